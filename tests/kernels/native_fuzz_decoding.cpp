// Drives the C interface of the packed linear layer and of decode attention over random shapes, for
// sanitizer builds. One row's results are compared with plain sums in double.
#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "native_fuzz.h"

// Numbers of rows of the register tile (14, 6, 4), of columns (32, 16, 8), and their neighbours.
static int64_t size() {
    const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33, 64, 65, 127, 129};
    return flip() ? 1 + below(40) : sizes[below(17)];
}
static int dtype() { return flip() ? FASTSD_BF16 : FASTSD_F32; }

// How far a result may be off: fp32 sums of `count` products whose absolute values sum to `terms`,
// each product off by `relative` of itself before, and the result's own rounding.
static double bound(double exact, double terms, int64_t count, double relative, int out_dtype) {
    double error = terms * ((double)(count + 8) * 0x1p-24 + relative);
    return error + (out_dtype == FASTSD_BF16 ? 0x1p-8 * (std::fabs(exact) + error) : 0);
}

static void run_linear() {
    int64_t m = below(20) ? size() : 0, n = size(), k = below(8) ? size() : 1 + below(1100);
    int type = dtype(), out_type = dtype(), threads = 1 + (int)below(3);
    char where[128];
    snprintf(where, sizeof where, "linear dtype %d to %d, %lld x %lld x %lld, threads %d", type,
             out_type, (long long)m, (long long)n, (long long)k, threads);
    Matrix weight("weight", type, n, k, below(3)), x("x", type, m, k, below(3));
    Matrix y("y", out_type, m, n, below(3));
    Exact<float> bias("bias", flip() ? n : 0);
    Exact<uint8_t> packed("packed", fastsd_packed_bytes(type, n, k), 64);
    weight.fill(1), x.fill(1);
    for (int64_t j = 0; (j + 1) * sizeof(float) <= bias.bytes; j++) bias.data[j] = real();
    int bad = fastsd_pack(type, weight.bytes.data, weight.stride, n, k, packed.data, threads);
    FastsdLinear p{packed.data, x.bytes.data, bias.count ? bias.data : nullptr, y.bytes.data,
                   m, n, k, x.stride, y.stride, type, out_type, threads};
    if (short_one == "race") {
        std::thread other([&] { fastsd_linear(&p); });
        fastsd_linear(&p), other.join();
    }
    bad |= fastsd_linear(&p);
    expect(!bad, "a call failed", where);
    int64_t row = m ? below(m) : 0;
    for (int64_t j = 0; m && j < n; j++) {
        double exact = bias.count ? bias.data[j] : 0, terms = std::fabs(exact);
        for (int64_t i = 0; i < k; i++) {
            double product = (double)get(x.at(row, i), type) * get(weight.at(j, i), type);
            exact += product, terms += std::fabs(product);
        }
        double error = std::fabs(get(y.at(row, j), out_type) - exact);
        expect(error <= bound(exact, terms, k, 0, out_type), "a sum is off", where);
    }
}

struct Position {  // of one row, all key/value heads
    std::vector<float> key, value;
};

// Groups of rows that decode some steps; every row's positions are kept for comparison.
struct Decoding {
    int type, threads;
    int64_t kv_heads, repeat, head_dim, groups, rows, layers, slots, capacity;
    Exact<int64_t> group_start, prefix_length, slot, length;
    Exact<const void*> prefix;
    std::vector<std::unique_ptr<Exact<uint8_t>>> memory;  // of prefixes
    std::vector<std::vector<Position>> seen;              // [row], of the last layer
    std::unique_ptr<Exact<uint8_t>> branches;

    static int64_t few() { return below(3) ? 1 + below(3) : 1 + below(17); }
    Decoding()
        : type(dtype()), threads(1 + (int)below(3)), kv_heads(1 + below(3)), repeat(few()),
          head_dim(size()), groups(1 + below(3)), rows(groups + below(12)), layers(1 + below(2)),
          slots(rows + below(2)), capacity(below(6) ? 1 + below(70) : 250 + below(20)),
          group_start("group_start", groups + 1), prefix_length("prefix_length", groups),
          slot("slot", rows), length("length", rows), prefix("prefix", groups), seen(rows) {
        for (int64_t g = 0; g <= groups; g++) at(group_start, g) = g * rows / groups;
        for (int64_t i = 0; i < rows; i++) at(slot, i) = slots - 1 - i, at(length, i) = 0;
        for (int64_t g = 0; g < groups; g++) admit(g);
        int64_t bytes = fastsd_decode_bytes(type, kv_heads, head_dim, capacity);
        branches.reset(new Exact<uint8_t>("branches", layers * slots * bytes, 64));
    }

    // The driver itself leaves out an element that is not there.
    template <class T>
    static T& at(const Exact<T>& x, int64_t i) {
        static T nowhere;
        return (i + 1) * sizeof(T) <= x.bytes ? x.data[i] : nowhere;
    }

    std::string name() const {
        char text[256];
        snprintf(text, sizeof text,
                 "decode dtype %d heads %lld x %lld of %lld, groups %lld rows %lld capacity %lld "
                 "threads %d", type, (long long)kv_heads, (long long)repeat, (long long)head_dim,
                 (long long)groups, (long long)rows, (long long)capacity, threads);
        return text;
    }

    void admit(int64_t group) {
        int64_t positions = below(4) ? below(70) : below(3) ? 0 : 250 + below(20);
        int64_t bytes = fastsd_decode_bytes(type, kv_heads, head_dim, positions);
        memory.emplace_back(new Exact<uint8_t>("prefix_memory", layers * bytes, 64));
        at(prefix, group) = memory.back()->data, at(prefix_length, group) = positions;
        for (int64_t layer = 0; layer < layers; layer++) {
            Matrix key("prefix_key", type, kv_heads * positions, head_dim, below(3));
            Matrix value("prefix_value", type, kv_heads * positions, head_dim, below(3));
            key.fill(2), value.fill(1);
            FastsdPrefix p{key.bytes.data, value.bytes.data, positions * key.stride, key.stride,
                           positions * value.stride, value.stride, kv_heads, head_dim, positions,
                           memory.back()->data + layer * bytes, type, threads};
            expect(!fastsd_decode_pack(&p), "a call failed", name());
            if (layer + 1 < layers) continue;
            for (int64_t row = at(group_start, group); row < at(group_start, group + 1); row++)
                for (int64_t i = 0; i < positions; i++) remember(row, key, value, i, positions);
        }
    }

    // Position i of each head; heads are `apart` rows of the matrices apart.
    void remember(int64_t row, const Matrix& key, const Matrix& value, int64_t i, int64_t apart) {
        Position p;
        for (int64_t h = 0; h < kv_heads; h++)
            for (int64_t k = 0; k < head_dim; k++) {
                p.key.push_back(get(key.at(h * apart + i, k), type));
                p.value.push_back(get(value.at(h * apart + i, k), type));
            }
        seen[row].push_back(p);
    }

    void run() {
        int64_t steps = std::min<int64_t>(capacity, below(3) ? 1 + below(4) : capacity);
        for (int64_t i = 0; i < steps; i++) {
            step(i + 1 == steps);
            for (int64_t row = 0; row < rows; row++) at(length, row)++;
        }
    }

    void step(bool check) {
        for (int64_t layer = 0; layer < layers; layer++) {
            int64_t heads = kv_heads * repeat, extra = below(3);
            // As a matrix of heads, one after the other, with rows of the batch apart.
            Matrix query("query", type, rows, heads * head_dim, extra);
            Matrix key("key", type, rows, kv_heads * head_dim, below(3));
            Matrix value("value", type, rows, kv_heads * head_dim, below(3));
            Matrix out("out", type, rows, heads * head_dim, below(3));
            query.fill(2), key.fill(2), value.fill(1);
            FastsdDecode p{};
            p.query = query.bytes.data, p.query_stride = query.stride;
            p.key = key.bytes.data, p.key_stride = key.stride;
            p.value = value.bytes.data, p.value_stride = value.stride;
            p.out = out.bytes.data, p.out_stride = out.stride;
            p.rows = rows, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
            p.groups = groups, p.group_start = group_start.data, p.prefix = prefix.data;
            p.prefix_length = prefix_length.data, p.branches = branches->data;
            p.slot = slot.data, p.length = length.data, p.layer = layer, p.slots = slots;
            p.capacity = capacity, p.dtype = type, p.threads = threads, p.scale = 0.3f;
            if (short_one == "race") {
                std::thread other([&] { fastsd_decode(&p); });
                fastsd_decode(&p), other.join();
            }
            expect(!fastsd_decode(&p), "a call failed", name());
            if (layer + 1 < layers) continue;
            for (int64_t row = 0; row < rows; row++) {
                seen[row].emplace_back();
                for (int64_t k = 0; k < kv_heads * head_dim; k++) {
                    seen[row].back().key.push_back(get(key.at(row, k), type));
                    seen[row].back().value.push_back(get(value.at(row, k), type));
                }
            }
            if (check) compare(query, out, below(rows), below(heads));
        }
    }

    void compare(const Matrix& query, const Matrix& out, int64_t row, int64_t head) const {
        int64_t first = head / repeat * head_dim, positions = (int64_t)seen[row].size();
        std::vector<double> weight;
        double most = -1e300, total = 0, norm = 0;
        for (const Position& p : seen[row]) {
            double score = 0, terms = 0;
            for (int64_t k = 0; k < head_dim; k++) {
                double x = 0.3f * (double)get(query.at(row, head * head_dim + k), type) *
                           p.key[first + k];
                score += x, terms += std::fabs(x);
            }
            weight.push_back(score), most = std::max(most, score), norm = std::max(norm, terms);
        }
        for (double& w : weight) w = std::exp(w - most), total += w;
        for (int64_t k = 0; k < head_dim; k++) {
            double exact = 0, terms = 0;
            for (int64_t i = 0; i < positions; i++) {
                double x = weight[i] / total * seen[row][i].value[first + k];
                exact += x, terms += std::fabs(x);
            }
            // Of a weight: the errors of two scores, and in bf16 its rounding.
            double relative = std::expm1(2 * norm * (double)(head_dim + 2) * 0x1p-24);
            if (type == FASTSD_BF16) relative += 0x1p-8 * (1 + relative);
            double error = std::fabs(get(out.at(row, head * head_dim + k), type) - exact);
            bool good = error <= bound(exact, terms, positions, relative, type);
            expect(good, "attention is off", name());
        }
    }
};

int main(int count, char** words) {
    return fuzz(count, words, [] {
        if (flip()) run_linear();
        else Decoding().run();
    });
}
