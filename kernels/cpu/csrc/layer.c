/* Decoder layers on the next tokens of some sequences: what a Llama-like model does, from its first layer to its last norm.
 *
 * Between the first layer's input and the end everything is float32, where a model rounds to its own dtype after every
 * operation.
 */
#include <stdatomic.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "generic.h"

#define EXPORT __attribute__((visibility("default")))
#define TOGETHER 4 /* query heads of one key head that read its keys and values together */
#define POSITIONS 64 /* whose values stay in the first cache while all features of a head pass by */
#define MIN_ATTENTION (256 << 10) /* products that are worth waking threads for */
#define MIN_ROWS (32 << 10) /* features of rows that are worth waking threads for */
#define MOST_ROWS 512 /* at a time, so that what lies between two products stays in the third cache */
#define OUTPUTS 256 /* of a dense weight that are a task: their rows stay in a core's second cache */
#define TILE 64 /* queries, and keys, that a tile of attention takes at once */

typedef enum { SILU, GELU_TANH } Activation;
typedef enum { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN } Part;

/* packed: as bitpress_pack made it. bias: [out], or NULL. order: [in], the input that comes in each place, or NULL.
 * inputs: one of Inputs. */
typedef struct {
    const void *packed;
    const float *bias;
    const int32_t *order;
    int64_t in, out, inputs;
} Linear;

/* Weights of norms: input_norm and post_norm [hidden], q_norm and k_norm [dim] or NULL. eps: of each of these four. */
typedef struct {
    Linear linears[7]; /* by Part */
    const float *input_norm, *post_norm, *q_norm, *k_norm;
    int64_t heads, key_heads, dim, activation, kernel;
    float eps[4], scale;
} Layer;

/* Where a layer's keys and values are: each [batch][key_heads][capacity][dim], in the step's dtype. */
typedef struct {
    void *keys, *values;
    int64_t capacity;
} Cache;

/* `count` tokens of each of `batch` sequences. x and y [batch][count][hidden]. cos and sin [dim] of token t of sequence b lie
 * b * rotations + t * dim numbers on. caches: of each layer, `length` tokens filled; these are appended. first [batch]: the
 * first key of each sequence that counts, those before are padding; NULL: 0. norm [hidden]: what y goes through at the
 * end, float32 as its eps, or NULL. All others have the dtype. */
typedef struct {
    const void *x, *cos, *sin;
    void *y;
    const Cache *caches;
    const int64_t *first;
    const float *norm;
    int64_t batch, count, length, rotations, dtype;
    float eps;
    int threads;
} Step;

/* The rows of some tokens of all sequences in one layer, sequence by sequence: x, normed [rows][hidden], q, mixed [rows][heads][dim],
 * k, v [rows][key_heads][dim], gate, up [rows][inner], rotation [rows][2][dim]. Their first token is number `from` of the
 * step's; there are `count` of each sequence. scores [batch * heads + TOGETHER][stride], where count is 1. */
typedef struct {
    const Layer *l;
    const Cache *cache;
    const Step *s;
    float *x, *normed, *q, *k, *v, *mixed, *gate, *up, *rotation, *scores;
    int64_t from, count, rows, stride;
    atomic_llong next;
    atomic_int failed;
} Rows;

/* y [rows][out_features] = x [rows][in_features], float32, times a dense weight [out_features][in_features]; y and the
 * weight have the dtype. The widest registers divide in_features. */
typedef struct {
    const void *weight;
    const float *x;
    void *y;
    int64_t rows, out_features, in_features, dtype;
    atomic_llong next;
} Dense;

/* Cephes' expf: a polynomial on [-ln 2 / 2, ln 2 / 2], relative error 2e-7. No branches, so that loops become vectors. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 0x1.8p23f, whole = shifted - 0x1.8p23f; /* rounds to an integer */
    const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return p * bits_to_float((float_to_bits(shifted) + 127) << 23);
}

INLINE float activated(float gate, const Activation activation) {
    const float inner = activation == SILU ? gate : 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1 + exponential(-inner));
}

INLINE void narrow(const float *values, int64_t count, DType dtype, void *out) {
    if (dtype == FLOAT32) memcpy(out, values, (size_t)count * 4);
    else if (dtype == FLOAT16) for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[i] = to_half(values[i]);
    else for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[i] = to_bfloat(values[i]);
}

/* Rotates each head's halves (RoFormer, arXiv 2104.09864, in the order of GPT-NeoX). */
INLINE void rotate(float *x, int64_t heads, int64_t dim, const float *cosine, const float *sine) {
    for (float *end = x + heads * dim, *low = x; low < end; low += dim) {
        float *high = low + dim / 2;
        for (int64_t i = 0, j = dim / 2; i < dim / 2; i++, j++) {
            const float a = low[i], b = high[i];
            low[i] = a * cosine[i] - b * sine[i];
            high[i] = b * cosine[j] + a * sine[j];
        }
    }
}

/* One row's keys or values to their place in the cache. */
INLINE void append(const float *from, const Rows *r, int64_t row, void *to) {
    const Layer *l = r->l;
    const Step *s = r->s;
    const int64_t item = s->dtype == FLOAT32 ? 4 : 2, place = s->length + r->from + row % r->count;
    for (int64_t h = 0; h < l->key_heads; h++) {
        const int64_t head = row / r->count * l->key_heads + h;
        narrow(from + h * l->dim, l->dim, (DType)s->dtype, (char *)to + (head * r->cache->capacity + place) * l->dim * item);
    }
}

/* The outputs of `count` linear layers that read the same x; those whose order and inputs agree, at once. */
static int multiply(const Rows *r, Part part, int count, const float *x, float *const *y) {
    const Linear *linears = r->l->linears + part;
    int status = 0;
    for (int from = 0, to = 0; from < count && !status; from = to) {
        Factor factors[3];
        for (; to < count && linears[to].order == linears[from].order && linears[to].inputs == linears[from].inputs; to++)
            factors[to - from] = (Factor){linears[to].packed, linears[to].bias, y[to]};
        status = bitpress_products(factors, to - from, x, linears[from].order, r->rows, FLOAT32, (int)linears[from].inputs,
                          (int)r->l->kernel, r->s->threads);
    }
    return status;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* `body` on all rows, or tasks, of r: by several threads where these do so much. */
static void run(void (*body)(void *), Rows *r, int worthwhile) {
    atomic_init(&r->next, 0);
    parallel(body, r, worthwhile ? r->s->threads : 1);
}

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define NAME(name) name##_avx512
#define LANES 16
#define MULTIPLY_ADD(x, y, z) (V)_mm512_fmadd_ps((__m512)(x), _mm512_set1_ps(y), (__m512)(z))
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#include "layer_step.h"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(name) name##_avx2
#define LANES 8
#define MULTIPLY_ADD(x, y, z) (V)_mm256_fmadd_ps((__m256)(x), _mm256_set1_ps(y), (__m256)(z))
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#include "layer_step.h"
#endif
#define TARGET
#define NAME(name) name##_plain
#define LANES 4
#if defined(__aarch64__)
#define MULTIPLY_ADD(x, y, z) (V)vfmaq_n_f32((float32x4_t)(z), (float32x4_t)(x), y)
#else
#define MULTIPLY_ADD(x, y, z) ((x) * (y) + (z))
#endif
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#include "layer_step.h"

/* `count` layers of as many features, one after the other, all by one kernel. Returns 0; 1: out of memory; 2: no such
 * weight or kernel. */
EXPORT int bitpress_layers_step(const Layer *const *layers, int64_t count, const Step *s) {
    const int64_t kernel = layers[0]->kernel;
    if (kernel < 0 || kernel >= bitpress_kernel_count()) return 2;
#if defined(__x86_64__)
    const char *name = bitpress_kernel_name((int)kernel);
    if (!strncmp(name, "amx", 3) || !strncmp(name, "avx512", 6)) return layers_avx512(layers, count, s);
    if (!strncmp(name, "avx2", 4)) return layers_avx2(layers, count, s);
#endif
    return layers_plain(layers, count, s);
}

/* See Dense. Returns 0; 2: no such kernel. */
EXPORT int bitpress_dense(const void *weight, const float *x, void *y, int64_t rows, int64_t out_features,
                          int64_t in_features, int64_t dtype, int kernel, int threads) {
    if (kernel < 0 || kernel >= bitpress_kernel_count()) return 2;
    Dense d = {.weight = weight, .x = x, .y = y, .rows = rows, .out_features = out_features, .in_features = in_features,
               .dtype = dtype};
    atomic_init(&d.next, 0);
    void (*body)(void *) = dense_plain;
#if defined(__x86_64__)
    const char *name = bitpress_kernel_name(kernel);
    if (!strncmp(name, "amx", 3) || !strncmp(name, "avx512", 6)) body = dense_avx512;
    else if (!strncmp(name, "avx2", 4)) body = dense_avx2;
#endif
    parallel(body, &d, threads);
    return 0;
}
