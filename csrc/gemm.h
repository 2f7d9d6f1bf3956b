// The one matrix product under everything: C[m, n] (+)= sum_k A[k, m] B[k, n] on packed operands.
//
// Register tile: MR rows x NR = 2 vectors of columns, fp32 accumulators that never leave the
// registers. With AVX-512 that is 14 x 32: 28 accumulators + 2 vectors of B + the broadcast of A.
// A step reads 2 vectors of B (128 B) and MR words of A (56 B) for 28 multiply-adds:
//     bf16   a word is a pair of neighbours along k; vdpbf16ps: 2 * 2 * 14 * 32 = 1,792 FLOP a step
//     fp32   a word is one number; 2 * 14 * 32 = 896 FLOP a step
// so one or two multiply-adds a cycle take 7 to 14 B a cycle from L1 and L2, within what they give.
// A panel of B (NR columns) is 64 B x K in bf16: 36 KB at K = 576, 128 KB at K = 2048, 512 KB at
// K = 8192, half of a 1 MB L2. Rows are cut into equal blocks of at most MR, so none is padding.
//
// A row's sum runs over k in one order whatever block it is in: results do not depend on batching.
#pragma once
#include "simd.h"

namespace FASTSD_ISA {

constexpr int NR = 2 * LANES;
constexpr int MR = LANES == 16 ? 14 : LANES == 8 ? 6 : 4;
FASTSD_INLINE int64_t panels(int64_t columns) { return (columns + NR - 1) / NR; }
constexpr int PAD = LANES;  // words that packing may write beyond its last block

// What a packed word holds: bf16 pairs where the processor multiplies them, else one fp32.
typedef uint32_t Pair;
template <class Word>
constexpr int DEPTH = 1;  // numbers of k in a word
template <>
constexpr int DEPTH<Pair> = 2;
template <class Word>
inline int64_t words(int64_t k) {
    return (k + DEPTH<Word> - 1) / DEPTH<Word>;
}

// Equal blocks of at most MR rows: block b covers [start(b), start(b + 1)).
struct Blocks {
    int64_t rows, count;
    explicit Blocks(int64_t n) : rows(n), count((n + MR - 1) / MR) {}
    int64_t start(int64_t b) const { return b * rows / count; }
    int size(int64_t b) const { return (int)(start(b + 1) - start(b)); }
};

FASTSD_INLINE void multiply_add(vf& c, float a, vf b) { c += a * b; }
#if BF16_DOT
FASTSD_INLINE void multiply_add(vf& c, Pair a, vf b) {
    c = (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)(__m512i)b);
}
#endif

// LANES words of B. Where they are fp32, B may hold them as bf16: half the bytes to read.
FASTSD_INLINE vf lanes_of(const float* b) { return load(b); }
FASTSD_INLINE vf lanes_of(const Pair* b) { return load((const float*)b); }
FASTSD_INLINE vf lanes_of(const uint16_t* b) { return (vf)(halves(b) << 16); }

// What a product asks of memory meanwhile: nothing; `step` bytes for each word of k; or so many, from
// `near` up to word number `turn`, then from `far`. Without it the times to read and to multiply
// add up.
struct Nothing {
    void operator()(int64_t) const {}
};
struct Along {
    const char* data;
    int64_t step;
    FASTSD_INLINE_MEMBER void operator()(int64_t k) const {
        __builtin_prefetch(data + k * step);
        __builtin_prefetch(data + k * step + 64);
    }
};
struct Ahead {
    const char *near, *far;
    int64_t turn, step;
    FASTSD_INLINE_MEMBER void operator()(int64_t k) const { Along{k < turn ? near : far, step}(k); }
};
constexpr int64_t DISTANCE = 8192;  // bytes: enough to cover memory, and it stays in L1

// DISTANCE ahead of B: within the `left` words of k from here on, then in what is read next.
template <class Stored>
static Ahead ahead_of(const Stored* here, int64_t left, const Stored* next) {
    int64_t step = NR * (int64_t)sizeof(Stored), turn = left - DISTANCE / step;
    if (turn < 0) turn = 0;
    return {(const char*)here + DISTANCE, (const char*)next - turn * step, turn, step};
}

// One register tile: a[depth][M], b[depth][NR] -> c[M][NR] with row stride c_stride. What is in c
// is added at the end, not at the start: sums over groups of columns stay short, and more exact.
template <int M, class Word, class Stored, class Meanwhile>
static void tile(const Word* a, const Stored* b, int64_t depth, float* c, int64_t c_stride,
                 bool add, const Meanwhile& meanwhile, int64_t done) {
    vf acc[M][2] = {};
    for (int64_t k = 0; k < depth; k++) {
        meanwhile(done + k);
        vf b0 = lanes_of(b + k * NR), b1 = lanes_of(b + k * NR + LANES);
#pragma GCC unroll 14
        for (int i = 0; i < M; i++) {
            multiply_add(acc[i][0], a[k * M + i], b0);
            multiply_add(acc[i][1], a[k * M + i], b1);
        }
    }
    for (int i = 0; i < M; i++)
        for (int h = 0; h < 2; h++) {
            float* at = c + i * c_stride + h * LANES;
            store(at, add ? load(at) + acc[i][h] : acc[i][h]);
        }
}

// Words of k summed in registers before they go to c.
template <class Word>
constexpr int64_t RUN = 128;
template <>
constexpr int64_t RUN<Pair> = 1024;

// m <= MR rows over the whole depth.
template <class Word, int M = MR, class Stored, class Meanwhile = Nothing>
static void product(int m, const Word* a, const Stored* b, int64_t depth, float* c,
                    int64_t c_stride, bool add, const Meanwhile& meanwhile = {}) {
    if constexpr (M > 1)
        if (m < M) return product<Word, M - 1>(m, a, b, depth, c, c_stride, add, meanwhile);
    int64_t k = 0;
    do {
        int64_t run = depth - k < RUN<Word> ? depth - k : RUN<Word>;
        tile<M>(a + k * M, b + k * NR, run, c, c_stride, add || k > 0, meanwhile, k);
        k += run;
    } while (k < depth);
}

}  // namespace FASTSD_ISA
