// Decode attention: one new position for each row, which sees its prefix (one copy for all rows of
// the group), its own earlier positions and itself.
//
// One key/value head of a prefix or a branch, in words of the register tile (gemm.h):
//     keys     panels of NR positions, each [word of head_dim][NR]     scores = queries keys
//     values   panels of NR columns, each [word of positions][NR]      out += weights values
// so that all queries of a group's rows, R = heads / kv_heads each, are the rows of one product with
// a panel of its prefix, up to MR at once, and a row's R queries of one with a panel of its branch.
// Scores go in chunks of 256 positions through an online softmax in fp32 (m, sum, out rescaled when
// m moves):
//     w = e^(scale q.k - m),   out = sum w v / sum w
// Words read per row and kv head: 2 head_dim (its own positions + its prefix's / rows of a unit).
//
// Only what is below a length is trusted: lanes of keys beyond it are masked after the product, and
// sums over values stop at it (the missing half of a bf16 pair is written as 0 with the first).
// Chunks start at the prefix's and the branch's first position, so a row's bits do not depend on
// other rows, groups or threads.
#pragma once
#include <atomic>
#include <cmath>

#include "fastsd_native.h"
#include "pack.h"
#include "parallel.h"

namespace FASTSD_ISA {

constexpr int64_t CHUNK = 256;            // positions
constexpr int64_t MOST_QUERIES = 4 * MR;  // of a unit of work, where R allows

// Where one key/value head's keys and values are in memory of `positions` positions.
template <class Stored>
struct HeadLayout {
    int64_t key_panel, value_panel;  // words of one panel
    int64_t keys, all;               // words of all keys, of both
    HeadLayout(int64_t head_dim, int64_t positions)
        : key_panel(words<Stored>(head_dim) * NR),
          value_panel(words<Stored>(positions) * NR),
          keys(panels(positions) * key_panel),
          all(keys + panels(head_dim) * value_panel) {}
    int64_t bytes(int64_t kv_heads) const {
        return (kv_heads * all * (int64_t)sizeof(Stored) + 63) / 64 * 64;
    }
};

template <class In, class Stored>
static int pack_prefix(const FastsdPrefix& p) {
    HeadLayout<Stored> layout(p.head_dim, p.positions);
    parallel(p.threads, [&](int thread) {
        Share share(p.kv_heads, thread, p.threads);
        for (int64_t head = share.first; head < share.last; head++) {
            const In* key = (const In*)p.key + head * p.key_head_stride;
            const In* value = (const In*)p.value + head * p.value_head_stride;
            Stored* keys = (Stored*)p.out + head * layout.all;
            for (int64_t i = 0; i < panels(p.positions); i++) {
                int64_t left = p.positions - i * NR;
                pack_rows_b(key + i * NR * p.key_stride, p.key_stride, left < NR ? (int)left : NR,
                            p.head_dim, keys + i * layout.key_panel);
            }
            for (int64_t i = 0; i < panels(p.head_dim); i++)
                pack_cols_b(value + i * NR, p.value_stride, p.head_dim - i * NR, p.positions,
                            keys + layout.keys + i * layout.value_panel);
        }
    });
    return 0;
}

// Columns of position `at` into a panel of values.
template <class In>
FASTSD_INLINE void put_values(In* panel, int64_t at, const In* row, int64_t columns) {
    memcpy(panel + at * NR, row, columns * sizeof(In));
}
FASTSD_INLINE void put_values(Pair* panel, int64_t at, const uint16_t* row, int64_t columns) {
    Pair* to = panel + at / 2 * NR;
    for (int64_t k = 0; k < columns; k++)
        to[k] = at % 2 ? (to[k] & 0xffff) | (Pair)row[k] << 16 : row[k];
}

// What a packed A of weights is made from: bf16 for pairs.
template <class Word>
struct WeightOf {
    typedef float type;
};
template <>
struct WeightOf<Pair> {
    typedef uint16_t type;
};

struct Online {  // the softmax of one query so far
    vf sum;      // lane by lane
    float m;
};

template <class In, class Word, class Stored>
struct Decode {
    typedef typename WeightOf<Word>::type Weight;
    const FastsdDecode& p;
    int64_t repeat, depth, width;  // R; words of head_dim; head_dim in whole panels
    HeadLayout<Stored> branch_layout;
    explicit Decode(const FastsdDecode& problem)
        : p(problem),
          repeat(problem.heads / problem.kv_heads),
          depth(words<Word>(problem.head_dim)),
          width(panels(problem.head_dim) * NR),
          branch_layout(problem.head_dim, problem.capacity) {}

    // Rows [first, last) of a group and one kv head, for one thread; and the thread's memory.
    struct Unit {
        int64_t group, head, first, last;
        In* rows;  // [query][head_dim], then as A: of all, and row by row
        Word *a, *own;
        float* out;      // [query][width]
        Online* online;  // [query]
    };

    int run() {
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
        parallel(p.threads, [&](int) {
            if (!work(next)) failed = true;
        });
        return failed ? 1 : 0;
    }

    // More rows to a unit read a prefix less often; fewer make units for all threads.
    int64_t rows_of_unit() const {
        bool few = p.groups * p.kv_heads < 4 * p.threads;
        int64_t rows = (few ? MR : MOST_QUERIES) / repeat;
        return rows < 1 ? 1 : rows;
    }

    bool work(std::atomic<int64_t>& next) const {
        static thread_local Kept rows, a, own, out, online;
        int64_t most = rows_of_unit(), queries = most * repeat;
        Unit u{};
        u.rows = rows.room<In>(queries * p.head_dim);
        u.a = a.room<Word>(queries * depth + PAD);
        u.own = own.room<Word>(queries * depth + PAD);
        u.out = out.room<float>(queries * width);
        u.online = online.room<Online>(queries);
        if (!u.rows || !u.a || !u.own || !u.out || !u.online) return false;
        int64_t mine = next++, index = 0;
        for (u.group = 0; u.group < p.groups; u.group++)
            for (u.head = 0; u.head < p.kv_heads; u.head++)
                for (int64_t row = p.group_start[u.group]; row < p.group_start[u.group + 1];
                     row += most) {
                    if (index++ != mine) continue;
                    int64_t end = p.group_start[u.group + 1];
                    u.first = row, u.last = row + most < end ? row + most : end;
                    attend(u);
                    mine = next++;
                }
        return true;
    }

    void attend(const Unit& u) const {
        int64_t queries = (u.last - u.first) * repeat, length = p.prefix_length[u.group];
        for (int64_t row = u.first; row < u.last; row++) append(row, u.head);
        for (int64_t i = 0; i < queries; i++) u.online[i] = {vf{}, -1e30f};
        memset(u.out, 0, queries * width * sizeof(float));
        pack_queries(u);
        HeadLayout<Stored> layout(p.head_dim, length);
        const Stored* data =
            (const Stored*)((const char*)p.prefix[u.group] + p.layer * layout.bytes(p.kv_heads));
        part(Blocks(queries), u.a, data + u.head * layout.all, layout, length,
             branch(u.first, u.head), u.out, u.online);
        for (int64_t row = u.first; row < u.last; row++) {
            int64_t first = (row - u.first) * repeat, next = row + 1 < u.last ? row + 1 : row;
            part(Blocks(repeat), u.own + first * depth, branch(row, u.head), branch_layout,
                 p.length[row] + 1, branch(next, u.head), u.out + first * width, u.online + first);
            write(row, u.head, u.out + first * width, u.online + first);
        }
    }

    Stored* branch(int64_t row, int64_t head) const {
        int64_t index = p.layer * p.slots + p.slot[row];
        return (Stored*)((char*)p.branches + index * branch_layout.bytes(p.kv_heads)) +
               head * branch_layout.all;
    }

    void append(int64_t row, int64_t head) const {
        const In* key = (const In*)p.key + row * p.key_stride + head * p.head_dim;
        const In* value = (const In*)p.value + row * p.value_stride + head * p.head_dim;
        int64_t at = p.length[row];
        Stored* keys = branch(row, head) + at / NR * branch_layout.key_panel + at % NR;
        int64_t whole = p.head_dim / DEPTH<Stored>;
        for (int64_t k = 0; k < whole; k++)
            memcpy(keys + k * NR, key + k * DEPTH<Stored>, sizeof(Stored));
        if (whole < words<Stored>(p.head_dim)) word_of(keys + whole * NR, key, whole, p.head_dim);
        Stored* values = branch(row, head) + branch_layout.keys;
        for (int64_t k = 0; k < p.head_dim; k += NR) {
            put_values(values, at, value + k, p.head_dim - k < NR ? p.head_dim - k : NR);
            values += branch_layout.value_panel;
        }
    }

    void pack_queries(const Unit& u) const {
        int64_t size = repeat * p.head_dim;  // of one row's queries, which are neighbours
        for (int64_t row = u.first; row < u.last; row++) {
            int64_t i = row - u.first;
            const In* from = (const In*)p.query + row * p.query_stride + u.head * size;
            memcpy(u.rows + i * size, from, size * sizeof(In));
            pack_rows_a(from, p.head_dim, Blocks(repeat), p.head_dim, u.own + i * repeat * depth);
        }
        Blocks blocks((u.last - u.first) * repeat);
        pack_rows_a(u.rows, p.head_dim, blocks, p.head_dim, u.a);
    }

    // `count` positions of one prefix or branch, for the queries in `a`; then come the keys `next`.
    void part(Blocks blocks, const Word* a, const Stored* head, const HeadLayout<Stored>& layout,
              int64_t count, const Stored* next, float* out, Online* online) const {
        for (int64_t start = 0; start < count; start += CHUNK) {
            int64_t here = count - start < CHUNK ? count - start : CHUNK;
            const Stored* keys = head + start / NR * layout.key_panel;
            const Stored* values = head + layout.keys + start / DEPTH<Stored> * NR;
            bool last = start + CHUNK >= count;
            const Stored* then = last ? next : keys + CHUNK / NR * layout.key_panel;
            for (int64_t b = 0; b < blocks.count; b++) {
                int64_t first = blocks.start(b);
                chunk(blocks.size(b), a + first * depth, keys, values, layout, here, then,
                      out + first * width, online + first);
            }
        }
    }

    void chunk(int n, const Word* a, const Stored* keys, const Stored* values,
               const HeadLayout<Stored>& layout, int64_t count, const Stored* next, float* out,
               Online* online) const {
        alignas(64) float z[MR * CHUNK];
        alignas(64) Weight w[MR * CHUNK];
        alignas(64) Word packed[MR * CHUNK / DEPTH<Word> + PAD];
        for (int64_t i = 0; i * NR < count; i++) {
            const Stored* b = keys + i * layout.key_panel;
            product<Word>(n, a, b, depth, z + i * NR, CHUNK, false,
                          ahead_of(b, (panels(count) - i) * depth, values));
        }
        for (int i = 0; i < n; i++)
            soften(z + i * CHUNK, count, w + i * CHUNK, out + i * width, online[i]);
        pack_rows_block(w, CHUNK, n, count, packed, n);
        int64_t all = words<Word>(count);
        for (int64_t i = 0; i * NR < p.head_dim; i++) {
            const Stored *b = values + i * layout.value_panel, *then = b + layout.value_panel;
            product<Word>(n, packed, b, all, out + i * NR, width, true,
                          ahead_of(b, all, (i + 1) * NR < p.head_dim ? then : next));
        }
    }

    // Scores of one query -> weights; what it has so far is scaled to the new m.
    void soften(float* z, int64_t count, Weight* w, float* out, Online& q) const {
        const float none = -INFINITY;
        int64_t padded = panels(count) * NR;
        for (int64_t j = count; j < padded; j++) z[j] = none;
        vf most = splat(none);
        for (int64_t j = 0; j < padded; j += LANES) {
            vf x = load(z + j) * p.scale;
            store(z + j, x);
            most = maximum(x, most);
        }
        float m = largest(most);
        if (m > q.m) {
            vf factor = exponential(splat(q.m - m));
            for (int64_t k = 0; k < width; k += LANES) store(out + k, load(out + k) * factor);
            q.m = m, q.sum *= factor;
        }
        for (int64_t j = 0; j < padded; j += LANES) {
            vf x = load(z + j);
            x = x == none ? vf{} : exponential(x - q.m);
            q.sum += x;
            narrow(w + j, x);
        }
    }

    void write(int64_t row, int64_t head, const float* out, const Online* online) const {
        In* to = (In*)p.out + row * p.out_stride + head * repeat * p.head_dim;
        for (int64_t i = 0; i < repeat; i++) {
            float factor = (float)(1 / sum(online[i].sum));
            int64_t k = 0;
            for (; k + LANES <= p.head_dim; k += LANES)
                narrow(to + i * p.head_dim + k, load(out + i * width + k) * factor);
            for (; k < p.head_dim; k++)
                narrow(to + i * p.head_dim + k, out[i * width + k] * factor);
        }
    }
};

}  // namespace FASTSD_ISA
