// The C interface: plain structs and pointers, no torch, called through ctypes. The loss head, then
// what decoding needs: a packed linear layer and attention.
//
// A call of the loss head covers some rows (a chunk). The order of calls for a training step:
//     fastsd_statistics        logits of both streams once; row statistics; the scratch if any
//     fastsd_divergence_sums   only for JSD and entry_clip, which need both normalisers first
//     fastsd_top               only for top_k
//     fastsd_gradient          d hidden, d head, d bias from the scratch and the caller's row terms
// All matrices are row-major with unit column stride. Functions return 0; 1: out of memory;
// 2: an unknown form to keep.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FASTSD_F32 = 0, FASTSD_BF16 = 1 };

// What is kept of a logit pair between the sweeps.
enum {
    FASTSD_NOTHING = 0,
    FASTSD_STUDENT = 1,      // fp16 e^(z_s - m)
    FASTSD_STUDENT_GAP = 2,  // and fp16 z_s - z_t - shift
    FASTSD_LARGER_GAP = 3,   // the larger of both streams' e^(z - m), and that gap
    FASTSD_LOGITS = 4        // fp32 z_s, z_t
};

enum { FASTSD_NO_DIVERGENCE = 0, FASTSD_FORWARD_KL = 1, FASTSD_REVERSE_KL = 2, FASTSD_JSD = 3 };

// Columns of the row statistics, doubles.
enum {
    FASTSD_LSE_S,
    FASTSD_LSE_T,  // log sum e^z
    FASTSD_REVERSE,
    FASTSD_FORWARD,  // KL(S||T), KL(T||S)
    FASTSD_ENTROPY,  // of S
    FASTSD_PICK_S,
    FASTSD_PICK_T,  // z[y]
    FASTSD_SHIFT,   // z_s[y] - z_t[y], taken off gaps before they are rounded
    FASTSD_COLUMNS
};

typedef struct {
    const void *student, *teacher, *head, *teacher_head;  // teacher null: no teacher
    const float* bias;                                    // [V] or null
    const int64_t* target;                                // [rows]
    int64_t rows, width, teacher_width, vocabulary;
    int64_t student_stride, teacher_stride, head_stride, teacher_head_stride;  // in elements
    int32_t dtype, keep, threads;
    float scale;        // z = scale * x, or with a softcap
    float softcap;      //     softcap * tanh(scale * x); 0: none
    int64_t kept_rows;  // the first rows are kept in the scratch, the others computed again
    void* scratch;      // fastsd_scratch_bytes(...) bytes, 64-byte aligned
    void* borrowed;  // memory of d head, for the first borrowed_rows <= fastsd_borrowed_rows(...)
    int64_t borrowed_rows, borrowed_stride;  // bytes of a panel of d head
    double* statistics;                      // [rows][FASTSD_COLUMNS], written by fastsd_statistics
} FastsdProblem;

// Row terms of the gradient, each [rows], already times dz/dx less the softcap's slope:
//     g_j = p_s (everywhere + entropy l_s) + weight F_j + pull [j = y]
//     F = -p_t (forward KL), p_s gap (reverse KL), -(1 - beta) p_s r (JSD); see gradient.h
typedef struct {
    int32_t divergence;
    float beta, entry_clip;                             // entry_clip <= 0: none
    const float *everywhere, *weight, *entropy, *pull;  // weight, entropy may be null
    int64_t top_k;             // 0: none. Of the k picked entries g_j gets top_value; of the others
    const int64_t* top_index;  // tail e^(l_s - rest). Both [rows][top_k], indices ascending
    const float *top_value, *tail, *rest;  // tail, rest: [rows]
    float softcap_inverse;     // 1 / softcap, or 0; the softcap's slope is 1 - (z / softcap)^2
    void *d_student, *d_head;  // [rows][D], [V][D] in the problem's dtype, or null
    float *d_bias, *sum;       // [V] accumulated, or null; [V][D] fp32 sum over chunks, or null
    int32_t first, last;       // is this the first chunk, the last chunk
} FastsdGradient;

const char* fastsd_isa(void);
int64_t fastsd_scratch_bytes(int32_t keep, int64_t kept, int64_t borrowed, int64_t vocabulary);
int64_t fastsd_panel(void);                                     // columns of a panel
int64_t fastsd_borrowed_rows(int32_t keep, int64_t row_bytes);  // from the bytes of a row of d head
// Asks for large pages under fresh memory: faulting it in by 4 KB costs a fifth of a call.
void fastsd_large_pages(void* data, int64_t bytes);
int fastsd_statistics(const FastsdProblem*);
int fastsd_divergence_sums(const FastsdProblem*, const FastsdGradient*,
                           double* sums);  // [rows][3]: D,
// sum F (forward KL: sum F + 1), entries held
int fastsd_top(const FastsdProblem*, int64_t k, int64_t* index, float* logits, double* rest);
int fastsd_gradient(const FastsdProblem*, const FastsdGradient*);

// y = x W^T + bias for few rows, W packed once. W is [n][k], x [m][k], both of dtype; sums in fp32.
typedef struct {
    const void *packed, *x;  // packed: by fastsd_pack, 64-byte aligned
    const float* bias;       // [n] or null
    void* y;                 // [m][n] of out_dtype
    int64_t m, n, k, x_stride, y_stride;
    int32_t dtype, out_dtype, threads;
} FastsdLinear;

int64_t fastsd_packed_bytes(int32_t dtype, int64_t n, int64_t k);
int fastsd_pack(int32_t dtype, const void* weight, int64_t row_stride, int64_t n, int64_t k,
                void* packed, int32_t threads);
int fastsd_linear(const FastsdLinear*);

// Decode attention: one new position for each row; see decode.h. A prefix, and a branch, of one
// layer takes fastsd_decode_bytes(dtype, kv_heads, head_dim, positions), its layers one after the
// other. The new key and value are stored at position length[row] of the row's branch first.
typedef struct {
    const void *query, *key, *value;  // [rows][heads][head_dim], [rows][kv_heads][head_dim]
    void* out;                        // [rows][heads][head_dim]
    int64_t query_stride, key_stride, value_stride, out_stride;  // of rows, in elements
    int64_t rows, heads, kv_heads, head_dim;
    int64_t groups;              // rows group_start[g] to group_start[g + 1] - 1 share prefix g
    const int64_t* group_start;  // [groups + 1]
    const void* const* prefix;   // [groups], 64-byte aligned as all cache memory
    const int64_t* prefix_length;
    void* branches;                // [layers][slots] branches of `capacity` positions
    const int64_t *slot, *length;  // [rows]: the branch, and how many positions it has
    int64_t layer, slots, capacity;
    int32_t dtype, threads;
    float scale;
} FastsdDecode;

// One layer of a prefix.
typedef struct {
    const void *key, *value;  // [kv_heads][positions][head_dim]
    int64_t key_head_stride, key_stride, value_head_stride, value_stride;  // of heads, positions
    int64_t kv_heads, head_dim, positions;
    void* out;  // fastsd_decode_bytes(...)
    int32_t dtype, threads;
} FastsdPrefix;

int64_t fastsd_decode_bytes(int32_t dtype, int64_t kv_heads, int64_t head_dim, int64_t positions);
int fastsd_decode_pack(const FastsdPrefix*);
int fastsd_decode(const FastsdDecode*);

// Attention over a packed token tree, forward and backward; see tree.h. Segments are listed
// depth-first; the first `outside` of them are rows of the prefixes instead of the pack. Gradients
// are written contiguously, in the dtype of the inputs.
typedef struct {
    const void *query, *key, *value;        // [T][heads][head_dim], [T][kv_heads][head_dim]
    const void *prefix_key, *prefix_value;  // [P][kv_heads][head_dim], or null
    int64_t query_stride, query_head_stride, key_stride, key_head_stride;  // in elements
    int64_t value_stride, value_head_stride, prefix_key_stride, prefix_key_head_stride;
    int64_t prefix_value_stride, prefix_value_head_stride;
    int64_t heads, kv_heads, head_dim, segments, outside;
    const int64_t *lengths, *parents;  // [segments]; parent -1: a root
    int32_t dtype, threads;
    float scale;
    void* out;         // [T][heads][head_dim], contiguous
    float* lse;        // [T][heads]
    const void* grad;  // of out; from here on the backward's
    int64_t grad_stride, grad_head_stride;
    void *d_query, *d_key, *d_value, *d_prefix_key, *d_prefix_value;
} FastsdTree;

int fastsd_tree_forward(const FastsdTree*);
int fastsd_tree_backward(const FastsdTree*);

// One token for each row of logits, by inverse cumulative mass, and its log-probability; a row that
// holds what is not a number gets token 0 and a log-probability that is not one.
typedef struct {
    const float* logits;    // [rows][columns]
    const double* uniform;  // [rows], in [0, 1)
    int64_t rows, columns, stride;
    int64_t* token;  // [rows]
    float* logprob;  // [rows]
    int32_t threads;
} FastsdDraw;

int fastsd_draw(const FastsdDraw*);

#ifdef __cplusplus
}
#endif
