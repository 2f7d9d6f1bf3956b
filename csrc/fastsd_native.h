// The C interface of the loss head: plain structs and pointers, no torch, called through ctypes.
//
// A call covers some rows (a chunk). The order of calls for a training step:
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

#ifdef __cplusplus
}
#endif
