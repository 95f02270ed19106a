/* AVX2: 8 outputs in the lanes of a register, two of them for a block. */
#include "bitpress.h"

HOLD_TEXT

#if defined(__x86_64__)
#include <immintrin.h>

#include "generic.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define AT_ONCE 4 /* rows; more would not fit 16 registers */

int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

AVX2_INLINE __m256i four_inputs(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

AVX2_INLINE __m256i two_inputs(const int16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
    return _mm256_set1_epi32(two);
}

AVX2_INLINE __m256 group_scales(const Weight *w, int64_t index, int half) {
    if (!w->scales) return _mm256_set1_ps(1);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w->scales + index * BLOCK + half * 8)));
}

AVX2_INLINE __m256 group_zeros(const Weight *w, int64_t index, int half) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(w->zeros + index * BLOCK + half * 8))));
}

/* Bytes that codes of 4 bits select. */
AVX2_INLINE __m256i signed_table(const Weight *w) {
    const int8_t *codes = (w->code == TABLE ? w->table : tables)->codes;
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
}

/* Sums of pairs of products in int16. With codes 0..15 they are at most 2 * 15 * 127, so that two fit together; signed
 * codes are multiplied as |w| * (x with w's sign), at most 2 * 128 * 127 = 32512. */
AVX2_INLINE __m256i products(__m256i codes, __m256i x, const Code kind) {
    if (kind == INT4) return _mm256_maddubs_epi16(codes, x);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
}

/* Sums of products of four signed bytes each, of any values: -128 times -128 fits no sum of pairs in int16. */
AVX2_INLINE __m256i whole_products(__m256i codes, __m256i x) {
    const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    return _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srai_epi16(codes, 8), _mm256_srai_epi16(x, 8)));
}

AVX2_INLINE void rows_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count,
                         const Code kind, float *out) {
    const int64_t groups = w->padded / w->group, steps = w->group / w->step;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8((char)0x80);
    const __m256i table = signed_table(w);
    const int64_t per_load = kind == INT8 ? 4 : 8;
    for (int half = 0; half < 4; half++) { /* of a block; two blocks */
        const uint8_t *codes = w->codes + (block + half / 2) * BLOCK * (w->padded / code_bytes(w)) + half % 2 * 32;
        const int8_t *x = in->codes + row * in->padded;
        __m256 totals[AT_ONCE];
        for (int m = 0; m < count; m++) totals[m] = _mm256_setzero_ps();
        for (int64_t g = 0, s = 0; g < groups; g++) {
            const __m256 group_scale = group_scales(w, (block + half / 2) * groups + g, half % 2);
            /* signed codes have 128 taken off already, and a table has no zero point */
            const float off = kind == INT8 ? 128 : 0;
            const __m256 zero = kind == TABLE ? _mm256_setzero_ps()
                                : w->zeros  ? _mm256_sub_ps(group_zeros(w, (block + half / 2) * groups + g, half % 2), _mm256_set1_ps(off))
                                            : _mm256_set1_ps((float)w->zero - off);
            for (int64_t last = s + steps; s < last; s++, x += w->step) {
                __m256i sums[AT_ONCE];
                __m256i shift = _mm256_setzero_si256();
                if (kind == INT8 && w->shifts)
                    shift = _mm256_loadu_si256((const __m256i *)(w->shifts + (block + half / 2) * BLOCK + half % 2 * 8));
                for (int m = 0; m < count; m++) sums[m] = _mm256_sub_epi32(_mm256_setzero_si256(), shift);
                for (int64_t k = 0; k < w->step; k += per_load, codes += 64) {
                    const __m256i both = _mm256_loadu_si256((const __m256i *)codes);
                    _mm_prefetch((const char *)codes + 2048, _MM_HINT_T0);
                    __m256i first = kind == INT8 ? _mm256_xor_si256(both, middle) : _mm256_and_si256(both, nibble);
                    __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                    if (kind == TABLE) {
                        first = _mm256_shuffle_epi8(table, first);
                        second = _mm256_shuffle_epi8(table, second);
                    }
                    for (int m = 0; m < count; m++) {
                        const int8_t *here = x + m * in->padded + k;
                        if (kind == INT8 && w->inputs) { /* codes of -128 */
                            sums[m] = _mm256_add_epi32(sums[m], whole_products(first, four_inputs(here)));
                            continue;
                        }
                        __m256i pairs = products(first, four_inputs(here), kind);
                        if (kind == INT4)
                            pairs = _mm256_add_epi16(pairs, products(second, four_inputs(here + 4), kind));
                        sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(pairs, ones));
                        if (kind == TABLE)
                            sums[m] = _mm256_add_epi32(
                                sums[m], _mm256_madd_epi16(products(second, four_inputs(here + 4), kind), ones));
                    }
                }
                for (int m = 0; m < count; m++) {
                    const int64_t at = (row + m) * in->steps + s;
                    const __m256 sum = _mm256_fnmadd_ps(zero, _mm256_set1_ps((float)in->sums[at]),
                                                        _mm256_cvtepi32_ps(sums[m]));
                    const __m256 scale = _mm256_mul_ps(group_scale, _mm256_set1_ps(in->scales[at]));
                    totals[m] = _mm256_fmadd_ps(sum, scale, totals[m]);
                }
            }
        }
        for (int m = 0; m < count; m++) {
            if (kind == TABLE) totals[m] = _mm256_mul_ps(totals[m], _mm256_set1_ps(1 / w->table->steps));
            _mm256_storeu_ps(out + m * PAIR + half * 8, totals[m]);
        }
    }
}

/* Four inputs' codes, as two of int16 in each 32-bit lane: inputs 0 and 2, then 1 and 3. Two inputs' products in int16
 * are summed at once. The integer zero point is taken off in the sums. */
AVX2_INLINE void wide_rows_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count,
                              const Code kind, float *out) {
    const int64_t groups = w->padded / w->group, steps = w->group / w->step;
    const __m256i nibble = _mm256_set1_epi8(15), even = _mm256_set1_epi16(255);
    const __m256i table = _mm256_xor_si256(signed_table(w), _mm256_set1_epi8((char)0x80));
    const int64_t per_load = kind == INT8 ? 4 : 8;
    for (int half = 0; half < 4; half++) { /* of a block; two blocks */
        const uint8_t *codes = w->codes + (block + half / 2) * BLOCK * (w->padded / code_bytes(w)) + half % 2 * 32;
        const int16_t *x = in->wide + row * in->padded;
        __m256 totals[AT_ONCE];
        for (int m = 0; m < count; m++) totals[m] = _mm256_setzero_ps();
        for (int64_t g = 0, s = 0; g < groups; g++) {
            const int64_t at = (block + half / 2) * groups + g;
            const __m256 group_scale = group_scales(w, at, half % 2);
            const __m256i zero = w->zeros ? _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(w->zeros + at * BLOCK + half % 2 * 8)))
                                          : _mm256_set1_epi32((int32_t)w->zero);
            for (int64_t last = s + steps; s < last; s++, x += w->step) {
                __m256i sums[AT_ONCE];
                for (int m = 0; m < count; m++) {
                    const __m256i inputs = _mm256_set1_epi32(in->sums[(row + m) * in->steps + s]);
                    sums[m] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_mullo_epi32(zero, inputs));
                }
                for (int64_t k = 0; k < w->step; k += per_load, codes += 64) {
                    const __m256i both = _mm256_loadu_si256((const __m256i *)codes);
                    _mm_prefetch((const char *)codes + 2048, _MM_HINT_T0);
                    __m256i fours[2] = {both, _mm256_setzero_si256()};
                    if (kind != INT8) {
                        fours[0] = _mm256_and_si256(both, nibble);
                        fours[1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                    }
                    for (int j = 0; j < (kind == INT8 ? 1 : 2); j++) {
                        if (kind == TABLE) fours[j] = _mm256_shuffle_epi8(table, fours[j]);
                        const __m256i first = _mm256_and_si256(fours[j], even), second = _mm256_srli_epi16(fours[j], 8);
                        for (int m = 0; m < count; m++) {
                            const int16_t *here = x + m * in->padded + k + 4 * j;
                            sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(first, two_inputs(here)));
                            sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(second, two_inputs(here + 2)));
                        }
                    }
                }
                for (int m = 0; m < count; m++) {
                    const __m256 scale = _mm256_mul_ps(group_scale, _mm256_set1_ps(in->scales[(row + m) * in->steps + s]));
                    totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, totals[m]);
                }
            }
        }
        for (int m = 0; m < count; m++) {
            if (kind == TABLE) totals[m] = _mm256_mul_ps(totals[m], _mm256_set1_ps(1 / w->table->steps));
            _mm256_storeu_ps(out + m * PAIR + half * 8, totals[m]);
        }
    }
}

/* The lowest code of each lane as a number; FP8: see from_e4m3. */
AVX2_INLINE __m256 code_values(const Weight *w, __m256i next, const Code kind, float zero) {
    if (kind == FP8) {
        const __m256i wide = _mm256_srai_epi32(_mm256_slli_epi32(next, 24), 4);
        return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(wide, _mm256_set1_epi32((int)0x87f00000))),
                             _mm256_set1_ps(0x1p120f));
    }
    if (kind == INT8)
        return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(next, _mm256_set1_epi32(255))), _mm256_set1_ps(zero));
    if (kind == TABLE) return _mm256_i32gather_ps(w->table->values, _mm256_and_si256(next, _mm256_set1_epi32(15)), 4);
    return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(next, _mm256_set1_epi32(15))), _mm256_set1_ps(zero));
}

AVX2_INLINE void exact_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count,
                          const Code kind, float *out) {
    const int64_t groups = w->padded / w->group;
    const float zero = w->zeros ? 0 : (float)w->zero;
    const int bytes = kind == INT8 || kind == FP8, per_load = bytes ? 4 : 8;
    for (int half = 0; half < 4; half++) { /* of a block; two blocks */
        const uint8_t *codes = w->codes + (block + half / 2) * BLOCK * (w->padded / code_bytes(w)) + half % 2 * 32;
        const float *x = in->values + row * in->padded;
        __m256 totals[AT_ONCE];
        for (int m = 0; m < count; m++) totals[m] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++, x += w->group) {
            __m256 sums[AT_ONCE];
            for (int m = 0; m < count; m++) sums[m] = _mm256_setzero_ps();
            for (int64_t k = 0; k < w->group; k += per_load, codes += 64) {
                const __m256i quad = _mm256_loadu_si256((const __m256i *)codes);
                for (int b = 0; b < per_load; b++) {
                    const int shift = bytes ? 8 * b : 8 * (b % 4) + 4 * (b / 4);
                    const __m256 value = code_values(w, _mm256_srli_epi32(quad, shift), kind, zero);
                    for (int m = 0; m < count; m++)
                        sums[m] = _mm256_fmadd_ps(value, _mm256_set1_ps(x[m * in->padded + k + b]), sums[m]);
                }
            }
            for (int m = 0; m < count; m++) {
                if (w->zeros) {
                    const __m256 value_sum = _mm256_set1_ps(in->value_sums[(row + m) * in->groups + g]);
                    sums[m] = _mm256_fnmadd_ps(group_zeros(w, (block + half / 2) * groups + g, half % 2), value_sum, sums[m]);
                }
                totals[m] = _mm256_fmadd_ps(sums[m], group_scales(w, (block + half / 2) * groups + g, half % 2), totals[m]);
            }
        }
        for (int m = 0; m < count; m++) _mm256_storeu_ps(out + m * PAIR + half * 8, totals[m]);
    }
}

#define EACH_COUNT(function, kind)                                          \
    switch (count) {                                                        \
    case 1: function(w, in, block, row, 1, kind, out); break;               \
    case 2: function(w, in, block, row, 2, kind, out); break;               \
    case 3: function(w, in, block, row, 3, kind, out); break;               \
    default: function(w, in, block, row, 4, kind, out);                     \
    }

AVX2 static void some_rows(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    if (w->code == INT4) EACH_COUNT(rows_of, INT4)
    else if (w->code == TABLE) EACH_COUNT(rows_of, TABLE)
    else EACH_COUNT(rows_of, INT8)
}

AVX2 static void some_wide(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    if (w->code == INT4) EACH_COUNT(wide_rows_of, INT4)
    else if (w->code == TABLE) EACH_COUNT(wide_rows_of, TABLE)
    else EACH_COUNT(wide_rows_of, INT8)
}

AVX2 static void some_exact(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    if (w->code == INT4) EACH_COUNT(exact_of, INT4)
    else if (w->code == TABLE) EACH_COUNT(exact_of, TABLE)
    else if (w->code == FP8) EACH_COUNT(exact_of, FP8)
    else EACH_COUNT(exact_of, INT8)
}

static void rows(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m += AT_ONCE)
        some_rows(w, in, block, row + m, count - m < AT_ONCE ? count - m : AT_ONCE, out + m * PAIR);
}

static void wide_rows(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m += AT_ONCE)
        some_wide(w, in, block, row + m, count - m < AT_ONCE ? count - m : AT_ONCE, out + m * PAIR);
}

static void exact(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m += AT_ONCE)
        some_exact(w, in, block, row + m, count - m < AT_ONCE ? count - m : AT_ONCE, out + m * PAIR);
}

GENERIC_FUNCTIONS(AVX2)

const Kernels avx2_kernels = {.rows = rows, .wide_rows = wide_rows, .exact = exact, GENERIC_MEMBERS};
#endif
