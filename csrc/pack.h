// Operands into the order in which the register tile reads them.
//
//     pack_rows   k runs along a source row: blocks of source rows become lanes (a transpose).
//                 h for the logits (A), W for the logits (B), G for d h (A).
//     pack_cols   k runs down the source rows: neighbouring columns are lanes already.
//                 h for d W (B), G for d W (A), W for d h (B).
// Source elements are bf16 (uint16_t) or fp32; words are bf16 pairs or fp32; what is missing is 0.
// A panel of B that stays in memory may hold single bf16 numbers where the words are fp32.
#pragma once
#include "gemm.h"

namespace FASTSD_ISA {

// Word number k of a source row with `count` elements.
FASTSD_INLINE void word_of(float* out, const float* row, int64_t k, int64_t count) {
    *out = k < count ? row[k] : 0.f;
}
FASTSD_INLINE void word_of(float* out, const uint16_t* row, int64_t k, int64_t count) {
    *out = k < count ? widened(row[k]) : 0.f;
}
FASTSD_INLINE void word_of(Pair* out, const uint16_t* row, int64_t k, int64_t count) {
    uint32_t low = 2 * k < count ? row[2 * k] : 0, high = 2 * k + 1 < count ? row[2 * k + 1] : 0;
    *out = low | high << 16;
}
FASTSD_INLINE void word_of(uint16_t* out, const uint16_t* row, int64_t k, int64_t count) {
    *out = k < count ? row[k] : 0;
}

// LANES words from a row that has them all.
FASTSD_INLINE vi words_at(const float* row, int64_t k, float) { return (vi)load(row + k); }
FASTSD_INLINE vi words_at(const uint16_t* row, int64_t k, Pair) {
    vi v;
    memcpy(&v, row + 2 * k, sizeof v);
    return v;
}
FASTSD_INLINE vi words_at(const uint16_t* row, int64_t k, float) { return halves(row + k) << 16; }

#if LANES == 16
FASTSD_INLINE void transpose(vi w[LANES]) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = (__m512i)w[i];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        w[i] = (vi)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        w[i + 8] = (vi)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        w[i + 4] = (vi)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        w[i + 12] = (vi)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#else
FASTSD_INLINE void transpose(vi w[LANES]) {
    vi t[LANES] = {};
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) t[i][j] = w[j][i];
    for (int i = 0; i < LANES; i++) w[i] = t[i];
}
#endif

// rows [n <= LANES][count] -> out[word][stride]; writes LANES lanes of each word, zero beyond n.
template <class Word, class In>
static void pack_rows_block(const In* rows, int64_t row_stride, int n, int64_t count, Word* out,
                            int64_t stride) {
    int64_t depth = words<Word>(count), k = 0;
    if constexpr (sizeof(Word) == sizeof(float))
        for (; k + LANES <= count / DEPTH<Word>; k += LANES) {
            vi w[LANES];
            for (int i = 0; i < LANES; i++)
                w[i] = i < n ? words_at(rows + i * row_stride, k, Word{}) : vi{};
            transpose(w);
            for (int i = 0; i < LANES; i++) memcpy(out + (k + i) * stride, &w[i], sizeof w[i]);
        }
    for (; k < depth; k++) {
        memset(out + k * stride, 0, LANES * sizeof(Word));
        for (int i = 0; i < n; i++) word_of(out + k * stride + i, rows + i * row_stride, k, count);
    }
}

// All rows as A: block after block, [word][rows of the block].
template <class Word, class In>
static void pack_rows_a(const In* rows, int64_t row_stride, Blocks blocks, int64_t count,
                        Word* out) {
    for (int64_t b = 0; b < blocks.count; b++) {
        int64_t first = blocks.start(b);
        pack_rows_block<Word>(rows + first * row_stride, row_stride, blocks.size(b), count,
                              out + first * words<Word>(count), blocks.size(b));
    }
}
// n <= NR rows as one panel of B: [word][NR].
template <class Word, class In>
static void pack_rows_b(const In* rows, int64_t row_stride, int n, int64_t count, Word* out) {
    for (int half = 0; half < 2; half++) {
        int here = n - half * LANES;
        here = here < 0 ? 0 : here > LANES ? LANES : here;
        pack_rows_block<Word>(rows + half * LANES * row_stride, row_stride, here, count,
                              out + half * LANES, NR);
    }
}

FASTSD_INLINE vi column_words(const float* upper, const float*, float) { return (vi)load(upper); }
FASTSD_INLINE vi column_words(const uint16_t* upper, const uint16_t*, float) {
    return words_at(upper, 0, 0.f);
}
FASTSD_INLINE vi column_words(const uint16_t* upper, const uint16_t* lower, Pair) {
    return halves(upper) | halves(lower) << 16;
}

// rows [count][n columns] -> out[word][stride], LANES columns a word; `readable` columns exist.
template <class Word, class In>
static void pack_cols_block(const In* rows, int64_t row_stride, int n, int64_t readable,
                            int64_t count, Word* out, int64_t stride) {
    for (int64_t k = 0; k < words<Word>(count); k++) {
        const In* upper = rows + k * DEPTH<Word> * row_stride;
        const In* lower = upper + (DEPTH<Word> == 2 && 2 * k + 1 < count ? row_stride : 0);
        if constexpr (sizeof(Word) == sizeof(float))
            if (readable >= LANES && (DEPTH<Word> == 1 || lower != upper)) {
                vi w = column_words(upper, lower, Word{});
                memcpy(out + k * stride, &w, sizeof w);
                continue;
            }
        In pair[2];
        memset(out + k * stride, 0, LANES * sizeof(Word));
        for (int i = 0; i < n; i++) {
            pair[0] = upper[i], pair[1] = lower == upper ? In{} : lower[i];
            word_of(out + k * stride + i, pair, 0, DEPTH<Word>);
        }
    }
}

#if BF16_DOT
// A whole panel of bf16 pairs: two rows interleaved by one permutation for each half.
static void interleave_rows(const uint16_t* rows, int64_t row_stride, int64_t count, Pair* out) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 64; i++) order[i / 32][i % 32] = (uint16_t)(i / 2 + i % 2 * 32);
    __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t k = 0; k < words<Pair>(count); k++) {
        const uint16_t* upper = rows + 2 * k * row_stride;
        __m512i a = _mm512_loadu_si512(upper), b = _mm512_setzero_si512();
        if (2 * k + 1 < count) b = _mm512_loadu_si512(upper + row_stride);
        _mm512_storeu_si512(out + k * NR, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(out + k * NR + LANES, _mm512_permutex2var_epi16(a, high, b));
    }
}
#endif

// n <= NR columns as one panel of B: [word][NR].
template <class Word, class In>
static void pack_cols_b(const In* rows, int64_t row_stride, int64_t n, int64_t count, Word* out) {
#if BF16_DOT
    if constexpr (DEPTH<Word> == 2)
        if (n >= NR) return interleave_rows(rows, row_stride, count, out);
#endif
    for (int half = 0; half < 2; half++) {
        int64_t here = n - half * LANES;
        here = here < 0 ? 0 : here > LANES ? LANES : here;
        pack_cols_block<Word>(rows + half * LANES, row_stride, (int)here, here, count,
                              out + half * LANES, NR);
    }
}
// Columns as A: blocks of columns, each [word][columns of the block]; rows are readable to LANES
// columns beyond the last.
template <class Word, class In>
static void pack_cols_a(const In* rows, int64_t row_stride, Blocks blocks, int64_t count,
                        Word* out) {
    for (int64_t b = 0; b < blocks.count; b++) {
        int64_t first = blocks.start(b);
        pack_cols_block<Word>(rows + first, row_stride, blocks.size(b), LANES, count,
                              out + first * words<Word>(count), blocks.size(b));
    }
}

}  // namespace FASTSD_ISA
