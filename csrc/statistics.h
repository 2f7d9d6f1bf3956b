// Sweep one: logits of both streams tile by tile, folded into row statistics while in L1.
//
// Per row and stream, with a reference m, a logit of the row at most 1 below the largest so far:
//     S = sum e^(z - m)    U = sum e^(z - m) (z_s - z_t - shift)    E = sum e^(z_s - m) (z_s - m)
// kept lane by lane in fp32 over a segment of columns, then merged over segments in fp64 in order:
// the result does not depend on threads, on the batch, or on the row's place in it. The shift,
// z_s[y] - z_t[y], takes the part that both streams share off the gap, so KL does not cancel.
// Moving m is rare (it takes a logit 1 above it), so the fold hardly branches.
#pragma once
#include <cmath>

#include "scratch.h"

namespace FASTSD_ISA {

constexpr float SLACK = 1;
constexpr int64_t SEGMENT = 64;  // panels whose sums stay in fp32

struct Sums {
    vf s_s, u_s, e_s, s_t, u_t;
};
struct Partial {  // of one row and segment
    float m_s, m_t;
    double s_s, u_s, e_s, s_t, u_t;
};

static __attribute__((noinline)) void move_student(Sums& q, float& m, vf z) {
    float before = m;
    m = largest(z);
    vf factor = exponential(splat(before - m));
    q.e_s = factor * (q.e_s + (before - m) * q.s_s);
    q.s_s *= factor, q.u_s *= factor;
}
static __attribute__((noinline)) void move_teacher(Sums& q, float& m, vf z) {
    vf factor = exponential(splat(m - largest(z)));
    m = largest(z);
    q.s_t *= factor, q.u_t *= factor;
}

// The gap of the entry that became a stream's reference: what is kept is kept relative to it,
// so that the gaps of the likely entries are small and rounding them to fp16 costs little.
static __attribute__((noinline)) float gap_at(float m, const vf z[2], const vf gap[2]) {
    for (int i = 0; i < NR; i++)
        if (z[i / LANES][i % LANES] == m) return gap[i / LANES][i % LANES];
    return 0;  // not a number
}

// One row of one panel. `valid`: lanes that are vocabulary (all ones unless the panel is the last).
template <int KEEP, bool TEACHER>
FASTSD_INLINE void fold(Sums& q, Reference& m, float shift, const float* z_s, const float* z_t,
                        const vi valid[2], const Slot& slot) {
    const vf none = splat(-1e30f);
    vf s[2], t[2], e_s[2], e_t[2], gap[2];
    for (int h = 0; h < 2; h++) s[h] = valid[h] ? load(z_s + h * LANES) : none;
    vf top = maximum(s[0], s[1]);
    bool moved_s = any_above(top, splat(m.s + SLACK)), moved_t = false;
    if (__builtin_expect(moved_s, 0)) move_student(q, m.s, top);
    for (int h = 0; h < 2; h++) {
        vf above = s[h] - m.s;
        e_s[h] = valid[h] ? exponential(above) : vf{};
        q.s_s += e_s[h];
        q.e_s += e_s[h] * above;
    }
    if constexpr (TEACHER) {
        for (int h = 0; h < 2; h++) t[h] = valid[h] ? load(z_t + h * LANES) : none;
        top = maximum(t[0], t[1]);
        moved_t = any_above(top, splat(m.t + SLACK));
        if (__builtin_expect(moved_t, 0)) move_teacher(q, m.t, top);
        for (int h = 0; h < 2; h++) {
            gap[h] = (s[h] - t[h]) - shift;
            e_t[h] = valid[h] ? exponential(t[h] - m.t) : vf{};
            q.u_s += e_s[h] * gap[h];
            q.s_t += e_t[h];
            q.u_t += e_t[h] * gap[h];
        }
    }
    if constexpr (KEEP == FASTSD_STUDENT_GAP || KEEP == FASTSD_LARGER_GAP) {
        if (__builtin_expect(moved_s, 0)) m.gap_s = gap_at(m.s, s, gap);
        if (__builtin_expect(moved_t, 0)) m.gap_t = gap_at(m.t, t, gap);
    }
    (void)moved_t;
    keep<KEEP, TEACHER>(slot, m, shift, s, t, e_s, e_t, gap);
}

// A row's logits in one panel, computed again -> the slot that sweep one would have kept. m runs
// along a segment as it did there, so the bits are the same.
template <int KEEP, bool TEACHER>
static void fold_again(Reference& m, float shift, const float* z, const vi valid[2], char* data) {
    Sums q{};
    Reference unused;
    fold<KEEP, TEACHER>(q, m, shift, z, z + NR, valid, {data, &unused});
}

typedef void (*FoldAgain)(Reference&, float, const float*, const vi[2], char*);

static FoldAgain choose_fold(const FastsdProblem& p) {
#if BF16_DOT
    if (p.keep == FASTSD_STUDENT_GAP) return fold_again<FASTSD_STUDENT_GAP, true>;
    if (p.keep == FASTSD_LARGER_GAP) return fold_again<FASTSD_LARGER_GAP, true>;
    if (p.keep == FASTSD_STUDENT)
        return p.teacher ? fold_again<FASTSD_STUDENT, true> : fold_again<FASTSD_STUDENT, false>;
#endif
    return p.teacher ? fold_again<FASTSD_LOGITS, true> : fold_again<FASTSD_LOGITS, false>;
}

FASTSD_INLINE Partial partial(const Sums& q, Reference m) {
    return {m.s, m.t, sum(q.s_s), sum(q.u_s), sum(q.e_s), sum(q.s_t), sum(q.u_t)};
}

// One row's segments, in order -> its statistics.
static void merge(const Partial* part, int64_t stride, int64_t segments, bool teacher,
                  double* out) {
    double m_s = part[0].m_s, m_t = part[0].m_t, s_s = 0, u_s = 0, e_s = 0, s_t = 0, u_t = 0;
    for (int64_t i = 1; i < segments; i++) {
        m_s = fmax(m_s, part[i * stride].m_s);
        m_t = fmax(m_t, part[i * stride].m_t);
    }
    for (int64_t i = 0; i < segments; i++) {
        const Partial& p = part[i * stride];
        double r_s = exp(p.m_s - m_s), r_t = exp(p.m_t - m_t);
        s_s += r_s * p.s_s, u_s += r_s * p.u_s, e_s += r_s * (p.e_s + (p.m_s - m_s) * p.s_s);
        s_t += r_t * p.s_t, u_t += r_t * p.u_t;
    }
    double shift = out[FASTSD_SHIFT], lse_s = m_s + log(s_s);
    out[FASTSD_LSE_S] = lse_s;
    out[FASTSD_ENTROPY] = log(s_s) - e_s / s_s;
    out[FASTSD_LSE_T] = out[FASTSD_REVERSE] = out[FASTSD_FORWARD] = 0;
    if (!teacher) return;
    double lse_t = m_t + log(s_t), offset = lse_s - lse_t;
    out[FASTSD_LSE_T] = lse_t;
    out[FASTSD_REVERSE] = u_s / s_s + (shift - offset);
    out[FASTSD_FORWARD] = (offset - shift) - u_t / s_t;
}

}  // namespace FASTSD_ISA
