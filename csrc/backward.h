// Sweep two: groups of columns; in each the gradient G of the chunk's rows, then both products on
// it while it is in cache:
//     d h [rows, D] += G [rows, group] W [group, D]         summed per thread, merged in order
//     d W [group, D]  = G^T [group, rows] h [rows, D]       whole at once: written once, as bf16
// G never goes to memory. Per group of 256 columns and 512 rows: 256 KB of G (bf16) and as much for
// each of its two packings. Threads own contiguous columns, so nothing depends on their timing.
#pragma once
#include <atomic>

#include "again.h"
#include "gradient.h"

namespace FASTSD_ISA {

constexpr int64_t GROUP = 8;  // panels
constexpr int64_t G_STRIDE = GROUP * NR + LANES;

template <class Word>
struct StoredAs {
    typedef float type;
};
template <>
struct StoredAs<Pair> {
    typedef uint16_t type;
};

template <class In, class Word>
struct Backward {
    typedef typename StoredAs<Word>::type G;
    const FastsdProblem& p;
    const FastsdGradient& g;
    Projection<In, Word> project;
    Again<In, Word> again;
    FormRow form_one;
    int64_t d_width, d_panels, depth;  // D in whole panels; words of k = rows
    Buffer<Row> rows;
    Buffer<Coefficients> terms_of;
    Buffer<Word> b_h;  // h as B of d W: [D panel][word][NR]
    Buffer<float> d_hidden;

    Backward(const FastsdProblem& problem, const FastsdGradient& gradient, FormRow form)
        : p(problem),
          g(gradient),
          project(problem),
          again(project),
          form_one(form),
          d_width((problem.width + NR - 1) / NR * NR),
          d_panels(d_width / NR),
          depth(words<Word>(problem.rows)),
          rows(problem.rows),
          terms_of(problem.rows),
          b_h(gradient.d_head ? d_panels * depth * NR + PAD : 0),
          d_hidden(gradient.d_student ? p.threads * p.rows * d_width : 0) {}
    bool ok() const {
        return project.ok() && rows.ok() && terms_of.ok() && b_h.ok() && d_hidden.ok();
    }

    struct Work {  // one thread's
        typename Again<In, Word>::Work again;
        Buffer<Scale> scales;
        Buffer<G> gradient;           // [rows][G_STRIDE]
        Buffer<Word> a_g, a_gt, b_w;  // G as A of d h, of d W; W as B of d h
        explicit Work(const Backward& of)
            : again(of.project),
              scales(of.p.rows),
              gradient(of.p.rows * G_STRIDE + PAD),
              a_g(of.p.rows * words<Word>(GROUP * NR) + PAD),
              a_gt(GROUP * NR * of.depth + PAD),
              b_w(of.d_panels * words<Word>(GROUP * NR) * NR + PAD) {}
        bool ok() const {
            return again.ok() && scales.ok() && gradient.ok() && a_g.ok() && a_gt.ok() && b_w.ok();
        }
    };

    int run() {
        if (!ok()) return 1;
        if (again.needed) project.pack();
        for (int64_t row = 0; row < p.rows; row++) {
            rows.data[row] = row_of(p.statistics + row * FASTSD_COLUMNS, project.teacher);
            terms_of.data[row] = coefficients(p, g, row);
        }
        const In* h = (const In*)p.student;
        for (int64_t d = 0; g.d_head && d < d_panels; d++)
            pack_cols_b(h + d * NR, p.student_stride, p.width - d * NR, p.rows,
                        b_h + d * depth * NR);
        int64_t groups = (panels(p.vocabulary) + GROUP - 1) / GROUP;
        std::atomic<bool> failed{false};
        parallel(p.threads, [&](int thread) {
            Work work(*this);
            if (!work.ok()) return (void)(failed = true);
            float* sum = g.d_student ? d_hidden + thread * p.rows * d_width : nullptr;
            if (sum) memset(sum, 0, p.rows * d_width * sizeof(float));
            // Whole segments, which rows computed again need, unless too few to share out.
            constexpr int64_t IN_SEGMENT = SEGMENT / GROUP;
            int64_t many = 4 * p.threads * IN_SEGMENT;
            int64_t whole = again.needed || groups >= many ? IN_SEGMENT : 1;
            Share share((groups + whole - 1) / whole, thread, p.threads);
            int64_t last = share.last * whole < groups ? share.last * whole : groups;
            for (int64_t group = share.first * whole; group < last; group++) {
                if (group % whole == 0) again.start_segment(work.again);
                form(work, group);
                if (sum) add_hidden(work, group, sum);
                if (g.d_head) write_head(work, group);
            }
        });
        if (failed) return 1;
        if (g.d_student) merge_hidden();
        return 0;
    }

    int64_t columns(int64_t group) const {
        int64_t left = p.vocabulary - group * GROUP * NR;
        return left < GROUP * NR ? left : GROUP * NR;
    }

    // work.gradient <- G of this group.
    void form(Work& work, int64_t group) const {
        alignas(64) float bias[NR];
        for (int64_t i = 0; i * NR < columns(group); i++) {
            int64_t index = group * GROUP + i, column = index * NR;
            memset(bias, 0, sizeof bias);
            auto put_row = [&](int64_t row, const char* data, const Scale& scale) {
                put(work, row, i, bias, data, scale, column);
            };
            scales_of(p, index, rows.data, work.scales.data);
            for (int64_t row = 0; row < p.kept_rows; row++)
                put_row(row, kept_slot(p, index, row).data, work.scales.data[row]);
            again.panel(work.again, index, rows.data, put_row);
            for (int64_t j = 0; g.d_bias && j < NR && column + j < p.vocabulary; j++)
                g.d_bias[column + j] += bias[j];
        }
    }
    void put(Work& work, int64_t row, int64_t i, float* bias, const char* data, const Scale& scale,
             int64_t column) const {
        alignas(64) float out[NR];
        form_one(g, terms_of.data[row], rows.data[row], data, scale, column, out);
        for (int h = 0; h < 2; h++) {
            vf x = load(out + h * LANES);
            narrow(work.gradient + row * G_STRIDE + i * NR + h * LANES, x);
            if (g.d_bias) store(bias + h * LANES, load(bias + h * LANES) + x);
        }
    }

    void add_hidden(Work& work, int64_t group, float* sum) const {
        int64_t n = columns(group), k = words<Word>(n);
        const In* w = (const In*)p.head + group * GROUP * NR * p.head_stride;
        for (int64_t d = 0; d < d_panels; d++)
            pack_cols_b(w + d * NR, p.head_stride, p.width - d * NR, n, work.b_w + d * k * NR);
        pack_rows_a(work.gradient.data, G_STRIDE, project.blocks, n, work.a_g.data);
        for (int64_t d = 0; d < d_panels; d++)
            for (int64_t b = 0; b < project.blocks.count; b++) {
                int64_t first = project.blocks.start(b);
                product<Word>(project.blocks.size(b), work.a_g + first * k, work.b_w + d * k * NR,
                              k, sum + first * d_width + d * NR, d_width, true);
            }
    }

    void write_head(Work& work, int64_t group) const {
        alignas(64) float tile[MR * NR];
        Blocks blocks(columns(group));
        pack_cols_a(work.gradient.data, G_STRIDE, blocks, p.rows, work.a_gt.data);
        for (int64_t d = 0; d < d_panels; d++)
            for (int64_t b = 0; b < blocks.count; b++) {
                int64_t first = blocks.start(b);
                product<Word>(blocks.size(b), work.a_gt + first * depth, b_h + d * depth * NR,
                              depth, tile, NR, false);
                for (int i = 0; i < blocks.size(b); i++)
                    put_head(group * GROUP * NR + first + i, d * NR, tile + i * NR);
            }
    }
    // One row's NR columns of d W: added to the sum over chunks, written out with the last.
    void put_head(int64_t v, int64_t column, float* x) const {
        int64_t n = p.width - column < NR ? p.width - column : NR, at = v * p.width + column;
        if (g.sum && !g.first)
            for (int64_t j = 0; j < n; j++) x[j] += g.sum[at + j];
        if (g.sum && !g.last) {
            memcpy(g.sum + at, x, n * sizeof(float));
            return;
        }
        In* out = (In*)g.d_head + at;
        if (n == NR) {
            narrow(out, load(x));
            narrow(out + LANES, load(x + LANES));
        } else {
            for (int64_t j = 0; j < n; j++) narrow(out + j, x[j]);
        }
    }

    void merge_hidden() const {
        parallel(p.threads, [&](int thread) {
            Share share(p.rows, thread, p.threads);
            for (int64_t row = share.first; row < share.last; row++)
                for (int64_t j = 0; j < p.width; j++) {
                    float total = 0;
                    for (int i = 0; i < p.threads; i++)
                        total += d_hidden.data[(i * p.rows + row) * d_width + j];
                    narrow((In*)g.d_student + row * p.width + j, total);
                }
        });
    }
};

}  // namespace FASTSD_ISA
