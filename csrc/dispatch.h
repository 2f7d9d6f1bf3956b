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
};

extern const FastsdImplementation fastsd_avx512_bf16, fastsd_avx512, fastsd_avx2, fastsd_scalar;
