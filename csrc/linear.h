// y[m, n] = x[m, k] W[n, k]^T + bias for few rows: what it takes is reading W, packed once.
//
// W is packed as panels of B, one after the other, so every thread reads one stream. Per panel of
// NR = 32 columns, k = 576: 36 KB in bf16, read once and multiplied with all rows while in cache;
// x, as A, is packed once a call. Work: 2 m n k FLOP on n k words of W, so up to about 8 rows the
// time is that of reading W. bf16 weights are bf16 in memory on every processor.
//
// Panels are taken by whichever thread is free; a row's sums run over k in one order, so neither
// threads nor the other rows change a bit.
#pragma once
#include <atomic>

#include "fastsd_native.h"
#include "pack.h"
#include "parallel.h"

namespace FASTSD_ISA {

template <class In, class Word, class Stored>
struct Linear {
    static int64_t panel_words(int64_t k) { return words<Stored>(k) * NR; }
    static int64_t packed_bytes(int64_t n, int64_t k) {
        return panels(n) * panel_words(k) * (int64_t)sizeof(Stored);
    }

    static int pack(const In* weight, int64_t stride, int64_t n, int64_t k, Stored* out,
                    int threads) {
        parallel(threads, [&](int thread) {
            Share share(panels(n), thread, threads);
            for (int64_t i = share.first; i < share.last; i++) {
                int64_t left = n - i * NR;
                pack_rows_b(weight + i * NR * stride, stride, left < NR ? (int)left : NR, k,
                            out + i * panel_words(k));
            }
        });
        return 0;
    }

    const FastsdLinear& p;
    int64_t depth, all;
    Blocks blocks;
    Word* a = nullptr;
    explicit Linear(const FastsdLinear& problem)
        : p(problem), depth(words<Word>(problem.k)), all(panels(problem.n)), blocks(problem.m) {}

    int run() {
        if (p.m == 0) return 0;
        static thread_local Kept kept;
        a = kept.room<Word>(p.m * depth + PAD);
        if (!a) return 1;
        pack_rows_a((const In*)p.x, p.x_stride, blocks, p.k, a);
        std::atomic<int64_t> next{0};
        parallel(p.threads, [&](int) {
            for (int64_t i = next++; i < all;) {
                int64_t following = next++;
                panel(i, following);
                i = following;
            }
        });
        return 0;
    }

    const Stored* panel_of(int64_t index) const {
        return (const Stored*)p.packed + index * panel_words(p.k);
    }

    // With several blocks of rows the panel that follows is fetched meanwhile, a part with each.
    void panel(int64_t index, int64_t following) const {
        const Stored* next = panel_of(following);
        if (blocks.count == 1) return tile(index, 0, ahead_of(panel_of(index), depth, next));
        int64_t part = panel_words(p.k) / blocks.count;
        int64_t step = NR * (int64_t)sizeof(Stored) / blocks.count;
        for (int64_t block = 0; block < blocks.count; block++)
            tile(index, block, Along{(const char*)(next + block * part), step});
    }

    template <class Meanwhile>
    void tile(int64_t index, int64_t block, const Meanwhile& meanwhile) const {
        alignas(64) float z[MR * NR];
        int64_t first = blocks.start(block), n = blocks.size(block);
        product<Word>((int)n, a + first * depth, panel_of(index), depth, z, NR, false, meanwhile);
        for (int64_t i = 0; i < n; i++) {
            int64_t row = (first + i) * p.y_stride;
            if (p.out_dtype == FASTSD_BF16) put(z + i * NR, index * NR, (uint16_t*)p.y + row);
            else put(z + i * NR, index * NR, (float*)p.y + row);
        }
    }

    template <class Out>
    void put(const float* z, int64_t column, Out* row) const {
        int64_t left = p.n - column;
        if (left >= NR) {
            for (int64_t j = 0; j < NR; j += LANES) {
                vf x = load(z + j);
                narrow(row + column + j, p.bias ? x + load(p.bias + column + j) : x);
            }
        } else {
            for (int64_t j = 0; j < left; j++)
                narrow(row + column + j, p.bias ? z[j] + p.bias[column + j] : z[j]);
        }
    }
};

}  // namespace FASTSD_ISA
