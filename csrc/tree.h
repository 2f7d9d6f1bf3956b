// A packed token tree's attention: what both directions share. A token sees its own segment up to
// itself and every segment above it; segments stand depth-first, each after the one it hangs from.
//
// A unit of work is a block of query rows (some tokens of one segment, times the query heads of one
// key/value head): its keys are the segments above and its own, walked in chunks of TREE_CHUNK keys. The
// rows' whole softmax happens in one place, so nothing is merged, and no kernel is called per
// segment: trees of many small segments cost what their products cost.
//
// Packed per key/value head and segment, once a call, for all units:
//     K, V as [panel of NR keys][word of H][NR]             scores Q K^T and dP = dO V^T
//     V, K as [chunk][panel of NR columns][word of key][NR]  P V and dQ = dS K
#pragma once
#include <atomic>

#include "pack.h"
#include "parallel.h"

namespace FASTSD_ISA {

constexpr int64_t TREE_CHUNK = 256;  // keys: 32 to 128 KB of packed operands, of scores 112 KB
constexpr int64_t TREE_BLOCK = 112;  // query rows: eight register tiles

// Probabilities are multiplied as what the tile takes: bf16 where it multiplies bf16.
template <class Word>
struct Rounded {
    typedef float type;
};
template <>
struct Rounded<Pair> {
    typedef uint16_t type;
};

struct Range {  // the keys of one segment that rows see; of their own only up to themselves
    int64_t segment, keys;
    bool own;
};

template <class In, class Word>
struct Tree {
    const FastsdTree& p;
    int64_t repeat, depth, columns;  // query heads a key head, words of H, panels of H
    // By segment: its first row in the pack or the prefixes, its words in one head's panels.
    Buffer<int64_t> start, key_at, value_at;
    int64_t key_words = 0, value_words = 0;

    explicit Tree(const FastsdTree& problem)
        : p(problem),
          repeat(p.heads / p.kv_heads),
          depth(words<Word>(p.head_dim)),
          columns(panels(p.head_dim)),
          start(p.segments),
          key_at(p.segments),
          value_at(p.segments) {
        if (!ok()) return;
        int64_t filled[2] = {0, 0};
        for (int64_t s = 0; s < p.segments; s++) {
            start.data[s] = filled[s >= p.outside];
            filled[s >= p.outside] += p.lengths[s];
            key_at.data[s] = key_words;
            value_at.data[s] = value_words;
            key_words += panels(p.lengths[s]) * depth * NR;
            value_words += words<Word>(p.lengths[s]) * columns * NR;
        }
    }
    bool ok() const { return start.ok() && key_at.ok() && value_at.ok(); }

    int64_t width() const { return columns * NR; }  // of an fp32 row of H numbers
    bool inside(int64_t s) const { return s >= p.outside; }

    const In* key_row(int64_t s, int64_t head) const {
        return inside(s)
                   ? (const In*)p.key + start.data[s] * p.key_stride + head * p.key_head_stride
                   : (const In*)p.prefix_key + start.data[s] * p.prefix_key_stride +
                         head * p.prefix_key_head_stride;
    }
    const In* value_row(int64_t s, int64_t head) const {
        return inside(s) ? (const In*)p.value + start.data[s] * p.value_stride +
                               head * p.value_head_stride
                         : (const In*)p.prefix_value + start.data[s] * p.prefix_value_stride +
                               head * p.prefix_value_head_stride;
    }
    int64_t key_stride(int64_t s) const { return inside(s) ? p.key_stride : p.prefix_key_stride; }
    int64_t value_stride(int64_t s) const {
        return inside(s) ? p.value_stride : p.prefix_value_stride;
    }

    // What the rows of a segment before `last` see: the segment itself, then those above it.
    Range first_range(int64_t s, int64_t last) const { return {s, last, true}; }
    bool next_range(Range& range) const {
        int64_t above = p.parents[range.segment];
        if (above < 0) return false;
        range = {above, p.lengths[above], false};
        return true;
    }

    // One segment's rows as panels of keys, and as chunks of columns.
    void pack_keys(const In* rows, int64_t stride, int64_t count, Word* out) const {
        for (int64_t first = 0; first < count; first += NR) {
            int n = (int)(count - first < NR ? count - first : NR);
            pack_rows_b<Word>(rows + first * stride, stride, n, p.head_dim, out);
            out += depth * NR;
        }
    }
    void pack_chunks(const In* rows, int64_t stride, int64_t count, Word* out) const {
        for (int64_t first = 0; first < count; first += TREE_CHUNK) {
            int64_t n = count - first < TREE_CHUNK ? count - first : TREE_CHUNK;
            pack_columns(rows + first * stride, stride, n, out);
            out += words<Word>(n) * columns * NR;
        }
    }
    // [n][H] as [panel of columns][word of n][NR].
    void pack_columns(const In* rows, int64_t stride, int64_t n, Word* out) const {
        for (int64_t c = 0; c < columns; c++)
            pack_cols_b<Word>(rows + c * NR, stride, p.head_dim - c * NR, n,
                              out + c * words<Word>(n) * NR);
    }
};

// a [rows as blocks][depth] times panels of b -> c[row][panel * NR ...] (+)=.
template <class Word>
static void multiply(const Blocks& blocks, const Word* a, const Word* b, int64_t count,
                     int64_t depth, float* c, int64_t c_stride, bool add) {
    for (int64_t panel = 0; panel < count; panel++)
        for (int64_t block = 0; block < blocks.count; block++)
            product<Word>(blocks.size(block), a + blocks.start(block) * depth,
                          b + panel * depth * NR, depth,
                          c + blocks.start(block) * c_stride + panel * NR, c_stride, add);
}

// A block of tokens of one segment, with the query heads [head, head + heads) of one key head.
struct Unit {
    int64_t segment, first, tokens, head, heads;
    int64_t rows() const { return tokens * heads; }
    int64_t token(int64_t row) const { return first + row / heads; }  // in its segment
};

// Contiguous copies of a unit's rows of a [T][N][H] tensor, row = (token, head).
template <class In>
static void gather(const In* from, int64_t stride, int64_t head_stride, const Unit& unit,
                   int64_t start, int64_t head_dim, In* out) {
    for (int64_t row = 0; row < unit.rows(); row++)
        memcpy(out + row * head_dim,
               from + (start + unit.token(row)) * stride +
                   (unit.head + row % unit.heads) * head_stride,
               head_dim * sizeof(In));
}

// Rows that a query row sees of a chunk that begins at key `first` of a range.
FASTSD_INLINE int64_t seen(const Range& range, int64_t first, int64_t n, int64_t token) {
    if (!range.own) return n;
    int64_t up_to = token + 1 - first;
    return up_to < 0 ? 0 : up_to < n ? up_to : n;
}

}  // namespace FASTSD_ISA
