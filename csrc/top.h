// The k largest student logits of each row, exactly, from kept logits; ties go to the lower index.
//
// The k-th largest of the panels' maxima bounds the k-th largest logit from below, so that few
// candidates remain to be ordered. Also the log mass outside, summed there: no cancellation.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>

#include "projection.h"

namespace FASTSD_ISA {

constexpr int64_t ROWS_AT_ONCE = 8;  // gathered together: their slots are neighbours

struct Candidate {
    float z;
    int64_t index;
};
struct Larger {
    bool operator()(const Candidate& a, const Candidate& b) const {
        return a.z != b.z ? a.z > b.z : a.index < b.index;
    }
};
struct Earlier {
    bool operator()(const Candidate& a, const Candidate& b) const { return a.index < b.index; }
};

// log of the sum of e^z over a row without the picked entries.
static double log_rest(float* z, int64_t padded, const Candidate* picked, int64_t k) {
    for (int64_t i = 0; i < k; i++) z[picked[i].index] = -1e30f;
    vf most = splat(-1e30f);
    for (int64_t i = 0; i < padded; i += LANES) most = maximum(most, load(z + i));
    float m = largest(most);
    double total = 0;
    const int64_t run = 128 * LANES;  // as many additions a lane as in sweep one
    for (int64_t start = 0; start < padded; start += run) {
        vf part{};
        int64_t stop = start + run < padded ? start + run : padded;
        for (int64_t i = start; i < stop; i += LANES) {
            vf x = load(z + i);
            part += x > -1e29f ? exponential(x - m) : vf{};
        }
        total += sum(part);
    }
    return m + log(total);
}

struct TopRow {
    int64_t vocabulary, padded, k;
    Buffer<Candidate> found, maxima;
    TopRow(int64_t v, int64_t top)
        : vocabulary(v), padded(panels(v) * NR), k(top), found(v), maxima(panels(v)) {}
    bool ok() const { return found.ok() && maxima.ok(); }

    // What orders entries: not a number counts as the largest, as in torch.topk; nothing is below
    // the padding, so that a bound from panels' maxima never leaves fewer than k.
    static float rank(float z) { return z != z ? INFINITY : z < -1e30f ? -1e30f : z; }

    // z: [padded], -1e30 beyond the vocabulary. The first k of `found` are the result.
    void select(const float* z) {
        float bound = -1e30f;
        int64_t all = padded / NR, n = 0;
        if (k < all) {
            for (int64_t i = 0; i < all; i++)
                maxima.data[i] = {
                    rank(largest(maximum(load(z + i * NR), load(z + i * NR + LANES)))), i};
            std::nth_element(maxima.data, maxima + (k - 1), maxima + all, Larger{});
            bound = maxima.data[k - 1].z;
        }
        for (int64_t i = 0; i < vocabulary; i++)
            if (rank(z[i]) >= bound) found.data[n++] = {rank(z[i]), i};
        std::nth_element(found.data, found + (k - 1), found + n, Larger{});
        std::sort(found.data, found + k, Earlier{});
    }
};

// index [rows][k] ascending; logits [rows][2][k] of student and teacher; rest [rows][2].
static int top(const FastsdProblem& p, int64_t k, int64_t* index, float* logits, double* rest) {
    int64_t all = panels(p.vocabulary), padded = all * NR;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    parallel(p.threads, [&](int) {
        Buffer<float> z(ROWS_AT_ONCE * 2 * padded);
        TopRow row_top(p.vocabulary, k);
        if (!z.ok() || !row_top.ok()) return (void)(failed = true);
        for (int64_t first; (first = next.fetch_add(ROWS_AT_ONCE)) < p.rows;) {
            int64_t n = std::min<int64_t>(ROWS_AT_ONCE, p.rows - first);
            for (int64_t i = 0; i < all; i++)
                for (int64_t j = 0; j < n; j++) {
                    const char* slot = slot_of<FASTSD_LOGITS>(p, i, first + j).data;
                    for (int side = 0; side < 2; side++)
                        memcpy(z + (2 * j + side) * padded + i * NR, slot + side * NR * 4, NR * 4);
                }
            for (int64_t j = 0; j < n; j++) {
                float *z_s = z + 2 * j * padded, *z_t = z_s + padded;
                int64_t row = first + j;
                row_top.select(z_s);
                for (int64_t i = 0; i < k; i++) {
                    int64_t picked = row_top.found.data[i].index;
                    index[row * k + i] = picked;
                    logits[2 * row * k + i] = z_s[picked];
                    logits[(2 * row + 1) * k + i] = z_t[picked];
                }
                rest[2 * row] = log_rest(z_s, padded, row_top.found.data, k);
                rest[2 * row + 1] = log_rest(z_t, padded, row_top.found.data, k);
            }
        }
    });
    return failed ? 1 : 0;
}

}  // namespace FASTSD_ISA
