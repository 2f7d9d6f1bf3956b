// What sweep one keeps of each logit pair for sweep two, and how sweep two reads it back.
//
// Layout: panel after panel, in it row after row, in that one slot of NR columns; so both sweeps
// stream. bf16 inputs keep 4 B a pair in fp16: E = e^(z - m), its sign telling of which stream if
// it is the larger's, and the gap less that of a likely entry of the same stream, so that the gaps
// which matter are small. m and those gaps are kept once per row and panel (statistics.h). fp32
// inputs, and options that must see logits, keep 8 B: z_s, z_t.
//
// The first rows borrow the memory of d head: their slots of a panel lie where its NR rows of d
// head will be written, once all slots of the panel have been read. That is room for about D / 2
// rows for nothing.
//
// Every gradient is base * (a function of the gap), with base = p_s or, where p_t counts too, the
// larger of both: u = p_s / base, v = p_t / base. Rounding E then scales both sides alike, so close
// streams do not cancel, and equal streams give exactly zero.
#pragma once
#include "fastsd_native.h"
#include "pack.h"

namespace FASTSD_ISA {

struct Reference {
    float s, t;          // m of both streams
    float gap_s, gap_t;  // the gaps where they were found, taken off the gaps that are kept
};
constexpr Reference NO_REFERENCE = {-1e30f, -1e30f, 0, 0};
constexpr int64_t MOST_SLOT_BYTES = NR * 8;
struct Slot {
    char* data;
    Reference* reference;
};

template <int KEEP>
constexpr int SLOT_BYTES = NR * (KEEP == FASTSD_STUDENT   ? 2
                                 : KEEP == FASTSD_LOGITS  ? 8
                                 : KEEP == FASTSD_NOTHING ? 0
                                                          : 4);

FASTSD_INLINE int64_t slot_bytes(int32_t keep) {
    return keep == FASTSD_LOGITS    ? SLOT_BYTES<FASTSD_LOGITS>
           : keep == FASTSD_STUDENT ? SLOT_BYTES<FASTSD_STUDENT>
           : keep == FASTSD_NOTHING ? 0
                                    : SLOT_BYTES<FASTSD_STUDENT_GAP>;
}

// Slots of the last, partial panel of borrowed rows; other slots; references.
FASTSD_INLINE Slot slot_at(const FastsdProblem& p, int64_t panel, int64_t row, int64_t bytes) {
    int64_t own = p.kept_rows - p.borrowed_rows;
    char* others = (char*)p.scratch + p.borrowed_rows * bytes;
    Reference* references = (Reference*)(others + panels(p.vocabulary) * own * bytes);
    char* data = others + (panel * own + row - p.borrowed_rows) * bytes;
    if (row < p.borrowed_rows)
        data = panel < p.vocabulary / NR
                   ? (char*)p.borrowed + panel * p.borrowed_stride + row * bytes
                   : (char*)p.scratch + row * bytes;
    return {data, references + panel * p.kept_rows + row};
}
template <int KEEP>
FASTSD_INLINE Slot slot_of(const FastsdProblem& p, int64_t panel, int64_t row) {
    return slot_at(p, panel, row, SLOT_BYTES<KEEP>);
}
// The same of whatever form the problem keeps (no references with kept logits).
FASTSD_INLINE Slot kept_slot(const FastsdProblem& p, int64_t panel, int64_t row) {
    return slot_at(p, panel, row, slot_bytes(p.keep));
}

#if BF16_DOT
FASTSD_INLINE __m256i half_of(vf x) {
    return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
FASTSD_INLINE vf of_half(const void* p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
#endif

template <int KEEP, bool TEACHER>
FASTSD_INLINE void keep(const Slot& slot, Reference m, float shift, const vf s[2], const vf t[2],
                        const vf e_s[2], const vf e_t[2], const vf gap[2]) {
    if constexpr (KEEP == FASTSD_LOGITS) {
        float* out = (float*)slot.data;
        for (int h = 0; h < 2; h++) {
            store(out + h * LANES, s[h]);
            if (TEACHER) store(out + NR + h * LANES, t[h]);
        }
    }
#if BF16_DOT
    if constexpr (KEEP == FASTSD_STUDENT || KEEP == FASTSD_STUDENT_GAP ||
                  KEEP == FASTSD_LARGER_GAP) {
        uint16_t* out = (uint16_t*)slot.data;
        *slot.reference = m;
        for (int h = 0; h < 2; h++) {
            vf larger = e_s[h], near = splat(m.gap_s);
            __m256i half;
            if constexpr (KEEP == FASTSD_LARGER_GAP) {
                vi student = gap[h] >= (m.s - m.t) - shift;
                larger = student ? e_s[h] : -e_t[h];
                near = student ? near : splat(m.gap_t);
            }
            if constexpr (KEEP != FASTSD_STUDENT) {
                half = half_of(held(gap[h] - near, -65504, 65504));  // fp16 has no more
                memcpy(out + NR + h * LANES, &half, sizeof half);
            }
            half = half_of(larger);
            memcpy(out + h * LANES, &half, sizeof half);
        }
    }
#endif
    (void)slot, (void)m, (void)shift, (void)s, (void)t, (void)e_s, (void)e_t, (void)gap;
}

// A row's normalisers as sweep two uses them; a double is a sum of two floats.
struct Row {
    float lse_s, lse_s_low, lse_t, lse_t_low;
    float offset, offset_low;  // LSE_s - LSE_t
    float shift, rest;         // rest = shift - offset: what a stored gap lacks
};
FASTSD_INLINE Row row_of(const double* statistics, bool teacher) {
    double s = statistics[FASTSD_LSE_S], t = statistics[FASTSD_LSE_T], o = teacher ? s - t : 0;
    double shift = statistics[FASTSD_SHIFT];
    Row r{(float)s, 0, (float)t, 0, (float)o, 0, (float)shift, (float)((float)shift - o)};
    r.lse_s_low = (float)(s - r.lse_s), r.lse_t_low = (float)(t - r.lse_t);
    r.offset_low = (float)(o - r.offset);
    return r;
}

struct Entry {
    vf base, u, v;  // base * u = p_s, base * v = p_t; v only where the larger stream is asked for
    vf gap, l_s;    // log p_s - log p_t; log p_s (from kept logits only)
    vi student;     // is p_s the base? and the other's share of it less one, without cancellation
    vf ratio_less_1;
};

FASTSD_INLINE void set_ratio(Entry& e, vi student) {
    e.student = student;
    e.ratio_less_1 = expm1(student ? -e.gap : e.gap);
    vf ratio = e.ratio_less_1 + 1.f;
    e.u = student ? splat(1.f) : ratio;
    e.v = student ? ratio : splat(1.f);
}

// Kept logits, or a tile computed again: z[2][NR]. LARGER: p_t is wanted.
template <bool TEACHER, bool LARGER>
FASTSD_INLINE Entry from_logits(const float* z, const Row& r) {
    Entry e{};
    vf z_s = load(z);
    e.l_s = (z_s - r.lse_s) - r.lse_s_low;
    e.u = splat(1.f);
    vf log_base = e.l_s;
    if constexpr (TEACHER) {
        vf z_t = load(z + NR);
        e.gap = ((z_s - z_t) - r.offset) - r.offset_low;
        if constexpr (LARGER) {
            set_ratio(e, e.gap >= 0.f);
            log_base = e.student ? e.l_s : (z_t - r.lse_t) - r.lse_t_low;
        }
    }
    e.base = exponential(log_base);
    return e;
}

// e^(m - LSE) of one row and panel, both streams, and m itself.
struct Scale {
    float s, t;
    Reference m;
};

#if BF16_DOT
// E of the stream that was the larger relative to the references -> base, u, v. Relative to the
// normalisers it can be the smaller. Past e^40 its ratio would overflow where base underflows, so
// there the other stream is the base; that is rare.
FASTSD_INLINE void set_larger(Entry& e, vf stored, vi student, const Scale& scale, const Row& r) {
    vf excess = student ? -e.gap : e.gap, base = student ? splat(scale.s) : splat(scale.t);
    if (__builtin_expect(any_above(excess, splat(40.f)), 0)) {
        vi wrong = excess > 40.f;
        vf log_base = student ? splat(scale.m.s - r.lse_s) : splat(scale.m.t - r.lse_t);
        base = wrong ? exponential(log_base + excess) : base;
        student ^= wrong;
    }
    e.base = stored * base;
    set_ratio(e, student);
}

// The compact forms.
template <int KEEP>
FASTSD_INLINE Entry from_compact(const char* data, int h, const Scale& scale, const Row& r) {
    Entry e{};
    const uint16_t* in = (const uint16_t*)data;
    vf stored = of_half(in + h * LANES);
    e.u = splat(1.f);
    if constexpr (KEEP != FASTSD_STUDENT) {
        e.gap = of_half(in + NR + h * LANES) + (scale.m.gap_s + r.rest);
        if constexpr (KEEP == FASTSD_LARGER_GAP) {
            vi student = (vi)stored >= 0;
            e.gap = student ? e.gap : of_half(in + NR + h * LANES) + (scale.m.gap_t + r.rest);
            set_larger(e, student ? stored : -stored, student, scale, r);
            return e;
        }
    }
    e.base = stored * scale.s;
    return e;
}
#endif

FASTSD_INLINE Scale scale_of(Reference m, const Row& r) {
    vf x{};
    x[0] = (m.s - r.lse_s) - r.lse_s_low, x[1] = (m.t - r.lse_t) - r.lse_t_low;
    x = exponential(x);
    return {x[0], x[1], m};
}

// The scales of all kept rows in one panel, a vector of rows at a time.
static void scales_of(const FastsdProblem& p, int64_t panel, const Row* rows, Scale* out) {
    if (p.keep == FASTSD_LOGITS) return;
    const Reference* m = kept_slot(p, panel, 0).reference;
    alignas(64) float s[LANES] = {}, t[LANES] = {};
    for (int64_t row = 0; row < p.kept_rows; row += LANES) {
        int64_t n = p.kept_rows - row < LANES ? p.kept_rows - row : LANES;
        for (int64_t i = 0; i < n; i++) {
            const Row& r = rows[row + i];
            s[i] = (m[row + i].s - r.lse_s) - r.lse_s_low;
            t[i] = (m[row + i].t - r.lse_t) - r.lse_t_low;
        }
        store(s, exponential(load(s)));
        store(t, exponential(load(t)));
        for (int64_t i = 0; i < n; i++) out[row + i] = {s[i], t[i], m[row + i]};
    }
}

}  // namespace FASTSD_ISA
