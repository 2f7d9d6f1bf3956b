// One table of functions per instruction set; fastsd_native.cpp chooses among them.
#pragma once
#include "fastsd_native.h"

struct FastsdImplementation {
    const char* name;
    int64_t panel;
    int64_t (*scratch_bytes)(int32_t, int64_t, int64_t, int64_t);
    int64_t (*borrowed_rows)(int32_t, int64_t);
    int (*statistics)(const FastsdProblem&);
    int (*divergence_sums)(const FastsdProblem&, const FastsdGradient&, double*);
    int (*top)(const FastsdProblem&, int64_t, int64_t*, float*, double*);
    int (*gradient)(const FastsdProblem&, const FastsdGradient&);
    int64_t (*packed_bytes)(int32_t, int64_t, int64_t);
    int (*pack)(int32_t, const void*, int64_t, int64_t, int64_t, void*, int32_t);
    int (*linear)(const FastsdLinear&);
    int64_t (*decode_bytes)(int32_t, int64_t, int64_t, int64_t);
    int (*decode_pack)(const FastsdPrefix&);
    int (*decode)(const FastsdDecode&);
    int (*tree_forward)(const FastsdTree&);
    int (*tree_backward)(const FastsdTree&);
    int (*draw)(const FastsdDraw&);
};

extern const FastsdImplementation fastsd_avx512_bf16, fastsd_avx512, fastsd_avx2, fastsd_scalar;
