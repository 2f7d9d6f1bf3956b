// Between the sweeps, for divergences that need both normalisers first (JSD, entry_clip): per row
// sum of the summands, sum of their slopes F (forward KL: less its -1), how many the clip holds.
#pragma once
#include <atomic>

#include "gradient.h"
#include "projection.h"
#include "statistics.h"

namespace FASTSD_ISA {

struct Totals {
    vf value, slope, held;
};

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
    }
}

// Segments of columns to threads, as in sweep one; partial sums merged in order.
template <class In, class Word, int KEEP, int DIVERGENCE, bool CLIP>
struct DivergenceSums {
    const FastsdProblem& p;
    const FastsdGradient& g;
    Projection<In, Word> project;
    bool again;  // are some rows' logits computed again?
    int64_t all, segments;
    Buffer<double> partials;  // [segment][row][3]
    Buffer<Row> rows;

    DivergenceSums(const FastsdProblem& problem, const FastsdGradient& gradient)
        : p(problem),
          g(gradient),
          project(problem),
          again(problem.kept_rows < problem.rows),
          all(panels(problem.vocabulary)),
          segments((all + SEGMENT - 1) / SEGMENT),
          partials(segments * problem.rows * 3),
          rows(problem.rows) {}

    struct Work {
        typename Projection<In, Word>::Panel panel;
        Buffer<Totals> totals;
        Buffer<Scale> scales;
        explicit Work(const DivergenceSums& of)
            : panel(of.project), totals(of.p.rows), scales(of.p.rows) {}
        bool ok() const { return panel.ok() && totals.ok() && scales.ok(); }
    };

    int run(double* sums) {
        if (!project.ok() || !partials.ok() || !rows.ok()) return 1;
        if (again) project.pack();
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
        memset(sums, 0, p.rows * 3 * sizeof(double));
        for (int64_t i = 0; i < segments * p.rows * 3; i++)
            sums[i % (p.rows * 3)] += partials.data[i];
        return 0;
    }

    void sum_segment(Work& work, int64_t segment) const {
        Totals* totals = work.totals.data;
        memset(totals, 0, p.rows * sizeof(Totals));
        int64_t last = (segment + 1) * SEGMENT < all ? (segment + 1) * SEGMENT : all;
        for (int64_t index = segment * SEGMENT; index < last; index++) {
            scales_of(p, index, rows.data, work.scales.data);
            for (int64_t row = 0; row < p.kept_rows; row++)
                add_slot<KEEP, DIVERGENCE, CLIP>(g, rows.data[row], kept_slot(p, index, row).data,
                                                 work.scales.data[row], totals[row]);
            if (again) sum_again(work, index);
        }
        for (int64_t row = 0; row < p.rows; row++) {
            double* out = partials + (segment * p.rows + row) * 3;
            out[0] = sum(totals[row].value), out[1] = sum(totals[row].slope);
            out[2] = sum(totals[row].held);
        }
    }

    void sum_again(Work& work, int64_t index) const {
        alignas(64) float z[MR * 2 * NR];
        project.fetch(work.panel, index);
        for (int64_t block = 0; block < project.blocks.count; block++) {
            int64_t first = project.blocks.start(block), n = project.blocks.size(block);
            if (first + n <= p.kept_rows) continue;
            project.tile(work.panel, block, z);
            project.mask(work.panel, n, z);
            for (int64_t row = first < p.kept_rows ? p.kept_rows : first; row < first + n; row++)
                add_slot<FASTSD_LOGITS, DIVERGENCE, CLIP>(g, rows.data[row],
                                                          (const char*)(z + (row - first) * 2 * NR),
                                                          {}, work.totals.data[row]);
        }
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
