/* Kernels for CPUs: decoding (kernels.h, draw.h) and the parts of training that torch is slow at (attention.h, training.h).
 *
 * Decoding is the forward pass of a Llama-shaped model over slots of a KV cache, in one call. A decode step of a small
 * model is bound by reading its weights once, and through a general library by the overhead of hundreds of small
 * operations as well. Here a step is one parallel region: threads meet at barriers, weights are read in order,
 * attention reads each slot's own length and no padding.
 *
 * Plain C with OpenMP. It is loaded by ctypes after torch and uses the OpenMP runtime that torch has loaded, so that
 * the two share one pool of threads (__init__.py). Nothing here allocates or checks: the caller does.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_HEAD_DIM 256
#define MAX_GROUP 4 /* query heads that one pass over the keys serves */
#define MAX_THREADS 128

typedef float v16f __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint16_t v16u16 __attribute__((vector_size(32)));

typedef struct {
    const void *qkv, *out, *gate_up, *down;         /* packed weights */
    const float *qkv_bias, *out_bias;               /* or NULL */
    const float *attention_norm, *mlp_norm;         /* [hidden], or NULL: no norm */
    const float *query_norm, *key_norm;             /* [head_dim], or NULL */
} layer_t;

typedef struct {
    int32_t is_bf16, hidden, num_heads, num_kv_heads, head_dim, intermediate, num_layers, vocab;
    int32_t num_slots, capacity, num_threads;       /* capacity: positions of a slot, a multiple of 16 */
    float epsilon;
    const void *embedding, *head;                   /* [vocab, hidden]; packed */
    const float *final_norm, *cosine, *sine;        /* [hidden], or NULL; [capacity, head_dim / 2] */
    const layer_t *layers;
    void *keys, *values;                            /* [num_layers][num_slots][num_kv_heads][capacity][head_dim] */
    float *residual, *qkv, *scores;                 /* scratch: [rows, hidden]; [rows, heads, head_dim]; [threads, 4, capacity + 16] */
    void *input, *attended, *activation;            /* scratch in the weights' dtype: [rows, widest] */
} model_t;

typedef struct {                                    /* tokens to run; those of one slot in order of position */
    int32_t num;
    const int64_t *tokens, *slots, *positions;      /* [num]: token i extends slots[i] at positions[i] */
    const int64_t *first_sharer, *sharers;          /* [num + 1], or NULL: slots sharers[first_sharer[i] ..] have the same past */
} rows_t;

typedef struct { _Alignas(64) int32_t panels; } turn_t; /* how many of a thread's panels of a matmul were taken */
typedef struct { turn_t (*done)[MAX_THREADS]; int number; } turns_t; /* of this matmul and the next, in turn; matmuls so far */

typedef struct {                                    /* rows of logits to draw a token from, each */
    int32_t num_threads, num_rows, num_logits, vocab, width; /* width: of a block of the vocabulary */
    const float *logits;                            /* [num_rows, num_logits] */
    const int64_t *tokens;                          /* [num_logits], in order: what they are of; or NULL: of all tokens */
    const int64_t *seeds, *positions;               /* [num_rows] */
    const float *temperature;                       /* [num_rows]; 0: the largest */
    float *masses;                                  /* scratch: [num_threads, blocks + 1] */
    int32_t *starts;                                /* likewise */
    int64_t *drawn;                                 /* [num_rows] */
    float *logprobs;                                /* likewise; at temperature 1 where it is 0 */
    float *margins;                                 /* likewise; by how much the noisy scores of what was drawn were the best */
} draw_t;

/* Training attention over a packed row (attention.h). All offsets in tokens or keys; strides in elements. */
#define KEY_TILE 64
#define LOG2_E 1.44269504f

typedef struct {                                    /* a prompt, or one completion of it; keys are padded to 16 */
    int32_t first_token, num_tokens, first_key;
    int32_t trunk;                                  /* the segment of its prompt, or -1 */
    int32_t first_item, last_item;                  /* the items that sum up gradients of its keys */
} segment_t;

typedef struct { int32_t segment, first_query, last_query; } chunk_t; /* queries of one segment, counted within it */

typedef struct {                                    /* chunks of one family (a prompt and its completions), for one thread */
    int32_t first_chunk, last_chunk;
    int32_t first_key, num_keys;                    /* the family's keys */
    int32_t first_sum;                              /* where the item's sums lie */
} item_t;

typedef struct {
    int32_t is_bf16, num_heads, num_kv_heads, head_dim, num_threads, num_tokens, num_keys, num_sums;
    int32_t num_segments, num_chunks, num_items, max_rows;
    float scale;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head, scratch_bytes;
    const segment_t *segments;
    const chunk_t *chunks;
    const item_t *items;
    const void *query, *key, *value;
    void *out;                                      /* [num_tokens, num_heads, head_dim] */
    float *log_mass;                                /* [num_heads, num_tokens]: base-2 log of the sum of exponentials */
    uint32_t *keys_by_width, *keys_by_key, *values_by_width, *values_by_key; /* scratch: [num_kv_heads, num_keys, head_dim] */
    void *scratch;                                  /* [num_threads, scratch_bytes] */
    const void *grad_out;                           /* as out */
    void *grad_query, *grad_key, *grad_value;       /* [num_tokens, heads, head_dim] */
    float *key_sums, *value_sums;                   /* scratch: [num_kv_heads, num_sums, head_dim] */
} attention_t;

/* One operation of training.h; what the fields are to it is said there and in training.py. */
enum { LOGIT_MASS, LOGIT_GRADIENT, NORM, NORM_GRADIENT, GATED_SILU };

typedef struct {
    int32_t operation, is_bf16, threads, rows, width;
    float scalar;
    const void *x, *weight, *grad;
    const int64_t *targets;
    void *out, *more_out;
    float *sums, *more_sums;
} training_t;

/* What becomes of a tile. STORE: out = acc + bias. ADD: out += acc + bias. GATE: blocks come in pairs
 * (gate, up); the activation silu(gate) * up goes to the next matmul's input. */
enum { STORE, ADD, GATE };

#define USE_DPBF16 0
#define SUFFIX _base
#include "kernels.h"
#undef SUFFIX

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SUFFIX _avx2
#include "kernels.h"
#undef SUFFIX
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define SUFFIX _avx512
#include "kernels.h"
#undef SUFFIX
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#undef USE_DPBF16
#define USE_DPBF16 1
#define SUFFIX _avx512bf16
#include "kernels.h"
#undef SUFFIX
#pragma GCC pop_options
#endif

/* 0: portable, 1: AVX2, 2: AVX-512, 3: AVX-512 with bf16 products. */
int32_t swarm_best_isa(void) {
#ifdef MULTIVERSION
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) return 3;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Run tokens through the model. hidden: [num, hidden], after the final norm. */
void swarm_forward(const model_t *m, int32_t isa, const rows_t *rows, float *hidden) {
    switch (isa) {
#ifdef MULTIVERSION
    case 3: forward_avx512bf16(m, rows, hidden); return;
    case 2: forward_avx512(m, rows, hidden); return;
    case 1: forward_avx2(m, rows, hidden); return;
#endif
    default: forward_base(m, rows, hidden);
    }
}

/* hidden: [n, hidden]. out: [n, vocab]. */
void swarm_logits(const model_t *m, int32_t isa, const float *hidden, int32_t n, float *out) {
    switch (isa) {
#ifdef MULTIVERSION
    case 3: logits_avx512bf16(m, hidden, n, out); return;
    case 2: logits_avx512(m, hidden, n, out); return;
    case 1: logits_avx2(m, hidden, n, out); return;
#endif
    default: logits_base(m, hidden, n, out);
    }
}

/* See draw.h. */
void swarm_draw(const draw_t *d, int32_t isa) {
    switch (isa) {
#ifdef MULTIVERSION
    case 3: draw_avx512bf16(d); return;
    case 2: draw_avx512(d); return;
    case 1: draw_avx2(d); return;
#endif
    default: draw_base(d);
    }
}

/* See attention.h. The caller fills in what the direction needs. */
void swarm_attention(const attention_t *a, int32_t isa, int32_t is_backward) {
    switch (isa) {
#ifdef MULTIVERSION
    case 3: (is_backward ? attention_backward_avx512bf16 : attention_forward_avx512bf16)(a); return;
    case 2: (is_backward ? attention_backward_avx512 : attention_forward_avx512)(a); return;
    case 1: (is_backward ? attention_backward_avx2 : attention_forward_avx2)(a); return;
#endif
    default: (is_backward ? attention_backward_base : attention_forward_base)(a);
    }
}

/* See training.h. */
void swarm_training(const training_t *t, int32_t isa) {
    switch (isa) {
#ifdef MULTIVERSION
    case 3: training_avx512bf16(t); return;
    case 2: training_avx512(t); return;
    case 1: training_avx2(t); return;
#endif
    default: training_base(t);
    }
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", "CPU kernels, called through ctypes.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }
