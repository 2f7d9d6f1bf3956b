// bf16 products by vdpbf16ps: Zen 4 and 5, Cooper Lake, Sapphire Rapids and later.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#pragma GCC visibility push(hidden)
#define FASTSD_ISA avx512_bf16
#define LANES 16
#define BF16_DOT 1
#include "implementation.h"

const FastsdImplementation fastsd_avx512_bf16 = {
    "avx512_bf16",
    avx512_bf16::NR,
    avx512_bf16::scratch_bytes,
    avx512_bf16::borrowed_rows,
    avx512_bf16::statistics,
    avx512_bf16::divergence_sums,
    avx512_bf16::top,
    avx512_bf16::gradient,
    avx512_bf16::packed_bytes,
    avx512_bf16::pack,
    avx512_bf16::linear,
    avx512_bf16::decode_bytes,
    avx512_bf16::decode_pack,
    avx512_bf16::decode,
    avx512_bf16::tree_forward,
    avx512_bf16::tree_backward,
    avx512_bf16::draw,
};
#endif
