// Sweep two, the row part: the loss's gradient in one row's NR logits.
//
//     g_j = base u (everywhere + entropy l_s) + weight F_j + pull [j = y],       p_s = base u
//     forward KL(T||S)   F = -p_t                                            p_t = base v
//     reverse KL(S||T)   F = p_s gap
//     JSD                F = -(1 - beta) p_s r,   r = log m - log S,   m = (1 - beta) S + beta T
// F is the divergence's slope in log p_s; the caller puts -weight * sum F into `everywhere`, which
// closes the softmax. An entry held at entry_clip has F = 0 (reverse KL: -p_s, see below).
#pragma once
#include "scratch.h"

namespace FASTSD_ISA {

struct Terms {
    vf value, slope;  // the summand of D, and F / base
    vf total;  // what is summed over entries for sum F: F / base, for forward KL F / base + v
    vi held;
};

// Is p_t asked for, and so the larger stream as base?
template <int DIVERGENCE>
constexpr bool NEEDS_LARGER = DIVERGENCE == FASTSD_FORWARD_KL || DIVERGENCE == FASTSD_JSD;

// The part of the divergence: F / base, and for the sums the summand itself.
// Reverse KL: d(p_s gap) / d l_s = p_s (gap + 1); the ones sum to 1 and cancel in the softmax, so
// they are left out and a held entry has -1 instead of 0 + (-1).
template <int DIVERGENCE, bool VALUE>
FASTSD_INLINE Terms terms(const Entry& e, float beta, float clip) {
    Terms out{};
    if constexpr (DIVERGENCE == FASTSD_JSD) {
        // m / base = 1 + (the other stream's share in m) (ratio - 1); log(p_s / base) = 0 or gap
        vf share = e.student ? splat(beta) : splat(1.f - beta);
        vf r = log1p(share * e.ratio_less_1) - (e.student ? vf{} : e.gap);
        out.slope = e.u * r * (beta - 1.f);
        if (VALUE) out.value = e.base * (out.slope - e.v * (e.gap + r) * beta);
    } else if constexpr (DIVERGENCE == FASTSD_FORWARD_KL) {
        out.slope = -e.v;
        if (VALUE) out.value = e.base * e.v * -e.gap;
    } else if constexpr (DIVERGENCE == FASTSD_REVERSE_KL) {
        out.slope = e.u * e.gap;
        if (VALUE) out.value = e.base * out.slope;
    }
    if (VALUE && clip > 0) {
        out.held = out.value > clip;
        out.slope = out.held ? (DIVERGENCE == FASTSD_REVERSE_KL ? -e.u : vf{}) : out.slope;
        out.value = minimum(splat(clip), out.value);
    }
    // Forward KL without clip: F sums to exactly -1; so equal streams stay exactly zero.
    out.total = DIVERGENCE == FASTSD_FORWARD_KL ? out.slope + e.v : out.slope;
    return out;
}

// One row's coefficients, and its sparse corrections (top_k).
struct Coefficients {
    float everywhere, weight, entropy, pull, tail, rest;
    int64_t target;
    const int64_t *top, *top_end;  // indices not yet passed
    const float* top_value;
};

FASTSD_INLINE Coefficients coefficients(const FastsdProblem& p, const FastsdGradient& g,
                                        int64_t row) {
    Coefficients c{g.everywhere[row],
                   g.weight ? g.weight[row] : 0,
                   g.entropy ? g.entropy[row] : 0,
                   g.pull[row],
                   0,
                   0,
                   p.target[row],
                   nullptr,
                   nullptr,
                   nullptr};
    if (g.top_k) {
        c.tail = g.tail[row], c.rest = g.rest[row];
        c.top = g.top_index + row * g.top_k, c.top_end = c.top + g.top_k;
        c.top_value = g.top_value + row * g.top_k;
    }
    return c;
}

// Target and top-k entries, and the softcap's slope.
FASTSD_INLINE void correct(const FastsdGradient& g, const Coefficients& c, int64_t column,
                           const float* tail, const float* z_s, float* out) {
    if (c.target >= column && c.target < column + NR) out[c.target - column] += c.pull;
    if (g.top_k) {
        int64_t low = 0, high = c.top_end - c.top;
        while (low < high) {
            int64_t middle = (low + high) / 2;
            if (c.top[middle] < column) low = middle + 1;
            else high = middle;
        }
        for (; c.top + low < c.top_end && c.top[low] < column + NR; low++) {
            int64_t j = c.top[low] - column;
            out[j] += c.top_value[low] - tail[j];
        }
    }
    if (g.softcap_inverse != 0)
        for (int h = 0; h < 2; h++) {
            vf x = load(z_s + h * LANES) * g.softcap_inverse;
            store(out + h * LANES, load(out + h * LANES) * (1.f - x * x));
        }
}

// g of one row and panel. `data`: its slot.
template <int KEEP, int DIVERGENCE, bool CLIP, bool TEACHER>
static void form_row(const FastsdGradient& g, const Coefficients& c, const Row& row,
                     const char* data, const Scale& scale, int64_t column, float* out) {
    (void)scale;
    alignas(64) float tail[NR] = {};
    for (int h = 0; h < 2; h++) {
        Entry e;
        vf inner = splat(c.everywhere);
        if constexpr (KEEP == FASTSD_LOGITS) {
            e = from_logits<TEACHER, NEEDS_LARGER<DIVERGENCE>>((const float*)data + h * LANES, row);
            inner += e.l_s * c.entropy;
        } else {
#if BF16_DOT
            e = from_compact<KEEP>(data, h, scale, row);
#endif
        }
        Terms t = terms<DIVERGENCE, CLIP>(e, g.beta, g.entry_clip);
        vf x = e.base * (inner * e.u + t.slope * c.weight);
        if (KEEP == FASTSD_LOGITS && g.top_k) {
            vf rest = exponential(minimum(e.l_s - c.rest, vf{})) * c.tail;
            store(tail + h * LANES, rest);
            x += rest;
        }
        store(out + h * LANES, x);
    }
    correct(g, c, column, tail, (const float*)data, out);
}

typedef void (*FormRow)(const FastsdGradient&, const Coefficients&, const Row&, const char*,
                        const Scale&, int64_t, float*);

template <int KEEP>
static FormRow choose_form(const FastsdProblem& p, const FastsdGradient& g) {
    if (!p.teacher) return form_row<KEEP, FASTSD_NO_DIVERGENCE, false, false>;
    bool clip = g.entry_clip > 0;
    switch (g.divergence) {
        case FASTSD_FORWARD_KL:
            return clip ? form_row<KEEP, FASTSD_FORWARD_KL, true, true>
                        : form_row<KEEP, FASTSD_FORWARD_KL, false, true>;
        case FASTSD_REVERSE_KL:
            return clip ? form_row<KEEP, FASTSD_REVERSE_KL, true, true>
                        : form_row<KEEP, FASTSD_REVERSE_KL, false, true>;
        case FASTSD_JSD:
            return clip ? form_row<KEEP, FASTSD_JSD, true, true>
                        : form_row<KEEP, FASTSD_JSD, false, true>;
        default: return form_row<KEEP, FASTSD_NO_DIVERGENCE, false, true>;
    }
}

}  // namespace FASTSD_ISA
