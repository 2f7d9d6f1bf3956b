// Vectors of the instruction set at hand, and the functions of one variable that the loss needs.
//
// Everything but four conversions is written once on GCC vector types: the same source compiles to
// AVX-512, AVX2 or SSE2, and LANES is all that differs. Each instruction set has its own namespace,
// so the linker can never put one's code in another's place.
//
// Accuracy, relative: exponential, expm1 and log1p 2e-7 (polynomials after Cephes, S. L. Moshier).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTSD_INLINE static inline __attribute__((always_inline))
#define FASTSD_INLINE_MEMBER inline __attribute__((always_inline))

namespace FASTSD_ISA {

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

FASTSD_INLINE vf splat(float x) { return x - vf{}; }
FASTSD_INLINE vi splat_bits(int32_t x) { return x - vi{}; }
FASTSD_INLINE vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
FASTSD_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
// Not a number in b comes out; in a it does not: where a value is held in a range, it stands last.
FASTSD_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
FASTSD_INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }
FASTSD_INLINE vf held(vf x, float low, float high) {
    return minimum(splat(high), maximum(splat(low), x));
}

FASTSD_INLINE double sum(vf v) {
    double total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}
FASTSD_INLINE float largest(vf v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}
// Is any lane of a above the same lane of b?
FASTSD_INLINE bool any_above(vf a, vf b) {
#if LANES == 16
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif LANES == 8
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
    vi above = a > b;
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= above[i];
    return found != 0;
#endif
}

// x = n ln 2 + r with |r| <= ln(2)/2: 2^n as bits to add to an exponent, and e^r - 1.
struct Split {
    vi exponent;
    vf rest;
};
FASTSD_INLINE Split split_exponential(vf x) {
    const vf round = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer
    x = held(x, -87.3f, 88.3f);
    vf shifted = x * 1.44269504f + round;
    vf n = shifted - round;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {((vi)shifted - (vi)round) << 23, p * (r * r) + r};
}
// e^x, with x held within [-87.3, 88.3]; exactly 1 at 0.
FASTSD_INLINE vf exponential(vf x) {
    Split s = split_exponential(x);
    return (vf)((vi)(s.rest + 1.f) + s.exponent);
}
FASTSD_INLINE vf expm1(vf x) {
    Split s = split_exponential(x);
    vf power = (vf)((vi)splat(1.f) + s.exponent);
    return power * s.rest + (power - 1.f);
}
// 1 / x, good enough for a correction: 2^-14 relative where the processor has an estimate.
FASTSD_INLINE vf rough_inverse(vf x) {
#if LANES == 16
    return (vf)_mm512_rcp14_ps((__m512)x);
#else
    return 1.f / x;
#endif
}
// log(1 + x), x > -1; exactly 0 at 0.
FASTSD_INLINE vf log1p(vf x) {
    vf u = x + 1.f;
    vf lost = (x - (u - 1.f)) * rough_inverse(u);
    vi bits = (vi)u - 0x3f3504f3;  // sqrt(1/2): the mantissa lands in [sqrt(1/2), sqrt(2))
    vi e = bits >> 23;
    vf m = (vf)((vi)u - (e << 23)) - 1.f;
    vf n = __builtin_convertvector(e, vf);
    vf p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    vf square = m * m;
    vf y = p * m * square - n * 2.12194440e-4f - square * 0.5f;
    return (m + y) + n * 0.693359375f + lost;
}
FASTSD_INLINE vf hyperbolic_tangent(vf x) {
    vf grown = expm1(held(x, -10, 10) * 2.f);
    return grown / (grown + 2.f);
}

// LANES 16-bit numbers, each in the low half of its lane.
FASTSD_INLINE vi halves(const uint16_t* p) {
#if LANES == 16
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif LANES == 8
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
FASTSD_INLINE float widened(float x) { return x; }
FASTSD_INLINE float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
FASTSD_INLINE uint16_t bf16_of(float x) {  // to nearest even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FASTSD_INLINE void narrow(float* out, float x) { *out = x; }
FASTSD_INLINE void narrow(uint16_t* out, float x) { *out = bf16_of(x); }
FASTSD_INLINE void narrow(float* out, vf x) { store(out, x); }
FASTSD_INLINE void narrow(uint16_t* out, vf x) {
#if BF16_DOT
    __m256bh packed = _mm512_cvtneps_pbh((__m512)x);
    memcpy(out, &packed, sizeof packed);
#else
    for (int i = 0; i < LANES; i++) out[i] = bf16_of(x[i]);
#endif
}

}  // namespace FASTSD_ISA
