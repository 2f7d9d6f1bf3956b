// 256-bit vectors with fused multiply-add: Haswell, Zen 1 and later.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#pragma GCC visibility push(hidden)
#define FASTSD_ISA avx2
#define LANES 8
#define BF16_DOT 0
#include "implementation.h"

const FastsdImplementation fastsd_avx2 = {
    "avx2",
    avx2::NR,
    avx2::scratch_bytes,
    avx2::borrowed_rows,
    avx2::statistics,
    avx2::divergence_sums,
    avx2::top,
    avx2::gradient,
    avx2::packed_bytes,
    avx2::pack,
    avx2::linear,
    avx2::decode_bytes,
    avx2::decode_pack,
    avx2::decode,
    avx2::tree_forward,
    avx2::tree_backward,
    avx2::draw,
};
#endif
