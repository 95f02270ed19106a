/* AVX512 with VNNI: 16 outputs in the lanes of a register, four inputs at a time in each lane's bytes. */
#include "bitpress.h"

HOLD_TEXT

#if defined(__x86_64__)
#include <immintrin.h>

#include "generic.h"

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define AVX512_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define WIDEST 2
#define AHEAD 2048 /* bytes that codes are fetched ahead: the hardware's own fetching stops at the end of a page */

int has_avx512_vnni(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

AVX512_INLINE __m512i four_inputs(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

AVX512_INLINE __m512i two_inputs(const int16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
    return _mm512_set1_epi32(two);
}

AVX512_INLINE __m512 group_scales(const Weight *w, int64_t index) {
    if (!w->scales) return _mm512_set1_ps(1);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w->scales + index * BLOCK)));
}

AVX512_INLINE __m512i whole_zeros(const Weight *w, int64_t index) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->zeros + index * BLOCK)));
}

AVX512_INLINE __m512 group_zeros(const Weight *w, int64_t index) { return _mm512_cvtepi32_ps(whole_zeros(w, index)); }

/* What a block's sums begin with, less what the zero point adds that the row has at this place. */
AVX512_INLINE __m512i shifted(const Weight *w, int64_t block, const Input *in, int64_t at, __m512i sums) {
    if (!w->shifts) return sums;
    const __m512i shifts = _mm512_loadu_si512(w->shifts + block * BLOCK);
    return _mm512_sub_epi32(sums, _mm512_mullo_epi32(shifts, _mm512_set1_epi32(in->zeros[at])));
}

/* Bytes that codes of 4 bits select; 128 is added, so that they have no sign. */
AVX512_INLINE __m512i unsigned_table(const Weight *w) {
    const __m128i codes = _mm_loadu_si128((const __m128i *)(w->code == TABLE ? w->table : tables)->codes);
    return _mm512_xor_si512(_mm512_broadcast_i32x4(codes), _mm512_set1_epi8((char)0x80));
}

/* Codes of 4 bits in the low halves of bytes, or what the table has for them, as unsigned bytes. */
AVX512_INLINE __m512i low_halves(__m512i both, __m512i table, const int64_t kind) {
    const __m512i codes = _mm512_and_si512(both, _mm512_set1_epi8(15));
    return kind == TABLE ? _mm512_shuffle_epi8(table, codes) : codes;
}

/* Writes the totals [count, wide] of rows and blocks to out. A table's are sums of its steps. */
AVX512_INLINE void store_totals(const Weight *w, const __m512 *totals, const int count, const int wide, const Code kind,
                                float *out) {
    for (int m = 0; m < count; m++)
        for (int j = 0; j < wide; j++) {
            __m512 total = totals[m * wide + j];
            if (kind == TABLE) total = _mm512_mul_ps(total, _mm512_set1_ps(1 / w->table->steps));
            _mm512_storeu_ps(out + m * PAIR + j * BLOCK, total);
        }
}

/* The high bytes of step s of `count` rows, which have these outliers, times one block, whose codes of that step are given:
 * 256 times that is added to sums[apart] of each row. Within rows_of it would take registers from what is always done. */
AVX512 static __attribute__((noinline)) void add_high(const Weight *w, const Input *in, const uint8_t *codes, int64_t row,
                                                      int64_t s, uint32_t outliers, int64_t count, int64_t apart,
                                                      __m512i *sums) {
    const int8_t *high = in->high + row * in->padded + s * w->step;
    const __m512i table = unsigned_table(w);
    __m512i products[MAX_ROWS] = {0};
    for (; outliers; outliers &= outliers - 1) {
        const int four = __builtin_ctz(outliers);
        __m512i weights = _mm512_loadu_si512(codes + (w->code == INT8 ? four : four / 2) * 64);
        if (w->code != INT8) weights = low_halves(four % 2 ? _mm512_srli_epi16(weights, 4) : weights, table, w->code);
        for (int64_t m = 0; m < count; m++)
            products[m] = _mm512_dpbusd_epi32(products[m], weights, four_inputs(high + m * in->padded + 4 * four));
    }
    for (int64_t m = 0; m < count; m++)
        sums[m * apart] = _mm512_add_epi32(sums[m * apart], _mm512_slli_epi32(products[m], 8));
}

/* dpbusd multiplies unsigned bytes by signed ones: weights are unsigned, and zero * sum(x codes) is taken off. High bytes of
 * split inputs are multiplied only where there are outliers.
 *
 * `count` rows, `wide` blocks side by side: more sums at a time hide the instructions' latency, and more streams of
 * codes the memory's. These and `kind` are constants wherever this is used, so that each gets code of its own. */
AVX512_INLINE void rows_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count,
                           const int wide, const Code kind, float *out) {
    const int64_t groups = w->padded / w->group, steps = w->group / w->step;
    const int64_t apart = BLOCK * (w->padded / code_bytes(w)); /* bytes from one block's codes to the next one's */
    const __m512i table = unsigned_table(w);
    const uint8_t *codes = w->codes + block * apart;
    const int8_t *x = in->codes + row * in->padded;
    const float *scales = in->scales + row * in->steps;
    const int32_t *sums = in->sums + row * in->steps;
    const int32_t zero = w->zeros ? 0 : (int32_t)w->zero;
    __m512 totals[WIDEST * MAX_ROWS];
    for (int i = 0; i < wide * count; i++) totals[i] = _mm512_setzero_ps();

    for (int64_t s = 0; s < groups * steps; s++) {
        __m512i even[WIDEST * MAX_ROWS], odd[WIDEST * MAX_ROWS];
        for (int m = 0; m < count; m++)
            for (int j = 0; j < wide; j++) {
                even[m * wide + j] = _mm512_set1_epi32(-zero * sums[m * in->steps]);
                if (kind == INT8) even[m * wide + j] = shifted(w, block + j, in, row + m, even[m * wide + j]);
                odd[m * wide + j] = _mm512_setzero_si512();
            }
        if (in->high) {
            uint32_t outliers = 0;
            for (int m = 0; m < count; m++) outliers |= in->outliers[(row + m) * in->steps + s];
            if (outliers)
                for (int j = 0; j < wide; j++) add_high(w, in, codes + j * apart, row, s, outliers, count, wide, even + j);
        }
        for (int64_t k = 0; k < w->step; k += 8) {
            __m512i first[WIDEST], second[WIDEST];
            for (int j = 0; j < wide; j++) {
                const uint8_t *at = codes + j * apart;
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
                if (kind == INT8) {
                    first[j] = _mm512_loadu_si512(at);
                    second[j] = _mm512_loadu_si512(at + 64);
                    _mm_prefetch((const char *)at + AHEAD + 64, _MM_HINT_T0);
                    continue;
                }
                const __m512i both = _mm512_loadu_si512(at);
                first[j] = low_halves(both, table, kind);
                second[j] = low_halves(_mm512_srli_epi16(both, 4), table, kind);
            }
            codes += kind == INT8 ? 128 : 64;
            for (int m = 0; m < count; m++) {
                const __m512i x_first = four_inputs(x + m * in->padded + k);
                const __m512i x_second = four_inputs(x + m * in->padded + k + 4);
                for (int j = 0; j < wide; j++) {
                    even[m * wide + j] = _mm512_dpbusd_epi32(even[m * wide + j], first[j], x_first);
                    odd[m * wide + j] = _mm512_dpbusd_epi32(odd[m * wide + j], second[j], x_second);
                }
            }
        }
        for (int j = 0; j < wide; j++) {
            const int64_t at = (block + j) * groups + s / steps;
            const __m512 group_scale = group_scales(w, at);
            const __m512 zeros = w->zeros ? group_zeros(w, at) : _mm512_setzero_ps();
            for (int m = 0; m < count; m++) {
                __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(even[m * wide + j], odd[m * wide + j]));
                if (w->zeros) sum = _mm512_fnmadd_ps(zeros, _mm512_set1_ps((float)sums[m * in->steps]), sum);
                const __m512 scale = _mm512_mul_ps(group_scale, _mm512_set1_ps(scales[m * in->steps]));
                totals[m * wide + j] = _mm512_fmadd_ps(sum, scale, totals[m * wide + j]);
            }
        }
        x += w->step;
        scales++;
        sums++;
    }
    store_totals(w, totals, count, wide, kind, out);
}

/* As rows_of, of inputs in int16: two of them, and two weights in int16, for each lane. Masks and shifts of 16 bits take
 * inputs 0 and 2 of four weights in bytes, then 1 and 3. Weights are loaded and taken apart once for all rows. */
AVX512_INLINE void wide_rows_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count,
                                const int wide, const Code kind, float *out) {
    const int64_t groups = w->padded / w->group, steps = w->group / w->step;
    const int64_t apart = BLOCK * (w->padded / code_bytes(w)); /* bytes from one block's codes to the next one's */
    const __m512i nibble = _mm512_set1_epi16(15), even_bytes = _mm512_set1_epi16(255);
    const __m512i table = unsigned_table(w);
    const uint8_t *codes = w->codes + block * apart;
    const int16_t *x = in->wide + row * in->padded;
    const float *scales = in->scales + row * in->steps;
    const int32_t *sums = in->sums + row * in->steps;
    __m512 totals[WIDEST * MAX_ROWS];
    for (int i = 0; i < wide * count; i++) totals[i] = _mm512_setzero_ps();

    for (int64_t s = 0; s < groups * steps; s++) {
        __m512i even[WIDEST * MAX_ROWS], odd[WIDEST * MAX_ROWS];
        for (int j = 0; j < wide; j++) {
            const uint8_t *at = w->zeros ? w->zeros + ((block + j) * groups + s / steps) * BLOCK : NULL;
            const __m512i zero = at ? _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at))
                                    : _mm512_set1_epi32((int32_t)w->zero);
            for (int m = 0; m < count; m++) {
                const int32_t inputs = -sums[m * in->steps];
                even[m * wide + j] = kind == TABLE ? _mm512_set1_epi32((int32_t)w->zero * inputs)
                                                   : _mm512_mullo_epi32(zero, _mm512_set1_epi32(inputs));
                odd[m * wide + j] = _mm512_setzero_si512();
            }
        }
        for (int64_t k = 0; k < w->step; k += kind == INT8 ? 4 : 8) {
            __m512i pairs[4][WIDEST];
            for (int j = 0; j < wide; j++) {
                const uint8_t *at = codes + j * apart;
                const __m512i both = _mm512_loadu_si512(at);
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
                if (kind == INT4) {
                    pairs[0][j] = _mm512_and_si512(both, nibble);
                    pairs[1][j] = _mm512_and_si512(_mm512_srli_epi16(both, 8), nibble);
                    pairs[2][j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
                    pairs[3][j] = _mm512_srli_epi16(both, 12);
                    continue;
                }
                const __m512i low = kind == INT8 ? both : _mm512_shuffle_epi8(table, _mm512_and_si512(both, _mm512_set1_epi8(15)));
                pairs[0][j] = _mm512_and_si512(low, even_bytes);
                pairs[1][j] = _mm512_srli_epi16(low, 8);
                if (kind == TABLE) {
                    const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi8(15)));
                    pairs[2][j] = _mm512_and_si512(high, even_bytes);
                    pairs[3][j] = _mm512_srli_epi16(high, 8);
                }
            }
            codes += 64;
            for (int p = 0; p < (kind == INT8 ? 2 : 4); p += 2)
                for (int m = 0; m < count; m++) {
                    const __m512i x_first = two_inputs(x + m * in->padded + k + 2 * p);
                    const __m512i x_second = two_inputs(x + m * in->padded + k + 2 * p + 2);
                    for (int j = 0; j < wide; j++) {
                        even[m * wide + j] = _mm512_dpwssd_epi32(even[m * wide + j], pairs[p][j], x_first);
                        odd[m * wide + j] = _mm512_dpwssd_epi32(odd[m * wide + j], pairs[p + 1][j], x_second);
                    }
                }
        }
        for (int j = 0; j < wide; j++) {
            const __m512 group_scale = group_scales(w, (block + j) * groups + s / steps);
            for (int m = 0; m < count; m++) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(even[m * wide + j], odd[m * wide + j]));
                const __m512 scale = _mm512_mul_ps(group_scale, _mm512_set1_ps(scales[m * in->steps]));
                totals[m * wide + j] = _mm512_fmadd_ps(sum, scale, totals[m * wide + j]);
            }
        }
        x += w->step;
        scales++;
        sums++;
    }
    store_totals(w, totals, count, wide, kind, out);
}

/* Codes of E4M3, one in the upper byte of each lane, with another bias; 2^120 moves it. See from_e4m3. */
AVX512_INLINE __m512 e4m3_values(__m512i codes) {
    const __m512i wide = _mm512_and_si512(_mm512_srai_epi32(codes, 4), _mm512_set1_epi32((int)0x87f00000));
    return _mm512_mul_ps(_mm512_castsi512_ps(wide), _mm512_set1_ps(0x1p120f));
}

/* Looks codes up, or converts them, and multiplies in float32: nothing about the inputs is rounded. Two sums for each row
 * hide half of the instructions' latency. */
AVX512_INLINE void exact_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count,
                            const Code kind, float *out) {
    const int64_t groups = w->padded / w->group;
    const float zero = w->zeros || kind == TABLE ? 0 : (float)w->zero;
    __m512 values = _mm512_sub_ps(
        _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)), _mm512_set1_ps(zero));
    if (kind == TABLE) values = _mm512_loadu_ps(w->table->values);
    const uint8_t *codes = w->codes + block * BLOCK * (w->padded / code_bytes(w));
    const float *x = in->values + row * in->padded;
    __m512 totals[MAX_ROWS];
    for (int m = 0; m < count; m++) totals[m] = _mm512_setzero_ps();

    for (int64_t g = 0; g < groups; g++) {
        __m512 sums[MAX_ROWS], odd[MAX_ROWS];
        for (int m = 0; m < count; m++) sums[m] = odd[m] = _mm512_setzero_ps();
        const int bytes = kind == INT8 || kind == FP8, per_load = bytes ? 4 : 8;
        for (int64_t k = 0; k < w->group; k += per_load, codes += 64) {
            const __m512i quad = _mm512_loadu_si512(codes);
            _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
            for (int b = 0; b < per_load; b++) { /* lanes are rotated so that their next code comes to the low bits */
                __m512i next = _mm512_srli_epi32(quad, bytes ? 8 * b : 8 * (b % 4) + 4 * (b / 4));
                __m512 value;
                if (kind == FP8)
                    value = e4m3_values(_mm512_slli_epi32(quad, 24 - 8 * b));
                else if (kind == INT8)
                    value = _mm512_sub_ps(
                        _mm512_cvtepi32_ps(_mm512_and_si512(next, _mm512_set1_epi32(255))), _mm512_set1_ps(zero));
                else
                    value = _mm512_permutexvar_ps(next, values);
                for (int m = 0; m < count; m++) {
                    __m512 *sum = b % 2 ? odd + m : sums + m;
                    *sum = _mm512_fmadd_ps(value, _mm512_set1_ps(x[m * in->padded + k + b]), *sum);
                }
            }
        }
        for (int m = 0; m < count; m++) {
            sums[m] = _mm512_add_ps(sums[m], odd[m]);
            if (w->zeros) {
                const float value_sum = in->value_sums[(row + m) * in->groups + g];
                sums[m] = _mm512_fnmadd_ps(group_zeros(w, block * groups + g), _mm512_set1_ps(value_sum), sums[m]);
            }
            totals[m] = _mm512_fmadd_ps(sums[m], group_scales(w, block * groups + g), totals[m]);
        }
        x += w->group;
    }
    for (int m = 0; m < count; m++) _mm512_storeu_ps(out + m * PAIR, totals[m]);
}

/* `wide` blocks at once while their sums fit the registers. */
#define ROWS(function, count, wide, kind)                                                                 \
    for (int64_t j = 0; j < 2; j += wide) function(w, in, block + j, row, count, wide, kind, out + j * BLOCK); \
    break
#define EXACT(count, kind)                                                                       \
    for (int64_t j = 0; j < 2; j++) exact_of(w, in, block + j, row, count, kind, out + j * BLOCK); \
    break
#define EACH_ROWS(function, kind)        \
    switch (count) {                     \
    case 1: ROWS(function, 1, 2, kind);  \
    case 2: ROWS(function, 2, 2, kind);  \
    case 3: ROWS(function, 3, 2, kind);  \
    case 4: ROWS(function, 4, 2, kind);  \
    case 5: ROWS(function, 5, 1, kind);  \
    case 6: ROWS(function, 6, 1, kind);  \
    case 7: ROWS(function, 7, 1, kind);  \
    default: ROWS(function, 8, 1, kind); \
    }
#define EACH_EXACT(kind)         \
    switch (count) {             \
    case 1: EXACT(1, kind);      \
    case 2: EXACT(2, kind);      \
    case 3: EXACT(3, kind);      \
    case 4: EXACT(4, kind);      \
    case 5: EXACT(5, kind);      \
    case 6: EXACT(6, kind);      \
    case 7: EXACT(7, kind);      \
    default: EXACT(8, kind);     \
    }

AVX512 static void rows(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    if (w->code == INT4) EACH_ROWS(rows_of, INT4)
    else if (w->code == TABLE) EACH_ROWS(rows_of, TABLE)
    else EACH_ROWS(rows_of, INT8)
}

AVX512 static void wide_rows(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    if (w->code == INT4) EACH_ROWS(wide_rows_of, INT4)
    else if (w->code == TABLE) EACH_ROWS(wide_rows_of, TABLE)
    else EACH_ROWS(wide_rows_of, INT8)
}

AVX512 static void exact(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    if (w->code == INT4) EACH_EXACT(INT4)
    else if (w->code == TABLE) EACH_EXACT(TABLE)
    else if (w->code == FP8) EACH_EXACT(FP8)
    else EACH_EXACT(INT8)
}

/* See generic_quantize. Sixteen at a time; dividing is slow, so x times 1 / scale is rounded instead, and divided only
 * where that comes so close to a half that the two could be rounded differently. */
AVX512 static void quantize(const float *x, int64_t in_features, int64_t padded, int64_t step, int8_t *codes,
                            int64_t stride, float *scales, int32_t *sums, int64_t apart) {
    const __m512i sign_off = _mm512_set1_epi32(0x7fffffff);
    for (int64_t start = 0, s = 0; start < padded; start += step, s++) {
        const int64_t end = start + step < in_features ? start + step : in_features;
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = start; i < end; i += 16) {
            const __mmask16 here = end - i < 16 ? (__mmask16)((1 << (end - i)) - 1) : 0xffff;
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(here, x + i), sign_off));
        }
        const uint32_t top = _mm512_reduce_max_epu32(most);
        float scale = bits_to_float(top) / 127;
        if (scale < 0x1p-126f) scale = 1;
        const int finite = top < 0x7f800000;
        const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(finite ? 1 / scale : 0);
        const __m512 half = _mm512_set1_ps(0.5f);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = start; i < start + step; i += 16) {
            const int64_t left = finite ? end - i : 0;
            const __mmask16 here = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
            const __m512 value = _mm512_maskz_loadu_ps(here, x + i);
            __m512 scaled = _mm512_mul_ps(value, inverse);
            const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(_mm512_abs_ps(_mm512_sub_ps(scaled, whole)), half));
            if (_mm512_cmp_ps_mask(distance, _mm512_set1_ps(1e-4f), _CMP_LT_OQ)) scaled = _mm512_div_ps(value, divisor);
            const __m512i code = _mm512_cvtps_epi32(scaled);
            sum = _mm512_add_epi32(sum, code);
            _mm_storeu_si128((__m128i *)(codes + i / CHUNK * stride + i % CHUNK), _mm512_cvtepi32_epi8(code));
        }
        scales[s * apart] = scale;
        sums[s * apart] = _mm512_reduce_add_epi32(sum);
    }
}

AVX512 static void quantize_static(const float *x, int64_t in_features, int64_t padded, const float *range, int8_t *codes,
                                   int64_t stride, float *scale, int32_t *sum, int32_t *zero) {
    generic_quantize_static(x, in_features, padded, range, codes, stride, scale, sum, zero);
}

AVX512 static void fit_range(const float *x, int64_t in_features, float *range) { generic_fit_range(x, in_features, range); }

/* See generic_quantize_wide. Sixteen at a time, to `codes`, or where that is NULL split. */
AVX512_INLINE void quantize_16_bits(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed,
                                    int16_t *codes, int8_t *low, int8_t *high, int64_t stride, float *scales,
                                    int32_t *sums, uint32_t *outliers, int64_t apart) {
    const __m512i sign_off = _mm512_set1_epi32(0x7fffffff);
    for (int64_t start = 0, s = 0; start < padded; start += step, s++) {
        const int64_t end = start + step < in_features ? start + step : in_features;
        __m512i most = _mm512_setzero_si512();
        __m512 roots = _mm512_setzero_ps();
        for (int64_t i = start; i < end; i += 16) {
            const __mmask16 here = end - i < 16 ? (__mmask16)((1 << (end - i)) - 1) : 0xffff;
            const __m512i size = _mm512_and_si512(_mm512_maskz_loadu_epi32(here, x + i), sign_off);
            most = _mm512_max_epu32(most, size);
            if (mixed) roots = _mm512_add_ps(roots, _mm512_sqrt_ps(_mm512_castsi512_ps(size)));
        }
        const uint32_t top = _mm512_reduce_max_epu32(most);
        const float scale = wide_scale(top, _mm512_reduce_add_ps(roots), end - start, mixed);
        const int finite = top < 0x7f800000;
        const __m512 inverse = _mm512_set1_ps(finite ? 1 / scale : 0);
        __m512i sum = _mm512_setzero_si512();
        uint32_t wide = 0;
        for (int64_t i = start; i < start + step; i += 16) {
            const int64_t left = finite ? end - i : 0;
            const __mmask16 here = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
            const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(here, x + i), inverse));
            sum = _mm512_add_epi32(sum, code);
            if (codes) {
                _mm256_storeu_si256((__m256i *)(codes + i), _mm512_cvtepi32_epi16(_mm512_shuffle_epi32(code, _MM_PERM_DBCA)));
                continue;
            }
            const int64_t to = i / CHUNK * stride + i % CHUNK; /* code = 256 * upper + what its lowest byte is with a sign */
            const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(low + to), _mm512_cvtepi32_epi8(code));
            _mm_storeu_si128((__m128i *)(high + to), _mm512_cvtepi32_epi8(upper));
            const __m512i fours = _mm512_or_si512(upper, _mm512_shuffle_epi32(upper, _MM_PERM_BADC));
            const uint32_t any = _mm512_test_epi32_mask(fours, fours) & 0x3333; /* two of each four stand for all */
            const uint32_t of_four = (any | any >> 1) & 0x1111;
            wide |= ((of_four | of_four >> 3 | of_four >> 6 | of_four >> 9) & 15) << (i - start) / 4;
        }
        scales[s * apart] = scale;
        sums[s * apart] = _mm512_reduce_add_epi32(sum);
        if (!codes) outliers[s * apart] = wide;
    }
}

AVX512 static void quantize_wide(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed,
                                 int16_t *codes, float *scales, int32_t *sums, int64_t apart) {
    quantize_16_bits(x, in_features, padded, step, mixed, codes, NULL, NULL, 0, scales, sums, NULL, apart);
}

AVX512 static void quantize_split(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed,
                                  int8_t *codes, int8_t *high, int64_t stride, float *scales, int32_t *sums,
                                  uint32_t *outliers, int64_t apart) {
    quantize_16_bits(x, in_features, padded, step, mixed, NULL, codes, high, stride, scales, sums, outliers, apart);
}

AVX512 static void widen(const void *x, DType dtype, int64_t count, float *out) {
    if (dtype != FLOAT16) {
        generic_widen(x, dtype, count, out);
        return;
    }
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i))));
    for (; i < count; i++) out[i] = from_half(((const uint16_t *)x)[i]);
}

AVX512 static void finish(const float *values, const float *multiplier, const float *bias, int64_t count, DType dtype,
                          void *y) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512 sum = _mm512_loadu_ps(values + i);
        if (multiplier) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(multiplier + i));
        if (bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias + i));
        if (dtype == FLOAT32) {
            _mm512_storeu_ps((float *)y + i, sum);
        } else if (dtype == FLOAT16) {
            _mm256_storeu_si256((__m256i *)((uint16_t *)y + i), _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
        } else {
            const __m512i bits = _mm512_castps_si512(sum);
            const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), tie));
            const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
            rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
            _mm256_storeu_si256((__m256i *)((uint16_t *)y + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
        }
    }
    const int64_t item = dtype == FLOAT32 ? 4 : 2;
    generic_finish(values + i, multiplier ? multiplier + i : NULL, bias ? bias + i : NULL, count - i, dtype,
                   (char *)y + i * item);
}

/* 16 outputs' values at one input, as `exact` reads them, each to its own row. */
AVX512 static void dequantize(const Weight *w, int64_t block, int64_t from, int64_t to, float *out) {
    const int64_t groups = w->padded / w->group;
    const __m512 values = _mm512_loadu_ps((w->code == TABLE ? w->table : tables)->values);
    const int bytes = code_bytes(w) == 1;
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)(to - from)));
    const uint8_t *codes = w->codes + block * BLOCK * (w->padded / code_bytes(w)) + from * BLOCK / code_bytes(w);
    const int64_t left = w->out_features - block * BLOCK;
    const __mmask16 real = left >= BLOCK ? 0xffff : (__mmask16)((1 << left) - 1);
    const __m512 multiplier = _mm512_maskz_loadu_ps(real, w->multiplier + block * BLOCK);
    const int per_load = bytes ? 4 : 8;
    __m512 scale = multiplier, zero = _mm512_set1_ps((float)w->zero);
    for (int64_t k = from; k < to; k += per_load, codes += 64) {
        if (k == from || k % w->group == 0) {
            scale = _mm512_mul_ps(multiplier, group_scales(w, block * groups + k / w->group));
            if (w->zeros) zero = group_zeros(w, block * groups + k / w->group);
        }
        const __m512i quad = _mm512_loadu_si512(codes);
        for (int b = 0; b < per_load; b++) {
            const int shift = bytes ? 8 * b : 8 * (b % 4) + 4 * (b / 4);
            const __m512i mask = _mm512_set1_epi32(bytes ? 255 : 15);
            const __m512i code = _mm512_and_si512(_mm512_srl_epi32(quad, _mm_cvtsi32_si128(shift)), mask);
            const __m512 value = w->code == TABLE ? _mm512_permutexvar_ps(code, values)
                                 : w->code == FP8 ? e4m3_values(_mm512_slli_epi32(code, 24))
                                                  : _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero);
            _mm512_i32scatter_ps(out + k - from + b, rows, _mm512_mul_ps(value, scale), 4);
        }
    }
}

AVX512 static uint64_t read_words(const uint64_t *from, int64_t words) { return generic_read(from, words); }

/* Codes of 4 bits, or what a table has for them, as unsigned bytes: [2][(to - from) / 4][BLOCK][4]. */
AVX512 static void unpack(const Weight *w, int64_t block, int64_t from, int64_t to, int64_t ahead, int8_t *panel) {
    if (w->code == INT8) return;
    const __m512i table = unsigned_table(w);
    for (int64_t j = 0; j < 2; j++) {
        const uint8_t *codes = w->codes + ((block + j) * w->padded + from) * BLOCK / 2;
        int8_t *bytes = panel + j * STRETCH * BLOCK;
        for (int64_t k = from; k < to; k += 8, codes += 64, bytes += 128) {
            const __m512i both = _mm512_loadu_si512(codes);
            _mm_prefetch((const char *)codes + ahead, _MM_HINT_T1);
            _mm512_storeu_si512(bytes, low_halves(both, table, w->code));
            _mm512_storeu_si512(bytes + 64, low_halves(_mm512_srli_epi16(both, 4), table, w->code));
        }
    }
}

/* Four features of `count` rows, x of each CHUNK bytes after the one before, times a pair of blocks. */
AVX512_INLINE void multiply_four(__m512i *sums, const int8_t *x, const int8_t *left, const int8_t *right, const int count) {
    const __m512i first = _mm512_loadu_si512(left), second = _mm512_loadu_si512(right);
    for (int m = 0; m < count; m++) {
        const __m512i four = four_inputs(x + m * CHUNK);
        sums[2 * m] = _mm512_dpbusd_epi32(sums[2 * m], first, four);
        sums[2 * m + 1] = _mm512_dpbusd_epi32(sums[2 * m + 1], second, four);
    }
}

/* Where feature k of a row of tiled codes is. */
AVX512_INLINE uint64_t tiled_at(uint64_t k) { return k / CHUNK * PAIR * CHUNK + k % CHUNK; }

AVX512_INLINE void multiply_step(__m512i *sums, const int8_t *x, const int8_t *left, const int8_t *right, int64_t start,
                                 int64_t step, const int count) {
    for (uint64_t k = (uint64_t)start; k < (uint64_t)(start + step); k += 16) { /* 16 features lie in one chunk */
        const int8_t *some = x + tiled_at(k);
        for (uint64_t i = 0; i < 16; i += 4)
            multiply_four(sums, some + i, left + (k + i) * BLOCK, right + (k + i) * BLOCK, count);
    }
}

/* Tiles.tile of `count` rows, a constant wherever this is used. High bytes are multiplied only where one of these rows has
 * outliers. See amx.c on steps that span many stretches. */
AVX512_INLINE void tile_of(const Weight *w, const Input *in, int64_t block, int64_t from, int64_t to, const int8_t *panel,
                           int64_t row, const int count, float *out) {
    const int64_t groups = w->padded / w->group, spans = w->step > STRETCH, step = spans ? to - from : w->step;
    const int64_t inputs = row / PAIR * PAIR * CHUNK * chunks(w->padded) + row % PAIR * CHUNK;
    const int8_t *x = in->codes + inputs, *high = in->high ? in->high + inputs : NULL;
    const int8_t *left = panel - from * BLOCK, *right = left + STRETCH * BLOCK; /* of feature 0 */
    if (w->code == INT8) left = (const int8_t *)w->codes + block * w->padded * BLOCK, right = left + w->padded * BLOCK;
    for (int64_t start = from; start < to; start += step) {
        const int64_t s = spans ? 0 : start / w->step, first = (row / PAIR * in->steps + s) * PAIR + row % PAIR;
        const float *scales = in->scales + first;
        const int32_t *input_sums = in->sums + first;
        __m512i sums[2 * MAX_ROWS];
        uint32_t outliers = 0;
        for (int m = 0; high && m < count; m++) outliers |= in->outliers[first + m];
        if (outliers) {
            for (int i = 0; i < 2 * count; i++) sums[i] = _mm512_setzero_si512();
            if (__builtin_popcount(outliers) * 8 > step) { /* every other four, or more */
                multiply_step(sums, high, left, right, start, step, count);
            } else {
                for (uint32_t rest = outliers; rest; rest &= rest - 1) {
                    const uint64_t k = (uint64_t)start + 4 * (uint64_t)__builtin_ctz(rest);
                    multiply_four(sums, high + tiled_at(k), left + k * BLOCK, right + k * BLOCK, count);
                }
            }
        }
        for (int j = 0; j < 2; j++) {
            __m512i zeros = _mm512_setzero_si512();
            if (w->zeros) zeros = whole_zeros(w, (block + j) * groups + s * w->step / w->group);
            for (int m = 0; m < count; m++) {
                __m512i *sum = sums + 2 * m + j;
                const __m512i off = w->zeros ? _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-input_sums[m]))
                                             : shifted(w, block + j, in, first + m,
                                                       _mm512_set1_epi32(-(int32_t)w->zero * input_sums[m]));
                if (spans && from) *sum = _mm512_loadu_si512(out + m * PAIR + j * BLOCK);
                else *sum = outliers ? _mm512_add_epi32(_mm512_slli_epi32(*sum, 8), off) : off;
            }
        }
        multiply_step(sums, x, left, right, start, step, count);
        if (spans && to < w->padded) {
            for (int i = 0; i < 2 * count; i++) _mm512_storeu_si512(out + i / 2 * PAIR + i % 2 * BLOCK, sums[i]);
            return;
        }
        for (int j = 0; j < 2; j++) {
            const __m512 group_scale = group_scales(w, (block + j) * groups + s * w->step / w->group);
            for (int m = 0; m < count; m++) {
                float *total = out + m * PAIR + j * BLOCK;
                const __m512 scale = _mm512_mul_ps(group_scale, _mm512_set1_ps(scales[m]));
                const __m512 before = s ? _mm512_loadu_ps(total) : _mm512_setzero_ps();
                _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[2 * m + j]), scale, before));
            }
        }
    }
    for (int i = 0; w->code == TABLE && to == w->padded && i < 2 * count; i++) {
        float *total = out + i / 2 * PAIR + i % 2 * BLOCK;
        _mm512_storeu_ps(total, _mm512_mul_ps(_mm512_loadu_ps(total), _mm512_set1_ps(1 / w->table->steps)));
    }
}

AVX512 static void columns(const Columns *c) { generic_columns(c); }

#define TILE(count)                                                                                            \
    case count: tile_of(w, in, block, from, to, panel, row + m, count, out + m * PAIR); break

AVX512 static void tile(const Weight *w, const Input *in, int64_t block, int64_t from, int64_t to, const int8_t *panel,
                        int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m += MAX_ROWS)
        switch (count - m) {
        TILE(1); TILE(2); TILE(3); TILE(4); TILE(5); TILE(6); TILE(7);
        default: tile_of(w, in, block, from, to, panel, row + m, MAX_ROWS, out + m * PAIR);
        }
}

static void begin(const Weight *w, int64_t count) { (void)w, (void)count; }
static void end(void) {}

const Tiles avx512_tiles = {.unpack = unpack, .tile = tile, .begin = begin, .end = end};

const Kernels avx512_kernels = {.rows = rows, .wide_rows = wide_rows, .exact = exact, .quantize = quantize,
    .quantize_static = quantize_static, .fit_range = fit_range, .quantize_wide = quantize_wide,
    .quantize_split = quantize_split, .widen = widen, .finish = finish, .read = read_words, .dequantize = dequantize, .columns = columns};
#endif
