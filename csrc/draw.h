// One token for each row of logits: the first whose cumulative mass exceeds u times the whole.
//
// Masses e^(z - max) are summed over segments of columns, in fp32 within and in fp64 across, always
// in one order: a row's token does not depend on the other rows. Only the segment that the draw
// falls into is walked again. Work: 2 reads and 1 exponential for each of V columns.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace FASTSD_ISA {

struct Draw {
    static constexpr int64_t SEGMENT_COLUMNS = 1024;
    const float* z;
    int64_t columns;
    float most;

    Draw(const float* logits, int64_t n) : z(logits), columns(n) {
        vf highest = splat(-3.4e38f);
        int64_t i = 0;
        for (; i + LANES <= columns; i += LANES) highest = maximum(highest, load(z + i));
        most = highest[0];  // what is not a number comes out
        for (int lane = 1; lane < LANES; lane++) most = more(most, highest[lane]);
        for (; i < columns; i++) most = more(most, z[i]);
    }
    static float more(float a, float b) { return a > b || a != a ? a : b; }

    // e^(z - most) of LANES columns from i on; a mass that fp32 cannot hold is 0, as beyond the end.
    vf masses(int64_t i) const {
        float tail[LANES];
        const float* from = z + i;
        if (i + LANES > columns) {
            for (int lane = 0; lane < LANES; lane++)
                tail[lane] = i + lane < columns ? z[i + lane] : -3.4e38f;
            from = tail;
        }
        vf x = load(from) - most;
        return x < splat(-87.f) ? vf{} : exponential(x);
    }

    double sum_of(int64_t first) const {
        int64_t end = first + SEGMENT_COLUMNS < columns ? first + SEGMENT_COLUMNS : columns;
        vf total{};
        for (int64_t i = first; i < end; i += LANES) total += masses(i);
        return sum(total);
    }

    // The token, or -1 where the row holds what is not a number or no finite one.
    int64_t pick(double uniform, double* total) const {
        *total = 0;
        for (int64_t first = 0; first < columns; first += SEGMENT_COLUMNS) *total += sum_of(first);
        if (!(*total >= 1)) return -1;  // the largest entry alone has mass 1
        double wanted = uniform * *total, before = 0;
        int64_t last = -1, first = 0;
        for (; first < columns; first += SEGMENT_COLUMNS) {
            double own = sum_of(first);
            if (before + own > wanted) break;
            before += own;
        }
        // Rounding may leave the walk short of the sum: then the last token that has any mass.
        if (first >= columns) first = 0, before = -1;
        for (int64_t i = first; i < columns; i += LANES) {
            vf mass = masses(i);
            for (int lane = 0; lane < LANES && i + lane < columns; lane++) {
                if (!(mass[lane] > 0)) continue;
                last = i + lane;
                if (before >= 0 && (before += mass[lane]) > wanted) return last;
            }
        }
        return last;
    }
};

static int draw(const FastsdDraw& p) {
    parallel(p.threads < p.rows ? p.threads : (int)p.rows, [&](int thread) {
        int threads = p.threads < p.rows ? p.threads : (int)p.rows;
        Share share(p.rows, thread, threads);
        for (int64_t row = share.first; row < share.last; row++) {
            Draw one(p.logits + row * p.stride, p.columns);
            double total;
            int64_t token = one.pick(p.uniform[row], &total);
            p.token[row] = token < 0 ? 0 : token;
            p.logprob[row] = token < 0
                                 ? __builtin_nanf("")
                                 : (float)((double)one.z[token] - one.most - __builtin_log(total));
        }
    });
    return 0;
}

}  // namespace FASTSD_ISA
