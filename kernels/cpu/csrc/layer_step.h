/* The layer of layer.c, which includes this once for each instruction set: TARGET is its attribute, LANES the floats of
 * its registers, EVEN and ODD the places of every other lane of two of them, NAME(x) a name of its own.
 * MULTIPLY_ADD(x, y, z) is x * y + z, of registers x and z and a number y. */

HOLD_TEXT

#define LOCAL TARGET static inline __attribute__((always_inline))
#define V NAME(Floats)

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(Words) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(Halves) __attribute__((vector_size(2 * LANES)));

LOCAL V NAME(load)(const void *from, int64_t at, const DType dtype) {
    V value;
    if (dtype == FLOAT32) {
        memcpy(&value, (const float *)from + at, sizeof value);
    } else if (dtype == BFLOAT16) {
        NAME(Halves) halves;
        memcpy(&halves, (const uint16_t *)from + at, sizeof halves);
        const NAME(Words) bits = __builtin_convertvector(halves, NAME(Words)) << 16;
        memcpy(&value, &bits, sizeof value);
    } else {
        float lanes[LANES];
        for (int i = 0; i < LANES; i++) lanes[i] = from_half(((const uint16_t *)from)[at + i]);
        memcpy(&value, lanes, sizeof value);
    }
    return value;
}

LOCAL void NAME(store)(float *to, V value) { memcpy(to, &value, sizeof value); }

/* Lane i of the result is the sum of the lanes of sums[i]: neighbours are added until one lane of each is left. */
LOCAL V NAME(fold)(V *sums) {
    for (int count = LANES / 2; count; count /= 2)
        for (int i = 0; i < count; i++) {
            const V a = sums[2 * i], b = sums[2 * i + 1];
#if defined(__clang__)
            sums[i] = __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
#else
            sums[i] = __builtin_shuffle(a, b, (NAME(Words)){EVEN}) + __builtin_shuffle(a, b, (NAME(Words)){ODD});
#endif
        }
    return sums[0];
}

/* x / root mean square(x) * weight (arXiv 1910.07467, equation 4, with eps added to the mean), or x less its mean and plus a
 * bias (LayerNorm, arXiv 1607.06450, equation 4); y may be x. */
TARGET static void NAME(norm)(const float *x, const Norm *n, float *y) {
    const int64_t count = n->features;
    float squares[LANES] = {0}, sum = 0, mean = 0;
    int64_t i = 0;
    if (n->centered) {
        for (; i < count; i++) mean += x[i];
        mean /= (float)count;
        i = 0;
    }
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) squares[j] += (x[i + j] - mean) * (x[i + j] - mean);
    for (; i < count; i++) sum += (x[i] - mean) * (x[i] - mean);
    for (int j = 0; j < LANES; j++) sum += squares[j];
    const float factor = 1 / sqrtf(sum / (float)count + n->eps);
    for (i = 0; i < count; i++) y[i] = n->weight[i] * ((x[i] - mean) * factor);
    for (i = 0; n->bias && i < count; i++) y[i] += n->bias[i];
}

/* All parts of a row that a norm takes, where there is one. */
TARGET static void NAME(norm_parts)(float *x, int64_t features, const Norm *n) {
    for (int64_t i = 0; n->weight && i < features; i += n->features) NAME(norm)(x + i, n, x + i);
}

/* Keys or values of one sequence and head: `length` of them, [length][dim], from number `first` on. */
typedef struct {
    const void *data;
    int64_t first, length, dim;
} NAME(States);

/* Scores of `count` queries, a constant, over all keys: [count][stride]; those beyond the last are -infinity. LANES
 * divides stride, which is larger than the number of keys by less than LANES, or by more if nobody reads these. */
LOCAL void NAME(score)(const NAME(States) keys, const float *q, float scale, const int count, const DType dtype,
                       int64_t stride, float *scores) {
    for (int64_t s = 0; s < stride; s += LANES) {
        V sums[TOGETHER][LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t row = keys.first + (s + i < keys.length ? s + i : keys.length - 1) * keys.dim;
            V sum[TOGETHER] = {0};
            for (int64_t j = 0; j < keys.dim; j += LANES) {
                const V key = NAME(load)(keys.data, row + j, dtype);
                for (int g = 0; g < count; g++) sum[g] += key * NAME(load)(q + g * keys.dim, j, FLOAT32);
            }
            for (int g = 0; g < count; g++) sums[g][i] = sum[g];
        }
        for (int g = 0; g < count; g++) NAME(store)(scores + g * stride + s, NAME(fold)(sums[g]) * scale);
    }
    for (int g = 0; g < count; g++)
        for (int64_t s = keys.length; s < stride; s++) scores[g * stride + s] = -INFINITY;
}

/* Scores to probabilities: exp(score - the largest), divided by their sum. */
LOCAL void NAME(softmax)(float *scores, int64_t count) {
    float most[LANES], sums[LANES] = {0}, top = -INFINITY, sum = 0;
    for (int j = 0; j < LANES; j++) most[j] = -INFINITY;
    for (int64_t s = 0; s < count; s += LANES)
        for (int j = 0; j < LANES; j++) most[j] = scores[s + j] > most[j] ? scores[s + j] : most[j];
    for (int j = 0; j < LANES; j++) top = most[j] > top ? most[j] : top;
    for (int64_t s = 0; s < count; s++) scores[s] = exponential(scores[s] - top);
    for (int64_t s = 0; s < count; s += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += scores[s + j];
    for (int j = 0; j < LANES; j++) sum += sums[j];
    for (int64_t s = 0; s < count; s++) scores[s] /= sum;
}

LOCAL void NAME(mix)(const NAME(States) values, const float *weights, int64_t stride, const int count, const DType dtype,
                     float *out) {
    memset(out, 0, (size_t)(count * values.dim) * 4);
    for (int64_t start = 0; start < values.length; start += POSITIONS) {
        const int64_t end = start + POSITIONS < values.length ? start + POSITIONS : values.length;
        for (int64_t j = 0; j < values.dim; j += LANES) {
            V sums[TOGETHER];
            for (int g = 0; g < count; g++) sums[g] = NAME(load)(out + g * values.dim, j, FLOAT32);
            for (int64_t s = start; s < end; s++) {
                const V value = NAME(load)(values.data, values.first + s * values.dim + j, dtype);
                for (int g = 0; g < count; g++) sums[g] += value * weights[g * stride + s];
            }
            for (int g = 0; g < count; g++) NAME(store)(out + g * values.dim + j, sums[g]);
        }
    }
}

/* The states of a sequence's key head, of tokens from .. to. */
LOCAL NAME(States) NAME(states)(const Rows *r, const void *data, int64_t sequence, int64_t key_head, int64_t from,
                                int64_t to) {
    const int64_t head = sequence * r->l->key_heads + key_head, dim = r->l->dim;
    return (NAME(States)){data, (head * r->c->capacity + from - r->c->start) * dim, to - from, dim};
}

LOCAL void NAME(attend_heads)(const Rows *r, int64_t sequence, int64_t head, int64_t key_head, const int count,
                              const DType dtype) {
    const Layer *l = r->l;
    const int64_t token = r->s->length + r->from, from = first_seen(r, sequence, token);
    float *q = r->q + sequence * r->query_apart + head * l->dim;
    float *mixed = r->mixed + (sequence * l->heads + head) * l->dim;
    float *scores = r->scores + (sequence * l->heads + head) * r->stride;
    const NAME(States) keys = NAME(states)(r, r->c->keys, sequence, key_head, from, token + 1);
    if (keys.length <= 0) { /* a padding token sees no key */
        memset(mixed, 0, (size_t)(count * l->dim) * 4);
        return;
    }
    const int64_t stride = (keys.length + LANES - 1) / LANES * LANES;
    NAME(score)(keys, q, l->scale, count, dtype, stride, scores);
    for (int g = 0; l->cap && g < count; g++)
        for (int64_t i = 0; i < keys.length; i++) scores[g * stride + i] = capped(scores[g * stride + i], l->cap);
    for (int g = 0; g < count; g++) NAME(softmax)(scores + g * stride, stride);
    NAME(mix)(NAME(states)(r, r->c->values, sequence, key_head, from, token + 1), scores, stride, count, dtype, mixed);
}

/* One token of each sequence: up to TOGETHER heads of it are a task. */
LOCAL void NAME(attend_tokens)(Rows *r, const DType dtype) {
    const Layer *l = r->l;
    const int64_t group = l->heads / l->key_heads, tasks = (group + TOGETHER - 1) / TOGETHER;
    for (int64_t task; (task = atomic_fetch_add(&r->next, 1)) < r->rows * l->key_heads * tasks;) {
        const int64_t sequence = task / tasks / l->key_heads, key_head = task / tasks % l->key_heads;
        const int64_t from = task % tasks * TOGETHER, head = key_head * group + from;
        const int64_t heads = group - from;
        if (heads >= TOGETHER) NAME(attend_heads)(r, sequence, head, key_head, TOGETHER, dtype);
        else if (heads == 3) NAME(attend_heads)(r, sequence, head, key_head, 3, dtype);
        else if (heads == 2) NAME(attend_heads)(r, sequence, head, key_head, 2, dtype);
        else NAME(attend_heads)(r, sequence, head, key_head, 1, dtype);
    }
}

/* Some rows times outputs from .. to of a dense weight. */
LOCAL void NAME(dense_rows)(const Dense *d, int64_t from, int64_t to, int64_t row, const int count, const DType dtype,
                            float *sums) {
    const NAME(States) weight = {d->weight, from * d->in_features, to - from, d->in_features};
    const int64_t item = dtype == FLOAT32 ? 4 : 2;
    NAME(score)(weight, d->x + row * d->in_features, 1, count, dtype, OUTPUTS, sums);
    for (int64_t g = 0; g < count; g++)
        narrow(sums + g * OUTPUTS, to - from, dtype, (char *)d->y + ((row + g) * d->out_features + from) * item);
}

LOCAL void NAME(dense_outputs)(Dense *d, const DType dtype) {
    float sums[TOGETHER * OUTPUTS];
    for (int64_t from; (from = OUTPUTS * atomic_fetch_add(&d->next, 1)) < d->out_features;) {
        const int64_t to = from + OUTPUTS < d->out_features ? from + OUTPUTS : d->out_features;
        int64_t row = 0;
        for (; row + TOGETHER <= d->rows; row += TOGETHER) NAME(dense_rows)(d, from, to, row, TOGETHER, dtype, sums);
        const int64_t left = d->rows - row;
        if (left == 3) NAME(dense_rows)(d, from, to, row, 3, dtype, sums);
        else if (left == 2) NAME(dense_rows)(d, from, to, row, 2, dtype, sums);
        else if (left == 1) NAME(dense_rows)(d, from, to, row, 1, dtype, sums);
    }
}

TARGET static void NAME(dense)(void *context) {
    Dense *d = context;
    if (d->dtype == FLOAT32) NAME(dense_outputs)(d, FLOAT32);
    else if (d->dtype == FLOAT16) NAME(dense_outputs)(d, FLOAT16);
    else NAME(dense_outputs)(d, BFLOAT16);
}

#define WIDE (LANES == 16 ? 4 : 2) /* registers of a row of products: with four rows they are half of all */

/* c [rows][columns] (+)= a [rows][inner] times b [inner][columns], rows and columns of a few registers: constants. */
LOCAL void NAME(block)(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, const int rows,
                       const int wide, const int more, float *c, int64_t c_stride) {
    V sums[4][WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < wide; j++)
            sums[i][j] = more ? NAME(load)(c + i * c_stride, j * LANES, FLOAT32) : (V){0};
    for (int64_t k = 0; k < inner; k++)
        for (int j = 0; j < wide; j++) {
            const V right = NAME(load)(b + k * b_stride, j * LANES, FLOAT32);
            for (int i = 0; i < rows; i++) sums[i][j] = MULTIPLY_ADD(right, a[i * a_stride + k], sums[i][j]);
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < wide; j++) NAME(store)(c + i * c_stride + j * LANES, sums[i][j]);
}

/* As block, of any number of rows, and of columns that LANES divides. */
LOCAL void NAME(product)(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, int64_t rows,
                         int64_t columns, const int more, float *c, int64_t c_stride) {
    for (int64_t j = 0; j < columns;) {
        const int wide = columns - j >= WIDE * LANES;
        for (int64_t i = 0; i < rows;) {
            const float *left = a + i * a_stride, *right = b + j;
            float *to = c + i * c_stride + j;
            const int four = rows - i >= 4;
            if (four && wide) NAME(block)(left, a_stride, right, b_stride, inner, 4, WIDE, more, to, c_stride);
            else if (four) NAME(block)(left, a_stride, right, b_stride, inner, 4, 1, more, to, c_stride);
            else if (wide) NAME(block)(left, a_stride, right, b_stride, inner, 1, WIDE, more, to, c_stride);
            else NAME(block)(left, a_stride, right, b_stride, inner, 1, 1, more, to, c_stride);
            i += four ? 4 : 1;
        }
        j += wide ? WIDE * LANES : LANES;
    }
}

/* Room of one thread for a tile of attention. keys are transposed [dim][TILE]. */
typedef struct {
    float *q, *keys, *values, *weights, *out, most[TILE], sum[TILE];
} NAME(Tile);

/* Up to TILE queries (token by token, the heads of one key head) of a sequence, over all keys that one of them sees: a tile
 * of keys at a time, with the largest score and the sum so far (FlashAttention, arXiv 2205.14135, algorithm 1). Tiles
 * begin at multiples of TILE from the sequence's first key, so that other sequences change nothing. */
LOCAL void NAME(attend_tile)(const Rows *r, int64_t sequence, int64_t key_head, int64_t from, int64_t count,
                             const DType dtype, NAME(Tile) *t) {
    const Layer *l = r->l;
    const int64_t group = l->heads / l->key_heads, dim = l->dim, filled = r->s->length + r->from;
    const int64_t first = r->s->first ? r->s->first[sequence] : 0;
    const int64_t begin = first + (first_seen(r, sequence, filled + from / group) - first) / TILE * TILE;
    const int64_t end = filled + (from + count - 1) / group + 1; /* beyond the last key of the last query */
    const int64_t gone = larger(r->c->start - begin, 0); /* keys of the first tile that the cache no longer has */
    const NAME(States) keys = NAME(states)(r, r->c->keys, sequence, key_head, begin, end);
    const NAME(States) values = NAME(states)(r, r->c->values, sequence, key_head, begin, end);
    for (int64_t i = 0; i < count; i++) {
        const float *q = r->q + (sequence * r->count + (from + i) / group) * r->query_apart;
        const int64_t head = key_head * group + (from + i) % group;
        for (int64_t j = 0; j < dim; j++) t->q[i * dim + j] = q[head * dim + j] * l->scale;
        t->most[i] = -INFINITY;
        t->sum[i] = 0;
    }
    memset(t->out, 0, (size_t)(count * dim) * 4);
    for (int64_t start = 0; start < keys.length; start += TILE) {
        const int64_t width = keys.length - start < TILE ? keys.length - start : TILE;
        for (int64_t j = 0; j < dim; j += LANES)
            for (int64_t k = 0; k < TILE; k++) {
                const int64_t at = larger(start + (k < width ? k : width - 1), gone) * dim + j;
                float lanes[LANES];
                NAME(store)(lanes, NAME(load)(keys.data, keys.first + at, dtype));
                for (int n = 0; n < LANES; n++) t->keys[(j + n) * TILE + k] = lanes[n];
                if (k < width) NAME(store)(t->values + k * dim + j, NAME(load)(values.data, values.first + at, dtype));
            }
        NAME(product)(t->q, dim, t->keys, TILE, dim, count, TILE, 0, t->weights, TILE);
        for (int64_t i = 0; i < count; i++) {
            const int64_t token = filled + (from + i) / group;
            const int64_t own = token + 1 - begin - start; /* keys that this query may see */
            const int64_t seen = own < 0 ? 0 : own < width ? own : width;
            const int64_t hidden = larger(first_seen(r, sequence, token) - begin - start, 0); /* keys before its window */
            float *weights = t->weights + i * TILE, most = t->most[i], sum = 0, lanes[LANES];
            if (seen <= hidden) {
                memset(weights, 0, TILE * sizeof *weights);
                continue;
            }
            for (int64_t k = 0; l->cap && k < TILE; k++) weights[k] = capped(weights[k], l->cap);
            for (int64_t k = 0; k < hidden; k++) weights[k] = -INFINITY;
            for (int64_t k = seen; k < TILE; k++) weights[k] = -INFINITY;
            for (int n = 0; n < LANES; n++) lanes[n] = most;
            for (int64_t k = 0; k < TILE; k += LANES)
                for (int n = 0; n < LANES; n++) lanes[n] = weights[k + n] > lanes[n] ? weights[k + n] : lanes[n];
            for (int n = 0; n < LANES; n++) most = lanes[n] > most ? lanes[n] : most;
            for (int64_t k = 0; k < TILE; k++) weights[k] = exponential(weights[k] - most);
            for (int64_t k = 0; k < hidden; k++) weights[k] = 0;
            for (int64_t k = seen; k < TILE; k++) weights[k] = 0;
            for (int n = 0; n < LANES; n++) lanes[n] = 0;
            for (int64_t k = 0; k < TILE; k += LANES)
                for (int n = 0; n < LANES; n++) lanes[n] += weights[k + n];
            for (int n = 0; n < LANES; n++) sum += lanes[n];
            const float factor = start ? exponential(t->most[i] - most) : 0;
            t->most[i] = most;
            t->sum[i] = t->sum[i] * factor + sum;
            for (int64_t j = 0; j < dim; j++) t->out[i * dim + j] *= factor;
        }
        NAME(product)(t->weights, TILE, t->values, dim, width, count, dim, 1, t->out, dim);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = sequence * r->count + (from + i) / group, head = key_head * group + (from + i) % group;
        const float factor = t->sum[i] == 0 ? 0 : 1 / t->sum[i]; /* a padding token's is 0 */
        for (int64_t j = 0; j < dim; j++) r->mixed[(row * l->heads + head) * dim + j] = t->out[i * dim + j] * factor;
    }
}

LOCAL void NAME(attend_tiles)(Rows *r, const DType dtype, NAME(Tile) *t) {
    const Layer *l = r->l;
    const int64_t queries = r->count * (l->heads / l->key_heads), tiles = (queries + TILE - 1) / TILE;
    for (int64_t task; (task = atomic_fetch_add(&r->next, 1)) < r->s->batch * l->key_heads * tiles;) {
        const int64_t from = (tiles - 1 - task % tiles) * TILE, count = queries - from < TILE ? queries - from : TILE;
        NAME(attend_tile)(r, task / tiles / l->key_heads, task / tiles % l->key_heads, from, count, dtype, t);
    }
}

TARGET static void NAME(attend)(void *context) {
    Rows *r = context;
    const DType dtype = (DType)r->s->dtype;
    if (r->count == 1) {
        if (dtype == FLOAT32) NAME(attend_tokens)(r, FLOAT32);
        else if (dtype == FLOAT16) NAME(attend_tokens)(r, FLOAT16);
        else NAME(attend_tokens)(r, BFLOAT16);
        return;
    }
    const int64_t tile = TILE * r->l->dim;
    float *memory = malloc((size_t)(4 * tile + TILE * TILE) * 4);
    if (!memory) {
        r->failed = 1;
        return;
    }
    NAME(Tile) t = {.q = memory, .keys = memory + tile, .values = memory + 2 * tile, .out = memory + 3 * tile,
                    .weights = memory + 4 * tile};
    if (dtype == FLOAT32) NAME(attend_tiles)(r, FLOAT32, &t);
    else if (dtype == FLOAT16) NAME(attend_tiles)(r, FLOAT16, &t);
    else NAME(attend_tiles)(r, BFLOAT16, &t);
    free(memory);
}

LOCAL void NAME(activate)(float *gate, const float *up, int64_t count, const Activation activation) {
    if (up) for (int64_t i = 0; i < count; i++) gate[i] = activated(gate[i], activation) * up[i];
    else for (int64_t i = 0; i < count; i++) gate[i] = activated(gate[i], activation);
}

/* Which of the step's tokens a row is. */
LOCAL int64_t NAME(token_of)(const Rows *r, int64_t row) {
    return row / r->count * r->s->count + r->from + row % r->count;
}

/* What a row needs before the first layer; before, between and after a layer's products; and after the last layer. */
TARGET static void NAME(read_rows)(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in, item = r->s->dtype == FLOAT32 ? 4 : 2;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->rows;)
        generic_widen((const char *)r->s->x + NAME(token_of)(r, row) * hidden * item, (DType)r->s->dtype, hidden,
                      r->x + row * hidden);
}

TARGET static void NAME(begin_rows)(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->rows;) {
        memcpy(r->normed + row * hidden, r->x + row * hidden, (size_t)hidden * 4);
        NAME(norm_parts)(r->normed + row * hidden, hidden, &r->l->norms[BEFORE_ATTENTION]);
    }
}

TARGET static void NAME(rotate_rows)(void *context) {
    Rows *r = context;
    const Layer *l = r->l;
    const Context *c = r->c;
    const int64_t dim = l->dim, rotated = c->rotated, item = r->s->dtype == FLOAT32 ? 4 : 2;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->rows;) {
        const int64_t at = (row / r->count * c->apart + (r->from + row % r->count) * rotated) * item;
        float *cosine = r->rotation + row * 2 * dim, *sine = cosine + dim;
        float *q = r->q + row * r->query_apart, *k = r->k + row * r->key_apart;
        NAME(norm_parts)(q, l->heads * dim, &l->norms[OF_QUERIES]);
        NAME(norm_parts)(k, l->key_heads * dim, &l->norms[OF_KEYS]);
        if (rotated) {
            generic_widen((const char *)c->cos + at, (DType)r->s->dtype, rotated, cosine);
            generic_widen((const char *)c->sin + at, (DType)r->s->dtype, rotated, sine);
            rotate(q, l->heads, dim, rotated, cosine, sine);
            rotate(k, l->key_heads, dim, rotated, cosine, sine);
        }
        append(k, r, row, c->keys);
        append(r->v + row * r->key_apart, r, row, c->values);
    }
}

TARGET static void NAME(continue_rows)(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->rows;) {
        float *x = r->x + row * hidden, *normed = r->normed + row * hidden;
        NAME(norm_parts)(normed, hidden, &r->l->norms[AFTER_ATTENTION]);
        for (int64_t i = 0; i < hidden; i++) x[i] += normed[i];
        memcpy(normed, x, (size_t)hidden * 4);
        NAME(norm_parts)(normed, hidden, &r->l->norms[BEFORE_MLP]);
    }
}

TARGET static void NAME(activate_rows)(void *context) {
    Rows *r = context;
    const int64_t inner = r->inner;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->inner_rows;) {
        float *gate = r->gate + row * r->inner_apart;
        const float *up = r->up ? r->up + row * r->inner_apart : NULL;
        if (r->l->activation == SILU) NAME(activate)(gate, up, inner, SILU);
        else if (r->l->activation == GELU_TANH) NAME(activate)(gate, up, inner, GELU_TANH);
        else if (r->l->activation == GELU) NAME(activate)(gate, up, inner, GELU);
        else NAME(activate)(gate, up, inner, RELU);
        if (r->activated != r->gate) memcpy(r->activated + row * inner, gate, (size_t)inner * 4);
    }
}

TARGET static void NAME(end_rows)(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->rows;) {
        float *x = r->x + row * hidden, *normed = r->normed + row * hidden;
        NAME(norm_parts)(normed, hidden, &r->l->norms[AFTER_MLP]);
        for (int64_t i = 0; i < hidden; i++) x[i] += normed[i];
    }
}

TARGET static void NAME(write_rows)(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in, item = r->s->dtype == FLOAT32 ? 4 : 2;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->rows;) {
        float *x = r->x + row * hidden;
        NAME(norm_parts)(x, hidden, &r->s->norm);
        narrow(x, hidden, (DType)r->s->dtype, (char *)r->s->y + NAME(token_of)(r, row) * hidden * item);
    }
}

/* y [rows][hidden] = what gate, up and down make of x. */
TARGET static int NAME(mlp)(Rows *r, const Linear *linears, int64_t rows, const float *x, float *y) {
    const Linear *gate = linears, *up = linears + 1, *down = linears + 2;
    const int fused = !up->packed && gate->out == 2 * down->in;
    r->inner = down->in, r->inner_rows = rows, r->inner_apart = gate->out;
    r->up = fused ? r->gate + r->inner : up->packed ? r->gate + rows * r->inner : NULL;
    r->activated = fused ? r->gate + rows * gate->out : r->gate;
    int failed = multiply(r, linears, 2, rows, x, (float *[]){r->gate, r->up});
    run(NAME(activate_rows), r, rows > 1 && rows * r->inner >= MIN_ROWS);
    return failed | multiply(r, down, 1, rows, r->activated, &y);
}

/* Which experts a row goes to, and with what shares. */
TARGET static void NAME(route_rows)(void *context) {
    Rows *r = context;
    const Experts *e = r->l->experts;
    const int64_t hidden = r->l->linears[QUERY].in;
    for (int64_t row; (row = atomic_fetch_add(&r->next, 1)) < r->rows;) {
        float *shares = r->shares + row * r->routes, sum = 0;
        int32_t *chosen = r->chosen + row * e->active;
        NAME(score)((NAME(States)){e->router, 0, e->count, hidden}, r->normed + row * hidden, 1, 1, FLOAT32, r->routes, shares);
        NAME(softmax)(shares, r->routes);
        for (int64_t i = 0; i < e->active; i++) {
            int64_t best = 0;
            for (int64_t n = 1; n < e->count; n++) best = shares[n] > shares[best] ? n : best;
            chosen[i] = (int32_t)best;
            sum += shares[best];
            shares[best] = -shares[best]; /* lower than all that are left */
        }
        for (int64_t n = 0; n < e->count; n++)
            shares[n] = shares[n] < 0 ? -shares[n] / (e->renormalized ? sum : 1) : 0;
    }
}

/* normed becomes what its experts make of each row. An expert takes all of its rows at once. */
TARGET static int NAME(consult)(Rows *r, int many) {
    const Experts *e = r->l->experts;
    const int64_t hidden = r->l->linears[QUERY].in;
    run(NAME(route_rows), r, many);
    memset(r->sum, 0, (size_t)(r->rows * hidden) * 4);
    int failed = 0;
    for (int64_t n = 0; n <= e->count && !failed; n++) {
        const int shared = n == e->count;
        const Linear *linears = shared ? r->l->linears + GATE : e->linears + 3 * n;
        int64_t own = 0;
        if (!linears->packed) continue;
        for (int64_t row = 0; row < r->rows; row++) {
            int sent = shared;
            for (int64_t i = 0; i < e->active; i++) sent |= r->chosen[row * e->active + i] == n;
            if (sent) memcpy(r->gathered + own++ * hidden, r->normed + row * hidden, (size_t)hidden * 4);
        }
        if (!own) continue;
        failed = NAME(mlp)(r, linears, own, r->gathered, r->outputs);
        own = 0;
        for (int64_t row = 0; row < r->rows; row++) {
            float share = 1;
            int sent = shared;
            for (int64_t i = 0; i < e->active; i++) sent |= r->chosen[row * e->active + i] == n;
            if (!sent) continue;
            if (!shared) share = r->shares[row * r->routes + n];
            else if (e->shared_gate) {
                float score[LANES];
                const NAME(States) gate = {e->shared_gate, 0, 1, hidden};
                NAME(score)(gate, r->normed + row * hidden, 1, 1, FLOAT32, LANES, score);
                share = 1 / (1 + exponential(-score[0]));
            }
            const float *output = r->outputs + own++ * hidden;
            for (int64_t i = 0; i < hidden; i++) r->sum[row * hidden + i] += share * output[i];
        }
    }
    float *given = r->normed;
    r->normed = r->sum, r->sum = given;
    return failed;
}

TARGET static int NAME(layer)(Rows *r) {
    const Layer *l = r->l;
    const int64_t hidden = l->linears[QUERY].in, end = r->s->length + r->from + r->count;
    const int64_t queries = l->heads * l->dim, keys = l->key_heads * l->dim, length = end - r->c->start;
    const int many = r->rows > 1 && r->rows * hidden >= MIN_ROWS, apart = !!l->linears[KEY].packed;
    r->query_apart = l->linears[QUERY].out, r->key_apart = apart ? keys : r->query_apart;
    r->k = r->q + (apart ? r->rows : 1) * queries, r->v = r->k + (apart ? r->rows : 1) * keys;
    run(NAME(begin_rows), r, many);
    int failed = multiply(r, l->linears, 3, r->rows, r->normed, (float *[]){r->q, r->k, r->v});
    run(NAME(rotate_rows), r, many);
    run(NAME(attend), r, r->rows * l->heads * l->dim * length >= MIN_ATTENTION);
    failed |= r->failed | multiply(r, l->linears + OUTPUT, 1, r->rows, r->mixed, &r->normed);
    run(NAME(continue_rows), r, many);
    if (l->experts) failed |= NAME(consult)(r, many);
    else failed |= NAME(mlp)(r, l->linears + GATE, r->rows, r->normed, r->normed);
    run(NAME(end_rows), r, many);
    return failed;
}

/* Some tokens at a time go through all layers: later ones read the keys and values of earlier ones from the caches. */
TARGET static int NAME(layers)(const Layer *const *layers, int64_t count, const Step *s) {
    const int64_t hidden = layers[0]->linears[QUERY].in;
    int64_t inner = 0, all = 0, some = 0, dim = 0, heads = 0, routes = 0, active = 0;
    for (int64_t i = 0; i < count; i++) {
        const Layer *l = layers[i];
        inner = larger(inner, l->linears[DOWN].in), dim = larger(dim, l->dim), heads = larger(heads, l->heads);
        all = larger(all, l->heads * l->dim), some = larger(some, l->key_heads * l->dim);
        if (!l->experts) continue;
        routes = larger(routes, (l->experts->count + LANES - 1) / LANES * LANES);
        active = larger(active, l->experts->active);
        for (int64_t n = 0; n < l->experts->count; n++) inner = larger(inner, l->experts->linears[3 * n + 2].in);
    }
    int64_t most = MOST_ROWS / s->batch;
    most = most < 1 ? 1 : most > s->count ? s->count : most;
    const int64_t rows = s->batch * most, ends = s->length + s->count, stride = (ends + LANES - 1) / LANES * LANES;
    const int64_t scores = most == 1 || s->count % most == 1 ? (s->batch * heads + TOGETHER) * stride : 0;
    const int64_t row = 2 * hidden + 2 * all + 2 * some + 3 * inner + 2 * dim + (active ? 3 * hidden + routes + active : 0);
    float *memory = malloc((size_t)(rows * row + scores) * 4);
    if (!memory) return 1;
    Rows r = {.l = layers[0], .s = s, .x = memory};
    r.normed = r.x + rows * hidden, r.q = r.normed + rows * hidden, r.mixed = r.q + rows * (all + 2 * some);
    r.gate = r.mixed + rows * all, r.rotation = r.gate + rows * 3 * inner, r.scores = r.rotation + rows * 2 * dim;
    r.gathered = r.scores + scores, r.outputs = r.gathered + rows * hidden, r.sum = r.outputs + rows * hidden;
    r.shares = r.sum + rows * hidden, r.chosen = (int32_t *)(r.shares + rows * routes);
    atomic_init(&r.failed, 0);
    int failed = 0;
    for (r.from = 0; r.from < s->count && !failed; r.from += r.count) {
        r.count = s->count - r.from < most ? s->count - r.from : most;
        r.rows = s->batch * r.count;
        r.stride = (s->length + r.from + 1 + LANES - 1) / LANES * LANES;
        const int many = r.rows > 1 && r.rows * hidden >= MIN_ROWS;
        run(NAME(read_rows), &r, many);
        for (int64_t i = 0; i < count && !failed; i++) {
            r.l = layers[i], r.c = &s->contexts[i];
            r.routes = r.l->experts ? (r.l->experts->count + LANES - 1) / LANES * LANES : 0;
            failed = NAME(layer)(&r);
        }
        run(NAME(write_rows), &r, many);
    }
    free(memory);
    return failed;
}

#undef WIDE
#undef TARGET
#undef NAME
#undef LANES
#undef MULTIPLY_ADD
#undef EVEN
#undef ODD
#undef LOCAL
#undef V
