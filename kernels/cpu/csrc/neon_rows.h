/* The integer products of neon.c, which includes this once for each instruction set: TARGET is its attribute, NAME(x) a name
 * of its own, MATRIX whether it multiplies matrices of 2 x 8 by 8 x 2 at once (i8mm). */

HOLD_TEXT

#if defined(__aarch64__)
#define LOCAL TARGET static inline __attribute__((always_inline))

/* sums += four outputs' weights (of eight inputs: first four, then four more) times x: eight inputs of one row, or of two.
 * Of two rows by matrices, sums[0] has outputs 0 and 1 (each of both rows), sums[1] outputs 2 and 3; else a row each. */
LOCAL void NAME(add)(int32x4_t *sums, int8x16_t first, int8x16_t second, int8x16_t x, const int two) {
#if MATRIX
    if (two) {
        const int32x4_t a = vreinterpretq_s32_s8(first), b = vreinterpretq_s32_s8(second);
        sums[0] = vmmlaq_s32(sums[0], vreinterpretq_s8_s32(vzip1q_s32(a, b)), x);
        sums[1] = vmmlaq_s32(sums[1], vreinterpretq_s8_s32(vzip2q_s32(a, b)), x);
        return;
    }
#endif
    sums[0] = vdotq_laneq_s32(vdotq_laneq_s32(sums[0], first, x, 0), second, x, 1);
    if (two) sums[1] = vdotq_laneq_s32(vdotq_laneq_s32(sums[1], first, x, 2), second, x, 3);
}

/* Four outputs' sums of one row. */
LOCAL int32x4_t NAME(sum)(const int32x4_t *sums, int row, const int two) {
    if (!MATRIX || !two) return sums[row];
    return row ? vuzp2q_s32(sums[0], sums[1]) : vuzp1q_s32(sums[0], sums[1]);
}

/* `count` rows, at most AT_ONCE, two by two. Weights are signed: 8-bit codes have 128 taken off. int16 inputs are two bytes,
 * 256 * high + low. These sums, and what zero points take off, may wrap: in the end they fit. */
LOCAL void NAME(rows_of)(const Weight *w, const Input *in, int64_t block, int64_t row, const int count, const int wide,
                         const Code kind, float *out) {
    const int64_t groups = w->padded / w->group, steps = w->group / w->step, line = BLOCK * 4;
    const int pairs = (count + 1) / 2, quads = pairs == 1 ? 4 : 2; /* as many sums as fit the registers */
    const int8x16_t table = vld1q_s8((w->code == TABLE ? w->table : tables)->codes);
    for (int from = 0; from < 2 * BLOCK; from += 4 * quads) { /* outputs */
        const uint8_t *codes = w->codes + (block + from / BLOCK) * BLOCK * (w->padded / code_bytes(w)) + from % BLOCK * 4;
        int64_t at = 0;
        float32x4_t totals[AT_ONCE][4];
        for (int m = 0; m < count; m++) for (int q = 0; q < quads; q++) totals[m][q] = vdupq_n_f32(0);
        for (int64_t s = 0; s < groups * steps; s++) {
            int32x4_t low[AT_ONCE / 2][4][2], high[AT_ONCE / 2][4][2];
            for (int p = 0; p < pairs; p++)
                for (int q = 0; q < quads; q++)
                    low[p][q][0] = low[p][q][1] = high[p][q][0] = high[p][q][1] = vdupq_n_s32(0);
            for (const int64_t end = at + w->step; at < end; at += 8, codes += kind == INT8 ? 2 * line : line) {
                int8x16_t x[AT_ONCE / 2], x_high[AT_ONCE / 2];
                for (int p = 0; p < pairs; p++) {
                    const int64_t here = (row + 2 * p) * in->padded + at, next = 2 * p + 1 < count ? here + in->padded : here;
                    if (!wide) {
                        x[p] = vcombine_s8(vld1_s8(in->codes + here), vld1_s8(in->codes + next));
                        continue;
                    }
                    const int16x8_t a = vld1q_s16(in->wide + here), b = vld1q_s16(in->wide + next);
                    const int8x16_t places = vld1q_s8(wide_places);
                    x[p] = vqtbl1q_s8(vcombine_s8(vmovn_s16(a), vmovn_s16(b)), vreinterpretq_u8_s8(places));
                    x_high[p] = vqtbl1q_s8(vcombine_s8(vrshrn_n_s16(a, 8), vrshrn_n_s16(b, 8)), vreinterpretq_u8_s8(places));
                }
                __builtin_prefetch(codes + AHEAD);
                for (int q = 0; q < quads; q++) {
                    uint8x16_t first = vld1q_u8(codes + q * 16), second;
                    if (kind == INT8) {
                        second = veorq_u8(vld1q_u8(codes + line + q * 16), vdupq_n_u8(128));
                        first = veorq_u8(first, vdupq_n_u8(128));
                    } else {
                        second = vshrq_n_u8(first, 4);
                        first = vandq_u8(first, vdupq_n_u8(15));
                    }
                    int8x16_t a = vreinterpretq_s8_u8(first), b = vreinterpretq_s8_u8(second);
                    if (kind == TABLE) a = vqtbl1q_s8(table, first), b = vqtbl1q_s8(table, second);
                    for (int p = 0; p < pairs; p++) {
                        NAME(add)(low[p][q], a, b, x[p], 2 * p + 1 < count);
                        if (wide) NAME(add)(high[p][q], a, b, x_high[p], 2 * p + 1 < count);
                    }
                }
            }
            for (int q = 0; q < quads; q++) {
                const int64_t group = ((block + from / BLOCK) * groups + s / steps) * BLOCK + from % BLOCK + 4 * q;
                const float32x4_t group_scale = four_scales(w, group);
                const int64_t first = (block + from / BLOCK) * BLOCK + from % BLOCK + 4 * q;
                const int32x4_t shift = kind == INT8 && w->shifts ? vld1q_s32(w->shifts + first) : vdupq_n_s32(0);
                const int32x4_t zero = kind == TABLE ? vdupq_n_s32(0) : four_zeros(w, group, kind == INT8 ? 128 : 0);
                for (int m = 0; m < count; m++) {
                    const int two = m / 2 * 2 + 1 < count;
                    int32x4_t sum = NAME(sum)(low[m / 2][q], m % 2, two);
                    if (wide) sum = vaddq_s32(sum, vshlq_n_s32(NAME(sum)(high[m / 2][q], m % 2, two), 8));
                    sum = vmlsq_n_s32(sum, shift, w->shifts ? in->zeros[row + m] : 0);
                    sum = vmlsq_n_s32(sum, zero, in->sums[(row + m) * in->steps + s]);
                    const float32x4_t scale = vmulq_n_f32(group_scale, in->scales[(row + m) * in->steps + s]);
                    totals[m][q] = vfmaq_f32(totals[m][q], vcvtq_f32_s32(sum), scale);
                }
            }
        }
        for (int m = 0; m < count; m++)
            for (int q = 0; q < quads; q++) {
                if (kind == TABLE) totals[m][q] = vmulq_n_f32(totals[m][q], 1 / w->table->steps);
                vst1q_f32(out + m * PAIR + from + 4 * q, totals[m][q]);
            }
    }
}

#define ROWS(count, kind) NAME(rows_of)(w, in, block, row, count, wide, kind, out)

LOCAL void NAME(some_rows)(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, const int wide,
                           float *out) {
    EACH(ROWS)
}

TARGET static void NAME(rows)(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m += AT_ONCE)
        NAME(some_rows)(w, in, block, row + m, count - m < AT_ONCE ? count - m : AT_ONCE, 0, out + m * PAIR);
}

TARGET static void NAME(wide_rows)(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m += AT_ONCE)
        NAME(some_rows)(w, in, block, row + m, count - m < AT_ONCE ? count - m : AT_ONCE, 1, out + m * PAIR);
}

#undef LOCAL
#undef ROWS
#undef TARGET
#undef NAME
#undef MATRIX
#endif
