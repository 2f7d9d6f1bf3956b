// 512-bit vectors, bf16 widened to fp32 while packing.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#pragma GCC visibility push(hidden)
#define FASTSD_ISA avx512
#define LANES 16
#define BF16_DOT 0
#include "implementation.h"

const FastsdImplementation fastsd_avx512 = {
    "avx512",
    avx512::NR,
    avx512::scratch_bytes,
    avx512::borrowed_rows,
    avx512::statistics,
    avx512::divergence_sums,
    avx512::top,
    avx512::gradient,
    avx512::packed_bytes,
    avx512::pack,
    avx512::linear,
    avx512::decode_bytes,
    avx512::decode_pack,
    avx512::decode,
    avx512::tree_forward,
    avx512::tree_backward,
    avx512::draw,
};
#endif
