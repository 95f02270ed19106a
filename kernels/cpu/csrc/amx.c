/* AMX: tiles of 16 inputs x 64 features times 64 features x 16 outputs. Linux gives them to a process that asks. What a
 * few rows need is memory's speed, and AVX512's kernels serve those. */
#include "bitpress.h"

HOLD_TEXT

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "generic.h"

#define AMX __attribute__((target("amx-tile,amx-int8,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

int has_amx_int8(void) {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!has_avx512_vnni()) return 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const unsigned wanted = 1u << 24 | 1u << 25; /* AMX-TILE and AMX-INT8 */
    return (d & wanted) == wanted && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

/* 4-bit weights as signed bytes, their zero points taken off: int8 [ceil((to - from) / 64)][2][16][BLOCK][4]. 8-bit ones are
 * left as they are: they lie as tiles do. */
AMX static void unpack(const Weight *w, int64_t block, int64_t from, int64_t to, int64_t ahead, int8_t *panel) {
    if (w->code == INT8) return;
    const __m512i nibble = _mm512_set1_epi8(15);
    const int8_t *in_table = (w->code == TABLE ? w->table : tables)->codes;
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)in_table));
    const __m512i replicate = _mm512_set1_epi32(0x01010101);
    const int64_t groups = w->padded / w->group;
    for (int64_t j = 0; j < 2; j++) {
        const uint8_t *codes = w->codes + ((block + j) * w->padded + from) * BLOCK / 2;
        __m512i zero = _mm512_set1_epi8((char)w->zero);
        for (int64_t k = from; k < to; k += 8, codes += 64) {
            const __m512i both = _mm512_loadu_si512(codes);
            _mm_prefetch((const char *)codes + ahead, _MM_HINT_T1);
            __m512i first = _mm512_and_si512(both, nibble);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            if (w->code == TABLE) {
                first = _mm512_shuffle_epi8(table, first);
                second = _mm512_shuffle_epi8(table, second);
            } else {
                if (w->zeros && (k == from || k % w->group == 0)) {
                    const uint8_t *zeros = w->zeros + ((block + j) * groups + k / w->group) * BLOCK;
                    zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros));
                    zero = _mm512_mullo_epi32(zero, replicate);
                }
                first = _mm512_sub_epi8(first, zero);
                second = _mm512_sub_epi8(second, zero);
            }
            int8_t *tile = panel + (k - from) / CHUNK * PAIR * CHUNK + j * BLOCK * CHUNK + k % CHUNK * BLOCK;
            _mm512_storeu_si512(tile, first);
            _mm512_storeu_si512(tile + 64, second);
        }
    }
}

/* Features of a tile: what one instruction takes, within a step. */
static int64_t tile_features(const Weight *w) { return w->step % CHUNK == 0 ? CHUNK : w->step % 32 == 0 ? 32 : 16; }

/* Tiles 0..3 hold sums (rows x outputs), 4 and 5 inputs, 6 and 7 weights. */
AMX static void begin(const Weight *w, int64_t count) {
    struct {
        uint8_t palette, start;
        uint8_t reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    const int upper = count < 16 ? (int)count : 16, lower = count > 16 ? (int)count - 16 : 1;
    const int features = (int)tile_features(w);
    for (int t = 0; t < 8; t++) config.bytes_per_row[t] = 64;
    config.bytes_per_row[4] = config.bytes_per_row[5] = (uint16_t)features;
    config.rows[0] = config.rows[1] = config.rows[4] = (uint8_t)upper;
    config.rows[2] = config.rows[3] = config.rows[5] = (uint8_t)lower;
    config.rows[6] = config.rows[7] = (uint8_t)(features / 4);
    __asm__ volatile("" : : "r"(&config) : "memory"); /* GCC thinks that the next reads 8 bytes, and drops the others */
    _tile_loadconfig(&config);
}

AMX static void end(void) { _tile_release(); }

/* out[rows][2][16] (+)= sums[rows][2][16] * input scales * weight scales. 8-bit weights still have their
 * zero points in them: zero * sum(x codes) is taken off first. high: NULL, or 256 times it is added. */
AMX static void fold(const Weight *w, const Input *in, int64_t block, int64_t row, int64_t count, int64_t s, int more,
                     const int32_t *sums, const int32_t *high, float *out) {
    const int64_t groups = w->padded / w->group, first = (row / PAIR * in->steps + s) * PAIR;
    const float *input_scales = in->scales + first;
    const int32_t *input_sums = in->sums + first, zero = w->zeros ? 0 : (int32_t)w->zero;
    const int offset = w->code == INT8, varying = offset && w->zeros; /* not read anew after each store */
    __m512 scale[2], zeros[2];
    for (int j = 0; j < 2; j++) {
        const int64_t at = ((block + j) * groups + s * w->step / w->group) * BLOCK;
        scale[j] = _mm512_set1_ps(w->code == TABLE ? 1 / w->table->steps : 1);
        zeros[j] = _mm512_setzero_ps();
        if (w->scales)
            scale[j] = _mm512_mul_ps(
                scale[j], _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w->scales + at))));
        if (w->zeros)
            zeros[j] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->zeros + at))));
    }
    for (int64_t m = 0; m < count; m++) {
        const __m512 input_scale = _mm512_set1_ps(input_scales[m]);
        for (int j = 0; j < 2; j++) {
            float *to = out + m * PAIR + j * BLOCK;
            __m512i codes = _mm512_loadu_si512(sums + m * PAIR + j * BLOCK);
            if (high) {
                const __m512i more_codes = _mm512_loadu_si512(high + m * PAIR + j * BLOCK);
                codes = _mm512_add_epi32(_mm512_slli_epi32(more_codes, 8), codes);
            }
            if (offset) codes = _mm512_sub_epi32(codes, _mm512_set1_epi32(zero * input_sums[m]));
            if (w->shifts) {
                const __m512i shifts = _mm512_loadu_si512(w->shifts + (block + j) * BLOCK);
                codes = _mm512_sub_epi32(codes, _mm512_mullo_epi32(shifts, _mm512_set1_epi32(in->zeros[first + m])));
            }
            __m512 sum = _mm512_cvtepi32_ps(codes);
            if (varying) sum = _mm512_fnmadd_ps(zeros[j], _mm512_set1_ps((float)input_sums[m]), sum);
            const __m512 before = more ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_mul_ps(scale[j], input_scale), before));
        }
    }
}

/* Stores tiles 0..3 as [count][2][16], or loads them. */
#define EACH_TILE(instruction, numbers, count)                         \
    instruction(0, (numbers), PAIR * 4);                               \
    instruction(1, (numbers) + BLOCK, PAIR * 4);                       \
    if ((count) > 16) {                                                \
        instruction(2, (numbers) + 16 * PAIR, PAIR * 4);               \
        instruction(3, (numbers) + 16 * PAIR + BLOCK, PAIR * 4);       \
    }

#define ZERO_TILES  \
    _tile_zero(0);  \
    _tile_zero(1);  \
    _tile_zero(2);  \
    _tile_zero(3);

/* One step of `codes`: inputs [32][64] after another times weights 64 x 16 on the left and on the right. `stride` is what lies
 * between one 64 features of weights and the next. */
#define PRODUCTS(instruction, codes)                                   \
    for (int64_t k = start; k < start + step; k += features) {         \
        const int8_t *upper = (codes) + k / CHUNK * PAIR * CHUNK + k % CHUNK; \
        const int64_t at = (k - from) / CHUNK * stride + k % CHUNK * BLOCK; \
        _tile_loadd(4, upper, CHUNK);                                  \
        _tile_loadd(6, left + at, CHUNK);                              \
        instruction(0, 4, 6);                                          \
        _tile_loadd(7, right + at, CHUNK);                             \
        instruction(1, 4, 7);                                          \
        if (count > 16) {                                              \
            _tile_loadd(5, upper + 16 * CHUNK, CHUNK);                 \
            instruction(2, 5, 6);                                      \
            instruction(3, 5, 7);                                      \
        }                                                              \
    }

/* Where one step spans many stretches (int8-dynamic), `out` holds int32 sums until the last. int16 inputs, whose steps
 * are short, are multiplied as two of int8 where there are outliers. */
AMX static void tile(const Weight *w, const Input *in, int64_t block, int64_t from, int64_t to, const int8_t *panel,
                     int64_t row, int64_t count, float *out) {
    _Alignas(64) int32_t sums[PAIR * PAIR], high_sums[PAIR * PAIR];
    const int spans = w->step > STRETCH;
    const int64_t features = tile_features(w), step = spans ? to - from : w->step;
    const int64_t first = row * CHUNK * chunks(w->padded);
    const int8_t *x = in->codes + first, *high = in->high ? in->high + first : NULL, *left = panel, *right = panel + BLOCK * CHUNK;
    int64_t stride = PAIR * CHUNK;
    if (w->code == INT8) {
        left = (const int8_t *)w->codes + (block * w->padded + from) * BLOCK;
        right = left + w->padded * BLOCK;
        stride = BLOCK * CHUNK;
    }
    for (int64_t start = from; start < to; start += step) {
        uint32_t outliers = 0;
        for (int64_t m = 0; high && m < count; m++) outliers |= in->outliers[(row / PAIR * in->steps + start / w->step) * PAIR + m];
        if (outliers) {
            ZERO_TILES
            if (w->code == INT8) PRODUCTS(_tile_dpbsud, high)
            else PRODUCTS(_tile_dpbssd, high)
            EACH_TILE(_tile_stored, high_sums, count)
        }
        if (spans && from) {
            EACH_TILE(_tile_loadd, (int32_t *)out, count)
        } else {
            ZERO_TILES
        }
        if (w->code == INT8) PRODUCTS(_tile_dpbsud, x)
        else PRODUCTS(_tile_dpbssd, x)
        EACH_TILE(_tile_stored, spans && to < w->padded ? (int32_t *)out : sums, count)
        if (!spans) fold(w, in, block, row, count, start / w->step, start > 0, sums, outliers ? high_sums : NULL, out);
        else if (to == w->padded) fold(w, in, block, row, count, 0, 0, sums, NULL, out);
    }
}

const Tiles amx_tiles = {.unpack = unpack, .tile = tile, .begin = begin, .end = end};
#endif
