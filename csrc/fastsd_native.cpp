// The C functions: the best table that the processor runs, or the one that FASTSD_CPU_ISA names.
#include "dispatch.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

static bool runs(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
    if (!strcmp(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return !strcmp(name, "scalar");
}

static const FastsdImplementation* const all[] = {
#if defined(__x86_64__)
    &fastsd_avx512_bf16,
    &fastsd_avx512,
    &fastsd_avx2,
#endif
    &fastsd_scalar,
};

static const FastsdImplementation* choose() {
    const char* forced = getenv("FASTSD_CPU_ISA");
    for (const FastsdImplementation* one : all)
        if (runs(one->name) && (!forced || !*forced || !strcmp(forced, one->name))) return one;
    return nullptr;  // the forced one does not run here, or has no such name
}

static const FastsdImplementation* chosen() {
    static const FastsdImplementation* one = choose();
    return one;
}

extern "C" {

void fastsd_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 4096;
    uintptr_t first = ((uintptr_t)data + page - 1) / page * page;
    uintptr_t last = ((uintptr_t)data + bytes) / page * page;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

const char* fastsd_isa(void) { return chosen() ? chosen()->name : ""; }

int64_t fastsd_scratch_bytes(int32_t keep, int64_t kept, int64_t borrowed, int64_t vocabulary) {
    return chosen()->scratch_bytes(keep, kept, borrowed, vocabulary);
}
int64_t fastsd_panel(void) { return chosen()->panel; }
int64_t fastsd_borrowed_rows(int32_t keep, int64_t row_bytes) {
    return chosen()->borrowed_rows(keep, row_bytes);
}
int fastsd_statistics(const FastsdProblem* p) { return chosen()->statistics(*p); }
int fastsd_divergence_sums(const FastsdProblem* p, const FastsdGradient* g, double* sums) {
    return chosen()->divergence_sums(*p, *g, sums);
}
int fastsd_top(const FastsdProblem* p, int64_t k, int64_t* index, float* logits, double* rest) {
    return chosen()->top(*p, k, index, logits, rest);
}
int fastsd_gradient(const FastsdProblem* p, const FastsdGradient* g) {
    return chosen()->gradient(*p, *g);
}
int64_t fastsd_packed_bytes(int32_t dtype, int64_t n, int64_t k) {
    return chosen()->packed_bytes(dtype, n, k);
}
int fastsd_pack(int32_t dtype, const void* weight, int64_t row_stride, int64_t n, int64_t k,
                void* packed, int32_t threads) {
    return chosen()->pack(dtype, weight, row_stride, n, k, packed, threads);
}
int fastsd_linear(const FastsdLinear* p) { return chosen()->linear(*p); }
int64_t fastsd_decode_bytes(int32_t dtype, int64_t kv_heads, int64_t head_dim, int64_t positions) {
    return chosen()->decode_bytes(dtype, kv_heads, head_dim, positions);
}
int fastsd_decode_pack(const FastsdPrefix* p) { return chosen()->decode_pack(*p); }
int fastsd_decode(const FastsdDecode* p) { return chosen()->decode(*p); }
int fastsd_tree_forward(const FastsdTree* p) { return chosen()->tree_forward(*p); }
int fastsd_tree_backward(const FastsdTree* p) { return chosen()->tree_backward(*p); }
int fastsd_draw(const FastsdDraw* p) { return chosen()->draw(*p); }
}
