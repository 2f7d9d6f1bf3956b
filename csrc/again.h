// Rows that the scratch had no room for: their logits are computed once more, panel by panel, and
// folded into the very slots that sweep one would have kept, so that no bit depends on the room.
#pragma once
#include "projection.h"
#include "statistics.h"

namespace FASTSD_ISA {

template <class In, class Word>
struct Again {
    const Projection<In, Word>& project;
    bool needed;
    FoldAgain fold_one;

    explicit Again(const Projection<In, Word>& of)
        : project(of), needed(of.p.kept_rows < of.p.rows), fold_one(choose_fold(of.p)) {}

    struct Work {  // one thread's
        typename Projection<In, Word>::Panel panel;
        Buffer<Reference> references;  // of all rows, running along the segment
        explicit Work(const Projection<In, Word>& of) : panel(of), references(of.p.rows) {}
        bool ok() const { return panel.ok() && references.ok(); }
    };

    void start_segment(Work& work) const {
        for (int64_t row = 0; needed && row < project.p.rows; row++)
            work.references.data[row] = NO_REFERENCE;
    }

    // use(row, slot, scale) for each of these rows in this panel; panels of a segment in order.
    template <class Use>
    void panel(Work& work, int64_t index, const Row* rows, const Use& use) const {
        if (!needed) return;
        alignas(64) float z[MR * 2 * NR];
        alignas(64) char slot[MOST_SLOT_BYTES];
        const FastsdProblem& p = project.p;
        project.fetch(work.panel, index);
        for (int64_t block = 0; block < project.blocks.count; block++) {
            int64_t first = project.blocks.start(block), end = first + project.blocks.size(block);
            if (end <= p.kept_rows) continue;
            project.tile(work.panel, block, z);
            for (int64_t row = first < p.kept_rows ? p.kept_rows : first; row < end; row++) {
                Reference& m = work.references.data[row];
                float shift = (float)p.statistics[row * FASTSD_COLUMNS + FASTSD_SHIFT];
                fold_one(m, shift, z + (row - first) * 2 * NR, work.panel.valid, slot);
                use(row, slot, scale_of(m, rows[row]));
            }
        }
    }
};

}  // namespace FASTSD_ISA
