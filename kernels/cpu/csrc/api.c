/* What Python calls: packing, multiplying, and which instruction sets there are. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bitpress.h"

HOLD_TEXT

#define MAGIC 0x3173736572706962 /* "bipress1" */
#define FEW_ROWS 64              /* of a task: up to so many, its weights are read in the order in which they lie */
#define MOST_ROWS 256            /* of a task, so that its inputs stay in a core's second cache */
#define INPUT_BYTES (512 << 10) /* of a task's inputs, likewise, where there are no tiles */
#define SUM_BYTES (512 << 10)   /* sums of a task, which stay in a core's second cache */
#define TASK_BYTES (512 << 10)   /* of weights, where these are read once */
#define PIECE (16 << 10)         /* words of 8 bytes that are read at a time */
#define MIN_PARALLEL (32 << 10)  /* inputs that are worth waking threads for */

typedef struct {
    const char *name;
    int (*available)(void);
    const Kernels *kernels;
    const Tiles *tiles; /* or NULL */
    const Layers *layers;
} Instructions;

static int always(void) { return 1; }

static const Instructions sets[] = {
#if defined(__x86_64__)
    {"amx-int8", has_amx_int8, &avx512_kernels, &amx_tiles, &avx512_layers},
    {"avx512-vnni", has_avx512_vnni, &avx512_kernels, &avx512_tiles, &avx512_layers},
    {"avx2", has_avx2, &avx2_kernels, NULL, &avx2_layers},
#elif defined(__aarch64__)
    {"neon-i8mm", has_neon_i8mm, &neon_i8mm_kernels, NULL, &plain_layers},
    {"neon-dotprod", has_neon_dotprod, &neon_dotprod_kernels, NULL, &plain_layers},
#endif
    {"portable", always, &portable_kernels, NULL, &plain_layers}};

EXPORT int bitpress_kernel_count(void) { return sizeof sets / sizeof *sets; }
EXPORT const char *bitpress_kernel_name(int index) { return sets[index].name; }
EXPORT int bitpress_kernel_available(int index) { return sets[index].available(); }

const Layers *layers_by(int64_t kernel) {
    return kernel >= 0 && kernel < bitpress_kernel_count() ? sets[kernel].layers : NULL;
}

/* ---- threads ---- */

typedef void (*Body)(void *);
static void (*fork_join)(Body, void *, unsigned, unsigned);

/* GOMP_parallel of the OpenMP runtime that torch uses: its threads then serve here too, and do not spin while ours
 * work. Without it, threads are started for each call. */
EXPORT void bitpress_set_fork_join(void *function) { *(void **)&fork_join = function; }

typedef struct {
    Body body;
    void *context;
} Call;

static void *started(void *call) {
    ((Call *)call)->body(((Call *)call)->context);
    return NULL;
}

void parallel(Body body, void *context, int threads) {
    if (threads <= 1) {
        body(context);
    } else if (fork_join) {
        fork_join(body, context, (unsigned)threads, 0);
    } else {
        enum { MOST = 64 };
        pthread_t others[MOST];
        int running = 0;
        Call call = {body, context};
        while (running < threads - 1 && running < MOST && !pthread_create(&others[running], NULL, started, &call))
            running++;
        body(context); /* takes whatever tasks no thread has taken */
        while (running) pthread_join(others[--running], NULL);
    }
}

/* Asks for huge pages for memory that has not been written yet. Where they are refused nothing is lost but speed. */
EXPORT void bitpress_use_huge_pages(void *start, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 2 << 20, first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)start + (uintptr_t)bytes) / page * page;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

/* Brings a file's mapped pages in now, as huge ones where its file system keeps such. Returns 0, or 1 where they cannot be
 * read. A piece at a time, so that other threads can map memory meanwhile. */
EXPORT int bitpress_page_in(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_READ)
    const int64_t piece = 16 << 20;
    madvise(start, (size_t)bytes, MADV_HUGEPAGE);
    for (int64_t at = 0; at < bytes; at += piece)
        while (madvise((char *)start + at, (size_t)(bytes - at < piece ? bytes - at : piece), MADV_POPULATE_READ))
            if (errno == EINVAL) return 0; /* Linux before 5.14: they come when they are first read */
            else if (errno != EINTR && errno != EAGAIN) return 1;
#else
    (void)start, (void)bytes;
#endif
    return 0;
}

/* ---- packed weights: a header, then the tensors that Weight names ---- */

typedef struct {
    int64_t magic, out_features, in_features, padded, group, step, code, zero;
    int64_t codes, scales, zeros, multiplier; /* bytes from the header's start; 0: there is none */
    int64_t bytes, table, inputs, shifts;
} Header;

static Weight weight_of(const void *packed) {
    const Header *h = packed;
    const char *base = packed;
    return (Weight){.out_features = h->out_features, .in_features = h->in_features, .padded = h->padded,
                    .group = h->group, .step = h->step, .code = h->code, .zero = h->zero,
                    .codes = (const uint8_t *)(base + h->codes),
                    .scales = h->scales ? (const uint16_t *)(base + h->scales) : NULL,
                    .zeros = h->zeros ? (const uint8_t *)(base + h->zeros) : NULL,
                    .multiplier = (const float *)(base + h->multiplier),
                    .inputs = h->inputs ? (const float *)(base + h->inputs) : NULL,
                    .shifts = h->shifts ? (const int32_t *)(base + h->shifts) : NULL, .table = &tables[h->table]};
}

static int64_t blocks_of(const Weight *w) { return (w->out_features + PAIR - 1) / PAIR * 2; }
static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }
static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

/* has_inputs: whether inputs have a scale that is stored; has_shifts: whether they have a zero point, stored or not.
 * Fills the header; returns the bytes that the whole takes, -1 where the numbers do not fit together. */
EXPORT int64_t bitpress_layout(void *packed, int64_t out_features, int64_t in_features, int64_t group, int64_t step,
                               int64_t code, int64_t table, int64_t zero, int64_t has_scales, int64_t has_zeros,
                               int64_t has_inputs, int64_t has_shifts) {
    if (out_features < 1 || in_features < 1 || step < 16 || step % (code == INT4 ? 32 : 16) || group % step ||
        code < INT4 || code > FP8 ||
        table < NF4 || table > FP4 || ((has_inputs || has_shifts) && (code != INT8 || step != group || step < in_features)))
        return -1;
    const int64_t padded = (in_features + group - 1) / group * group;
    const Weight w = {.out_features = out_features, .padded = padded, .code = code};
    const int64_t outputs = blocks_of(&w) * BLOCK, groups = padded / group;
    Header h = {.magic = MAGIC, .out_features = out_features, .in_features = in_features, .padded = padded,
                .group = group, .step = step, .code = code, .zero = zero, .table = table};
    int64_t end = sizeof(Header);
    h.codes = end, end = aligned(end + outputs * padded / code_bytes(&w));
    if (has_scales) h.scales = end, end = aligned(end + outputs * groups * 2);
    if (has_zeros) h.zeros = end, end = aligned(end + outputs * groups);
    h.multiplier = end, end = aligned(end + outputs * 4);
    if (has_inputs) h.inputs = end, end = aligned(end + 2 * 4);
    if (has_shifts) h.shifts = end, end = aligned(end + outputs * 4);
    h.bytes = end;
    memcpy(packed, &h, sizeof h);
    return end;
}

typedef struct {
    Weight w;
    const uint32_t *from;
    int64_t words, row_stride, word_stride, high_first;
    uint8_t *to;
    atomic_llong next;
} Packing;

/* Eight 4-bit codes, the first lowest -> bytes of codes 0 and 4, 1 and 5, 2 and 6, 3 and 7. */
static uint32_t interleaved(uint32_t codes) {
    uint32_t low = (codes & 0xff) | (codes & 0xff00) << 8, high = (codes >> 16 & 0xff) | (codes >> 8 & 0xff0000);
    low = (low | low << 4) & 0x0f0f0f0f;
    high = (high | high << 4) & 0x0f0f0f0f;
    return low | high << 4;
}

static void pack_blocks(void *context) {
    Packing *p = context;
    const Weight *w = &p->w;
    const int64_t blocks = blocks_of(w), words = w->padded / (4 * code_bytes(w));
    for (int64_t block; (block = atomic_fetch_add(&p->next, 1)) < blocks;) {
        const int64_t outputs = maximum(minimum(w->out_features - block * BLOCK, BLOCK), 0);
        const uint32_t *from = p->from + block * BLOCK * p->row_stride;
        uint8_t *to = p->to + block * words * BLOCK * 4;
        for (int64_t i = 0; i < words; i++) {
            uint32_t line[BLOCK] = {0};
            for (int64_t n = 0; i < p->words && n < outputs; n++)
                line[n] = from[n * p->row_stride + i * p->word_stride];
            for (int64_t n = 0; p->high_first && n < BLOCK; n++)
                line[n] = (line[n] & 0x0f0f0f0f) << 4 | (line[n] >> 4 & 0x0f0f0f0f);
            for (int64_t n = 0; code_bytes(w) == 2 && n < BLOCK; n++) line[n] = interleaved(line[n]);
            memcpy(to + i * sizeof line, line, sizeof line);
        }
    }
}

/* Codes -> the header's codes: word i of output o is codes[o * row_stride + i * word_stride], of `words`, and holds two
 * codes per byte (the first in the low nibble, or the high one) or one. Assumes a little-endian machine. */
EXPORT void bitpress_pack(void *packed, const uint32_t *codes, int64_t words, int64_t row_stride, int64_t word_stride,
                          int64_t high_first, int threads) {
    Packing p = {.w = weight_of(packed), .from = codes, .words = words, .row_stride = row_stride,
                 .word_stride = word_stride, .high_first = high_first};
    p.to = (uint8_t *)p.w.codes;
    atomic_init(&p.next, 0);
    parallel(pack_blocks, &p, threads);
}

/* ---- linear ---- */

enum { MOST_FACTORS = 3 }; /* of one x */

typedef struct {
    Weight w;
    const float *bias;
    char *y;
    int64_t blocks_per_task, rows_per_task, across, tasks;
} Output;

typedef struct {
    const Kernels *k;
    const Tiles *tiles; /* NULL where rows are few */
    Output outputs[MOST_FACTORS];
    int count, needs_sums, split; /* needs_sums: of float32 inputs, for zero points; split: see Input */
    Input in;
    const void *x;
    const int32_t *order;
    int64_t in_features, step, group, dtype, item;
    Inputs inputs;
    atomic_llong next;
    atomic_int failed;
} Product;

/* `floats` has space for a row. */
static void prepare_row(const Product *p, int64_t row, float *floats) {
    const Input *in = &p->in;
    const char *x = (const char *)p->x + row * p->in_features * p->item;
    const float *values = (const float *)x;
    if (p->inputs == INPUTS_FLOAT32) floats = in->values + row * in->padded;
    if (p->order) {
        for (int64_t i = 0; i < p->in_features; i++) floats[i] = ((const float *)x)[p->order[i]];
        values = floats;
    } else if (p->dtype != FLOAT32 || p->inputs == INPUTS_FLOAT32) {
        p->k->widen(x, (DType)p->dtype, p->in_features, floats);
        values = floats;
    }
    if (p->inputs == INPUTS_FLOAT32) {
        memset(floats + p->in_features, 0, (size_t)(in->padded - p->in_features) * 4);
        for (int64_t g = 0; p->needs_sums && g < in->groups; g++) {
            float sum = 0;
            for (int64_t i = g * p->group; i < (g + 1) * p->group; i++) sum += floats[i];
            in->value_sums[row * in->groups + g] = sum;
        }
        return;
    }
    const int64_t tile_bytes = PAIR * CHUNK, tiled = row / PAIR * tile_bytes * chunks(in->padded) + row % PAIR * CHUNK;
    const int64_t at = p->tiles ? row / PAIR * in->steps * PAIR + row % PAIR : row * in->steps;
    const int64_t to = p->tiles ? tiled : row * in->padded, stride = p->tiles ? tile_bytes : CHUNK;
    const int64_t apart = p->tiles ? PAIR : 1;
    const int mixed = p->inputs == INPUTS_MIXED;
    const Weight *w = &p->outputs[0].w;
    if (w->inputs || w->shifts) {
        float range[2];
        if (!w->inputs) p->k->fit_range(values, p->in_features, range);
        p->k->quantize_static(values, p->in_features, in->padded, w->inputs ? w->inputs : range, in->codes + to, stride,
                              in->scales + at, in->sums + at, in->zeros + at);
    } else if (p->inputs == INPUTS_INT8)
        p->k->quantize(values, p->in_features, in->padded, p->step, in->codes + to, stride, in->scales + at, in->sums + at,
                       apart);
    else if (p->split)
        p->k->quantize_split(values, p->in_features, in->padded, p->step, mixed, in->codes + to, in->high + to, stride,
                             in->scales + at, in->sums + at, in->outliers + at, apart);
    else
        p->k->quantize_wide(values, p->in_features, in->padded, p->step, mixed, in->wide + to, in->scales + at,
                            in->sums + at, apart);
}

static void prepare_rows(void *context) {
    Product *p = context;
    float *floats = malloc((size_t)p->in.padded * 4);
    if (!floats) {
        p->failed = 1;
        return;
    }
    EACH_CLAIMED(row, p->in.rows, p->next) prepare_row(p, row, floats);
    free(floats);
}

static void finish_rows(const Product *p, const Output *o, int64_t block, int64_t row, int64_t count, const float *out) {
    const int64_t first = block * BLOCK, outputs = minimum(PAIR, o->w.out_features - first);
    if (outputs <= 0) return;
    for (int64_t m = 0; m < count; m++)
        p->k->finish(out + m * PAIR, o->w.multiplier + first, o->bias ? o->bias + first : NULL, outputs, (DType)p->dtype,
                     o->y + ((row + m) * o->w.out_features + first) * p->item);
}

static void multiply_rows(const Product *p, const Output *o, int64_t block, int64_t blocks, int64_t row, int64_t rows) {
    float out[MAX_ROWS * PAIR];
    void (*const some)(const Weight *, const Input *, int64_t, int64_t, int64_t, float *) =
        p->inputs == INPUTS_FLOAT32 ? p->k->exact : p->inputs == INPUTS_INT8 || p->split ? p->k->rows : p->k->wide_rows;
    for (int64_t b = block; b < block + blocks; b += 2)
        for (int64_t m = row; m < row + rows; m += MAX_ROWS) {
            const int64_t count = minimum(MAX_ROWS, row + rows - m);
            some(&o->w, &p->in, b, m, count, out);
            finish_rows(p, o, b, m, count, out);
        }
}

/* A stretch of features at a time: its weights, unpacked, stay in the first cache while all rows pass by, its inputs in
 * the second while the blocks do. Where rows are few, codes are read in the order in which they lie. */
static void multiply_tiles(const Product *p, const Output *o, int64_t block, int64_t blocks, int64_t row, int64_t rows,
                           char *scratch) {
    const Weight *w = &o->w;
    const int64_t stretch = w->step == 96 ? 384 : STRETCH, at_once = rows > FEW_ROWS ? blocks : 2;
    const int64_t ahead = at_once == 2 ? stretch * BLOCK / code_bytes(w) : PAIR * w->padded / code_bytes(w);
    int8_t *panel = (int8_t *)scratch;
    float *sums = (float *)(scratch + PAIR * STRETCH);
    int64_t configured = 0;
    for (int64_t first = 0; first < blocks; first += at_once)
        for (int64_t from = 0; from < w->padded; from += stretch) {
            const int64_t to = minimum(from + stretch, w->padded);
            for (int64_t b = first; b < first + at_once; b += 2) {
                p->tiles->unpack(w, block + b, from, to, ahead, panel);
                for (int64_t m = 0; m < rows; m += PAIR) {
                    const int64_t count = minimum(PAIR, rows - m);
                    if (count != configured) p->tiles->begin(w, configured = count);
                    p->tiles->tile(w, &p->in, block + b, from, to, panel, row + m, count,
                               sums + (b * BLOCK * rows + m * PAIR));
                }
            }
        }
    p->tiles->end();
    for (int64_t b = 0; b < blocks; b += 2) finish_rows(p, o, block + b, row, rows, sums + b * BLOCK * rows);
}

static void multiply(void *context) {
    Product *p = context;
    char *scratch = NULL;
    int64_t bytes = 0, tasks = 0;
    for (int i = 0; i < p->count; i++) {
        const Output *o = &p->outputs[i];
        bytes = maximum(bytes, PAIR * STRETCH + o->blocks_per_task * BLOCK * o->rows_per_task * 4);
        tasks += o->tasks;
    }
    if (p->tiles && !(scratch = aligned_alloc(64, (size_t)bytes))) {
        p->failed = 1;
        return;
    }
    for (int64_t task; (task = atomic_fetch_add(&p->next, 1)) < tasks;) {
        const Output *o = p->outputs;
        while (task >= o->tasks) task -= o++->tasks;
        const int64_t block = task % o->across * o->blocks_per_task, row = task / o->across * o->rows_per_task;
        const int64_t width = minimum(o->blocks_per_task, blocks_of(&o->w) - block);
        const int64_t rows = minimum(o->rows_per_task, p->in.rows - row);
        if (p->tiles) multiply_tiles(p, o, block, width, row, rows, scratch);
        else multiply_rows(p, o, block, width, row, rows);
    }
    free(scratch);
}

/* Tasks large enough to be worth claiming and to use what is in cache, small enough that threads end together. */
static void split(const Product *p, Output *o, int threads) {
    const int64_t pairs = blocks_of(&o->w) / 2, rows = p->in.rows;
    const int64_t item = p->inputs == INPUTS_FLOAT32 ? 4 : p->inputs == INPUTS_INT8 ? 1 : 2;
    const int64_t fitting = maximum(MAX_ROWS, INPUT_BYTES / (o->w.padded * item) / MAX_ROWS * MAX_ROWS);
    o->rows_per_task = minimum(rows, p->tiles ? MOST_ROWS : fitting);
    const int64_t down = (rows + o->rows_per_task - 1) / o->rows_per_task;
    int64_t per_task = p->tiles ? SUM_BYTES / (PAIR * o->rows_per_task * 4)
                                : TASK_BYTES / (PAIR * o->w.padded / code_bytes(&o->w));
    per_task = maximum(1, minimum(per_task, pairs * down / (threads * 4)));
    o->blocks_per_task = 2 * minimum(per_task, pairs);
    if (pairs < threads * 4 && rows > 2 * PAIR * threads) /* a narrow weight: rows are split too */
        o->rows_per_task = minimum(o->rows_per_task, (rows / (4 * threads) + PAIR) / PAIR * PAIR);
    o->across = (2 * pairs + o->blocks_per_task - 1) / o->blocks_per_task;
    o->tasks = o->across * ((rows + o->rows_per_task - 1) / o->rows_per_task);
}

static int carve(Product *p, char **memory) {
    Input *in = &p->in;
    const int exact = p->inputs == INPUTS_FLOAT32;
    const int64_t padded_rows = (in->rows + PAIR - 1) / PAIR * PAIR;
    const int64_t code = aligned(exact ? 0 : padded_rows * chunks(in->padded) * CHUNK);
    const int64_t numbers = aligned(padded_rows * (exact ? in->groups : in->steps) * 4);
    const int64_t value = aligned(exact ? in->rows * in->padded * 4 : 0);
    const int64_t total = code * (p->inputs == INPUTS_INT8 ? 1 : 2) + 3 * numbers + value;
    if (!(*memory = aligned_alloc(64, (size_t)total + 64))) return 1;
    in->scales = (float *)*memory;
    in->sums = (int32_t *)(*memory + numbers);
    in->outliers = (uint32_t *)(*memory + 2 * numbers);
    in->zeros = (int32_t *)in->outliers; /* of int8 inputs, which have no outliers */
    in->value_sums = (float *)*memory;
    in->values = (float *)(*memory + 3 * numbers);
    in->codes = (int8_t *)(*memory + 3 * numbers);
    in->wide = (int16_t *)in->codes;
    in->high = p->split ? in->codes + code : NULL;
    return 0;
}

/* Products of weights that one prepared input serves. */
static int multiply_alike(Product *p, int threads) {
    const Weight *w = &p->outputs[0].w;
    p->in_features = w->in_features, p->step = w->step, p->group = w->group;
    p->in.padded = w->padded, p->in.steps = w->padded / w->step, p->in.groups = w->padded / w->group;
    int64_t size = 0;
    for (int i = 0; i < p->count; i++) {
        size += p->outputs[i].w.out_features * w->in_features * p->in.rows;
        p->needs_sums |= p->outputs[i].w.zeros != NULL;
    }
    char *memory;
    if (carve(p, &memory)) return 1;
    if (size < MIN_PARALLEL) threads = 1;
    atomic_init(&p->next, 0);
    parallel(prepare_rows, p, p->in.rows > 1 && p->in.rows * w->in_features >= MIN_PARALLEL ? threads : 1);
    for (int i = 0; i < p->count; i++) split(p, &p->outputs[i], threads);
    atomic_init(&p->next, 0);
    if (!p->failed) parallel(multiply, p, threads);
    free(memory);
    return p->failed;
}

static int alike(const Weight *a, const Weight *b) {
    const int fixed = a->inputs || b->inputs;
    return a->in_features == b->in_features && a->padded == b->padded && a->group == b->group && a->step == b->step &&
           !a->shifts == !b->shifts && (!fixed || (a->inputs && b->inputs && !memcmp(a->inputs, b->inputs, 2 * sizeof(float))));
}

int bitpress_products(const Factor *factors, int count, const void *x, const int32_t *order, int64_t rows, int64_t dtype,
             int inputs, int kernel, int threads) {
    if (kernel < 0 || kernel >= bitpress_kernel_count() || inputs < INPUTS_INT8 || inputs > INPUTS_MIXED) return 2;
    const Instructions *set = &sets[kernel];
    int status = 0;
    for (int from = 0, to = 0; rows && from < count && !status; from = to) {
        Product p = {.k = set->kernels, .tiles = inputs == INPUTS_FLOAT32 || rows <= MAX_ROWS ? NULL : set->tiles,
                     .in = {.rows = rows}, .x = x, .order = order, .dtype = dtype, .item = dtype == FLOAT32 ? 4 : 2,
                     .inputs = (Inputs)inputs};
        p.split = p.tiles ? inputs != INPUTS_INT8 : inputs == INPUTS_MIXED && p.k->quantize_split;
        for (; to < count && p.count < MOST_FACTORS; to++) {
            if (((const Header *)factors[to].packed)->magic != MAGIC) return 2;
            const Weight w = weight_of(factors[to].packed);
            const int wide = inputs == INPUTS_INT16 || inputs == INPUTS_MIXED;
            if (wide && (w.step > 128 || w.inputs || w.shifts)) return 2;
            if (inputs != INPUTS_FLOAT32 && w.code == FP8) return 2;
            if (p.count && !alike(&w, &p.outputs[0].w)) break;
            p.outputs[p.count++] = (Output){.w = w, .bias = factors[to].bias, .y = factors[to].y};
        }
        status = multiply_alike(&p, threads);
    }
    return status;
}

/* y [rows][out_features] = x [rows][in_features] times the weight + bias (float32 [out_features], or NULL).
 *
 * x and y have the dtype. inputs: one of Inputs; int16 and mixed need steps of at most 128, FP8 weights need float32.
 * int8 inputs whose scale is stored with the weight are rounded by that.
 * Returns 0; 1: out of memory; 2: no such weight, inputs or kernel.
 */
EXPORT int bitpress_linear(const void *packed, const void *x, int64_t rows, int64_t dtype, const float *bias, void *y,
                           int inputs, int kernel, int threads) {
    return bitpress_products(&(Factor){packed, bias, y}, 1, x, NULL, rows, dtype, inputs, kernel, threads);
}

/* ---- the weight itself ---- */

typedef struct {
    const Kernels *k;
    Weight w;
    int64_t dtype, first, last; /* blocks */
    char *out;
    atomic_llong next;
} Restoring;

enum { RESTORED = 128 }; /* features at a time, so that they stay in the first cache */

static void restore_blocks(void *context) {
    Restoring *r = context;
    const Weight *w = &r->w;
    const int64_t item = r->dtype == FLOAT32 ? 4 : 2;
    float values[BLOCK * RESTORED];
    for (int64_t block; (block = r->first + atomic_fetch_add(&r->next, 1)) < r->last;)
        for (int64_t from = 0; from < w->in_features; from += RESTORED) {
            const int64_t width = minimum(RESTORED, w->padded - from), wanted = minimum(width, w->in_features - from);
            r->k->dequantize(w, block, from, from + width, values);
            for (int64_t n = 0; n < BLOCK && block * BLOCK + n < w->out_features; n++)
                r->k->finish(values + n * width, NULL, NULL, wanted, (DType)r->dtype,
                             r->out + (((block - r->first) * BLOCK + n) * w->in_features + from) * item);
        }
}

/* Output features first .. first + count (first a multiple of 16): out [count][in_features], in dtype. Returns 0, or 2:
 * no such weight or kernel. */
EXPORT int bitpress_dequantize(const void *packed, int64_t first, int64_t count, int64_t dtype, void *out, int kernel,
                               int threads) {
    if (((const Header *)packed)->magic != MAGIC || kernel < 0 || kernel >= bitpress_kernel_count()) return 2;
    Restoring r = {.k = sets[kernel].kernels, .w = weight_of(packed), .dtype = dtype, .out = out, .first = first / BLOCK,
                   .last = (first + count + BLOCK - 1) / BLOCK};
    atomic_init(&r.next, 0);
    parallel(restore_blocks, &r, threads);
    return 0;
}

/* ---- how fast memory is read ---- */

typedef struct {
    const Kernels *k;
    const uint64_t *from;
    int64_t pieces;
    atomic_llong next;
    atomic_ullong sum;
} Reading;

static void read_pieces(void *context) {
    Reading *r = context;
    uint64_t sum = 0;
    for (int64_t piece; (piece = atomic_fetch_add(&r->next, 1)) < r->pieces;)
        sum ^= r->k->read(r->from + piece * PIECE, PIECE);
    atomic_fetch_xor(&r->sum, sum);
}

/* Reads whole pieces of 128 KiB and returns their words' exclusive or, so that nothing can be left out. */
EXPORT uint64_t bitpress_read(const void *from, int64_t bytes, int kernel, int threads) {
    Reading r = {.k = sets[kernel].kernels, .from = from, .pieces = bytes / (PIECE * 8)};
    atomic_init(&r.next, 0);
    atomic_init(&r.sum, 0);
    parallel(read_pieces, &r, threads);
    return r.sum;
}

/* See Columns; on this thread. Returns 0, or 2: no such kernel. */
EXPORT int bitpress_columns(float *left, const float *factor, int64_t stride, const float *scales, const float *low,
                            const float *high, const int32_t *groups, float *codes, float *steps, int64_t count,
                            int64_t rows, int settle, int kernel) {
    if (kernel < 0 || kernel >= bitpress_kernel_count() || !sets[kernel].available()) return 2;
    const Columns c = {.left = left, .codes = codes, .steps = steps, .factor = factor, .scales = scales, .low = low,
                       .high = high, .groups = groups, .count = count, .rows = rows, .stride = stride, .settle = settle};
    sets[kernel].kernels->columns(&c);
    return 0;
}
