// Drives the C interface of the loss head over random shapes and options, for sanitizer builds.
//
// Beside the sanitizers' reports it checks what costs little: results are finite, statistics in
// their ranges, picked indices ascend, and a row's logit gradient sums to 0, seen in the bias's
// gradient.
#include <thread>

#include "native_fuzz.h"

struct Shape {
    int dtype, keep, divergence, threads;
    int64_t rows, width, teacher_width, vocabulary, chunks, top_k;
    bool teacher, own_head, has_bias, entropy, d_student, d_head, d_bias;
    float clip, softcap;

    std::string name() const {
        char text[256];
        snprintf(text, sizeof text,
                 "dtype %d keep %d divergence %d threads %d rows %lld width %lld teacher %d/%lld "
                 "vocabulary %lld chunks %lld top_k %lld clip %g softcap %g",
                 dtype, keep, divergence, threads, (long long)rows, (long long)width, teacher,
                 (long long)teacher_width, (long long)vocabulary, (long long)chunks,
                 (long long)top_k, clip, softcap);
        return text;
    }
};

static Shape draw() {
    Shape s{};
    const int64_t widths[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 64, 65, 129};
    const int64_t vocabularies[] = {1,  2,  15,  31,  32,  33,  63,  64,
                                    65, 255, 256, 257, 300, 2047, 2049};
    s.dtype = flip() ? FASTSD_BF16 : FASTSD_F32;
    s.threads = 1 + (int)below(3);
    s.rows = below(10) ? 1 + below(30) : 1 + below(90);
    s.width = widths[below(13)];
    s.vocabulary = flip() ? 1 + below(200) : vocabularies[below(below(8) ? 13 : 15)];
    s.teacher = below(4) != 0;
    s.own_head = s.teacher && below(4) == 0;
    s.teacher_width = !s.teacher ? 0 : s.own_head ? widths[below(13)] : s.width;
    s.has_bias = flip(), s.d_bias = flip(), s.d_student = flip(), s.d_head = flip();
    s.chunks = below(3) ? 1 : 1 + below(s.rows < 4 ? s.rows : 4);
    s.divergence = s.teacher ? (int)below(4) : FASTSD_NO_DIVERGENCE;
    bool compact = s.dtype == FASTSD_BF16 && !strcmp(fastsd_isa(), "avx512_bf16") && flip();
    if (compact) {
        s.keep = s.divergence == FASTSD_NO_DIVERGENCE ? FASTSD_STUDENT
                 : s.divergence == FASTSD_REVERSE_KL  ? FASTSD_STUDENT_GAP
                                                      : FASTSD_LARGER_GAP;
    } else {
        s.keep = FASTSD_LOGITS;
        s.entropy = flip();
        s.softcap = below(3) ? 0.f : 2.f;
        if (s.divergence && below(3) == 0) s.clip = 0.05f;
        if (s.teacher && s.vocabulary > 1 && below(4) == 0) {
            s.top_k = 1 + below(s.vocabulary - 1 < 12 ? s.vocabulary - 1 : 12);
            s.divergence = FASTSD_NO_DIVERGENCE, s.clip = 0;
        }
    }
    if (!(s.d_student || s.d_head || s.d_bias) && flip()) s.keep = FASTSD_NOTHING;
    return s;
}

// All of one case's memory but a chunk's.
struct Case {
    Shape s;
    Matrix student, teacher, head, teacher_head, d_student, d_head;
    Exact<float> bias, d_bias, sum;
    Exact<int64_t> target;
    bool summed;

    explicit Case(const Shape& shape)
        : s(shape), student("student", s.dtype, s.rows, s.width, below(3)),
          teacher("teacher", s.dtype, s.teacher ? s.rows : 0, s.teacher_width, below(3)),
          head("head", s.dtype, s.vocabulary, s.width, below(3)),
          teacher_head("teacher_head", s.dtype, s.own_head ? s.vocabulary : 0, s.teacher_width,
                       below(3)),
          d_student("d_student", s.dtype, s.d_student ? s.rows : 0, s.width),
          d_head("d_head", s.dtype, s.d_head ? s.vocabulary : 0, s.width),
          bias("bias", s.has_bias ? s.vocabulary : 0),
          d_bias("d_bias", s.d_bias ? s.vocabulary : 0),
          sum("sum", narrow_sum(s) ? s.vocabulary * s.width : 0), target("target", s.rows),
          summed(s.d_head && s.chunks > 1) {
        float scale = below(6) ? 1.f : 30.f;  // some with large logits
        student.fill(scale), teacher.fill(scale), head.fill(1), teacher_head.fill(1);
        for (int64_t j = 0; j < bias.count; j++) bias.data[j] = real();
        for (int64_t j = 0; j < d_bias.count; j++) d_bias.data[j] = 0;
        for (int64_t i = 0; i < s.rows; i++) target.data[i] = below(s.vocabulary);
    }

    static bool narrow_sum(const Shape& s) {
        return s.d_head && s.chunks > 1 && s.dtype == FASTSD_BF16;
    }

    FastsdProblem problem(int64_t first, int64_t rows) const {
        FastsdProblem p{};
        p.student = student.at(first, 0), p.student_stride = student.stride, p.head = head.at(0, 0);
        p.head_stride = head.stride, p.width = s.width, p.vocabulary = s.vocabulary, p.rows = rows;
        if (s.teacher) p.teacher = teacher.at(first, 0), p.teacher_stride = teacher.stride;
        if (s.own_head) p.teacher_head = teacher_head.at(0, 0);
        p.teacher_width = s.teacher_width, p.teacher_head_stride = teacher_head.stride;
        p.bias = s.has_bias ? bias.data : nullptr, p.target = target.data + first;
        p.dtype = s.dtype, p.keep = s.keep, p.threads = s.threads;
        p.scale = s.softcap > 0 ? 0.5f : 1.f, p.softcap = s.softcap;
        return p;
    }
};

static double magnitude;  // of the coefficients of the rows so far

// Coefficients whose gradient sums to 0 in every row.
struct Terms {
    Exact<float> everywhere, weight, entropy, pull, top_value, tail, rest;
    Exact<int64_t> index;
    Terms(const Shape& s, int64_t rows)
        : everywhere("everywhere", rows), weight("weight", rows), entropy("entropy", rows),
          pull("pull", rows), top_value("top_value", rows * s.top_k), tail("tail", rows),
          rest("rest", rows), index("index", rows * s.top_k) {}

    void fill(const Shape& s, int64_t rows, const double* statistics, const double* sums,
              const double* log_rest) {
        for (int64_t i = 0; i < rows; i++) {
            const double* row = statistics + i * FASTSD_COLUMNS;
            double w = real(), e = s.entropy ? real() : 0, c = real();
            double slope = s.divergence == FASTSD_FORWARD_KL   ? -1
                           : s.divergence == FASTSD_REVERSE_KL ? row[FASTSD_REVERSE]
                                                               : 0;
            if (sums) slope = sums[i * 3 + 1] - (s.divergence == FASTSD_FORWARD_KL);
            everywhere.data[i] = (float)(-c + e * row[FASTSD_ENTROPY] - w * slope);
            weight.data[i] = (float)w, entropy.data[i] = (float)e, pull.data[i] = (float)c;
            magnitude += std::fabs(everywhere.data[i]) + std::fabs(w) * (1 + std::fabs(slope)) +
                         std::fabs(c) + std::fabs(e) * (1 + row[FASTSD_ENTROPY]);
            tail.data[i] = rest.data[i] = 0;
            if (!s.top_k) continue;
            for (int64_t k = 0; k < s.top_k; k++) {
                float value = real();
                top_value.data[i * s.top_k + k] = value, tail.data[i] -= value;
                magnitude += 2 * std::fabs(value);
            }
            rest.data[i] = (float)(log_rest[2 * i] - row[FASTSD_LSE_S]);
        }
    }
};

static void check_statistics(const Case& c, const FastsdProblem& p, const double* sums) {
    for (int64_t i = 0; i < p.rows; i++) {
        const double* row = p.statistics + i * FASTSD_COLUMNS;
        for (int k = 0; k < FASTSD_COLUMNS; k++)
            expect(std::isfinite(row[k]), "a statistic is not finite", c.s.name());
        double slack = 1e-5 * (1 + std::fabs(row[FASTSD_LSE_S]) + std::fabs(row[FASTSD_LSE_T]));
        double entropy = row[FASTSD_ENTROPY];
        bool below_1 = row[FASTSD_PICK_S] <= row[FASTSD_LSE_S] + slack &&
                       row[FASTSD_PICK_T] <= row[FASTSD_LSE_T] + slack;
        expect(below_1, "a probability above 1", c.s.name());
        expect(entropy >= -slack && entropy <= std::log(p.vocabulary) + slack,
               "an entropy out of range", c.s.name());
        expect(row[FASTSD_REVERSE] >= -slack && row[FASTSD_FORWARD] >= -slack, "a KL below 0",
               c.s.name());
        for (int k = 0; sums && k < 3; k++)
            expect(std::isfinite(sums[i * 3 + k]), "a sum is not finite", c.s.name());
    }
}

static void run_chunk(const Case& c, int64_t first, int64_t rows, bool last) {
    const Shape& s = c.s;
    FastsdProblem p = c.problem(first, rows);
    Exact<double> statistics("statistics", rows * FASTSD_COLUMNS), sums("sums", rows * 3);
    p.statistics = statistics.data;
    p.kept_rows = s.keep == FASTSD_NOTHING ? 0 : s.top_k || flip() ? rows : below(rows + 1);
    int64_t row_bytes = s.width * size_of(s.dtype);
    if (s.d_head && !(s.dtype == FASTSD_F32 && c.summed)) {
        int64_t room = fastsd_borrowed_rows(s.keep, row_bytes);
        p.borrowed_rows = flip() ? 0 : room < p.kept_rows ? room : p.kept_rows;
        p.borrowed = c.d_head.at(0, 0), p.borrowed_stride = fastsd_panel() * row_bytes;
    }
    Exact<uint8_t> scratch(
        "scratch", fastsd_scratch_bytes(s.keep, p.kept_rows, p.borrowed_rows, s.vocabulary), 64);
    p.scratch = scratch.data;
    int bad = fastsd_statistics(&p);
    FastsdGradient g{};
    g.divergence = s.divergence, g.beta = 0.3f, g.entry_clip = s.clip;
    bool summed = s.keep != FASTSD_NOTHING && (s.divergence == FASTSD_JSD || s.clip > 0);
    if (summed) bad |= fastsd_divergence_sums(&p, &g, sums.data);
    check_statistics(c, p, summed ? sums.data : nullptr);
    Terms terms(s, rows);
    Exact<float> logits("logits", rows * 2 * s.top_k);
    Exact<double> log_rest("log_rest", rows * 2);
    if (s.top_k && s.keep == FASTSD_LOGITS) {
        bad |= fastsd_top(&p, s.top_k, terms.index.data, logits.data, log_rest.data);
        for (int64_t i = 0; i < rows * s.top_k; i++) {
            int64_t before = i % s.top_k ? terms.index.data[i - 1] : -1;
            expect(terms.index.data[i] > before && terms.index.data[i] < s.vocabulary,
                   "picked indices do not ascend", s.name());
        }
    }
    if (s.keep != FASTSD_NOTHING && (s.d_student || s.d_head || s.d_bias)) {
        terms.fill(s, rows, p.statistics, summed ? sums.data : nullptr, log_rest.data);
        g.everywhere = terms.everywhere.data, g.pull = terms.pull.data;
        g.weight = s.divergence ? terms.weight.data : nullptr;
        g.entropy = s.entropy ? terms.entropy.data : nullptr;
        g.top_k = s.top_k, g.top_index = terms.index.data, g.top_value = terms.top_value.data;
        g.tail = terms.tail.data, g.rest = terms.rest.data;
        g.softcap_inverse = s.softcap > 0 ? 1 / s.softcap : 0;
        g.d_student = s.d_student ? c.d_student.at(first, 0) : nullptr;
        g.d_head = s.d_head ? c.d_head.at(0, 0) : nullptr;
        g.d_bias = s.d_bias ? c.d_bias.data : nullptr;
        if (c.summed) g.sum = s.dtype == FASTSD_BF16 ? c.sum.data : (float*)c.d_head.at(0, 0);
        g.first = first == 0, g.last = last;
        if (short_one == "race") {
            std::thread other([&] { fastsd_gradient(&p, &g); });
            fastsd_gradient(&p, &g), other.join();
        }
        bad |= fastsd_gradient(&p, &g);
    }
    expect(!bad, "a call failed", s.name());
}

static void run(const Case& c) {
    const Shape& s = c.s;
    magnitude = 0;
    for (int64_t chunk = 0; chunk < s.chunks; chunk++) {
        int64_t first = chunk * s.rows / s.chunks, stop = (chunk + 1) * s.rows / s.chunks;
        run_chunk(c, first, stop - first, chunk + 1 == s.chunks);
    }
    if (s.keep == FASTSD_NOTHING) return;
    expect(c.d_student.finite(), "d student is not finite", s.name());
    expect(c.d_head.finite(), "d head is not finite", s.name());
    double total = 0;
    for (int64_t j = 0; j < c.d_bias.count; j++) total += c.d_bias.data[j];
    // Rounding of compact forms 2^-11, of fp32 coefficients and the padding of sums far less.
    double limit = s.keep == FASTSD_LOGITS ? 1e-4 : 1.0 / 256;
    if (s.softcap == 0)
        expect(std::fabs(total) <= limit * magnitude, "rows do not sum to 0", s.name());
}

int main(int count, char** words) {
    return fuzz(count, words, [] { run(Case(draw())); });
}
