/* The step of layer.c, which includes this once for each instruction set: TARGET is its attribute, LANES the floats of
 * its registers, EVEN and ODD the places of every other lane of two of them, NAME(x) a name of its own. */

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

/* x / root mean square(x) * weight (arXiv 1910.07467, equation 4, with eps added to the mean); y may be x. */
LOCAL void NAME(norm)(const float *x, int64_t count, const float *weight, float eps, float *y) {
    float squares[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) squares[j] += x[i + j] * x[i + j];
    for (; i < count; i++) sum += x[i] * x[i];
    for (int j = 0; j < LANES; j++) sum += squares[j];
    const float factor = 1 / sqrtf(sum / (float)count + eps);
    for (i = 0; i < count; i++) y[i] = weight[i] * (x[i] * factor);
}

LOCAL void NAME(norm_heads)(float *x, int64_t heads, int64_t dim, const float *weight, float eps) {
    for (int64_t h = 0; weight && h < heads; h++) NAME(norm)(x + h * dim, dim, weight, eps, x + h * dim);
}

/* Scores of TOGETHER queries; those beyond the last key are -infinity. `count`: of the queries, a constant. */
LOCAL void NAME(score)(const Attention *a, const float *q, const void *keys, int64_t first, const int count,
                       const DType dtype, float *scores) {
    for (int64_t s = 0; s < a->stride; s += LANES) {
        V sums[TOGETHER][LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t row = first + (s + i < a->length ? s + i : a->length - 1) * a->dim;
            V sum[TOGETHER] = {0};
            for (int64_t j = 0; j < a->dim; j += LANES) {
                const V key = NAME(load)(keys, row + j, dtype);
                for (int g = 0; g < count; g++) sum[g] += key * NAME(load)(q + g * a->dim, j, FLOAT32);
            }
            for (int g = 0; g < count; g++) sums[g][i] = sum[g];
        }
        for (int g = 0; g < count; g++) NAME(store)(scores + g * a->stride + s, NAME(fold)(sums[g]) * a->scale);
    }
    for (int g = 0; g < count; g++)
        for (int64_t s = a->length; s < a->stride; s++) scores[g * a->stride + s] = -INFINITY;
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

LOCAL void NAME(mix)(const Attention *a, const float *weights, const void *values, int64_t first, const int count,
                     const DType dtype, float *out) {
    memset(out, 0, (size_t)(count * a->dim) * 4);
    for (int64_t start = 0; start < a->length; start += POSITIONS) {
        const int64_t end = start + POSITIONS < a->length ? start + POSITIONS : a->length;
        for (int64_t j = 0; j < a->dim; j += LANES) {
            V sums[TOGETHER];
            for (int g = 0; g < count; g++) sums[g] = NAME(load)(out + g * a->dim, j, FLOAT32);
            for (int64_t s = start; s < end; s++) {
                const V value = NAME(load)(values, first + s * a->dim + j, dtype);
                for (int g = 0; g < count; g++) sums[g] += value * weights[g * a->stride + s];
            }
            for (int g = 0; g < count; g++) NAME(store)(out + g * a->dim + j, sums[g]);
        }
    }
}

LOCAL void NAME(attend_heads)(const Attention *a, int64_t head, int64_t key_head, const int count, const DType dtype) {
    const int64_t first = key_head * a->capacity * a->dim;
    float *scores = a->scores + head * a->stride;
    NAME(score)(a, a->q + head * a->dim, a->keys, first, count, dtype, scores);
    for (int g = 0; g < count; g++) NAME(softmax)(scores + g * a->stride, a->stride);
    NAME(mix)(a, scores, a->values, first, count, dtype, a->out + head * a->dim);
}

LOCAL void NAME(attend_some)(Attention *a, const DType dtype) {
    const int64_t group = a->heads / a->key_heads, tasks = (group + TOGETHER - 1) / TOGETHER;
    for (int64_t task; (task = atomic_fetch_add(&a->next, 1)) < tasks * a->key_heads;) {
        const int64_t key_head = task / tasks, from = task % tasks * TOGETHER, head = key_head * group + from;
        if (group - from >= TOGETHER) NAME(attend_heads)(a, head, key_head, TOGETHER, dtype);
        else for (int64_t g = from; g < group; g++) NAME(attend_heads)(a, head + g - from, key_head, 1, dtype);
    }
}

TARGET static void NAME(attend)(void *context) {
    Attention *a = context;
    if (a->dtype == FLOAT32) NAME(attend_some)(a, FLOAT32);
    else if (a->dtype == FLOAT16) NAME(attend_some)(a, FLOAT16);
    else NAME(attend_some)(a, BFLOAT16);
}

TARGET static void NAME(activate)(float *gate, const float *up, int64_t count, Activation activation) {
    if (activation == SILU) for (int64_t i = 0; i < count; i++) gate[i] = activated(gate[i], SILU) * up[i];
    else for (int64_t i = 0; i < count; i++) gate[i] = activated(gate[i], GELU_TANH) * up[i];
}

TARGET static int NAME(layer)(const Layer *l, const Step *s) {
    const int64_t hidden = l->q.in, inner = l->gate.out, dim = l->dim, length = s->length + 1;
    const int64_t all = l->heads * dim, some = l->key_heads * dim, stride = (length + LANES - 1) / LANES * LANES;
    const int64_t widest = hidden + inner + all;
    float *memory = malloc((size_t)(2 * hidden + 2 * all + 2 * some + 2 * inner + 2 * dim + widest + l->heads * stride) * 4);
    if (!memory) return 1;
    float *x = memory, *normed = x + hidden, *q = normed + hidden, *k = q + all, *v = k + some, *mixed = v + some;
    float *gate = mixed + all, *up = gate + inner, *cosine = up + inner, *sine = cosine + dim, *room = sine + dim;
    const DType dtype = (DType)s->dtype;
    int failed = 0;

    generic_widen(s->x, dtype, hidden, x);
    generic_widen(s->cos, dtype, dim, cosine);
    generic_widen(s->sin, dtype, dim, sine);
    NAME(norm)(x, hidden, l->input_norm, l->eps[0], normed);
    failed |= multiply(l, &l->q, normed, q, room, s->threads);
    failed |= multiply(l, &l->k, normed, k, room, s->threads);
    failed |= multiply(l, &l->v, normed, v, room, s->threads);
    NAME(norm_heads)(q, l->heads, dim, l->q_norm, l->eps[2]);
    NAME(norm_heads)(k, l->key_heads, dim, l->k_norm, l->eps[3]);
    rotate(q, l->heads, dim, cosine, sine);
    rotate(k, l->key_heads, dim, cosine, sine);
    append(k, l, s, s->keys);
    append(v, l, s, s->values);

    Attention a = {.q = q, .keys = s->keys, .values = s->values, .scores = room + widest, .out = mixed,
                   .heads = l->heads, .key_heads = l->key_heads, .dim = dim, .length = length,
                   .capacity = s->capacity, .stride = stride, .dtype = dtype, .scale = l->scale};
    atomic_init(&a.next, 0);
    parallel(NAME(attend), &a, all * length >= MIN_ATTENTION ? s->threads : 1);

    failed |= multiply(l, &l->o, mixed, normed, room, s->threads);
    for (int64_t i = 0; i < hidden; i++) x[i] += normed[i];
    NAME(norm)(x, hidden, l->post_norm, l->eps[1], normed);
    failed |= multiply(l, &l->gate, normed, gate, room, s->threads);
    failed |= multiply(l, &l->up, normed, up, room, s->threads);
    NAME(activate)(gate, up, inner, (Activation)l->activation);
    failed |= multiply(l, &l->down, gate, normed, room, s->threads);
    for (int64_t i = 0; i < hidden; i++) x[i] += normed[i];
    narrow(x, hidden, dtype, s->y);
    free(memory);
    return failed;
}

#undef TARGET
#undef NAME
#undef LANES
#undef EVEN
#undef ODD
#undef LOCAL
#undef V
