// Tree attention backward, from the merged out and lse:
//
//     P = e^(scale q.k - lse),  dS = scale P (dO.v - dO.o),
//     dq = sum dS k,  dk = sum dS q,  dv = sum P dO
//
// Five products of 2 rows n H FLOP for a unit of rows and a chunk of n keys. A lane is one root's
// segments and some query heads of one key head; its sums over queries run in one order, on one
// thread, so equal calls give equal bits on any number of threads. Lanes are single query heads,
// whose sums are added at the end, as long as those sums stay small (SPLIT_BYTES).
#pragma once
#include "tree.h"

namespace FASTSD_ISA {

constexpr int64_t SPLIT_BYTES = 64 << 20;

template <class In, class Word>
struct TreeBackward {
    typedef typename Rounded<Word>::type Probability;
    const FastsdTree& p;
    Tree<In, Word> tree;
    int64_t all_keys, heads;  // rows of all segments; query heads of a lane
    int64_t roots = 0;
    Buffer<int64_t> root, next;  // by root its first segment; by segment the next one of its root
    Buffer<int64_t> row_at;      // by segment its first row in a lane's sums
    Buffer<Word> keys, key_chunks, values;
    Buffer<float> d_keys, d_values;  // [lanes of a root][all_keys][width]

    explicit TreeBackward(const FastsdTree& problem)
        : p(problem),
          tree(p),
          all_keys(count_keys()),
          heads(p.heads * all_keys * tree.width() * 8 <= SPLIT_BYTES ? 1 : tree.repeat),
          root(p.segments),
          next(p.segments),
          row_at(p.segments),
          keys(p.kv_heads * tree.key_words + PAD),
          key_chunks(p.kv_heads * tree.value_words + PAD),
          values(p.kv_heads * tree.key_words + PAD),
          d_keys(p.heads / heads * all_keys * tree.width()),
          d_values(p.heads / heads * all_keys * tree.width()) {}

    // Chains the segments of each root. False: out of memory.
    bool chain() {
        Buffer<int64_t> root_of(p.segments), last(p.segments);
        if (!root_of.ok() || !last.ok()) return false;
        for (int64_t s = 0, row = 0; s < p.segments; row += p.lengths[s++]) {
            bool first = p.parents[s] < 0;
            int64_t own = first ? roots++ : root_of.data[p.parents[s]];
            if (first) root.data[own] = s;
            else next.data[last.data[own]] = s;
            row_at.data[s] = row, root_of.data[s] = own, last.data[own] = s, next.data[s] = -1;
        }
        return true;
    }
    int64_t count_keys() const {
        int64_t count = 0;
        for (int64_t s = 0; s < p.segments; s++) count += p.lengths[s];
        return count;
    }

    struct Work {  // one thread's
        Buffer<In> query, grad, out;
        Buffer<Word> query_rows, grad_rows, query_columns, grad_columns, left;
        Buffer<float> scores, d_scores, d_query, lse, delta;
        Buffer<Probability> weight, d_weight;
        Work(const TreeBackward& of, int64_t rows)
            : query(rows * of.p.head_dim + PAD),
              grad(rows * of.p.head_dim + PAD),
              out(rows * of.p.head_dim),
              query_rows(rows * of.tree.depth + PAD),
              grad_rows(rows * of.tree.depth + PAD),
              query_columns(words<Word>(rows) * of.tree.width() + PAD),
              grad_columns(words<Word>(rows) * of.tree.width() + PAD),
              left((rows > TREE_CHUNK ? rows : TREE_CHUNK) *
                       words<Word>(rows > TREE_CHUNK ? rows : TREE_CHUNK) +
                   PAD),
              scores(rows * TREE_CHUNK),
              d_scores(rows * TREE_CHUNK),
              d_query(rows * of.tree.width()),
              lse(rows),
              delta(rows),
              weight(rows * TREE_CHUNK + PAD),
              d_weight(rows * TREE_CHUNK + PAD) {}
        bool ok() const {
            return query.ok() && grad.ok() && out.ok() && query_rows.ok() && grad_rows.ok() &&
                   query_columns.ok() && grad_columns.ok() && left.ok() && scores.ok() &&
                   d_scores.ok() && d_query.ok() && lse.ok() && delta.ok() && weight.ok() &&
                   d_weight.ok();
        }
    };

    int run() {
        if (!tree.ok() || !root.ok() || !next.ok() || !row_at.ok() || !keys.ok() ||
            !key_chunks.ok() || !values.ok() || !d_keys.ok() || !d_values.ok() || !chain())
            return 1;
        std::atomic<int64_t> taken[3] = {};
        std::atomic<bool> failed{false};
        parallel(p.threads, [&](int) {
            for (int64_t i; (i = taken[0]++) < p.segments * p.kv_heads;)
                pack(i / p.kv_heads, i % p.kv_heads);
        });
        int64_t lanes = p.heads / heads;
        parallel(p.threads, [&](int) {
            Work work(*this, TREE_BLOCK > heads ? TREE_BLOCK : heads);
            if (!work.ok()) return (void)(failed = true);
            for (int64_t i; (i = taken[1]++) < roots * lanes;)
                run_lane(work, root.data[i / lanes], i % lanes);
        });
        if (failed) return 1;
        parallel(p.threads, [&](int) {
            for (int64_t i; (i = taken[2]++) < p.segments * p.kv_heads;)
                finish(i / p.kv_heads, i % p.kv_heads);
        });
        return 0;
    }

    void pack(int64_t s, int64_t head) const {
        const In *key = tree.key_row(s, head), *value = tree.value_row(s, head);
        int64_t count = p.lengths[s], at = head * tree.key_words + tree.key_at.data[s];
        tree.pack_keys(key, tree.key_stride(s), count, keys + at);
        tree.pack_keys(value, tree.value_stride(s), count, values + at);
        tree.pack_chunks(key, tree.key_stride(s), count,
                         key_chunks + (head * tree.value_words + tree.value_at.data[s]));
    }

    float* sums(const Buffer<float>& of, int64_t lane, int64_t s) const {
        return of + (lane * all_keys + row_at.data[s]) * tree.width();
    }

    void run_lane(Work& w, int64_t from, int64_t lane) const {
        int64_t block = TREE_BLOCK / heads > 0 ? TREE_BLOCK / heads : 1;
        for (int64_t s = from; s >= 0; s = next.data[s])
            for (const Buffer<float>* of : {&d_keys, &d_values})
                memset(sums(*of, lane, s), 0, p.lengths[s] * tree.width() * sizeof(float));
        for (int64_t s = from; s >= 0; s = next.data[s])
            for (int64_t first = 0; tree.inside(s) && first < p.lengths[s]; first += block) {
                int64_t left = p.lengths[s] - first;
                run_unit(w, {s, first, left < block ? left : block, lane * heads, heads}, lane);
            }
    }

    void load_rows(Work& w, const Unit& unit, const Blocks& blocks) const {
        int64_t H = p.head_dim, start = tree.start.data[unit.segment];
        gather((const In*)p.query, p.query_stride, p.query_head_stride, unit, start, H,
               w.query.data);
        gather((const In*)p.grad, p.grad_stride, p.grad_head_stride, unit, start, H, w.grad.data);
        gather((const In*)p.out, p.heads * H, H, unit, start, H, w.out.data);
        pack_rows_a(w.query.data, H, blocks, H, w.query_rows.data);
        pack_rows_a(w.grad.data, H, blocks, H, w.grad_rows.data);
        tree.pack_columns(w.query.data, H, blocks.rows, w.query_columns.data);
        tree.pack_columns(w.grad.data, H, blocks.rows, w.grad_columns.data);
        for (int64_t row = 0; row < blocks.rows; row++) {
            float dot = 0;
            for (int64_t i = 0; i < H; i++)
                dot += widened(w.grad.data[row * H + i]) * widened(w.out.data[row * H + i]);
            w.delta.data[row] = dot;
            w.lse.data[row] =
                p.lse[(start + unit.token(row)) * p.heads + unit.head + row % unit.heads];
        }
    }

    void run_unit(Work& w, const Unit& unit, int64_t lane) const {
        Blocks blocks(unit.rows());
        load_rows(w, unit, blocks);
        memset(w.d_query.data, 0, blocks.rows * tree.width() * sizeof(float));
        int64_t head = unit.head / tree.repeat;
        Range range = tree.first_range(unit.segment, unit.first + unit.tokens);
        do
            for (int64_t first = 0; first < range.keys; first += TREE_CHUNK)
                run_chunk(w, unit, blocks, range, first, lane, head);
        while (tree.next_range(range));
        for (int64_t row = 0; row < blocks.rows; row++) {
            int64_t token = tree.start.data[unit.segment] + unit.token(row);
            In* out =
                (In*)p.d_query + (token * p.heads + unit.head + row % unit.heads) * p.head_dim;
            for (int64_t i = 0; i < p.head_dim; i++)
                narrow(out + i, w.d_query.data[row * tree.width() + i]);
        }
    }

    void run_chunk(Work& w, const Unit& unit, const Blocks& blocks, const Range& range,
                   int64_t first, int64_t lane, int64_t head) const {
        int64_t s = range.segment, left = p.lengths[s] - first;
        int64_t packed = left < TREE_CHUNK ? left : TREE_CHUNK;
        int64_t n = range.keys - first < TREE_CHUNK ? range.keys - first : TREE_CHUNK;
        int64_t at = head * tree.key_words + tree.key_at.data[s] + first / NR * tree.depth * NR;
        multiply(blocks, w.query_rows.data, keys + at, panels(n), tree.depth, w.scores.data,
                 TREE_CHUNK, false);
        multiply(blocks, w.grad_rows.data, values + at, panels(n), tree.depth, w.d_scores.data,
                 TREE_CHUNK, false);
        for (int64_t row = 0; row < blocks.rows; row++)
            weigh(w, row, seen(range, first, n, unit.token(row)), n);

        const Word* chunk = key_chunks + (head * tree.value_words + tree.value_at.data[s] +
                                          words<Word>(first) * tree.width());
        int64_t used = words<Word>(n);
        pack_rows_a(w.d_weight.data, TREE_CHUNK, blocks, n, w.left.data);
        for (int64_t c = 0; c < tree.columns; c++)
            multiply(blocks, w.left.data, chunk + c * words<Word>(packed) * NR, 1, used,
                     w.d_query + c * NR, tree.width(), true);

        Blocks below(n);
        int64_t depth = words<Word>(blocks.rows), to = first * tree.width();
        pack_cols_a(w.d_weight.data, TREE_CHUNK, below, blocks.rows, w.left.data);
        multiply(below, w.left.data, w.query_columns.data, tree.columns, depth,
                 sums(d_keys, lane, s) + to, tree.width(), true);
        pack_cols_a(w.weight.data, TREE_CHUNK, below, blocks.rows, w.left.data);
        multiply(below, w.left.data, w.grad_columns.data, tree.columns, depth,
                 sums(d_values, lane, s) + to, tree.width(), true);
    }

    // Scores and dO.v to P and dS, zero where the row does not see.
    FASTSD_INLINE_MEMBER void weigh(Work& w, int64_t row, int64_t visible, int64_t n) const {
        const float *s = w.scores + row * TREE_CHUNK, *d = w.d_scores + row * TREE_CHUNK;
        Probability *weight = w.weight + row * TREE_CHUNK,
                    *d_weight = w.d_weight + row * TREE_CHUNK;
        float lse = w.lse.data[row], delta = w.delta.data[row];
        vf lane;
        for (int i = 0; i < LANES; i++) lane[i] = (float)i;
        for (int64_t i = 0; i < panels(n) * NR; i += LANES) {
            vf probability{}, slope{};
            if (i < visible) {
                auto in = lane + (float)i < splat((float)visible);
                probability = in ? exponential(load(s + i) * p.scale - lse) : vf{};
                slope = in ? probability * (load(d + i) - delta) * p.scale : vf{};
            }
            narrow(weight + i, probability);
            narrow(d_weight + i, slope);
        }
    }

    // One segment's keys and values: the lanes of their head added up.
    void finish(int64_t s, int64_t head) const {
        int64_t lanes = tree.repeat / heads, width = tree.width();
        for (int which = 0; which < 2; which++) {
            const Buffer<float>& of = which ? d_values : d_keys;
            In* out = (In*)(tree.inside(s) ? which ? p.d_value : p.d_key
                            : which        ? p.d_prefix_value
                                           : p.d_prefix_key);
            for (int64_t row = 0; row < p.lengths[s]; row++)
                for (int64_t i = 0; i < p.head_dim; i++) {
                    float total = 0;
                    for (int64_t lane = 0; lane < lanes; lane++)
                        total += sums(of, head * lanes + lane, s)[row * width + i];
                    narrow(out + ((tree.start.data[s] + row) * p.kv_heads + head) * p.head_dim + i,
                           total);
                }
        }
    }
};

}  // namespace FASTSD_ISA
