/* Any CPU: plain loops. What the other files compute, in the fewest words. */
#include "generic.h"

HOLD_TEXT

/* A code as the signed number that the input's code is multiplied by; what its group's zero point adds is in `zero`. */
INLINE int32_t signed_code(const Weight *w, int64_t block, int64_t n, int64_t k) {
    int32_t code = code_at(w, block, n, k);
    return w->code == TABLE ? w->table->codes[code] : code - zero_at(w, block, n, k);
}

static void rows(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m++) {
        const int8_t *x = in->codes + (row + m) * in->padded;
        for (int64_t n = 0; n < PAIR; n++) {
            float total = 0;
            for (int64_t s = 0; s < in->steps; s++) {
                int32_t sum = 0;
                for (int64_t k = s * w->step; k < (s + 1) * w->step; k++) sum += x[k] * signed_code(w, block, n, k);
                if (w->shifts) sum = (int32_t)((uint32_t)sum - (uint32_t)in->zeros[row + m] * (uint32_t)w->shifts[block * BLOCK + n]);
                total += (float)sum * (scale_at(w, block, n, s * w->step) * in->scales[(row + m) * in->steps + s]);
            }
            out[m * PAIR + n] = w->code == TABLE ? total / w->table->steps : total;
        }
    }
}

static void wide_rows(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m++) {
        const int16_t *x = in->wide + (row + m) * in->padded;
        for (int64_t n = 0; n < PAIR; n++) {
            float total = 0;
            for (int64_t s = 0; s < in->steps; s++) {
                int32_t sum = 0;
                for (int64_t k = s * w->step; k < (s + 1) * w->step; k++)
                    sum += x[wide_place(k)] * signed_code(w, block, n, k);
                total += (float)sum * (scale_at(w, block, n, s * w->step) * in->scales[(row + m) * in->steps + s]);
            }
            out[m * PAIR + n] = w->code == TABLE ? total / w->table->steps : total;
        }
    }
}

static void exact(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m++) {
        const float *x = in->values + (row + m) * in->padded;
        for (int64_t n = 0; n < PAIR; n++) {
            float total = 0;
            for (int64_t start = 0; start < w->padded; start += w->group) {
                float sum = 0;
                for (int64_t k = start; k < start + w->group; k++) sum += x[k] * value_at(w, block, n, k);
                total += sum * scale_at(w, block, n, start);
            }
            out[m * PAIR + n] = total;
        }
    }
}

GENERIC_FUNCTIONS()
GENERIC_ROUNDING()

const Kernels portable_kernels = {.rows = rows, .wide_rows = wide_rows, .exact = exact, GENERIC_MEMBERS,
    ROUNDING_MEMBERS};
