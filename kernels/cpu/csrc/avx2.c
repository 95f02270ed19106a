/* AVX2: 8 outputs in the lanes of a register, two of them for a block. */
#include "bitpress.h"

HOLD_TEXT

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include "generic.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define AT_ONCE 4 /* rows; more would not fit 16 registers */
#define IN_THIS_ORDER(sum) __asm__("" : "+x"(sum)) /* other orders of sums take more registers than there are */
#define AHEAD 2048 /* bytes that codes are fetched ahead: the hardware's own fetching stops at the end of a page */

int has_avx2(void) {
    __builtin_cpu_init();
    unsigned a, b, c, d; /* f16c is no name that every compiler knows */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
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

AVX2_INLINE __m256i whole_zeros(const Weight *w, int64_t index, int half) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(w->zeros + index * BLOCK + half * 8)));
}

AVX2_INLINE __m256 group_zeros(const Weight *w, int64_t index, int half) {
    return _mm256_cvtepi32_ps(whole_zeros(w, index, half));
}

/* Bytes that codes of 4 bits select. */
AVX2_INLINE __m256i signed_table(const Weight *w) {
    const int8_t *codes = (w->code == TABLE ? w->table : tables)->codes;
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
}

/* Sums of products of four signed bytes each, of any values: -128 times -128 fits no sum of pairs in int16. */
AVX2_INLINE __m256i whole_products(__m256i codes, __m256i x) {
    const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    return _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srai_epi16(codes, 8), _mm256_srai_epi16(x, 8)));
}

/* What bytes stand for, and so how they are multiplied. */
typedef enum { NIBBLES, LOOKED_UP, BYTES, ALL_BYTES } Bytes; /* BYTES: no input is -128 */

/* Sums of pairs of products in int16. Codes 0..15 make at most 2 * 15 * 128, so that eight fit together. A table's codes are
 * within +-123, so they take the inputs' signs: at most 2 * 123 * 128. Codes that may be -128 give theirs: 2 * 128 * 127. */
AVX2_INLINE __m256i pairs_of(__m256i codes, __m256i x, const Bytes kind) {
    if (kind == NIBBLES) return _mm256_maddubs_epi16(codes, x);
    if (kind == LOOKED_UP) return _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(codes, x));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
}

/* sums [count][2] += the products of so many rows of four inputs, `apart` bytes from one another, and four codes of each of 16
 * outputs; of codes of 4 bits pairs [count][2] in int16 instead, which `join_pairs` adds to the sums. All times `factor`. */
AVX2_INLINE void multiply_four(const __m256i codes[2], const int8_t *x, int64_t apart, const int count, const Bytes kind,
                               __m256i factor, __m256i *pairs, __m256i *sums) {
    for (int m = 0; m < count; m++) {
        const __m256i four = four_inputs(x + m * apart);
        for (int i = 2 * m, half = 0; half < 2; i++, half++)
            if (kind == NIBBLES) {
                pairs[i] = _mm256_add_epi16(pairs[i], pairs_of(codes[half], four, kind));
                IN_THIS_ORDER(pairs[i]);
            } else if (kind != ALL_BYTES)
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs_of(codes[half], four, kind), factor));
            else
                sums[i] = _mm256_add_epi32(sums[i], _mm256_mullo_epi32(whole_products(codes[half], four),
                                                                       _mm256_srli_epi32(factor, 16)));
    }
}

AVX2_INLINE void join_pairs(__m256i *pairs, const int count, const Bytes kind, __m256i factor, __m256i *sums) {
    for (int i = 0; kind == NIBBLES && i < 2 * count; i++) {
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs[i], factor));
        pairs[i] = _mm256_setzero_si256();
    }
}

/* Four codes of each of 16 outputs: those at `at`, or of codes of 4 bits in these or the upper halves. */
AVX2_INLINE void four_codes(const uint8_t *at, int upper, __m256i table, const Bytes kind, __m256i codes[2]) {
    for (int half = 0; half < 2; half++) {
        __m256i all = _mm256_loadu_si256((const __m256i *)at + half);
        if (kind == NIBBLES || kind == LOOKED_UP)
            all = _mm256_and_si256(upper ? _mm256_srli_epi16(all, 4) : all, _mm256_set1_epi8(15));
        codes[half] = kind == NIBBLES ? all : kind == LOOKED_UP ? _mm256_shuffle_epi8(table, all)
                                                                : _mm256_xor_si256(all, _mm256_set1_epi8((char)0x80));
    }
}

/* What each row's sums of products begin with in step `at`: minus the zero points, of a group of a block's weights of which
 * `off` is taken already, times the sum of the inputs. */
AVX2_INLINE void begin_sums(const Weight *w, const Input *in, int64_t at, int64_t group, const int count, const int32_t off,
                            __m256i *sums) {
    for (int i = 0; i < 2 * count; i++) {
        const int32_t sum = in->sums[at + i / 2 * in->steps];
        if (!w->zeros) sums[i] = _mm256_set1_epi32((off - (int32_t)w->zero) * sum);
        else sums[i] = _mm256_mullo_epi32(_mm256_sub_epi32(_mm256_set1_epi32(off), whole_zeros(w, group, i % 2)), _mm256_set1_epi32(sum));
    }
}

/* totals += the sums of step `at`, by the scales of the group and of the inputs. */
AVX2_INLINE void add_scaled(const Weight *w, const Input *in, int64_t at, int64_t group, const int count, const __m256i *sums,
                            __m256 *totals) {
    for (int half = 0; half < 2; half++)
        for (int m = 0; m < count; m++) {
            const __m256 scale = _mm256_mul_ps(group_scales(w, group, half), _mm256_set1_ps(in->scales[at + m * in->steps]));
            totals[2 * m + half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[2 * m + half]), scale, totals[2 * m + half]);
        }
}

/* The rows' totals of a block; those of a table's codes count its steps. */
AVX2_INLINE void store_totals(const Weight *w, const int looked_up, __m256 *totals, const int count, float *out) {
    for (int i = 0; i < 2 * count; i++) {
        if (looked_up) totals[i] = _mm256_mul_ps(totals[i], _mm256_set1_ps(1 / w->table->steps));
        _mm256_storeu_ps(out + i / 2 * PAIR + i % 2 * 8, totals[i]);
    }
}

/* `count` rows times a pair of blocks, 16 outputs at a time. High bytes of split inputs are multiplied only where there are
 * outliers. */
AVX2_INLINE void rows_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count, const Bytes kind,
                         float *out) {
    const int64_t groups = w->padded / w->group, steps = w->group / w->step;
    const int bytes = kind == BYTES || kind == ALL_BYTES, run = kind == NIBBLES ? 32 : 16; /* which divides the step */
    const __m256i table = signed_table(w), once = _mm256_set1_epi16(1), times_256 = _mm256_set1_epi16(256);
    for (int j = 0; j < 2; j++) {
        const uint8_t *codes = w->codes + (block + j) * BLOCK * (w->padded / code_bytes(w));
        const int8_t *x = in->codes + row * in->padded;
        __m256 totals[2 * AT_ONCE];
        __m256i pairs[2 * AT_ONCE];
        for (int i = 0; i < 2 * count; i++) totals[i] = _mm256_setzero_ps(), pairs[i] = _mm256_setzero_si256();
        for (int64_t s = 0; s < groups * steps; s++, x += w->step) {
            const int64_t group = (block + j) * groups + (steps == 1 ? s : s / steps), at = row * in->steps + s;
            __m256i sums[2 * AT_ONCE];
            if (kind != LOOKED_UP) begin_sums(w, in, at, group, count, bytes ? 128 : 0, sums);
            else for (int i = 0; i < 2 * count; i++) sums[i] = _mm256_setzero_si256(); /* a table has no zero point */
            for (int i = 0; bytes && w->shifts && i < 2 * count; i++) {
                const __m256i *shifts = (const __m256i *)(w->shifts + (block + j) * BLOCK);
                const __m256i zero = _mm256_set1_epi32(in->zeros[row + i / 2]);
                sums[i] = _mm256_sub_epi32(sums[i], _mm256_mullo_epi32(_mm256_loadu_si256(shifts + i % 2), zero));
            }
            uint32_t outliers = 0;
            for (int m = 0; in->high && m < count; m++) outliers |= in->outliers[at + m * in->steps];
            __m256i four[2];
            while (outliers) {
                for (int n = 0; n < 8 && outliers; n++, outliers &= outliers - 1) {
                    const int which = __builtin_ctz(outliers);
                    four_codes(codes + (bytes ? which : which / 2) * 64, which % 2, table, kind, four);
                    const int8_t *high = in->high + row * in->padded + s * w->step + 4 * which;
                    multiply_four(four, high, in->padded, count, kind, times_256, pairs, sums);
                }
                join_pairs(pairs, count, kind, times_256, sums);
            }
            for (int64_t k = 0; k < w->step; k += run) {
                UNROLL
                for (int i = 0; i < run; i += bytes ? 4 : 8, codes += 64) {
                    _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
                    four_codes(codes, 0, table, kind, four);
                    multiply_four(four, x + k + i, in->padded, count, kind, once, pairs, sums);
                    if (bytes) continue;
                    four_codes(codes, 1, table, kind, four);
                    multiply_four(four, x + k + i + 4, in->padded, count, kind, once, pairs, sums);
                }
                join_pairs(pairs, count, kind, once, sums);
            }
            add_scaled(w, in, at, group, count, sums, totals);
        }
        store_totals(w, kind == LOOKED_UP, totals, count, out + j * BLOCK);
    }
}

/* Four inputs' codes, as two of int16 in each 32-bit lane: inputs 0 and 2, then 1 and 3. Two inputs' products in int16
 * are summed at once. The zero point is taken off in the sums. */
AVX2_INLINE void wide_rows_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count,
                              const Code kind, float *out) {
    const int64_t groups = w->padded / w->group, steps = w->group / w->step;
    const __m256i nibble = _mm256_set1_epi8(15), even = _mm256_set1_epi16(255);
    const __m256i table = _mm256_xor_si256(signed_table(w), _mm256_set1_epi8((char)0x80));
    for (int j = 0; j < 2; j++) {
        const uint8_t *codes = w->codes + (block + j) * BLOCK * (w->padded / code_bytes(w));
        const int16_t *x = in->wide + row * in->padded;
        __m256 totals[2 * AT_ONCE];
        for (int i = 0; i < 2 * count; i++) totals[i] = _mm256_setzero_ps();
        for (int64_t s = 0; s < groups * steps; s++, x += w->step) {
            const int64_t group = (block + j) * groups + (steps == 1 ? s : s / steps), at = row * in->steps + s;
            __m256i sums[2 * AT_ONCE];
            begin_sums(w, in, at, group, count, 0, sums);
            for (int64_t k = 0; k < w->step; k += 16) {
                UNROLL
                for (int i = 0; i < 16; i += 4) {
                    const int upper = kind != INT8 && i % 8;
                    __m256i first[2], second[2];
                    if (!upper) _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
                    for (int half = 0; half < 2; half++) {
                        __m256i four = _mm256_loadu_si256((const __m256i *)codes + half);
                        if (kind != INT8) four = _mm256_and_si256(upper ? _mm256_srli_epi16(four, 4) : four, nibble);
                        if (kind == TABLE) four = _mm256_shuffle_epi8(table, four);
                        first[half] = _mm256_and_si256(four, even), second[half] = _mm256_srli_epi16(four, 8);
                    }
                    if (kind == INT8 || upper) codes += 64;
                    for (int m = 0; m < count; m++) {
                        const int16_t *here = x + m * in->padded + k + i;
                        const __m256i x_first = two_inputs(here), x_second = two_inputs(here + 2);
                        for (int half = 0; half < 2; half++) {
                            __m256i *sum = sums + 2 * m + half;
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(first[half], x_first));
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(second[half], x_second));
                            IN_THIS_ORDER(*sum);
                        }
                    }
                }
            }
            add_scaled(w, in, at, group, count, sums, totals);
        }
        store_totals(w, kind == TABLE, totals, count, out + j * BLOCK);
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
    if (w->code == INT4) EACH_COUNT(rows_of, NIBBLES)
    else if (w->code == TABLE) EACH_COUNT(rows_of, LOOKED_UP)
    else if (w->inputs || w->shifts || in->high) EACH_COUNT(rows_of, ALL_BYTES)
    else EACH_COUNT(rows_of, BYTES)
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

/* Up to 8 numbers from x on, and zeros for those beyond `left`. */
AVX2_INLINE __m256 some_numbers(const float *x, int64_t left) {
    if (left >= 8) return _mm256_loadu_ps(x);
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32(left < 0 ? 0 : (int32_t)left), places));
}

AVX2_INLINE uint32_t largest(__m256i lanes) {
    uint32_t each[8], most = 0;
    _mm256_storeu_si256((__m256i *)each, lanes);
    for (int i = 0; i < 8; i++) most = each[i] > most ? each[i] : most;
    return most;
}

AVX2_INLINE int32_t sum_of(__m256i lanes) {
    int32_t each[8], sum = 0;
    _mm256_storeu_si256((__m256i *)each, lanes);
    for (int i = 0; i < 8; i++) sum += each[i];
    return sum;
}

/* See generic_quantize_wide. Sixteen at a time, to `codes`, or where that is NULL split. */
AVX2_INLINE void quantize_16_bits(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed, int16_t *codes,
                                  int8_t *low, int8_t *high, int64_t stride, float *scales, int32_t *sums, uint32_t *outliers,
                                  int64_t apart) {
    const __m256i sign_off = _mm256_set1_epi32(0x7fffffff);
    const __m256i places = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int64_t start = 0, s = 0; start < padded; start += step, s++) {
        const int64_t end = start + step < in_features ? start + step : in_features;
        __m256i most = _mm256_setzero_si256();
        __m256 roots = _mm256_setzero_ps();
        for (int64_t i = start; i < end; i += 8) {
            const __m256i size = _mm256_and_si256(_mm256_castps_si256(some_numbers(x + i, end - i)), sign_off);
            most = _mm256_max_epu32(most, size);
            if (mixed) roots = _mm256_add_ps(roots, _mm256_sqrt_ps(_mm256_castsi256_ps(size)));
        }
        const uint32_t top = largest(most);
        float lanes[8], root = 0;
        _mm256_storeu_ps(lanes, roots);
        for (int i = 0; i < 8; i++) root += lanes[i];
        const float scale = wide_scale(top, root, end - start, mixed);
        const __m256 inverse = _mm256_set1_ps(1 / scale);
        const int64_t last = top < 0x7f800000 ? end : start; /* codes after it are 0 */
        __m256i sum = _mm256_setzero_si256();
        uint32_t wide = 0;
        for (int64_t i = start; i < start + step; i += 16) {
            const __m256i one = _mm256_cvtps_epi32(_mm256_mul_ps(some_numbers(x + i, last - i), inverse));
            const __m256i other = _mm256_cvtps_epi32(_mm256_mul_ps(some_numbers(x + i + 8, last - i - 8), inverse));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(one, other));
            const __m256i code = _mm256_permute4x64_epi64(_mm256_packs_epi32(one, other), 0xd8);
            if (codes) {
                _mm256_storeu_si256((__m256i *)(codes + i), _mm256_shuffle_epi8(code, places));
                continue;
            }
            const int64_t to = i / CHUNK * stride + i % CHUNK; /* code = 256 * upper + what its lowest byte is with a sign */
            const __m256i upper = _mm256_srai_epi16(_mm256_add_epi16(code, _mm256_set1_epi16(128)), 8);
            const __m256i lower = _mm256_and_si256(code, _mm256_set1_epi16(255));
            const __m128i fours = _mm_packs_epi16(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
            _mm_storeu_si128((__m128i *)(low + to), _mm_packus_epi16(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1)));
            _mm_storeu_si128((__m128i *)(high + to), fours);
            const int none = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(fours, _mm_setzero_si128())));
            wide |= (uint32_t)(~none & 15) << (i - start) / 4;
        }
        scales[s * apart] = scale;
        sums[s * apart] = sum_of(sum);
        if (!codes) outliers[s * apart] = wide;
    }
}

AVX2 static void quantize_wide(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed, int16_t *codes,
                               float *scales, int32_t *sums, int64_t apart) {
    quantize_16_bits(x, in_features, padded, step, mixed, codes, NULL, NULL, 0, scales, sums, NULL, apart);
}

AVX2 static void quantize_split(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed, int8_t *codes,
                                int8_t *high, int64_t stride, float *scales, int32_t *sums, uint32_t *outliers,
                                int64_t apart) {
    quantize_16_bits(x, in_features, padded, step, mixed, NULL, codes, high, stride, scales, sums, outliers, apart);
}

/* See generic_quantize. */
AVX2 static void quantize(const float *x, int64_t in_features, int64_t padded, int64_t step, int8_t *codes, int64_t stride,
                          float *scales, int32_t *sums, int64_t apart) {
    const __m256i sign_off = _mm256_set1_epi32(0x7fffffff);
    for (int64_t start = 0, s = 0; start < padded; start += step, s++) {
        const int64_t end = start + step < in_features ? start + step : in_features;
        __m256i most = _mm256_setzero_si256(), sum = _mm256_setzero_si256();
        for (int64_t i = start; i < end; i += 8)
            most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(some_numbers(x + i, end - i)), sign_off));
        const uint32_t top = largest(most);
        float scale = bits_to_float(top) / 127;
        if (scale < 0x1p-126f) scale = 1;
        const int64_t last = top < 0x7f800000 ? end : start; /* codes after it are 0 */
        for (int64_t i = start; i < start + step; i += 16) {
            const __m256i one = _mm256_cvtps_epi32(_mm256_div_ps(some_numbers(x + i, last - i), _mm256_set1_ps(scale)));
            const __m256i other = _mm256_cvtps_epi32(_mm256_div_ps(some_numbers(x + i + 8, last - i - 8), _mm256_set1_ps(scale)));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(one, other));
            const __m256i code = _mm256_permute4x64_epi64(_mm256_packs_epi32(one, other), 0xd8);
            _mm_storeu_si128((__m128i *)(codes + i / CHUNK * stride + i % CHUNK),
                             _mm_packs_epi16(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1)));
        }
        scales[s * apart] = scale;
        sums[s * apart] = sum_of(sum);
    }
}

AVX2 static void finish(const float *values, const float *multiplier, const float *bias, int64_t count, DType dtype, void *y) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256 sum = _mm256_loadu_ps(values + i);
        if (multiplier) sum = _mm256_mul_ps(sum, _mm256_loadu_ps(multiplier + i));
        if (bias) sum = _mm256_add_ps(sum, _mm256_loadu_ps(bias + i));
        if (dtype == FLOAT32) {
            _mm256_storeu_ps((float *)y + i, sum);
        } else if (dtype == FLOAT16) {
            _mm_storeu_si128((__m128i *)((uint16_t *)y + i), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
        } else {
            const __m256i bits = _mm256_castps_si256(sum), tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), tie));
            const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
            const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
            const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
            _mm_storeu_si128((__m128i *)((uint16_t *)y + i),
                             _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
        }
    }
    const int64_t item = dtype == FLOAT32 ? 4 : 2;
    generic_finish(values + i, multiplier ? multiplier + i : NULL, bias ? bias + i : NULL, count - i, dtype,
                   (char *)y + i * item);
}

GENERIC_FUNCTIONS(AVX2)

const Kernels avx2_kernels = {.rows = rows, .wide_rows = wide_rows, .exact = exact, .quantize_split = quantize_split,
                              GENERIC_MEMBERS, ROUNDING_MEMBERS};
#endif
