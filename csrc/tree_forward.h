// Tree attention forward: out = softmax(scale Q K^T) V and its log-sum-exp, online over chunks.
//
// Work of a unit and chunk: 2 rows n H FLOP for the scores, as many for P V, rows n exponentials.
#pragma once
#include "tree.h"

namespace FASTSD_ISA {

template <class In, class Word>
struct TreeForward {
    typedef typename Rounded<Word>::type Probability;
    const FastsdTree& p;
    Tree<In, Word> tree;
    Buffer<Word> keys, values;
    int64_t block;  // tokens of a unit
    int64_t count = 0;
    Buffer<Unit> units;

    explicit TreeForward(const FastsdTree& problem)
        : p(problem),
          tree(p),
          keys(p.kv_heads * tree.key_words + PAD),
          values(p.kv_heads * tree.value_words + PAD),
          block(TREE_BLOCK / tree.repeat > 0 ? TREE_BLOCK / tree.repeat : 1),
          units(most_units()) {
        if (!tree.ok() || !units.ok()) return;
        for (int64_t s = p.outside; s < p.segments; s++)
            for (int64_t first = 0; first < p.lengths[s]; first += block)
                for (int64_t head = 0; head < p.kv_heads; head++) {
                    int64_t left = p.lengths[s] - first;
                    units.data[count++] = {s, first, left < block ? left : block,
                                           head * tree.repeat, tree.repeat};
                }
    }
    int64_t most_units() const {
        int64_t blocks = 0;
        for (int64_t s = p.outside; s < p.segments; s++)
            blocks += (p.lengths[s] + block - 1) / block;
        return blocks * p.kv_heads;
    }

    struct Work {  // one thread's
        Buffer<In> gathered;
        Buffer<Word> query, weights;
        Buffer<float> scores, sums;
        Buffer<Probability> rounded;
        Buffer<float> most, total;
        explicit Work(const TreeForward& of, int64_t rows)
            : gathered(rows * of.p.head_dim),
              query(rows * of.tree.depth + PAD),
              weights(rows * words<Word>(TREE_CHUNK) + PAD),
              scores(rows * TREE_CHUNK),
              sums(rows * of.tree.width()),
              rounded(rows * TREE_CHUNK),
              most(rows),
              total(rows) {}
        bool ok() const {
            return gathered.ok() && query.ok() && weights.ok() && scores.ok() && sums.ok() &&
                   rounded.ok() && most.ok() && total.ok();
        }
    };

    int run() {
        if (!tree.ok() || !keys.ok() || !values.ok() || !units.ok()) return 1;
        std::atomic<int64_t> next{0}, next_unit{0};
        std::atomic<bool> failed{false};
        parallel(p.threads, [&](int) {
            for (int64_t i; (i = next++) < p.segments * p.kv_heads;)
                pack(i / p.kv_heads, i % p.kv_heads);
        });
        int64_t most = TREE_BLOCK > tree.repeat ? TREE_BLOCK : tree.repeat;
        parallel(p.threads, [&](int) {
            Work work(*this, most);
            if (!work.ok()) return (void)(failed = true);
            for (int64_t i; (i = next_unit++) < count;) attend(work, units.data[i]);
        });
        return failed ? 1 : 0;
    }

    void pack(int64_t s, int64_t head) const {
        tree.pack_keys(tree.key_row(s, head), tree.key_stride(s), p.lengths[s],
                       keys + (head * tree.key_words + tree.key_at.data[s]));
        tree.pack_chunks(tree.value_row(s, head), tree.value_stride(s), p.lengths[s],
                         values + (head * tree.value_words + tree.value_at.data[s]));
    }

    void attend(Work& w, const Unit& unit) const {
        int64_t rows = unit.rows(), head = unit.head / tree.repeat;
        Blocks blocks(rows);
        gather((const In*)p.query, p.query_stride, p.query_head_stride, unit,
               tree.start.data[unit.segment], p.head_dim, w.gathered.data);
        pack_rows_a(w.gathered.data, p.head_dim, blocks, p.head_dim, w.query.data);
        memset(w.sums.data, 0, rows * tree.width() * sizeof(float));
        for (int64_t row = 0; row < rows; row++) w.most.data[row] = -3e38f, w.total.data[row] = 0;
        Range range = tree.first_range(unit.segment, unit.first + unit.tokens);
        do {
            const Word* key = keys + (head * tree.key_words + tree.key_at.data[range.segment]);
            const Word* value =
                values + (head * tree.value_words + tree.value_at.data[range.segment]);
            int64_t whole = p.lengths[range.segment];
            for (int64_t first = 0; first < range.keys; first += TREE_CHUNK) {
                int64_t packed = whole - first < TREE_CHUNK ? whole - first : TREE_CHUNK;
                int64_t n = range.keys - first < TREE_CHUNK ? range.keys - first : TREE_CHUNK;
                multiply(blocks, w.query.data, key + first / NR * tree.depth * NR, panels(n),
                         tree.depth, w.scores.data, TREE_CHUNK, false);
                for (int64_t row = 0; row < rows; row++)
                    weigh(w, row, seen(range, first, n, unit.token(row)), n);
                pack_rows_a(w.rounded.data, TREE_CHUNK, blocks, n, w.weights.data);
                add(w, blocks, value + words<Word>(first) * tree.columns * NR, n, packed);
            }
        } while (tree.next_range(range));
        finish(w, unit);
    }

    // sums += weights times the chunk's values, of which the first n of `packed` keys.
    void add(Work& w, const Blocks& blocks, const Word* value, int64_t n, int64_t packed) const {
        int64_t used = words<Word>(n);
        for (int64_t c = 0; c < tree.columns; c++)
            for (int64_t block = 0; block < blocks.count; block++)
                product<Word>(blocks.size(block), w.weights + blocks.start(block) * used,
                              value + c * words<Word>(packed) * NR, used,
                              w.sums + (blocks.start(block) * tree.width() + c * NR), tree.width(),
                              true);
    }

    // Scores to weights e^(s - most), with what was summed before brought to the new maximum.
    FASTSD_INLINE_MEMBER void weigh(Work& w, int64_t row, int64_t visible, int64_t n) const {
        float* s = w.scores + row * TREE_CHUNK;
        Probability* out = w.rounded + row * TREE_CHUNK;
        int64_t whole = panels(n) * NR;
        vf lane, highest = splat(-3e38f);
        for (int i = 0; i < LANES; i++) lane[i] = (float)i;
        for (int64_t i = 0; i < visible; i += LANES) {
            vf x = load(s + i) * p.scale;
            x = lane + (float)i < splat((float)visible) ? x : splat(-3e38f);
            store(s + i, x);
            highest = maximum(x, highest);
        }
        float before = w.most.data[row], most = largest(highest);
        most = before > most ? before : most;
        vf sum{};
        for (int64_t i = 0; i < whole; i += LANES) {
            vf weight{};
            if (i < visible) {
                weight = exponential(load(s + i) - most);
                weight = lane + (float)i < splat((float)visible) ? weight : vf{};
            }
            sum += weight;
            narrow(out + i, weight);
        }
        float shrink = before == most ? 1.f : exponential(splat(before - most))[0];
        w.total.data[row] = w.total.data[row] * shrink + (float)FASTSD_ISA::sum(sum);
        w.most.data[row] = most;
        if (shrink != 1)
            for (int64_t i = 0; i < tree.width(); i += LANES) {
                float* at = w.sums + (row * tree.width() + i);
                store(at, load(at) * shrink);
            }
    }

    void finish(Work& w, const Unit& unit) const {
        for (int64_t row = 0; row < unit.rows(); row++) {
            int64_t token = tree.start.data[unit.segment] + unit.token(row);
            int64_t head = unit.head + row % unit.heads;
            float total = w.total.data[row];
            In* out = (In*)p.out + (token * p.heads + head) * p.head_dim;
            const float* sums = w.sums + row * tree.width();
            for (int64_t i = 0; i < p.head_dim; i++) narrow(out + i, sums[i] / total);
            p.lse[token * p.heads + head] = w.most.data[row] + __builtin_logf(total);
        }
    }
};

}  // namespace FASTSD_ISA
