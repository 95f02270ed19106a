/* Decoder layers on the next tokens of some sequences: what a Llama-, Gemma-, Phi-, GPT-2- or Mixtral-like model does, from
 * its first layer to its last norm.
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

HOLD_TEXT

#define EXPORT __attribute__((visibility("default")))
#define TOGETHER 4 /* query heads of one key head that read its keys and values together */
#define PIECE 256 /* keys that are a task for one token: 64 KiB of int8 or less, and sums of int16 * int8 fit int32 */
#define EXPANDED 64 /* keys or values that are float32 at a time, so that they stay in the second cache */
#define MIN_ATTENTION (256 << 10) /* products that are worth waking threads for */
#define MIN_ROWS (32 << 10) /* features of rows that are worth waking threads for */
#define MOST_ROWS 512 /* at a time, so that what lies between two products stays in the third cache */
#define OUTPUTS 256 /* of a dense weight that are a task: their rows stay in a core's second cache */
#define TILE 64 /* queries, and keys, that a tile of attention takes at once */

typedef enum { SILU, GELU_TANH, GELU, RELU } Activation;
typedef enum { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN } Part;
typedef enum { NUMBERS, CODES8, CODES4, CODES_E4M3 } Cached;
typedef enum { BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP, OF_QUERIES, OF_KEYS } Place;

/* packed: as bitpress_pack made it, or NULL: there is no such layer. bias: [out], or NULL. order: [in], the input that
 * comes in each place, or NULL. inputs: one of Inputs. */
typedef struct {
    const void *packed;
    const float *bias;
    const int32_t *order;
    int64_t in, out, inputs;
} Linear;

/* RMS norm of each `features` numbers, or where it is `centered` LayerNorm. weight [features], or NULL: there is no norm.
 * bias [features], or NULL. */
typedef struct {
    const float *weight, *bias;
    int64_t features, centered;
    float eps;
} Norm;

/* Each row goes to the `active` of `count` experts whose router's scores are the highest, with the softmax of its scores
 * as shares; where these are `renormalized`, their sum is 1. linears: gate, up and down of each. router [count][hidden].
 * The layer's own MLP serves each row besides, where there is one, with the sigmoid of shared_gate [hidden] as its share,
 * or whole where that is NULL. */
typedef struct {
    const Linear *linears;
    const float *router, *shared_gate;
    int64_t count, active, renormalized;
} Experts;

/* Without a KEY layer, outputs of QUERY are those of all three, one after the other. Without an UP layer, outputs of GATE
 * are those of both, if they are twice what DOWN reads; otherwise nothing is multiplied by. cap: scores become
 * cap * tanh(score / cap); 0: they stay. experts: NULL where there are none. */
typedef struct {
    Linear linears[7]; /* by Part */
    Norm norms[6]; /* by Place */
    const Experts *experts;
    int64_t heads, key_heads, dim, activation, kernel;
    float scale, cap;
} Layer;

/* What a layer's own is in a step. keys and values: each [batch][key_heads][capacity][dim], whose first token is number
 * `start` of each sequence; numbers of the step's dtype, or what `cached`, one of Cached, says: int8; uint8 with two codes
 * of 4 bits, the even feature's in the low half; E4M3. Codes times their scales are numbers. Scales: float16 [batch]
 * [key_heads][capacity][dim / group], or where group is 0 float32 [batch][key_heads], which become NaN where a number was.
 * window: a token sees so many, up to itself; 0: all. Features 0 .. rotated of each head are rotated by cos and sin, of
 * token t of sequence b [rotated], b * apart + t * rotated numbers on; in the step's dtype. */
typedef struct {
    void *keys, *values, *key_scales, *value_scales;
    const void *cos, *sin;
    int64_t capacity, start, window, rotated, apart, cached, group;
} Context;

/* `count` tokens of each of `batch` sequences. x and y [batch][count][hidden]. contexts: of each layer, which has the keys
 * and values of `length` tokens, or those that its window still reaches; these tokens' are appended. first [batch]: the
 * first key of each sequence that counts, those before are padding; NULL: 0. norm: what y goes through at the end. All
 * others have the dtype. */
typedef struct {
    const void *x;
    void *y;
    const Context *contexts;
    const int64_t *first;
    Norm norm;
    int64_t batch, count, length, dtype;
    int threads;
} Step;

/* What is around the layers of a decoder. embedding [vocabulary][hidden], in the step's dtype, whose rows of `tokens` [batch]
 * become its x; NULL: x is there already. head: packed, or where that is NULL dense [vocabulary][hidden] in that dtype. logits
 * [batch][vocabulary], likewise; best and largest [batch]: the first of the largest logits, or the first that is NaN. */
typedef struct {
    const void *embedding, *dense;
    const int64_t *tokens;
    Linear head;
    void *logits;
    int64_t *best;
    float *largest;
    int64_t vocabulary;
} Around;

/* The rows of some tokens of all sequences in one layer, sequence by sequence: x, normed [rows][hidden], mixed
 * [rows][heads][dim], rotation [rows][2][dim]. q [heads][dim] of a row lies `query_apart` numbers from the next row's, k and
 * v [key_heads][dim] `key_apart`. Their first token is number `from` of the step's; there are `count` of each sequence.
 * parts: where count is 1, of each row, head and piece of its keys [dim] values by their weights, these weights' sum, and
 * the largest score.
 *
 * An MLP has `inner_rows` rows: gate, up and what they become, activated; of the first two, [inner] of a row lie
 * `inner_apart` numbers from the next row's. For experts: gathered, outputs, sum [rows][hidden], shares [rows][routes],
 * chosen [rows][active]. */
typedef struct {
    const Layer *l;
    const Context *c;
    const Step *s;
    float *x, *normed, *q, *k, *v, *mixed, *gate, *up, *activated, *rotation, *parts, *gathered, *outputs, *sum, *shares;
    int32_t *chosen;
    int64_t from, count, rows, pieces, query_apart, key_apart, inner, inner_rows, inner_apart, routes;
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

/* Abramowitz and Stegun's formula 7.1.26: absolute error 1.5e-7. */
INLINE float error_function(float x) {
    const float size = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * size);
    const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float value = 1 - p * exponential(-x * x);
    return x < 0 ? -value : value;
}

INLINE float activated(float gate, const Activation activation) {
    if (activation == RELU) return gate < 0 ? 0 : gate;
    if (activation == GELU) return 0.5f * gate * (1 + error_function(gate * 0.70710678f));
    const float inner = activation == SILU ? gate : 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1 + exponential(-inner));
}

INLINE float capped(float score, float cap) { return cap - 2 * cap / (exponential(2 / cap * score) + 1); }

INLINE void narrow(const float *values, int64_t count, DType dtype, void *out) {
    if (dtype == FLOAT32) memcpy(out, values, (size_t)count * 4);
    else if (dtype == FLOAT16) for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[i] = to_half(values[i]);
    else for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[i] = to_bfloat(values[i]);
}

/* Rotates the halves of each head's first features (RoFormer, arXiv 2104.09864, in the order of GPT-NeoX). */
INLINE void rotate(float *x, int64_t heads, int64_t dim, int64_t rotated, const float *cosine, const float *sine) {
    for (float *end = x + heads * dim, *low = x; low < end; low += dim) {
        float *high = low + rotated / 2;
        for (int64_t i = 0, j = rotated / 2; i < rotated / 2; i++, j++) {
            const float a = low[i], b = high[i];
            low[i] = a * cosine[i] - b * sine[i];
            high[i] = b * cosine[j] + a * sine[j];
        }
    }
}

INLINE float nearest(float x, float low, float high) {
    x = rintf(x);
    return x < low ? low : x > high ? high : x;
}

/* The E4M3 code nearest to x, ties to even, of at most 448. Adding 2^14 times a subnormal's step, or rounding the bits. */
INLINE uint32_t to_e4m3(float x) {
    const uint32_t sign = float_to_bits(x) >> 24 & 128, bits = float_to_bits(x) & 0x7fffffff;
    const float size = bits_to_float(bits), most = size > 448 ? 448 : size;
    const uint32_t wide = float_to_bits(most), small = float_to_bits(most + 0x1p14f) - float_to_bits(0x1p14f);
    const uint32_t large = (wide - 0x3c000000 + 0x7ffff + (wide >> 20 & 1)) >> 20;
    return sign | (bits > 0x7f800000 ? 127 : most < 0x1p-6f ? small : large);
}

/* One head's keys or values of one token as the cache has them; kernels/caches/ says the same in torch.
 *
 * row: which [dim] of the cache. scale: of codes without groups. */
INLINE void encode(const float *x, int64_t dim, const Context *c, int64_t row, float *scale, uint16_t *scales, void *to) {
    const int64_t group = c->group ? c->group : dim;
    const float largest = c->cached == CODES8 ? 127 : 7, lowest = c->group ? -largest : -128;
    for (int64_t g = 0; g < dim; g += group) {
        uint32_t most = 0; /* bits of absolute values are in the order of the values, NaN last */
        for (int64_t i = g; i < g + group; i++) {
            const uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float step = c->group ? 1 : *scale;
        if (c->group) {
            const float wanted = bits_to_float(most) / largest;
            uint16_t *own = scales + row * (dim / group) + g / group;
            *own = to_half(wanted > 65504 ? 65504 : wanted);
            step = *own ? from_half(*own) : 1;
        } else if (most > 0x7f800000) {
            *scale = NAN;
        }
        if (c->cached == CODES_E4M3) {
            for (int64_t i = g; i < g + group; i++) ((uint8_t *)to)[row * dim + i] = (uint8_t)to_e4m3(x[i] / step);
        } else if (c->cached == CODES8) {
            for (int64_t i = g; i < g + group; i++) {
                const float code = nearest(x[i] / step, lowest, largest);
                ((int8_t *)to)[row * dim + i] = (int8_t)(code == code ? code : 0);
            }
        } else {
            for (int64_t i = g; i < g + group; i += 2) {
                const float even = nearest(x[i] / step, lowest, largest), odd = nearest(x[i + 1] / step, lowest, largest);
                const int low = (int)(even == even ? even : 0), high = (int)(odd == odd ? odd : 0);
                ((uint8_t *)to)[(row * dim + i) / 2] = (uint8_t)((low & 15) | (high & 15) << 4);
            }
        }
    }
}

/* One row's keys or values to their place in the cache. */
INLINE void append(const float *from, const Rows *r, int64_t row, void *to, void *scales) {
    const Layer *l = r->l;
    const Context *c = r->c;
    const Step *s = r->s;
    const int64_t item = s->dtype == FLOAT32 ? 4 : 2, place = s->length + r->from + row % r->count - c->start;
    for (int64_t h = 0; h < l->key_heads; h++) {
        const int64_t head = row / r->count * l->key_heads + h, own = head * c->capacity + place;
        if (c->cached) encode(from + h * l->dim, l->dim, c, own, (float *)scales + head, scales, to);
        else narrow(from + h * l->dim, l->dim, (DType)s->dtype, (char *)to + own * l->dim * item);
    }
}

/* x [count] times 1 / scale, which this returns, as int16; codes 0 and a scale that shows it where there is NaN or infinity. */
INLINE float to_int16(const float *x, int64_t count, int16_t *codes) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float scale = bits_to_float(most) / 32767;
    if (scale < 0x1p-100f) scale = 0x1p-100f;
    const float inverse = most < 0x7f800000 ? 1 / scale : 0;
    for (int64_t i = 0; i < count; i++) codes[i] = inverse ? (int16_t)(int32_t)rintf(x[i] * inverse) : 0;
    return scale;
}

/* The outputs of those of `count` linear layers that there are, which read the same `rows` of x; those whose order and
 * inputs agree, at once. */
static int multiply(const Rows *r, const Linear *linears, int count, int64_t rows, const float *x, float *const *y) {
    int status = 0;
    while (count && !linears[count - 1].packed) count--;
    for (int from = 0, to = 0; from < count && !status; from = to) {
        Factor factors[3];
        for (; to < count && linears[to].order == linears[from].order && linears[to].inputs == linears[from].inputs; to++)
            factors[to - from] = (Factor){linears[to].packed, linears[to].bias, y[to]};
        status = bitpress_products(factors, to - from, x, linears[from].order, rows, FLOAT32, (int)linears[from].inputs,
                          (int)r->l->kernel, r->s->threads);
    }
    return status;
}

/* The first token that token number `token` of a sequence sees. */
INLINE int64_t first_seen(const Rows *r, int64_t sequence, int64_t token) {
    const int64_t first = r->s->first ? r->s->first[sequence] : 0, windowed = r->c->window ? token + 1 - r->c->window : 0;
    return windowed > first ? windowed : first;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* `body` on all rows, or tasks, of r: by several threads where these do so much. */
static void run(void (*body)(void *), Rows *r, int worthwhile) {
    atomic_init(&r->next, 0);
    parallel(body, r, worthwhile ? r->s->threads : 1);
}

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define NAME(name) name##_avx512
#define LANES 16
#define MULTIPLY_ADD(x, y, z) (V)_mm512_fmadd_ps((__m512)(x), _mm512_set1_ps(y), (__m512)(z))
#define MULTIPLY_ADD_ALL(x, y, z) (V)_mm512_fmadd_ps((__m512)(x), (__m512)(y), (__m512)(z))
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#include "layer_step.h"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(name) name##_avx2
#define LANES 8
#define MULTIPLY_ADD(x, y, z) (V)_mm256_fmadd_ps((__m256)(x), _mm256_set1_ps(y), (__m256)(z))
#define MULTIPLY_ADD_ALL(x, y, z) (V)_mm256_fmadd_ps((__m256)(x), (__m256)(y), (__m256)(z))
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#include "layer_step.h"
#endif
#define TARGET
#define NAME(name) name##_plain
#define LANES 4
#if defined(__aarch64__)
#define MULTIPLY_ADD(x, y, z) (V)vfmaq_n_f32((float32x4_t)(z), (float32x4_t)(x), y)
#define MULTIPLY_ADD_ALL(x, y, z) (V)vfmaq_f32((float32x4_t)(z), (float32x4_t)(x), (float32x4_t)(y))
#else
#define MULTIPLY_ADD(x, y, z) ((x) * (y) + (z))
#define MULTIPLY_ADD_ALL(x, y, z) ((x) * (y) + (z))
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

enum { LOGITS = 1024 }; /* that are float32 at a time */

/* Whose logit is the largest, the first of them, or the first that is NaN; its value to *largest. */
static int64_t best_of(const char *logits, int64_t count, DType dtype, float *largest) {
    const int64_t item = dtype == FLOAT32 ? 4 : 2;
    float values[LOGITS];
    int32_t most = INT32_MIN;
    int64_t best = 0;
    for (int64_t from = 0; from < count; from += LOGITS) {
        const int64_t some = count - from < LOGITS ? count - from : LOGITS;
        int32_t top = INT32_MIN, places[LOGITS];
        generic_widen(logits + from * item, dtype, some, values);
        for (int64_t i = 0; i < some; i++) { /* to integers in the same order, NaN of either sign last; -0 is 0 */
            const int32_t bits = (int32_t)float_to_bits(values[i] + 0.0f), size = bits & 0x7fffffff;
            places[i] = size > 0x7f800000 ? 0x7f800001 : bits < 0 ? -size : size;
            top = places[i] > top ? places[i] : top;
        }
        if (top <= most) continue;
        most = top;
        for (best = from; places[best - from] != top;) best++;
        *largest = values[best - from];
    }
    return best;
}

/* The next token of each sequence: rows of the embedding, all layers and the norm, the head, and its largest logit. Step's
 * count is 1. Returns as bitpress_layers_step does. */
EXPORT int bitpress_next_tokens(const Layer *const *layers, int64_t count, const Step *s, const Around *a) {
    const int64_t hidden = layers[0]->linears[QUERY].in, item = s->dtype == FLOAT32 ? 4 : 2;
    const DType dtype = (DType)s->dtype;
    Step step = *s;
    char *memory = malloc((size_t)(s->batch * hidden) * 4);
    if (!memory) return 1;
    if (a->embedding) {
        for (int64_t i = 0; i < s->batch; i++)
            memcpy(memory + i * hidden * item, (const char *)a->embedding + a->tokens[i] * hidden * item, (size_t)(hidden * item));
        step.x = memory;
    }
    int failed = bitpress_layers_step(layers, count, &step);
    if (!failed && a->head.packed) {
        failed = bitpress_products(&(Factor){a->head.packed, a->head.bias, a->logits}, 1, s->y, NULL, s->batch, dtype,
                                   (int)a->head.inputs, (int)layers[0]->kernel, s->threads);
    } else if (!failed) {
        generic_widen(s->y, dtype, s->batch * hidden, (float *)memory);
        failed = bitpress_dense(a->dense, (float *)memory, a->logits, s->batch, a->vocabulary, hidden, dtype,
                                (int)layers[0]->kernel, s->threads);
    }
    free(memory);
    for (int64_t i = 0; i < s->batch && !failed; i++)
        a->best[i] = best_of((char *)a->logits + i * a->vocabulary * item, a->vocabulary, dtype, a->largest + i);
    return failed;
}
