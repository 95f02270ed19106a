/* Decoder layers on the next tokens of some sequences: what a Llama-, Gemma-, Phi-, GPT-2- or Mixtral-like model does, from
 * its first layer to its last norm.
 *
 * Between the first layer's input and the end everything is float32, where a model rounds to its own dtype after every
 * operation.
 */
#ifndef LAYER_H
#define LAYER_H

#include <stdatomic.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "generic.h"

HOLD_TEXT

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

/* What each width of registers has: layers as bitpress_layers_step does them, all by one kernel; and the rows of a Dense that a
 * thread claims. */
struct Layers {
    int (*layers)(const Layer *const *layers, int64_t count, const Step *);
    void (*dense)(void *dense);
};

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

/* The first token that token number `token` of a sequence sees. */
INLINE int64_t first_seen(const Rows *r, int64_t sequence, int64_t token) {
    const int64_t first = r->s->first ? r->s->first[sequence] : 0, windowed = r->c->window ? token + 1 - r->c->window : 0;
    return windowed > first ? windowed : first;
}

#endif
