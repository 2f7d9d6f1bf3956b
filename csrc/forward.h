// The driver of sweep one: segments of columns for threads to take, panels within, blocks of rows.
#pragma once
#include <atomic>

#include "projection.h"
#include "statistics.h"

namespace FASTSD_ISA {

template <class In, class Word, int KEEP, bool TEACHER>
struct Forward {
    const FastsdProblem& p;
    Projection<In, Word> project;
    int64_t all, segments;
    Buffer<Partial> partials;  // [segment][row]

    explicit Forward(const FastsdProblem& problem)
        : p(problem),
          project(problem),
          all(panels(problem.vocabulary)),
          segments((all + SEGMENT - 1) / SEGMENT),
          partials(segments * problem.rows) {}

    struct Work {  // one thread's
        typename Projection<In, Word>::Panel panel;
        Buffer<Sums> sums;
        Buffer<Reference> references;
        explicit Work(const Forward& of)
            : panel(of.project), sums(of.p.rows), references(of.p.rows) {}
        bool ok() const { return panel.ok() && sums.ok() && references.ok(); }
    };

    int run() {
        if (!project.ok() || !partials.ok()) return 1;
        project.pack();
        for (int64_t row = 0; row < p.rows; row++) project.pick(row);
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
        parallel(p.threads, [&](int) {
            Work work(*this);
            if (!work.ok()) return (void)(failed = true);
            for (int64_t segment; (segment = next++) < segments;) fold_segment(work, segment);
        });
        if (failed) return 1;
        for (int64_t row = 0; row < p.rows; row++)
            merge(partials + row, p.rows, segments, TEACHER, p.statistics + row * FASTSD_COLUMNS);
        return 0;
    }

    void fold_segment(Work& work, int64_t segment) const {
        alignas(64) float z[MR * 2 * NR];
        memset(work.sums.data, 0, p.rows * sizeof(Sums));
        for (int64_t row = 0; row < p.rows; row++) work.references.data[row] = NO_REFERENCE;
        int64_t last = (segment + 1) * SEGMENT < all ? (segment + 1) * SEGMENT : all;
        for (int64_t index = segment * SEGMENT; index < last; index++) {
            project.fetch(work.panel, index);
            for (int64_t block = 0; block < project.blocks.count; block++) {
                project.tile(work.panel, block, z);
                for (int i = 0; i < project.blocks.size(block); i++)
                    fold_row(work, index, project.blocks.start(block) + i, z + i * 2 * NR);
            }
        }
        for (int64_t row = 0; row < p.rows; row++)
            partials.data[segment * p.rows + row] =
                partial(work.sums.data[row], work.references.data[row]);
    }

    FASTSD_INLINE_MEMBER void fold_row(Work& work, int64_t index, int64_t row,
                                       const float* z) const {
        float shift = (float)p.statistics[row * FASTSD_COLUMNS + FASTSD_SHIFT];
        Sums& q = work.sums.data[row];
        Reference& m = work.references.data[row];
        const vi* valid = work.panel.valid;
        if (KEEP != FASTSD_NOTHING && row < p.kept_rows)
            fold<KEEP, TEACHER>(q, m, shift, z, z + NR, valid, slot_of<KEEP>(p, index, row));
        else fold<FASTSD_NOTHING, TEACHER>(q, m, shift, z, z + NR, valid, {});
    }
};

}  // namespace FASTSD_ISA
