/* Multiplication by quantized weights on the CPU: what the files of this library share.
 *
 * api.c is what Python calls: it packs weights, splits the work over threads and picks an instruction set.
 * portable.c, avx2.c, avx512.c, amx.c and neon.c hold one set of kernels each. layer.c is what Python calls of whole decoder
 * layers, which layer_plain.c, layer_avx2.c and layer_avx512.c run.
 */
#ifndef BITPRESS_H
#define BITPRESS_H

#include <stdint.h>

/* The text of a file, in the library: library.py takes an installed library only where it holds every file of this folder
 * as it is. A file that is included more than once is kept once, by the linker. */
#if defined(__ELF__)
#define TEXTS ".pushsection .rodata.texts,\"aMS\",%progbits,1\n"
#else
#define TEXTS ".pushsection __TEXT,__const\n"
#endif
#define HOLD_TEXT __asm__(TEXTS ".incbin \"" __FILE__ "\"\n.byte 0\n.popsection\n");

HOLD_TEXT

#define EXPORT __attribute__((visibility("default")))
#define BLOCK 16    /* output features that lie together: int32 lanes of a 512-bit register, columns of an AMX tile */
#define PAIR 32     /* blocks come in pairs, so that two tiles share their inputs */
#define CHUNK 64    /* input features of an AMX tile */
#define STRETCH 512 /* input features of a panel of unpacked weights: 16 KiB, a third of a first cache */
#define MAX_ROWS 8  /* input rows that a rows kernel takes at once */

/* `row` is each number below `rows` that this thread claims, CLAIM of them at once: a claim takes about as long as the work
 * of some rows. */
#define CLAIM 4
#define EACH_CLAIMED(row, rows, next)                                                                \
    for (int64_t row##_from; (row##_from = atomic_fetch_add(&(next), CLAIM)) < (rows);)             \
        for (int64_t row = row##_from; row < row##_from + CLAIM && row < (rows); row++)

typedef enum { INT4, TABLE, INT8, FP8 } Code;
typedef enum { NF4, FP4 } TableName;
typedef enum { FLOAT32, FLOAT16, BFLOAT16 } DType;
/* What inputs are rounded to before they are multiplied. */
typedef enum { INPUTS_INT8, INPUTS_INT16, INPUTS_FLOAT32, INPUTS_MIXED } Inputs;

/* What 4-bit codes stand for: values, and these times steps as whole numbers, rounded where steps cannot make them whole. */
typedef struct {
    float values[16], steps;
    int8_t codes[16];
} Table;

/* A weight [out_features, in_features], as bitpress_pack lays it out.
 *
 * The value of output o and input k is multiplier[o] * scale[o, k / group] * (code - zero[o, k / group]); of TABLE, 4-bit
 * places in a table, multiplier[o] * scale[o, k / group] * table->values[code]; of FP8 the code is a float, E4M3.
 *
 * codes: of 4 bits, uint8 [blocks][padded / 8][BLOCK][4]: byte b has input 8p + b in its low nibble, 8p + 4 + b in its
 *   high one; of 8 bits, uint8 [blocks][padded / 4][BLOCK][4]. blocks is even, padded a multiple of step.
 * scales: float16 [blocks][padded / group][BLOCK], or NULL: 1 everywhere. zeros: uint8, likewise, or NULL: `zero`.
 * multiplier: float32 [out_features].
 * inputs: NULL, or the scale and the zero point by which all inputs are rounded to int8. shifts: int32, for each output of
 *   the blocks the sum of code - zero: this times a row's zero point is taken off its sum of products; or NULL: rows have
 *   no zero points. Without inputs each row has its own range. Where there are either, step, group and padded are one.
 * step: the inputs that share an activation scale, a multiple of 16, of 32 for INT4, that divides group; group divides
 *   padded.
 */
typedef struct {
    int64_t out_features, in_features, padded, group, step, code, zero;
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zeros;
    const float *multiplier, *inputs;
    const int32_t *shifts;
    const Table *table; /* of TABLE */
} Weight;

/* Rows of inputs as kernels read them, filled with zeros up to `padded` features.
 *
 * Either int8 or int16: x = code * scale, with sums[step] of the codes; scales float32 and sums int32 [rows][steps], or if
 * tiled [rows / 32][steps][32]. int8: codes [rows][padded], or if tiled [rows / 32][ceil(padded / 64)][32][64]; for weights
 * with shifts x = (code - zero) * scale, with zeros as sums are. int16:
 * wide [rows][padded], of each four in the order 0, 2, 1, 3; or split: 256 * high + codes, both as int8's are, and in
 * `outliers`, as sums are, a bit for each four inputs of the step: whether one of their `high` is not 0. Tiled ones are
 * split.
 * Or float32: values [rows][padded], with sums of each group, [rows][padded / group].
 */
typedef struct {
    int64_t rows, padded, steps, groups;
    int8_t *codes, *high; /* high: NULL where they are not split */
    int16_t *wide;
    float *scales;
    int32_t *sums, *zeros;
    uint32_t *outliers;
    float *values, *value_sums;
} Input;

/* GPTQ's inner loop (arXiv 2210.17323, algorithm 1): `count` columns of a weight, each of so many rows, are rounded one after
 * the other, and each makes up for the steps of those before it. settle: by coordinate descent on the codes instead.
 *
 * left: [count][rows], the weights, or minus half the gradient; afterwards each column as it was when its turn came.
 * factor: [count][stride], of which what lies above the diagonal, and the diagonal, is read.
 * scales, low, high: [groups][rows], and groups: [count], each column's row of them. Limits are whole numbers of int32.
 * codes: [count][rows]. steps: [count][rows], the error over the diagonal, or the change of the code times its scale. */
typedef struct {
    float *left, *codes, *steps;
    const float *factor, *scales, *low, *high;
    const int32_t *groups;
    int64_t count, rows, stride;
    int settle;
} Columns;

/* What every set of instructions has. */
typedef struct {
    /* Rows row .. row + count (at most MAX_ROWS) times a pair of blocks: out float32 [count][PAIR], without the
     * multiplier. `rows` takes int8 inputs, and split ones where there is `quantize_split`; `wide_rows` int16 ones, `exact`
     * float32 ones. */
    void (*rows)(const Weight *, const Input *, int64_t block, int64_t row, int64_t count, float *out);
    void (*wide_rows)(const Weight *, const Input *, int64_t block, int64_t row, int64_t count, float *out);
    void (*exact)(const Weight *, const Input *, int64_t block, int64_t row, int64_t count, float *out);
    /* One row to int8: 64 codes, then the next 64 `stride` bytes on; scales and sums of each step, `apart` numbers
     * from those of the next. */
    void (*quantize)(const float *x, int64_t in_features, int64_t padded, int64_t step, int8_t *codes, int64_t stride,
                     float *scales, int32_t *sums, int64_t apart);
    /* One row to int8, likewise, in one step and by the scale and the zero point in range[2]. */
    void (*quantize_static)(const float *x, int64_t in_features, int64_t padded, const float *range, int8_t *codes,
                            int64_t stride, float *scale, int32_t *sum, int32_t *zero);
    /* The scale and the zero point that fit a row, to range[2]. */
    void (*fit_range)(const float *x, int64_t in_features, float *range);
    /* One row to int16 as Input.wide has it, likewise. mixed: see wide_scale. */
    void (*quantize_wide)(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed, int16_t *codes,
                          float *scales, int32_t *sums, int64_t apart);
    /* One row to int16, split: 64 codes, and 64 high bytes, then the next `stride` bytes on. NULL: there is none. */
    void (*quantize_split)(const float *x, int64_t in_features, int64_t padded, int64_t step, int mixed, int8_t *codes,
                           int8_t *high, int64_t stride, float *scales, int32_t *sums, uint32_t *outliers, int64_t apart);
    void (*widen)(const void *x, DType dtype, int64_t count, float *out);
    /* y = values * multiplier (NULL: 1) + bias (NULL: 0), in dtype. */
    void (*finish)(const float *values, const float *multiplier, const float *bias, int64_t count, DType dtype, void *y);
    /* Exclusive or of `words` words, a multiple of 64. */
    uint64_t (*read)(const uint64_t *from, int64_t words);
    /* Features from .. to, multiples of 8, of one block of the weight, float32 [BLOCK][to - from]. */
    void (*dequantize)(const Weight *, int64_t block, int64_t from, int64_t to, float *out);
    /* See Columns. */
    void (*columns)(const Columns *);
} Kernels;

/* What multiplies many rows of integer inputs faster than `rows` and `wide_rows` do, where Kernels have `quantize_split`. */
typedef struct {
    /* Features from .. to of a pair of blocks as a panel of PAIR * STRETCH bytes, in an order of the set's own. What comes
     * next lies `ahead` bytes after these codes. 8-bit weights need no panel. */
    void (*unpack)(const Weight *, int64_t block, int64_t from, int64_t to, int64_t ahead, int8_t *panel);
    /* Up to 32 rows of tiled codes times that panel, added to out float32 [count][PAIR], or from 0 on in its place. */
    void (*tile)(const Weight *, const Input *, int64_t block, int64_t from, int64_t to, const int8_t *panel,
                 int64_t row, int64_t count, float *out);
    /* Surround the use of `tile` on each thread. */
    void (*begin)(const Weight *, int64_t count);
    void (*end)(void);
} Tiles;

/* y [rows][out_features] = x times the weight + bias (float32 [out_features], or NULL). */
typedef struct {
    const void *packed;
    const float *bias;
    void *y;
} Factor;

/* api.c: `body` on each of so many threads at once, which share its tasks among them; and what else Python calls. */
void parallel(void (*body)(void *), void *context, int threads);
int bitpress_kernel_count(void);
const char *bitpress_kernel_name(int index);
/* Products of the same x [rows][in_features], in dtype like each y; where the weights' steps agree, x is quantized once for
 * all. order: [in_features], the input that comes in each place, of float32, or NULL. See bitpress_linear. */
int bitpress_products(const Factor *factors, int count, const void *x, const int32_t *order, int64_t rows, int64_t dtype,
             int inputs, int kernel, int threads);

typedef struct Layers Layers; /* see layer.h */
const Layers *layers_by(int64_t kernel); /* or NULL: there is no such kernel */

extern const Kernels portable_kernels;
extern const Layers plain_layers;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
extern const Layers avx2_layers, avx512_layers;
extern const Tiles avx512_tiles, amx_tiles;
int has_avx2(void);
int has_avx512_vnni(void);
int has_amx_int8(void);
#elif defined(__aarch64__)
extern const Kernels neon_i8mm_kernels, neon_dotprod_kernels;
int has_neon_i8mm(void);
int has_neon_dotprod(void);
#endif

/* NF4: the code book (QLoRA, arXiv 2305.14314, appendix E); of the step sizes that fit int8 the one whose largest error is
 * least, 0.0028. FP4: E2M1 (OCP Microscaling Formats, section 5.3.3), whose halves are exact. */
static const Table tables[] = {
    [NF4] = {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
              -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
              0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
              0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
             123.26f, {-123, -86, -65, -49, -35, -23, -11, 0, 10, 20, 30, 42, 54, 69, 89, 123}},
    [FP4] = {{0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6},
             2, {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}}};

/* The largest int16 code that is 256 * a + b with a and b in int8. At most 128 products with codes of at most 255 fit
 * their sum in int32. */
#define WIDE_MOST 32639

/* Of mixed inputs: the usual size of a step's codes is to be at least so large. See wide_scale. */
#define MIXED_USUAL 18

/* Where input i is in Input.wide: of each four in the order 0, 2, 1, 3, so that masks and shifts of 16 bits bring the
 * bytes of four weights to the two inputs that each 32-bit lane multiplies. */
static inline int64_t wide_place(int64_t i) { return (i & ~(int64_t)3) | (i & 1) << 1 | (i >> 1 & 1); }

static inline int64_t chunks(int64_t padded) { return (padded + CHUNK - 1) / CHUNK; }
static inline int64_t code_bytes(const Weight *w) { return w->code == INT8 || w->code == FP8 ? 1 : 2; } /* codes per byte */

#endif
