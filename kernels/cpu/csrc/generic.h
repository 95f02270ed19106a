/* Plain C bodies that each instruction set compiles for itself: the compiler turns their loops into its vectors. */
#ifndef GENERIC_H
#define GENERIC_H

#include <math.h>
#include <string.h>

#include "bitpress.h"

HOLD_TEXT

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4") /* loops over constants, so that their arrays become registers */

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included */
    return bits_to_float(float_to_bits(bits_to_float(rest << 13) * 0x1p112f) | sign);
}

/* Rounded to nearest, ties to even; too large becomes infinite. */
INLINE uint16_t to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) return (uint16_t)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

/* E4M3, a float of 8 bits without infinities: 2^120 moves the exponent's bias from 7 to 127, subnormal numbers included. */
INLINE float from_e4m3(uint32_t code) {
    return bits_to_float(float_to_bits(bits_to_float((code & 127) << 20) * 0x1p120f) | (code & 128) << 24);
}

INLINE uint16_t to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void generic_widen(const void *x, DType dtype, int64_t count, float *out) {
    if (dtype == FLOAT32) memcpy(out, x, (size_t)count * 4);
    else if (dtype == FLOAT16) for (int64_t i = 0; i < count; i++) out[i] = from_half(((const uint16_t *)x)[i]);
    else for (int64_t i = 0; i < count; i++) out[i] = bits_to_float((uint32_t)((const uint16_t *)x)[i] << 16);
}

INLINE void generic_finish(const float *values, const float *multiplier, const float *bias, int64_t count, DType dtype,
                           void *y) {
    for (int64_t i = 0; i < count; i++) {
        const float sum = values[i] * (multiplier ? multiplier[i] : 1) + (bias ? bias[i] : 0);
        if (dtype == FLOAT32) ((float *)y)[i] = sum;
        else ((uint16_t *)y)[i] = dtype == FLOAT16 ? to_half(sum) : to_bfloat(sum);
    }
}

/* Symmetric int8 of each step: scale = absmax / 127, codes = x / scale rounded, ties to even. A step of zeros, or so
 * small that its scale would be subnormal, gets codes 0; one with NaN or infinity codes 0 and a scale that shows it. */
INLINE void generic_quantize(const float *x, int64_t in_features, int64_t padded, int64_t step, int8_t *codes,
                             int64_t stride, float *scales, int32_t *sums, int64_t apart) {
    for (int64_t start = 0, s = 0; start < padded; start += step, s++) {
        int64_t end = start + step < in_features ? start + step : in_features;
        uint32_t most = 0; /* bits of absolute values are in the order of the values, NaN last */
        for (int64_t i = start; i < end; i++) {
            uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float scale = bits_to_float(most) / 127;
        if (scale < 0x1p-126f) scale = 1;
        int finite = most < 0x7f800000;
        int32_t sum = 0;
        for (int64_t i = start; i < start + step; i++) {
            int32_t code = i < end && finite ? (int32_t)rintf(x[i] / scale) : 0;
            codes[i / CHUNK * stride + i % CHUNK] = (int8_t)code;
            sum += code;
        }
        scales[s * apart] = scale;
        sums[s * apart] = sum;
    }
}

/* A number of int8, whatever the value. */
INLINE int32_t within_int8(float value) {
    value = value > -128 ? value : -128;
    return (int32_t)(value < 127 ? value : 127);
}

/* codes = x / scale rounded, ties to even, plus the zero point, at most 127 and at least -128. A row with NaN gets a scale
 * that shows it. */
INLINE void generic_quantize_static(const float *x, int64_t in_features, int64_t padded, const float *range, int8_t *codes,
                                    int64_t stride, float *scale, int32_t *sum, int32_t *zero) {
    uint32_t most = 0;
    int32_t total = 0;
    for (int64_t i = 0; i < in_features; i++) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    for (int64_t start = 0; start < padded; start += CHUNK) {
        const int64_t count = in_features - start < CHUNK ? in_features - start : CHUNK;
        int8_t *to = codes + start / CHUNK * stride;
        for (int64_t i = 0; i < count; i++) {
            const int32_t code = within_int8(rintf(x[start + i] / range[0]) + range[1]);
            to[i] = (int8_t)code;
            total += code;
        }
        for (int64_t i = count > 0 ? count : 0; i < CHUNK && start + i < padded; i++) to[i] = 0;
    }
    *scale = most > 0x7f800000 ? NAN : range[0];
    *sum = total;
    *zero = within_int8(range[1]);
}

/* scale = (largest - least) / 255, where the range holds 0; zero = -128 - least / scale, rounded. A range of zeros, or so
 * narrow that its scale would be subnormal, has scale 1; a row with NaN or infinity one that shows it. */
INLINE void generic_fit_range(const float *x, int64_t in_features, float *range) {
    int32_t least = 0, most = 0; /* bits of numbers; of negative ones all but the sign are turned, so that they are in order */
    for (int64_t i = 0; i < in_features; i++) {
        int32_t bits = (int32_t)float_to_bits(x[i]);
        bits ^= bits >> 31 & 0x7fffffff;
        least = bits < least ? bits : least;
        most = bits > most ? bits : most;
    }
    const float low = bits_to_float((uint32_t)(least ^ (least >> 31 & 0x7fffffff))), high = bits_to_float((uint32_t)most);
    float scale = (high - low) / 255;
    if (scale < 0x1p-126f) scale = 1;
    range[0] = scale;
    range[1] = rintf(-128 - low / scale);
}

/* The scale of a step's int16 codes. most: the size of its largest input, as bits; roots: the sum of the square roots of the
 * sizes of all `count`.
 *
 * Codes of 16 bits take the finest scale at which the largest fits. Mixed ones take a coarser: that at which the usual input's
 * code is MIXED_USUAL, or if it is finer that at which the largest is 127. So nearly all codes fit 8 bits, and outliers need 16.
 * The usual size is the square of the roots' mean, which an outlier moves little: one of 128 inputs that is a thousand times as
 * large as the others makes it 1.5 times as large, and their mean 9 times. The scale's mantissa has three bits, so that it
 * does not depend on the order of the sum. */
INLINE float wide_scale(uint32_t most, float roots, int64_t count, int mixed) {
    const float largest = bits_to_float(most), root = roots / (float)count;
    float scale = largest / WIDE_MOST;
    if (mixed && most < 0x7f800000) {
        const float usual = bits_to_float(float_to_bits(root * root / MIXED_USUAL) & 0xfff00000), narrow = largest / 127;
        const float coarse = usual < narrow ? usual : narrow;
        scale = coarse > scale ? coarse : scale;
    }
    return scale < 0x1p-126f ? 1 : scale;
}

enum { SUMS = 16 }; /* roots are summed up in so many lanes */

/* Symmetric int16 of each step, see generic_quantize. x is multiplied by 1 / scale, not divided: the two differ by less
 * than a hundredth of a code. */
INLINE void generic_quantize_wide(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed,
                                  int16_t *codes, float *scales, int32_t *sums, int64_t apart) {
    for (int64_t start = 0, s = 0; start < padded; start += step, s++) {
        int64_t end = start + step < in_features ? start + step : in_features;
        uint32_t most = 0;
        float roots[SUMS] = {0};
        for (int64_t i = start; i < end; i++) {
            uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
            most = bits > most ? bits : most;
            if (mixed) roots[i % SUMS] += sqrtf(bits_to_float(bits));
        }
        for (int half = SUMS / 2; half; half /= 2)
            for (int i = 0; i < half; i++) roots[i] += roots[i + half];
        const float scale = wide_scale(most, roots[0], end - start, mixed);
        int finite = most < 0x7f800000;
        const float inverse = 1 / scale;
        int32_t sum = 0;
        for (int64_t i = start; i < start + step; i++) {
            int32_t code = i < end && finite ? (int32_t)rintf(x[i] * inverse) : 0;
            codes[wide_place(i)] = (int16_t)code;
            sum += code;
        }
        scales[s * apart] = scale;
        sums[s * apart] = sum;
    }
}

INLINE uint64_t generic_read(const uint64_t *from, int64_t words) {
    uint64_t lanes[32] = {0}, all = 0;
    for (int64_t i = 0; i < words; i += 32) {
        for (int j = 0; j < 32; j += 8) __builtin_prefetch(from + i + 512 + j);
        for (int j = 0; j < 32; j++) lanes[j] ^= from[i + j];
    }
    for (int j = 0; j < 32; j++) all ^= lanes[j];
    return all;
}

/* The code at input k of output n of a block, or of those after it, as it is stored. */
INLINE int32_t code_at(const Weight *w, int64_t block, int64_t n, int64_t k) {
    block += n / BLOCK, n %= BLOCK;
    if (code_bytes(w) == 1) return w->codes[((block * (w->padded / 4) + k / 4) * BLOCK + n) * 4 + k % 4];
    uint8_t both = w->codes[((block * (w->padded / 8) + k / 8) * BLOCK + n) * 4 + k % 4];
    return k % 8 < 4 ? both & 15 : both >> 4;
}

INLINE float scale_at(const Weight *w, int64_t block, int64_t n, int64_t k) {
    block += n / BLOCK, n %= BLOCK;
    return w->scales ? from_half(w->scales[(block * (w->padded / w->group) + k / w->group) * BLOCK + n]) : 1;
}

INLINE int32_t zero_at(const Weight *w, int64_t block, int64_t n, int64_t k) {
    block += n / BLOCK, n %= BLOCK;
    return w->zeros ? w->zeros[(block * (w->padded / w->group) + k / w->group) * BLOCK + n] : (int32_t)w->zero;
}

/* What that code stands for, without scales. */
INLINE float value_at(const Weight *w, int64_t block, int64_t n, int64_t k) {
    const int32_t code = code_at(w, block, n, k);
    if (w->code == FP8) return from_e4m3((uint32_t)code);
    return w->code == TABLE ? w->table->values[code] : (float)(code - zero_at(w, block, n, k));
}

/* What words of four bytes stand for that lie BLOCK words apart: inputs of one output that share a scale, 8 of 4 bits or 4
 * bytes to a word. An even number of bytes' words. */
INLINE void dequantize_words(const uint8_t *codes, int64_t words, float scale, int32_t zero, const float *values,
                             const Code kind, float *out) {
    typedef uint8_t Bytes __attribute__((vector_size(8)));
    typedef uint32_t Lanes __attribute__((vector_size(32)));
    typedef int32_t Whole __attribute__((vector_size(32)));
    typedef float Floats __attribute__((vector_size(32)));
    const int bytes = kind == INT8 || kind == FP8;
    for (int64_t i = 0; i < words; i += 1 + bytes, out += 8) {
        uint32_t eight[2];
        memcpy(eight, codes + i * BLOCK * 4, 4);
        if (bytes) memcpy(eight + 1, codes + (i + 1) * BLOCK * 4, 4);
        else eight[1] = eight[0] >> 4 & 0x0f0f0f0f, eight[0] &= 0x0f0f0f0f;
        Bytes narrow;
        memcpy(&narrow, eight, 8);
        const Lanes code = __builtin_convertvector(narrow, Lanes);
        Floats value;
        if (kind == TABLE) for (int b = 0; b < 8; b++) value[b] = values[code[b]];
        else if (kind == FP8) value = (Floats)((Lanes)((Floats)((code & 127) << 20) * 0x1p120f) | (code & 128) << 24);
        else value = __builtin_convertvector((Whole)code - zero, Floats);
        value *= scale;
        memcpy(out, &value, 32);
    }
}

INLINE void generic_dequantize(const Weight *w, int64_t block, int64_t from, int64_t to, float *out) {
    const int64_t per_byte = code_bytes(w), width = to - from;
    const uint8_t *codes = w->codes + block * BLOCK * (w->padded / per_byte);
    for (int64_t k = from, end; k < to; k = end) {
        end = (k / w->group + 1) * w->group < to ? (k / w->group + 1) * w->group : to;
        const uint8_t *here = codes + k / per_byte * BLOCK;
        const int64_t words = (end - k) / (4 * per_byte);
        for (int64_t n = 0; n < BLOCK; n++, here += 4) {
            const int64_t o = block * BLOCK + n;
            const float scale = (o < w->out_features ? w->multiplier[o] : 0) * scale_at(w, block, n, k);
            const int32_t zero = zero_at(w, block, n, k);
            float *values = out + n * width + k - from;
            if (w->code == INT4) dequantize_words(here, words, scale, zero, NULL, INT4, values);
            else if (w->code == TABLE) dequantize_words(here, words, scale, zero, w->table->values, TABLE, values);
            else if (w->code == FP8) dequantize_words(here, words, scale, zero, NULL, FP8, values);
            else dequantize_words(here, words, scale, zero, NULL, INT8, values);
        }
    }
}

enum { TURN = 64 }; /* rows whose columns are in registers */

/* One column of `count` rows, at most TURN, from `row` on. No product is fused with a sum, so every set finds the same bits. */
INLINE void one_column(const Columns *c, int64_t j, int64_t row, const int64_t count) {
    const int64_t at = j * c->rows + row, table = c->groups[j] * c->rows + row;
    const float pivot = c->factor[j * c->stride + j], inverse = 1 / pivot;
    float left[TURN];
    memcpy(left, c->left + at, (size_t)count * 4);
    for (int64_t i = 0; i < j; i++) {
        const float factor = c->factor[i * c->stride + j], *steps = c->steps + i * c->rows + row;
        for (int64_t n = 0; n < count; n++) left[n] -= factor * steps[n];
    }
    memcpy(c->left + at, left, (size_t)count * 4);
    for (int64_t n = 0; n < count; n++) {
        const float scale = c->scales[table + n], low = c->low[table + n], high = c->high[table + n];
        const float before = c->codes[at + n];
        float code = c->settle ? before + left[n] * inverse / scale : left[n] / scale;
        code = code > low ? code : low; /* and so for NaN */
        code = code < high ? code : high;
        code = rintf(code);
        c->steps[at + n] = c->settle ? (code - before) * scale : (left[n] - code * scale) / pivot;
        c->codes[at + n] = code;
    }
}

INLINE void generic_columns(const Columns *c) {
    int64_t row = 0;
    for (; row + TURN <= c->rows; row += TURN)
        for (int64_t j = 0; j < c->count; j++) one_column(c, j, row, TURN);
    for (int64_t j = 0; row < c->rows && j < c->count; j++) one_column(c, j, row, c->rows - row);
}

/* What an instruction set leaves to the compiler: the functions of Kernels that have the bodies above, as static functions of
 * its file with TARGET as their attribute, and the designators of Kernels that name them. */
#define GENERIC_FUNCTIONS(TARGET)                                                                                         \
    TARGET static void quantize_static(const float *x, int64_t in_features, int64_t padded, const float *range,           \
                                       int8_t *codes, int64_t stride, float *scale, int32_t *sum, int32_t *zero) {        \
        generic_quantize_static(x, in_features, padded, range, codes, stride, scale, sum, zero);                          \
    }                                                                                                                     \
    TARGET static void fit_range(const float *x, int64_t in_features, float *range) {                                     \
        generic_fit_range(x, in_features, range);                                                                         \
    }                                                                                                                     \
    TARGET static void widen(const void *x, DType dtype, int64_t count, float *out) {                                     \
        generic_widen(x, dtype, count, out);                                                                              \
    }                                                                                                                     \
    TARGET static void dequantize(const Weight *w, int64_t block, int64_t from, int64_t to, float *out) {                 \
        generic_dequantize(w, block, from, to, out);                                                                      \
    }                                                                                                                     \
    TARGET static void columns(const Columns *c) { generic_columns(c); }                                                  \
    TARGET static uint64_t read_words(const uint64_t *from, int64_t words) { return generic_read(from, words); }
#define GENERIC_MEMBERS \
    .quantize_static = quantize_static, .fit_range = fit_range, .widen = widen, .read = read_words, .dequantize = dequantize, .columns = columns

/* Likewise, of what surrounds each product. */
#define GENERIC_ROUNDING(TARGET)                                                                                          \
    TARGET static void quantize(const float *x, int64_t in_features, int64_t padded, int64_t step, int8_t *codes,         \
                                int64_t stride, float *scales, int32_t *sums, int64_t apart) {                            \
        generic_quantize(x, in_features, padded, step, codes, stride, scales, sums, apart);                               \
    }                                                                                                                     \
    TARGET static void quantize_wide(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed,        \
                                     int16_t *codes, float *scales, int32_t *sums, int64_t apart) {                       \
        generic_quantize_wide(x, in_features, padded, step, mixed, codes, scales, sums, apart);                           \
    }                                                                                                                     \
    TARGET static void finish(const float *values, const float *multiplier, const float *bias, int64_t count, DType dtype, \
                              void *y) {                                                                                  \
        generic_finish(values, multiplier, bias, count, dtype, y);                                                        \
    }
#define ROUNDING_MEMBERS .quantize = quantize, .quantize_wide = quantize_wide, .finish = finish

#endif
