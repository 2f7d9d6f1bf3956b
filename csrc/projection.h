// Tiles of scaled logits: z = softcap(scale * (h W^T + b)) for a block of rows and a panel of
// columns, both streams, one packed panel of W for both where they share the head.
//
// A tile is [rows of the block][student NR, teacher NR]: the layout of kept logits (scratch.h).
#pragma once
#include "parallel.h"
#include "scratch.h"

namespace FASTSD_ISA {

template <class In, class Word>
struct Projection {
    const FastsdProblem& p;
    bool teacher, own_head;
    int64_t depth_s, depth_t;
    Blocks blocks;
    Buffer<Word> a_s, a_t;

    explicit Projection(const FastsdProblem& problem)
        : p(problem),
          teacher(problem.teacher != nullptr),
          own_head(problem.teacher_head != nullptr),
          depth_s(words<Word>(problem.width)),
          depth_t(teacher ? words<Word>(problem.teacher_width) : 0),
          blocks(problem.rows),
          a_s(problem.rows * depth_s + PAD),
          a_t(problem.rows * depth_t + PAD) {}
    bool ok() const { return a_s.ok() && a_t.ok(); }

    void pack() const {
        pack_rows_a((const In*)p.student, p.student_stride, blocks, p.width, a_s.data);
        if (teacher)
            pack_rows_a((const In*)p.teacher, p.teacher_stride, blocks, p.teacher_width, a_t.data);
    }

    // One thread's panel: NR columns of the head(s), packed.
    struct Panel {
        Buffer<Word> b_s, b_t;
        float bias[NR];
        vi valid[2];
        bool scaled;
        explicit Panel(const Projection& of)
            : b_s(of.depth_s * NR + PAD), b_t(of.own_head ? of.depth_t * NR + PAD : 0) {}
        bool ok() const { return b_s.ok() && b_t.ok(); }
    };

    void fetch(Panel& panel, int64_t index) const {
        int64_t first = index * NR, left = p.vocabulary - first;
        int n = left < NR ? (int)left : NR;
        pack_rows_b((const In*)p.head + first * p.head_stride, p.head_stride, n, p.width,
                    panel.b_s.data);
        if (own_head)
            pack_rows_b((const In*)p.teacher_head + first * p.teacher_head_stride,
                        p.teacher_head_stride, n, p.teacher_width, panel.b_t.data);
        for (int i = 0; i < NR; i++) {
            panel.bias[i] = p.bias && i < n ? p.bias[first + i] : 0.f;
            panel.valid[i / LANES][i % LANES] = i < n ? -1 : 0;
        }
        panel.scaled = p.bias || p.softcap != 0 || p.scale != 1;
    }

    void tile(const Panel& panel, int64_t block, float* z) const {
        int n = blocks.size(block);
        int64_t first = blocks.start(block);
        product<Word>(n, a_s + first * depth_s, panel.b_s.data, depth_s, z, 2 * NR, false);
        if (teacher)
            product<Word>(n, a_t + first * depth_t, (own_head ? panel.b_t : panel.b_s).data,
                          depth_t, z + NR, 2 * NR, false);
        if (panel.scaled) scale(panel, n, z);
    }

    void scale(const Panel& panel, int n, float* z) const {
        for (int64_t i = 0; i < 2 * n; i++)
            for (int h = 0; i % 2 <= (teacher ? 1 : 0) && h < 2; h++) {
                float* at = z + i * NR + h * LANES;
                vf x = (load(at) + load(panel.bias + h * LANES)) * p.scale;
                store(at, p.softcap != 0 ? hyperbolic_tangent(x) * p.softcap : x);
            }
    }

    // z[y] of one row and stream, exactly as many operations for either stream.
    float pick(const In* hidden, const In* row, int64_t width, int64_t y) const {
        vf sums{};
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES)
            sums += (vf)words_at(hidden, k, 0.f) * (vf)words_at(row, k, 0.f);
        double total = sum(sums);
        for (; k < width; k++) total += (double)widened(hidden[k]) * widened(row[k]);
        float x = ((float)total + (p.bias ? p.bias[y] : 0.f)) * p.scale;
        return p.softcap != 0 ? hyperbolic_tangent(splat(x))[0] * p.softcap : x;
    }
    void pick(int64_t row) const {
        double* out = p.statistics + row * FASTSD_COLUMNS;
        int64_t y = p.target[row];
        const In* w = (const In*)p.head + y * p.head_stride;
        out[FASTSD_PICK_S] = pick((const In*)p.student + row * p.student_stride, w, p.width, y);
        out[FASTSD_PICK_T] = out[FASTSD_SHIFT] = 0;
        if (!teacher) return;
        if (own_head) w = (const In*)p.teacher_head + y * p.teacher_head_stride;
        const In* h = (const In*)p.teacher + row * p.teacher_stride;
        out[FASTSD_PICK_T] = pick(h, w, p.teacher_width, y);
        out[FASTSD_SHIFT] = (float)(out[FASTSD_PICK_S] - out[FASTSD_PICK_T]);
    }
};

}  // namespace FASTSD_ISA
