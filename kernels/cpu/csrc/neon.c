/* NEON with dot products, and with products of matrices where there are these: four outputs in the lanes of a register, four
 * inputs in each lane's bytes. */
#include "bitpress.h"

HOLD_TEXT

#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "generic.h"

#define AT_ONCE 4 /* rows; more would not fit 32 registers */
#define AHEAD 1024 /* bytes that codes are fetched ahead */

/* Whether this machine has what Linux names by a bit of its auxiliary vector, and macOS by a name. */
static int has(unsigned long type, unsigned long bit, const char *name) {
#if defined(__linux__)
    (void)name;
    return (getauxval(type) & bit) != 0;
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    (void)type, (void)bit;
    return !sysctlbyname(name, &value, &size, NULL, 0) && value;
#else
    (void)type, (void)bit, (void)name;
    return 0;
#endif
}

int has_neon_dotprod(void) { return has(16, 1ul << 20, "hw.optional.arm.FEAT_DotProd"); } /* AT_HWCAP, HWCAP_ASIMDDP */
int has_neon_i8mm(void) {
    return has_neon_dotprod() && has(26, 1ul << 13, "hw.optional.arm.FEAT_I8MM"); /* AT_HWCAP2, HWCAP2_I8MM */
}

/* Brings eight inputs of two rows from the order of Input.wide to their own. */
static const int8_t wide_places[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};

INLINE float32x4_t four_scales(const Weight *w, int64_t at) {
    if (!w->scales) return vdupq_n_f32(1);
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(w->scales + at)));
}

/* Four outputs' zero points, less what their codes have lost already. */
INLINE int32x4_t four_zeros(const Weight *w, int64_t at, int32_t off) {
    if (!w->zeros) return vdupq_n_s32((int32_t)w->zero - off);
    uint32_t four;
    memcpy(&four, w->zeros + at, 4);
    const uint16x4_t zeros = vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))));
    return vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(zeros)), vdupq_n_s32(off));
}

/* call(count, kind), where both are constants, so that each pair gets code of its own. */
#define EACH_COUNT(call, kind)            \
    switch (count) {                      \
    case 1: call(1, kind); break;         \
    case 2: call(2, kind); break;         \
    case 3: call(3, kind); break;         \
    default: call(4, kind);               \
    }
#define EACH(call)                             \
    if (w->code == INT4) EACH_COUNT(call, INT4) \
    else if (w->code == TABLE) EACH_COUNT(call, TABLE) \
    else EACH_COUNT(call, INT8)

#define TARGET __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#define NAME(name) name##_i8mm
#define MATRIX 1
#include "neon_rows.h"
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define NAME(name) name##_dotprod
#define MATRIX 0
#include "neon_rows.h"

/* Looks codes up, or converts them, and multiplies in float32: nothing about the inputs is rounded. */
INLINE void exact_of(const Weight *w, const Input *in, int64_t block, int64_t row, const int count, const Code kind,
                     float *out) {
    const int64_t groups = w->padded / w->group;
    const int bytes = kind == INT8 || kind == FP8, per_load = bytes ? 4 : 8;
    const float *values = (w->code == TABLE ? w->table : tables)->values;
    const uint8x16x4_t table = {{vreinterpretq_u8_f32(vld1q_f32(values)), vreinterpretq_u8_f32(vld1q_f32(values + 4)),
                                 vreinterpretq_u8_f32(vld1q_f32(values + 8)), vreinterpretq_u8_f32(vld1q_f32(values + 12))}};
    for (int from = 0; from < 2 * BLOCK; from += 4) { /* outputs */
        const uint8_t *codes = w->codes + (block + from / BLOCK) * BLOCK * (w->padded / code_bytes(w)) + from % BLOCK * 4;
        const float *x = in->values + row * in->padded;
        float32x4_t totals[AT_ONCE];
        for (int m = 0; m < count; m++) totals[m] = vdupq_n_f32(0);
        for (int64_t g = 0; g < groups; g++, x += w->group) {
            const int64_t at = ((block + from / BLOCK) * groups + g) * BLOCK + from % BLOCK;
            const float32x4_t zero = vcvtq_f32_s32(four_zeros(w, at, 0));
            float32x4_t sums[AT_ONCE];
            for (int m = 0; m < count; m++) sums[m] = vdupq_n_f32(0);
            for (int64_t k = 0; k < w->group; k += per_load, codes += 4 * BLOCK) {
                const uint32x4_t four = vreinterpretq_u32_u8(vld1q_u8(codes));
                for (int b = 0; b < per_load; b++) {
                    const int shift = bytes ? 8 * b : 8 * (b % 4) + 4 * (b / 4);
                    const uint32x4_t code = vandq_u32(vshlq_u32(four, vdupq_n_s32(-shift)), vdupq_n_u32(bytes ? 255 : 15));
                    float32x4_t value = vsubq_f32(vcvtq_f32_u32(code), zero);
                    if (kind == TABLE) { /* the four bytes of each lane's number */
                        const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
                        value = vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places)));
                    }
                    if (kind == FP8) { /* see from_e4m3 */
                        const int32x4_t wide = vshrq_n_s32(vreinterpretq_s32_u32(vshlq_n_u32(code, 24)), 4);
                        const int32x4_t float_bits = vandq_s32(wide, vdupq_n_s32((int32_t)0x87f00000));
                        value = vmulq_n_f32(vreinterpretq_f32_s32(float_bits), 0x1p120f);
                    }
                    for (int m = 0; m < count; m++) sums[m] = vfmaq_n_f32(sums[m], value, x[m * in->padded + k + b]);
                }
            }
            for (int m = 0; m < count; m++) totals[m] = vfmaq_f32(totals[m], sums[m], four_scales(w, at));
        }
        for (int m = 0; m < count; m++) vst1q_f32(out + m * PAIR + from, totals[m]);
    }
}

#define EXACT(count, kind) exact_of(w, in, block, row, count, kind, out)

static void some_exact(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    if (w->code == FP8) EACH_COUNT(EXACT, FP8)
    else EACH(EXACT)
}

static void exact(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, float *out) {
    for (int64_t m = 0; m < count; m += AT_ONCE)
        some_exact(w, in, block, row + m, count - m < AT_ONCE ? count - m : AT_ONCE, out + m * PAIR);
}

GENERIC_FUNCTIONS()
GENERIC_ROUNDING()

const Kernels neon_i8mm_kernels = {.rows = rows_i8mm, .wide_rows = wide_rows_i8mm, .exact = exact, GENERIC_MEMBERS,
    ROUNDING_MEMBERS};
const Kernels neon_dotprod_kernels = {.rows = rows_dotprod, .wide_rows = wide_rows_dotprod, .exact = exact, GENERIC_MEMBERS,
    ROUNDING_MEMBERS};
#else
#include "neon_rows.h" /* its text alone */
#endif
