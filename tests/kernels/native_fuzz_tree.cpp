// Drives the C interface of tree attention and of the draw over random trees and rows, for sanitizer
// builds. Outputs, all gradients and tokens are compared with plain sums in double.
#include <algorithm>
#include <thread>
#include <vector>

#include "native_fuzz.h"

static int64_t length() {
    const int64_t sizes[] = {0, 1, 2, 7, 31, 32, 33, 37, 38, 112, 113, 255, 256, 257, 300};
    return below(8) ? below(12) : sizes[below(15)];
}

struct Keys {  // one head's, [position][head_dim], and what flows back to them
    std::vector<std::vector<double>> key, value, d_key, d_value;
};

struct TreeCase {
    int type, threads;
    int64_t repeat, kv_heads, head_dim, outside;
    float scale = 0.3f;
    std::vector<int64_t> lengths, parents, start;
    int64_t tokens[2] = {0, 0};  // of the prefixes, of the pack

    TreeCase()
        : type(flip() ? FASTSD_BF16 : FASTSD_F32), threads(1 + (int)below(3)),
          repeat(below(3) ? 1 + below(3) : 1 + below(120)), kv_heads(1 + below(3)),
          head_dim(1 + below(below(4) ? 40 : 130)), outside(below(3) == 0) {
        // The largest quarter of all trees takes nearly all the time: of these, one in 200 cases.
        const double most = below(200) ? 5e6 : INFINITY;
        do {
            lengths.clear(), parents.clear();
            for (int64_t roots = 1 + below(2); roots > 0; roots--) grow(-1, 0);
        } while (work() > most);
        for (size_t s = 0; s < lengths.size(); s++) {
            int64_t& filled = tokens[(int64_t)s >= outside];
            start.push_back(filled), filled += lengths[s];
        }
    }
    void grow(int64_t parent, int depth) {
        int64_t own = (int64_t)lengths.size();
        lengths.push_back(length()), parents.push_back(parent);
        for (int64_t children = below(4 - depth); children > 0; children--) grow(own, depth + 1);
    }
    double work() const {  // multiplications of one product of all pairs of positions
        double pairs = 0;
        for (size_t s = 0; s < lengths.size(); s++)
            for (int64_t from = (int64_t)s; from >= 0; from = parents[from])
                pairs += (double)lengths[s] * (double)lengths[from];
        return pairs * (double)(kv_heads * repeat * head_dim);
    }
    std::string name() const {
        std::string text = "tree dtype " + std::to_string(type) + " heads " +
                           std::to_string(kv_heads) + " x " + std::to_string(repeat) + " of " +
                           std::to_string(head_dim) + " outside " + std::to_string(outside);
        for (size_t s = 0; s < lengths.size(); s++)
            text += " " + std::to_string(lengths[s]) + "<" + std::to_string(parents[s]);
        return text;
    }

    void run() {
        int64_t heads = kv_heads * repeat;
        Matrix query("query", type, tokens[1], heads * head_dim, below(3));
        Matrix key("key", type, tokens[1], kv_heads * head_dim, below(3));
        Matrix value("value", type, tokens[1], kv_heads * head_dim, below(3));
        Matrix prefix_key("prefix_key", type, tokens[0], kv_heads * head_dim, below(3));
        Matrix prefix_value("prefix_value", type, tokens[0], kv_heads * head_dim, below(3));
        Matrix grad("grad", type, tokens[1], heads * head_dim, below(3));
        Matrix out("out", type, tokens[1], heads * head_dim);
        Matrix d_query("d_query", type, tokens[1], heads * head_dim);
        Matrix d_key("d_key", type, tokens[1], kv_heads * head_dim);
        Matrix d_value("d_value", type, tokens[1], kv_heads * head_dim);
        Matrix d_prefix_key("d_prefix_key", type, tokens[0], kv_heads * head_dim);
        Matrix d_prefix_value("d_prefix_value", type, tokens[0], kv_heads * head_dim);
        Exact<float> lse("lse", tokens[1] * heads);
        Exact<int64_t> shape("lengths", (int64_t)lengths.size());
        Exact<int64_t> above("parents", (int64_t)parents.size());
        memcpy(shape.data, lengths.data(), shape.bytes);
        memcpy(above.data, parents.data(), above.bytes);
        for (Matrix* x : {&query, &key, &value, &prefix_key, &prefix_value, &grad}) x->fill(1);
        FastsdTree p{};
        p.query = query.bytes.data, p.key = key.bytes.data, p.value = value.bytes.data;
        p.prefix_key = prefix_key.bytes.data, p.prefix_value = prefix_value.bytes.data;
        p.query_stride = query.stride, p.key_stride = key.stride, p.value_stride = value.stride;
        p.prefix_key_stride = prefix_key.stride, p.prefix_value_stride = prefix_value.stride;
        p.query_head_stride = p.key_head_stride = p.value_head_stride = head_dim;
        p.prefix_key_head_stride = p.prefix_value_head_stride = p.grad_head_stride = head_dim;
        p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
        p.segments = (int64_t)lengths.size(), p.outside = outside;
        p.lengths = shape.data, p.parents = above.data;
        p.dtype = type, p.threads = threads, p.scale = scale;
        p.out = out.bytes.data, p.lse = lse.data, p.grad = grad.bytes.data;
        p.grad_stride = grad.stride, p.d_query = d_query.bytes.data;
        p.d_key = d_key.bytes.data, p.d_value = d_value.bytes.data;
        p.d_prefix_key = d_prefix_key.bytes.data, p.d_prefix_value = d_prefix_value.bytes.data;
        if (short_one == "race") {
            std::thread other([&] { fastsd_tree_forward(&p); });
            fastsd_tree_forward(&p), other.join();
        }
        expect(!fastsd_tree_forward(&p) && !fastsd_tree_backward(&p), "a call failed", name());
        if (short_one != "") return;
        compare(below(kv_heads), {&query, &key, &value, &prefix_key, &prefix_value, &grad},
                {&out, &d_query, &d_key, &d_value, &d_prefix_key, &d_prefix_value});
    }

    std::vector<double> row(const Matrix& x, int64_t i, int64_t head) const {
        std::vector<double> found;
        for (int64_t k = 0; k < head_dim; k++) found.push_back(get(x.at(i, head * head_dim + k), type));
        return found;
    }

    // One key head with all of its query heads.
    void compare(int64_t head, std::vector<const Matrix*> in, std::vector<const Matrix*> found) const {
        Keys all[2];
        for (int where = 0; where < 2; where++)
            for (int64_t i = 0; i < tokens[where]; i++) {
                all[where].key.push_back(row(*in[where ? 1 : 3], i, head));
                all[where].value.push_back(row(*in[where ? 2 : 4], i, head));
                all[where].d_key.emplace_back(head_dim, 0.0);
                all[where].d_value.emplace_back(head_dim, 0.0);
            }
        double off = 0, most = 1e-3;
        for (int64_t h = head * repeat; h < (head + 1) * repeat; h++)
            for (int64_t s = outside; s < (int64_t)lengths.size(); s++)
                for (int64_t i = 0; i < lengths[s]; i++)
                    token(all, s, i, h, in, found, &off, &most);
        for (int where = 0; where < 2; where++)
            for (int64_t i = 0; i < tokens[where]; i++) {
                measure(all[where].d_key[i], row(*found[where ? 2 : 4], i, head), &off, &most);
                measure(all[where].d_value[i], row(*found[where ? 3 : 5], i, head), &off, &most);
            }
        // Sums of some hundred terms of order 1, times the heads that add up; bf16: some roundings.
        expect(off <= most * (type == FASTSD_BF16 ? 0.03 : 3e-5), "attention is off", name());
    }
    static void measure(const std::vector<double>& exact, const std::vector<double>& found, double* off,
                        double* most) {
        for (size_t k = 0; k < exact.size(); k++) {
            double error = std::fabs(exact[k] - found[k]);
            *off = error > *off || error != error ? error : *off;
            *most = std::max(*most, std::fabs(exact[k]));
        }
    }

    void token(Keys* all, int64_t s, int64_t i, int64_t h, const std::vector<const Matrix*>& in,
               const std::vector<const Matrix*>& found, double* off, double* most) const {
        std::vector<double> q = row(*in[0], start[s] + i, h), g = row(*in[5], start[s] + i, h);
        std::vector<std::pair<int, int64_t>> seen;
        for (int64_t from = s; from >= 0; from = parents[from])
            for (int64_t j = 0; j < (from == s ? i + 1 : lengths[from]); j++)
                seen.emplace_back(from >= outside, start[from] + j);
        std::vector<double> weight, out(head_dim, 0.0), d_query(head_dim, 0.0);
        double total = 0, dot = 0;
        for (auto [where, j] : seen) {
            double score = 0;
            for (int64_t k = 0; k < head_dim; k++) score += scale * q[k] * all[where].key[j][k];
            weight.push_back(std::exp(score)), total += weight.back();
        }
        for (size_t n = 0; n < seen.size(); n++)
            for (int64_t k = 0; k < head_dim; k++)
                out[k] += weight[n] / total * all[seen[n].first].value[seen[n].second][k];
        for (int64_t k = 0; k < head_dim; k++) dot += g[k] * out[k];
        for (size_t n = 0; n < seen.size(); n++) {
            Keys& keys = all[seen[n].first];
            int64_t j = seen[n].second;
            double share = weight[n] / total, slope = -dot;
            for (int64_t k = 0; k < head_dim; k++) slope += g[k] * keys.value[j][k];
            for (int64_t k = 0; k < head_dim; k++) {
                d_query[k] += scale * share * slope * keys.key[j][k];
                keys.d_key[j][k] += scale * share * slope * q[k];
                keys.d_value[j][k] += share * g[k];
            }
        }
        measure(out, row(*found[0], start[s] + i, h), off, most);
        measure(d_query, row(*found[1], start[s] + i, h), off, most);
    }
};

static void run_draw() {
    int64_t rows = 1 + below(5), columns = below(3) ? 1 + below(70) : 1 + below(2100);
    Matrix logits("logits", FASTSD_F32, rows, columns, below(3));
    Exact<double> uniform("uniform", rows);
    Exact<int64_t> token("token", rows);
    Exact<float> logprob("logprob", rows);
    logits.fill(10);
    for (int64_t i = 0; (i + 1) * sizeof(double) <= uniform.bytes; i++)
        uniform.data[i] = below(9) ? (double)below(1 << 20) / (1 << 20) : 1 - 0x1p-53;
    FastsdDraw p{(const float*)logits.bytes.data, uniform.data, rows, columns, logits.stride,
                 token.data, logprob.data, 1 + (int)below(3)};
    if (short_one == "race") {
        std::thread other([&] { fastsd_draw(&p); });
        fastsd_draw(&p), other.join();
    }
    expect(!fastsd_draw(&p), "a call failed", "draw");
    if (short_one != "") return;
    for (int64_t i = 0; i < rows; i++) {
        double total = 0, below_it = 0;
        for (int64_t j = 0; j < columns; j++) total += std::exp((double)get(logits.at(i, j), FASTSD_F32));
        for (int64_t j = 0; j < token.data[i]; j++)
            below_it += std::exp((double)get(logits.at(i, j), FASTSD_F32));
        double own = std::exp((double)get(logits.at(i, token.data[i]), FASTSD_F32));
        bool in = uniform.data[i] >= below_it / total - 1e-5 &&
                  uniform.data[i] <= (below_it + own) / total + 1e-5;
        double error = std::fabs(logprob.data[i] - std::log(own / total));
        expect(in && error < 2e-5, "a draw is off", "draw of " + std::to_string(columns));
    }
}

int main(int count, char** words) {
    return fuzz(count, words, [] {
        if (below(4)) TreeCase().run();
        else run_draw();
    });
}
