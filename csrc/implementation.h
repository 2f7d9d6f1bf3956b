// One instruction set's functions, from its LANES and BF16_DOT; the types are chosen here.
#pragma once
#include "backward.h"
#include "decode.h"
#include "divergence.h"
#include "dispatch.h"
#include "draw.h"
#include "forward.h"
#include "linear.h"
#include "top.h"
#include "tree_backward.h"
#include "tree_forward.h"

namespace FASTSD_ISA {

#if BF16_DOT
typedef Pair Bf16Word, Bf16Stored;
#else
typedef float Bf16Word;       // widened while packing
typedef uint16_t Bf16Stored;  // but what stays in memory keeps its size
#endif

template <class In, class Word, int KEEP>
static int statistics_keeping(const FastsdProblem& p) {
    return p.teacher ? Forward<In, Word, KEEP, true>(p).run()
                     : Forward<In, Word, KEEP, false>(p).run();
}
template <class In, class Word>
static int statistics_of(const FastsdProblem& p) {
    switch (p.keep) {
        case FASTSD_NOTHING: return statistics_keeping<In, Word, FASTSD_NOTHING>(p);
        case FASTSD_LOGITS: return statistics_keeping<In, Word, FASTSD_LOGITS>(p);
#if BF16_DOT
        case FASTSD_STUDENT: return statistics_keeping<In, Word, FASTSD_STUDENT>(p);
        case FASTSD_STUDENT_GAP: return Forward<In, Word, FASTSD_STUDENT_GAP, true>(p).run();
        case FASTSD_LARGER_GAP: return Forward<In, Word, FASTSD_LARGER_GAP, true>(p).run();
#endif
    }
    return 2;
}
static int statistics(const FastsdProblem& p) {
    return p.dtype == FASTSD_BF16 ? statistics_of<uint16_t, Bf16Word>(p)
                                  : statistics_of<float, float>(p);
}

static int divergence_sums(const FastsdProblem& p, const FastsdGradient& g, double* sums) {
    return p.dtype == FASTSD_BF16 ? sum_divergence<uint16_t, Bf16Word>(p, g, sums)
                                  : sum_divergence<float, float>(p, g, sums);
}

static FormRow form_of(const FastsdProblem& p, const FastsdGradient& g) {
#if BF16_DOT
    const bool teacher = true;
    switch (p.keep) {
        case FASTSD_STUDENT: return form_row<FASTSD_STUDENT, FASTSD_NO_DIVERGENCE, false, teacher>;
        case FASTSD_STUDENT_GAP:
            return form_row<FASTSD_STUDENT_GAP, FASTSD_REVERSE_KL, false, teacher>;
        case FASTSD_LARGER_GAP:
            return g.divergence == FASTSD_JSD
                       ? form_row<FASTSD_LARGER_GAP, FASTSD_JSD, false, teacher>
                       : form_row<FASTSD_LARGER_GAP, FASTSD_FORWARD_KL, false, teacher>;
    }
#endif
    return choose_form<FASTSD_LOGITS>(p, g);
}
static int gradient(const FastsdProblem& p, const FastsdGradient& g) {
    FormRow form = form_of(p, g);
    return p.dtype == FASTSD_BF16 ? Backward<uint16_t, Bf16Word>(p, g, form).run()
                                  : Backward<float, float>(p, g, form).run();
}

static int64_t scratch_bytes(int32_t keep, int64_t kept, int64_t borrowed, int64_t vocabulary) {
    int64_t slots = borrowed + panels(vocabulary) * (kept - borrowed);
    bool references = keep != FASTSD_LOGITS && keep != FASTSD_NOTHING;
    int64_t others = references ? panels(vocabulary) * kept * (int64_t)sizeof(Reference) : 0;
    return slots * slot_bytes(keep) + others;
}
static int64_t borrowed_rows(int32_t keep, int64_t row_bytes) {
    return keep == FASTSD_NOTHING ? 0 : NR * row_bytes / slot_bytes(keep);
}

typedef Linear<uint16_t, Bf16Word, Bf16Stored> LinearBf16;
typedef Linear<float, float, float> LinearF32;

static int64_t packed_bytes(int32_t dtype, int64_t n, int64_t k) {
    return dtype == FASTSD_BF16 ? LinearBf16::packed_bytes(n, k) : LinearF32::packed_bytes(n, k);
}
static int pack(int32_t dtype, const void* weight, int64_t stride, int64_t n, int64_t k,
                void* packed, int32_t threads) {
    return dtype == FASTSD_BF16
               ? LinearBf16::pack((const uint16_t*)weight, stride, n, k, (Bf16Stored*)packed,
                                  threads)
               : LinearF32::pack((const float*)weight, stride, n, k, (float*)packed, threads);
}
static int linear(const FastsdLinear& p) {
    return p.dtype == FASTSD_BF16 ? LinearBf16(p).run() : LinearF32(p).run();
}

static int64_t decode_bytes(int32_t dtype, int64_t kv_heads, int64_t head_dim, int64_t positions) {
    return dtype == FASTSD_BF16 ? HeadLayout<Bf16Stored>(head_dim, positions).bytes(kv_heads)
                                : HeadLayout<float>(head_dim, positions).bytes(kv_heads);
}
static int decode_pack(const FastsdPrefix& p) {
    return p.dtype == FASTSD_BF16 ? pack_prefix<uint16_t, Bf16Stored>(p)
                                  : pack_prefix<float, float>(p);
}
static int decode(const FastsdDecode& p) {
    return p.dtype == FASTSD_BF16 ? Decode<uint16_t, Bf16Word, Bf16Stored>(p).run()
                                  : Decode<float, float, float>(p).run();
}

static int tree_forward(const FastsdTree& p) {
    return p.dtype == FASTSD_BF16 ? TreeForward<uint16_t, Bf16Word>(p).run()
                                  : TreeForward<float, float>(p).run();
}
static int tree_backward(const FastsdTree& p) {
    return p.dtype == FASTSD_BF16 ? TreeBackward<uint16_t, Bf16Word>(p).run()
                                  : TreeBackward<float, float>(p).run();
}

}  // namespace FASTSD_ISA
