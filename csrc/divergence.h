// Between the sweeps, for divergences that need both normalisers first (JSD, entry_clip): per row
// sum of the summands, sum of their slopes F (forward KL: less its -1), how many the clip holds.
#pragma once
#include <atomic>

#include "again.h"
#include "gradient.h"

namespace FASTSD_ISA {

struct Totals {
    vf value, slope, held, mass_s, mass_t;
};
constexpr int TOTALS = 5;

template <int KEEP, int DIVERGENCE, bool CLIP>
FASTSD_INLINE void add_slot(const FastsdGradient& g, const Row& r, const char* data,
                            const Scale& scale, Totals& q) {
    (void)scale;
    for (int h = 0; h < 2; h++) {
        Entry e;
        if constexpr (KEEP == FASTSD_LOGITS)
            // As in form_row: both sweeps must hold the same entries at the clip.
            e = from_logits<true, NEEDS_LARGER<DIVERGENCE>>((const float*)data + h * LANES, r);
#if BF16_DOT
        else e = from_compact<KEEP>(data, h, scale, r);
#endif
        Terms t = terms<DIVERGENCE, true>(e, g.beta, CLIP ? g.entry_clip : 0.f);
        q.value += t.value;
        q.slope += e.base * t.total;
        if (CLIP) q.held += t.held ? splat(1.f) : vf{};
        if (KEEP != FASTSD_LOGITS) q.mass_s += e.base * e.u, q.mass_t += e.base * e.v;
    }
}

// Rounded probabilities do not sum to 1. On a confident row that would be all there is, so both
// parts of a JSD are divided by the mass they were summed with: sum F is the student's part.
FASTSD_INLINE void divide_by_mass(double* q) {
    double teacher = q[0] - q[1];
    q[1] /= q[3];
    q[0] = q[1] + teacher / q[4];
}

// Segments of columns to threads, as in sweep one; partial sums merged in order.
template <class In, class Word, int KEEP, int DIVERGENCE, bool CLIP>
struct DivergenceSums {
    const FastsdProblem& p;
    const FastsdGradient& g;
    Projection<In, Word> project;
    Again<In, Word> again;
    int64_t all, segments;
    Buffer<double> partials;  // [segment][row][TOTALS]
    Buffer<Row> rows;

    DivergenceSums(const FastsdProblem& problem, const FastsdGradient& gradient)
        : p(problem),
          g(gradient),
          project(problem),
          again(project),
          all(panels(problem.vocabulary)),
          segments((all + SEGMENT - 1) / SEGMENT),
          partials(segments * problem.rows * TOTALS),
          rows(problem.rows) {}

    struct Work {
        typename Again<In, Word>::Work again;
        Buffer<Totals> totals;
        Buffer<Scale> scales;
        explicit Work(const DivergenceSums& of)
            : again(of.project), totals(of.p.rows), scales(of.p.rows) {}
        bool ok() const { return again.ok() && totals.ok() && scales.ok(); }
    };

    int run(double* sums) {
        if (!project.ok() || !partials.ok() || !rows.ok()) return 1;
        if (again.needed) project.pack();
        for (int64_t row = 0; row < p.rows; row++)
            rows.data[row] = row_of(p.statistics + row * FASTSD_COLUMNS, true);
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
        parallel(p.threads, [&](int) {
            Work work(*this);
            if (!work.ok()) return (void)(failed = true);
            for (int64_t segment; (segment = next++) < segments;) sum_segment(work, segment);
        });
        if (failed) return 1;
        for (int64_t row = 0; row < p.rows; row++) merge(row, sums + 3 * row);
        return 0;
    }

    void sum_segment(Work& work, int64_t segment) const {
        Totals* totals = work.totals.data;
        memset(totals, 0, p.rows * sizeof(Totals));
        again.start_segment(work.again);
        int64_t last = (segment + 1) * SEGMENT < all ? (segment + 1) * SEGMENT : all;
        auto add = [&](int64_t row, const char* data, const Scale& scale) {
            add_slot<KEEP, DIVERGENCE, CLIP>(g, rows.data[row], data, scale, totals[row]);
        };
        for (int64_t index = segment * SEGMENT; index < last; index++) {
            scales_of(p, index, rows.data, work.scales.data);
            for (int64_t row = 0; row < p.kept_rows; row++)
                add(row, kept_slot(p, index, row).data, work.scales.data[row]);
            again.panel(work.again, index, rows.data, add);
        }
        for (int64_t row = 0; row < p.rows; row++) {
            double* out = partials + (segment * p.rows + row) * TOTALS;
            const Totals& q = totals[row];
            out[0] = sum(q.value), out[1] = sum(q.slope), out[2] = sum(q.held);
            out[3] = sum(q.mass_s), out[4] = sum(q.mass_t);
        }
    }

    void merge(int64_t row, double* out) const {
        double q[TOTALS] = {};
        for (int64_t segment = 0; segment < segments; segment++)
            for (int i = 0; i < TOTALS; i++)
                q[i] += partials.data[(segment * p.rows + row) * TOTALS + i];
        if (KEEP != FASTSD_LOGITS) divide_by_mass(q);
        out[0] = q[0], out[1] = q[1], out[2] = q[2];
    }
};

template <class In, class Word>
static int sum_divergence(const FastsdProblem& p, const FastsdGradient& g, double* sums) {
#if BF16_DOT
    if (p.keep == FASTSD_LARGER_GAP)
        return DivergenceSums<In, Word, FASTSD_LARGER_GAP, FASTSD_JSD, false>(p, g).run(sums);
#endif
    bool clip = g.entry_clip > 0;
    if (g.divergence == FASTSD_JSD)
        return clip ? DivergenceSums<In, Word, FASTSD_LOGITS, FASTSD_JSD, true>(p, g).run(sums)
                    : DivergenceSums<In, Word, FASTSD_LOGITS, FASTSD_JSD, false>(p, g).run(sums);
    return g.divergence == FASTSD_FORWARD_KL
               ? DivergenceSums<In, Word, FASTSD_LOGITS, FASTSD_FORWARD_KL, true>(p, g).run(sums)
               : DivergenceSums<In, Word, FASTSD_LOGITS, FASTSD_REVERSE_KL, true>(p, g).run(sums);
}

}  // namespace FASTSD_ISA
