/* What Python calls of decoder layers: some of them, a dense head, and a whole step to the next token. */
#include "layer.h"

HOLD_TEXT

/* `count` layers of as many features, one after the other, all by one kernel. Returns 0; 1: out of memory; 2: no such
 * weight or kernel. */
EXPORT int bitpress_layers_step(const Layer *const *layers, int64_t count, const Step *s) {
    const Layers *set = layers_by(layers[0]->kernel);
    return set ? set->layers(layers, count, s) : 2;
}

/* See Dense. Returns 0; 2: no such kernel. */
EXPORT int bitpress_dense(const void *weight, const float *x, void *y, int64_t rows, int64_t out_features,
                          int64_t in_features, int64_t dtype, int kernel, int threads) {
    const Layers *set = layers_by(kernel);
    if (!set) return 2;
    Dense d = {.weight = weight, .x = x, .y = y, .rows = rows, .out_features = out_features, .in_features = in_features,
               .dtype = dtype};
    atomic_init(&d.next, 0);
    parallel(set->dense, &d, threads);
    return 0;
}

enum { LOGITS = 1024 }; /* that are float32 at a time */

/* Whose logit is the largest, the first of them, or the first that is NaN; its value to *largest. */
static int64_t best_of(const char *logits, int64_t count, DType dtype, float *largest) {
    const int64_t item = dtype == FLOAT32 ? 4 : 2;
    float values[LOGITS];
    int32_t most = INT32_MIN;
    int64_t best = 0;
    for (int64_t from = 0; from < count; from += LOGITS) {
        const int64_t some = count - from < LOGITS ? count - from : LOGITS;
        int32_t top = INT32_MIN, places[LOGITS];
        generic_widen(logits + from * item, dtype, some, values);
        for (int64_t i = 0; i < some; i++) { /* to integers in the same order, NaN of either sign last; -0 is 0 */
            const int32_t bits = (int32_t)float_to_bits(values[i] + 0.0f), size = bits & 0x7fffffff;
            places[i] = size > 0x7f800000 ? 0x7f800001 : bits < 0 ? -size : size;
            top = places[i] > top ? places[i] : top;
        }
        if (top <= most) continue;
        most = top;
        for (best = from; places[best - from] != top;) best++;
        *largest = values[best - from];
    }
    return best;
}

/* The next token of each sequence: rows of the embedding, all layers and the norm, the head, and its largest logit. Step's
 * count is 1. Returns as bitpress_layers_step does. */
EXPORT int bitpress_next_tokens(const Layer *const *layers, int64_t count, const Step *s, const Around *a) {
    const int64_t hidden = layers[0]->linears[QUERY].in, item = s->dtype == FLOAT32 ? 4 : 2;
    const DType dtype = (DType)s->dtype;
    Step step = *s;
    char *memory = malloc((size_t)(s->batch * hidden) * 4);
    if (!memory) return 1;
    if (a->embedding) {
        for (int64_t i = 0; i < s->batch; i++)
            memcpy(memory + i * hidden * item, (const char *)a->embedding + a->tokens[i] * hidden * item, (size_t)(hidden * item));
        step.x = memory;
    }
    int failed = bitpress_layers_step(layers, count, &step);
    if (!failed && a->head.packed) {
        failed = bitpress_products(&(Factor){a->head.packed, a->head.bias, a->logits}, 1, s->y, NULL, s->batch, dtype,
                                   (int)a->head.inputs, (int)layers[0]->kernel, s->threads);
    } else if (!failed) {
        generic_widen(s->y, dtype, s->batch * hidden, (float *)memory);
        failed = bitpress_dense(a->dense, (float *)memory, a->logits, s->batch, a->vocabulary, hidden, dtype,
                                (int)layers[0]->kernel, s->threads);
    }
    free(memory);
    for (int64_t i = 0; i < s->batch && !failed; i++)
        a->best[i] = best_of((char *)a->logits + i * a->vocabulary * item, a->vocabulary, dtype, a->largest + i);
    return failed;
}
