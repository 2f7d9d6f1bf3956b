// Whatever the compiler targets by default: any processor.
#pragma GCC visibility push(hidden)
#define FASTSD_ISA scalar
#define LANES 4
#define BF16_DOT 0
#include "implementation.h"

const FastsdImplementation fastsd_scalar = {
    "scalar",
    scalar::NR,
    scalar::scratch_bytes,
    scalar::borrowed_rows,
    scalar::statistics,
    scalar::divergence_sums,
    scalar::top,
    scalar::gradient,
    scalar::packed_bytes,
    scalar::pack,
    scalar::linear,
    scalar::decode_bytes,
    scalar::decode_pack,
    scalar::decode,
    scalar::tree_forward,
    scalar::tree_backward,
    scalar::draw,
};
