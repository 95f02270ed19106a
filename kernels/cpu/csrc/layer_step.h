/* Decoder layers for one width of registers, of the file that includes this: TARGET is its functions' attribute, LANES the
 * floats of its registers, EVEN and ODD the places of every other lane of two of them. MULTIPLY_ADD(x, y, z) is x * y + z,
 * of registers x and z and a number y; of MULTIPLY_ADD_ALL y is a register, too. */

HOLD_TEXT

#define LOCAL TARGET static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

/* The outputs of those of `count` linear layers that there are, which read the same `rows` of x; those whose order and
 * inputs agree, at once. */
static int multiply(const Rows *r, const Linear *linears, int count, int64_t rows, const float *x, float *const *y) {
    int status = 0;
    while (count && !linears[count - 1].packed) count--;
    for (int from = 0, to = 0; from < count && !status; from = to) {
        Factor factors[3];
        for (; to < count && linears[to].order == linears[from].order && linears[to].inputs == linears[from].inputs; to++)
            factors[to - from] = (Factor){linears[to].packed, linears[to].bias, y[to]};
        status = bitpress_products(factors, to - from, x, linears[from].order, rows, FLOAT32, (int)linears[from].inputs,
                          (int)r->l->kernel, r->s->threads);
    }
    return status;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* `body` on all rows, or tasks, of r: by several threads where these do so much. */
static void run(void (*body)(void *), Rows *r, int worthwhile) {
    atomic_init(&r->next, 0);
    parallel(body, r, worthwhile ? r->s->threads : 1);
}

LOCAL V load(const void *from, int64_t at, const DType dtype) {
    V value;
    if (dtype == FLOAT32) {
        memcpy(&value, (const float *)from + at, sizeof value);
    } else if (dtype == BFLOAT16) {
        Halves halves;
        memcpy(&halves, (const uint16_t *)from + at, sizeof halves);
        const Words bits = __builtin_convertvector(halves, Words) << 16;
        memcpy(&value, &bits, sizeof value);
    } else {
        float lanes[LANES];
        for (int i = 0; i < LANES; i++) lanes[i] = from_half(((const uint16_t *)from)[at + i]);
        memcpy(&value, lanes, sizeof value);
    }
    return value;
}

LOCAL void store(float *to, V value) { memcpy(to, &value, sizeof value); }

/* Neighbours of two registers are added: first a's, then b's. */
#if defined(__clang__)
#define ADD_NEIGHBOURS(a, b) (__builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD))
#else
#define ADD_NEIGHBOURS(a, b) (__builtin_shuffle(a, b, (Words){EVEN}) + __builtin_shuffle(a, b, (Words){ODD}))
#endif

/* The first of `count` registers, a constant, each of whose lanes is the sum of LANES / count lanes that lay together: those
 * of the first register come first. */
#define FOLD(type, name)                                                    \
    LOCAL type name(type *sums, const int count) {                    \
        if (count > 8)                                                      \
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) sums[i] = ADD_NEIGHBOURS(sums[2 * i], sums[2 * i + 1]); \
        if (count > 4)                                                      \
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sums[i] = ADD_NEIGHBOURS(sums[2 * i], sums[2 * i + 1]); \
        if (count > 2)                                                      \
            _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) sums[i] = ADD_NEIGHBOURS(sums[2 * i], sums[2 * i + 1]); \
        return count > 1 ? ADD_NEIGHBOURS(sums[0], sums[1]) : sums[0];      \
    }
FOLD(V, fold)
FOLD(Words, fold_words)

/* x / root mean square(x) * weight (arXiv 1910.07467, equation 4, with eps added to the mean), or x less its mean and plus a
 * bias (LayerNorm, arXiv 1607.06450, equation 4); y may be x. */
TARGET static void norm(const float *x, const Norm *n, float *y) {
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
TARGET static void norm_parts(float *x, int64_t features, const Norm *n) {
    for (int64_t i = 0; n->weight && i < features; i += n->features) norm(x + i, n, x + i);
}

/* Rows of a dense weight, or keys: `length` of them, [length][dim], from number `first` on. */
typedef struct {
    const void *data;
    int64_t first, length, dim;
} States;

#define KEYS (LANES == 16 ? 4 : 2) /* that meet a query at once: their sums fit the registers */

/* What is read later and comes from memory meanwhile: [rows][bytes] in two places. */
typedef struct {
    const char *one, *other;
    int64_t bytes;
} Ahead;

LOCAL void fetch(const Ahead ahead, int64_t row) {
    for (int64_t i = row * ahead.bytes; i < (row + 1) * ahead.bytes; i += 64) {
        __builtin_prefetch(ahead.one + i);
        __builtin_prefetch(ahead.other + i);
    }
}

/* Scores of `count` queries, a constant, over all keys, up to `width` of [count][stride]; those beyond the last are
 * -infinity. LANES divides width, which is larger than the number of keys by less than LANES, or by more if nobody reads
 * these. together: so many keys, a constant, meet the queries at once; 1 where they are read from memory. */
LOCAL void score(const States keys, const float *q, float scale, const int count, const int together,
                 const DType dtype, int64_t width, int64_t stride, float *scores, const Ahead ahead) {
    for (int64_t s = 0; s < width; s += LANES) {
        V sums[TOGETHER][LANES];
        for (int i = 0; i < LANES; i += together) {
            int64_t rows[KEYS];
            V sum[TOGETHER][KEYS] = {0};
            UNROLL
            for (int n = 0; n < together; n++) {
                const int64_t row = s + i + n < keys.length ? s + i + n : keys.length - 1;
                rows[n] = keys.first + row * keys.dim;
                fetch(ahead, row);
            }
            for (int64_t j = 0; j < keys.dim; j += LANES) {
                V own[KEYS];
                UNROLL
                for (int n = 0; n < together; n++) own[n] = load(keys.data, rows[n] + j, dtype);
                UNROLL
                for (int g = 0; g < count; g++) {
                    const V query = load(q + g * keys.dim, j, FLOAT32);
                    UNROLL
                    for (int n = 0; n < together; n++) sum[g][n] = MULTIPLY_ADD_ALL(own[n], query, sum[g][n]);
                }
            }
            UNROLL
            for (int g = 0; g < count; g++) sums[g][i / together] = fold(sum[g], together);
        }
        UNROLL
        for (int g = 0; g < count; g++) store(scores + g * stride + s, fold(sums[g], LANES / together) * scale);
    }
    UNROLL
    for (int g = 0; g < count; g++)
        for (int64_t s = keys.length; s < width; s++) scores[g * stride + s] = -INFINITY;
}

/* Scores to probabilities: exp(score - the largest), divided by their sum. */
LOCAL void softmax(float *scores, int64_t count) {
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

/* Rows row .. row + count of the cache's keys or values, which are of one head of a sequence, as float32: in `room`
 * [count][dim], or where they lie. */
TARGET static const float *expand(const Rows *r, const void *data, const void *scales, int64_t row, int64_t count,
                                  float *room) {
    const Context *c = r->c;
    const int64_t dim = r->l->dim, group = c->group ? c->group : dim;
    const DType dtype = (DType)r->s->dtype;
    if (c->cached == NUMBERS && dtype == FLOAT32) return (const float *)data + row * dim;
    if (c->cached == NUMBERS) {
        generic_widen((const uint16_t *)data + row * dim, dtype, count * dim, room);
        return room;
    }
    const uint8_t *codes = (const uint8_t *)data + (c->cached == CODES4 ? row * dim / 2 : row * dim);
    if (c->cached == CODES8) for (int64_t i = 0; i < count * dim; i++) room[i] = (float)((const int8_t *)codes)[i];
    else if (c->cached == CODES_E4M3) for (int64_t i = 0; i < count * dim; i++) room[i] = from_e4m3(codes[i]);
    else for (int64_t i = 0; i < count * dim / 2; i++) {
        room[2 * i] = (float)(((codes[i] & 15) ^ 8) - 8);
        room[2 * i + 1] = (float)((codes[i] >> 4 ^ 8) - 8);
    }
    for (int64_t g = 0; g < count * dim / group; g++) {
        const float scale = c->group ? from_half(((const uint16_t *)scales)[row * (dim / group) + g])
                                     : ((const float *)scales)[row / c->capacity];
        for (int64_t i = g * group; i < (g + 1) * group; i++) room[i] *= scale;
    }
    return room;
}

/* The row of the cache that is token number `token` of a sequence's key head. */
LOCAL int64_t cache_row(const Rows *r, int64_t sequence, int64_t key_head, int64_t token) {
    return (sequence * r->l->key_heads + key_head) * r->c->capacity + token - r->c->start;
}

/* `wide` registers of each row of out [count][apart] += weights [count][PIECE] times values [length][dim]. */
LOCAL void mix_columns(const float *values, int64_t length, int64_t dim, const float *weights, const int count,
                       const int wide, float *out, int64_t apart) {
    V sums[TOGETHER][2];
    UNROLL
    for (int g = 0; g < count; g++)
        UNROLL
        for (int n = 0; n < wide; n++) sums[g][n] = load(out + g * apart, n * LANES, FLOAT32);
    for (int64_t s = 0; s < length; s++)
        UNROLL
        for (int n = 0; n < wide; n++) {
            const V value = load(values + s * dim, n * LANES, FLOAT32);
            UNROLL
            for (int g = 0; g < count; g++) sums[g][n] = MULTIPLY_ADD(value, weights[g * PIECE + s], sums[g][n]);
        }
    UNROLL
    for (int g = 0; g < count; g++)
        UNROLL
        for (int n = 0; n < wide; n++) store(out + g * apart + n * LANES, sums[g][n]);
}

LOCAL void mix(const float *values, int64_t length, int64_t dim, const float *weights, const int count, float *out,
               int64_t apart) {
    int64_t j = 0;
    for (; j + 2 * LANES <= dim; j += 2 * LANES)
        mix_columns(values + j, length, dim, weights, count, 2, out + j, apart);
    if (j < dim) mix_columns(values + j, length, dim, weights, count, 1, out + j, apart);
}

/* What a thread has for its tasks of attend_tokens. */
typedef struct {
    float *expanded, scores[TOGETHER * PIECE]; /* expanded [EXPANDED][dim] */
#if LANES == 16
    float *scales; /* [groups][PIECE] */
    int16_t *q, weights[TOGETHER * PIECE];
#endif
} Room;

#if LANES == 16 /* INT8 codes are multiplied as they are, by queries and weights of 16 bits: half of the instructions */
/* Whether integers do it for this cache. */
LOCAL int in_integers(const Rows *r) {
    return r->c->cached == CODES8 && r->l->dim % 32 == 0 && r->c->group % 32 == 0;
}

/* Scales of so many rows as float32 [groups][PIECE], of each row alike where the cache has no groups. */
LOCAL void widen_scales(const Rows *r, const void *scales, int64_t row, int64_t count, float *out) {
    const int64_t groups = r->c->group ? r->l->dim / r->c->group : 1;
    const uint16_t *halves = (const uint16_t *)scales + row * groups;
    for (int64_t m = 0; m < groups; m++)
        for (int64_t i = 0; i < count; i++)
            out[m * PIECE + i] = r->c->group ? _cvtsh_ss(halves[i * groups + m]) : ((const float *)scales)[row / r->c->capacity];
}

LOCAL __m512i widened(const int8_t *from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from)); }

/* As score, of int8 codes [length][dim]. q float32 [count][dim]. */
LOCAL void score_codes(const Rows *r, const int8_t *codes, int64_t length, const float *q, const int count,
                       Room *room, const Ahead ahead) {
    const int64_t dim = r->l->dim, group = r->c->group ? r->c->group : dim, groups = dim / group;
    float scales[TOGETHER];
    for (int g = 0; g < count; g++) scales[g] = r->l->scale * to_int16(q + g * dim, dim, room->q + g * dim);
    for (int64_t s = 0; s < length; s += LANES)
        for (int64_t m = 0; m < groups; m++) {
            Words sums[TOGETHER][LANES / KEYS];
            for (int i = 0; i < LANES; i += KEYS) {
                const int8_t *rows[KEYS];
                Words products[TOGETHER][KEYS];
                UNROLL
                for (int n = 0; n < KEYS; n++) {
                    const int64_t row = s + i + n < length ? s + i + n : length - 1;
                    rows[n] = codes + row * dim + m * group;
                    if (!m) fetch(ahead, row);
                }
                UNROLL
                for (int g = 0; g < count; g++)
                    UNROLL
                    for (int n = 0; n < KEYS; n++) products[g][n] = (Words){0};
                for (int64_t j = 0; j < group; j += 32) {
                    __m512i own[KEYS];
                    UNROLL
                    for (int n = 0; n < KEYS; n++) own[n] = widened(rows[n] + j);
                    UNROLL
                    for (int g = 0; g < count; g++) {
                        const __m512i query = _mm512_loadu_si512(room->q + g * dim + m * group + j);
                        UNROLL
                        for (int n = 0; n < KEYS; n++)
                            products[g][n] = (Words)_mm512_dpwssd_epi32((__m512i)products[g][n], own[n], query);
                    }
                }
                UNROLL
                for (int g = 0; g < count; g++) sums[g][i / KEYS] = fold_words(products[g], KEYS);
            }
            const __m512 scale = _mm512_loadu_ps(room->scales + m * PIECE + s); /* beyond the last key: never read */
            for (int g = 0; g < count; g++) {
                float *to = room->scores + g * PIECE + s;
                const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)fold_words(sums[g], LANES / KEYS)), scale);
                const __m512 before = m ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(scales[g]), before));
            }
        }
    for (int g = 0; g < count; g++)
        for (int64_t s = length; s % LANES; s++) room->scores[g * PIECE + s] = -INFINITY;
}

/* As mix, of int8 codes [length][dim] and the room's scores. Two rows at a time, so that a register's lanes each multiply
 * both by their weights. */
LOCAL void mix_codes(const Rows *r, const int8_t *codes, int64_t length, const int count, Room *room,
                     float *out, int64_t apart) {
    const int64_t dim = r->l->dim, group = r->c->group ? r->c->group : dim, groups = dim / group;
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t n = 0; n < groups; n++) {
        float scales[TOGETHER];
        UNROLL
        for (int g = 0; g < count; g++) {
            float *own = room->expanded; /* EXPANDED * dim >= PIECE + 1 */
            for (int64_t s = 0; s < length; s++) own[s] = room->scores[g * PIECE + s] * room->scales[n * PIECE + s];
            own[length] = 0; /* of the row that an odd number of rows lacks */
            scales[g] = to_int16(own, length + length % 2, room->weights + g * PIECE);
        }
        for (int64_t j = n * group; j < (n + 1) * group; j += 32) {
            __m512i low[TOGETHER], high[TOGETHER];
            UNROLL
            for (int g = 0; g < count; g++) low[g] = high[g] = _mm512_setzero_si512();
            for (int64_t s = 0; s < length; s += 2) {
                const __m512i a = widened(codes + s * dim + j);
                const __m512i b = widened(codes + (s + 1 < length ? s + 1 : s) * dim + j);
                const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
                UNROLL
                for (int g = 0; g < count; g++) {
                    int32_t both;
                    memcpy(&both, room->weights + g * PIECE + s, 4);
                    low[g] = _mm512_dpwssd_epi32(low[g], even, _mm512_set1_epi32(both));
                    high[g] = _mm512_dpwssd_epi32(high[g], odd, _mm512_set1_epi32(both));
                }
            }
            UNROLL
            for (int g = 0; g < count; g++) {
                float *to = out + g * apart + j;
                const __m512 scale = _mm512_set1_ps(scales[g]);
                _mm512_storeu_ps(to, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(low[g], first, high[g]))));
                _mm512_storeu_ps(to + 16, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(low[g], second, high[g]))));
            }
        }
    }
}
#endif

/* A token's attention to keys from .. to, at most PIECE, of `count` heads that share them; see Rows.parts. */
LOCAL void attend_piece(const Rows *r, int64_t sequence, int64_t head, int64_t key_head, int64_t from, int64_t to,
                        const int count, Room *room, float *parts, int64_t apart) {
    const Layer *l = r->l;
    const Context *c = r->c;
    const int64_t dim = l->dim, length = to - from, width = (length + LANES - 1) / LANES * LANES;
    const int64_t row = cache_row(r, sequence, key_head, from);
    const int64_t bytes = c->cached == CODES4 ? dim / 2 : c->cached ? dim : dim * (r->s->dtype == FLOAT32 ? 4 : 2);
    const char *all_keys = (const char *)c->keys + row * bytes, *all_values = (const char *)c->values + row * bytes;
    const float *q = r->q + sequence * r->query_apart + head * dim;
#if LANES == 16
    const int integers = in_integers(r);
    if (integers) {
        widen_scales(r, c->key_scales, row, length, room->scales);
        const Ahead ahead = {all_keys + EXPANDED * bytes, all_values, bytes};
        score_codes(r, (const int8_t *)all_keys, length, q, count, room, ahead);
    } else
#endif
    for (int64_t s = 0; s < length; s += EXPANDED) {
        const int64_t some = length - s < EXPANDED ? length - s : EXPANDED;
        const float *keys = expand(r, c->keys, c->key_scales, row + s, some, room->expanded);
        const Ahead ahead = {all_keys + (s + EXPANDED) * bytes, all_values + s * bytes, bytes};
        score((States){keys, 0, some, dim}, q, l->scale, count, KEYS, FLOAT32, (some + LANES - 1) / LANES * LANES,
              PIECE, room->scores + s, ahead);
    }
    for (int g = 0; g < count; g++) {
        float *scores = room->scores + g * PIECE, *part = parts + g * apart, lanes[LANES], top = -INFINITY, sum = 0;
        for (int64_t i = 0; l->cap && i < length; i++) scores[i] = capped(scores[i], l->cap);
        for (int j = 0; j < LANES; j++) lanes[j] = top;
        for (int64_t i = 0; i < width; i += LANES)
            for (int j = 0; j < LANES; j++) lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
        for (int j = 0; j < LANES; j++) top = lanes[j] > top ? lanes[j] : top;
        for (int64_t i = 0; i < width; i++) scores[i] = exponential(scores[i] - top);
        for (int64_t i = length; i < width; i++) scores[i] = 0;
        for (int j = 0; j < LANES; j++) lanes[j] = 0;
        for (int64_t i = 0; i < width; i += LANES)
            for (int j = 0; j < LANES; j++) lanes[j] += scores[i + j];
        for (int j = 0; j < LANES; j++) sum += lanes[j];
        memset(part, 0, (size_t)dim * 4);
        part[dim] = sum, part[dim + 1] = top;
    }
#if LANES == 16
    if (integers) {
        widen_scales(r, c->value_scales, row, length, room->scales);
        mix_codes(r, (const int8_t *)all_values, length, count, room, parts, apart);
    } else
#endif
    for (int64_t s = 0; s < length; s += EXPANDED) {
        const int64_t some = length - s < EXPANDED ? length - s : EXPANDED;
        const float *values = expand(r, c->values, c->value_scales, row + s, some, room->expanded);
        mix(values, some, dim, room->scores + s, count, parts, apart);
    }
}

/* One token of each sequence: up to TOGETHER heads of it and PIECE keys are a task, so that threads share a long cache
 * (Flash-Decoding, pytorch.org/blog/flash-decoding). */
LOCAL void attend_tokens(Rows *r, Room *room) {
    const Layer *l = r->l;
    const int64_t group = l->heads / l->key_heads, some = (group + TOGETHER - 1) / TOGETHER, end = r->s->length + r->from + 1;
    const int64_t tasks = r->rows * l->key_heads * some * r->pieces, apart = r->pieces * (l->dim + 2);
    for (int64_t task; (task = atomic_fetch_add(&r->next, 1)) < tasks;) {
        const int64_t piece = task % r->pieces, unit = task / r->pieces % some, key_head = task / r->pieces / some % l->key_heads;
        const int64_t sequence = task / r->pieces / some / l->key_heads, head = key_head * group + unit * TOGETHER;
        const int64_t from = first_seen(r, sequence, end - 1) + piece * PIECE, to = end - from < PIECE ? end : from + PIECE;
        float *parts = r->parts + ((sequence * l->heads + head) * r->pieces + piece) * (l->dim + 2);
        const int64_t heads = group - unit * TOGETHER;
        if (from >= end) continue;
        if (heads >= TOGETHER) attend_piece(r, sequence, head, key_head, from, to, TOGETHER, room, parts, apart);
        else if (heads == 3) attend_piece(r, sequence, head, key_head, from, to, 3, room, parts, apart);
        else if (heads == 2) attend_piece(r, sequence, head, key_head, from, to, 2, room, parts, apart);
        else attend_piece(r, sequence, head, key_head, from, to, 1, room, parts, apart);
    }
}

/* Each head's parts to what it mixed; a padding token, which sees no key, has none. */
TARGET static void join_parts(void *context) {
    Rows *r = context;
    const Layer *l = r->l;
    const int64_t dim = l->dim, end = r->s->length + r->from + 1;
    for (int64_t task; (task = atomic_fetch_add(&r->next, 1)) < r->rows * l->heads;) {
        const float *parts = r->parts + task * r->pieces * (dim + 2);
        const int64_t seen = end - first_seen(r, task / l->heads, end - 1), pieces = seen > 0 ? (seen + PIECE - 1) / PIECE : 0;
        float *mixed = r->mixed + task * dim, top = -INFINITY, sum = 0;
        for (int64_t i = 0; i < pieces; i++) top = parts[i * (dim + 2) + dim + 1] > top ? parts[i * (dim + 2) + dim + 1] : top;
        memset(mixed, 0, (size_t)dim * 4);
        for (int64_t i = 0; i < pieces; i++) {
            const float *part = parts + i * (dim + 2), factor = exponential(part[dim + 1] - top);
            sum += part[dim] * factor;
            for (int64_t j = 0; j < dim; j++) mixed[j] += part[j] * factor;
        }
        for (int64_t j = 0; pieces && j < dim; j++) mixed[j] /= sum;
    }
}

/* Some rows times outputs from .. to of a dense weight. */
LOCAL void dense_rows(const Dense *d, int64_t from, int64_t to, int64_t row, const int count, const DType dtype,
                      float *sums) {
    const States weight = {d->weight, from * d->in_features, to - from, d->in_features};
    const int64_t item = dtype == FLOAT32 ? 4 : 2;
    score(weight, d->x + row * d->in_features, 1, count, 1, dtype, OUTPUTS, OUTPUTS, sums,
          (Ahead){0});
    for (int64_t g = 0; g < count; g++)
        narrow(sums + g * OUTPUTS, to - from, dtype, (char *)d->y + ((row + g) * d->out_features + from) * item);
}

LOCAL void dense_outputs(Dense *d, const DType dtype) {
    float sums[TOGETHER * OUTPUTS];
    for (int64_t from; (from = OUTPUTS * atomic_fetch_add(&d->next, 1)) < d->out_features;) {
        const int64_t to = from + OUTPUTS < d->out_features ? from + OUTPUTS : d->out_features;
        int64_t row = 0;
        for (; row + TOGETHER <= d->rows; row += TOGETHER) dense_rows(d, from, to, row, TOGETHER, dtype, sums);
        const int64_t left = d->rows - row;
        if (left == 3) dense_rows(d, from, to, row, 3, dtype, sums);
        else if (left == 2) dense_rows(d, from, to, row, 2, dtype, sums);
        else if (left == 1) dense_rows(d, from, to, row, 1, dtype, sums);
    }
}

TARGET static void dense(void *context) {
    Dense *d = context;
    if (d->dtype == FLOAT32) dense_outputs(d, FLOAT32);
    else if (d->dtype == FLOAT16) dense_outputs(d, FLOAT16);
    else dense_outputs(d, BFLOAT16);
}

#define WIDE (LANES == 16 ? 4 : 2) /* registers of a row of products: with four rows they are half of all */

/* c [rows][columns] (+)= a [rows][inner] times b [inner][columns], rows and columns of a few registers: constants. */
LOCAL void block(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, const int rows,
                 const int wide, const int more, float *c, int64_t c_stride) {
    V sums[4][WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < wide; j++)
            sums[i][j] = more ? load(c + i * c_stride, j * LANES, FLOAT32) : (V){0};
    for (int64_t k = 0; k < inner; k++)
        for (int j = 0; j < wide; j++) {
            const V right = load(b + k * b_stride, j * LANES, FLOAT32);
            for (int i = 0; i < rows; i++) sums[i][j] = MULTIPLY_ADD(right, a[i * a_stride + k], sums[i][j]);
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < wide; j++) store(c + i * c_stride + j * LANES, sums[i][j]);
}

/* As block, of any number of rows, and of columns that LANES divides. */
LOCAL void product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, int64_t rows,
                   int64_t columns, const int more, float *c, int64_t c_stride) {
    for (int64_t j = 0; j < columns;) {
        const int wide = columns - j >= WIDE * LANES;
        for (int64_t i = 0; i < rows;) {
            const float *left = a + i * a_stride, *right = b + j;
            float *to = c + i * c_stride + j;
            const int four = rows - i >= 4;
            if (four && wide) block(left, a_stride, right, b_stride, inner, 4, WIDE, more, to, c_stride);
            else if (four) block(left, a_stride, right, b_stride, inner, 4, 1, more, to, c_stride);
            else if (wide) block(left, a_stride, right, b_stride, inner, 1, WIDE, more, to, c_stride);
            else block(left, a_stride, right, b_stride, inner, 1, 1, more, to, c_stride);
            i += four ? 4 : 1;
        }
        j += wide ? WIDE * LANES : LANES;
    }
}

/* Room of one thread for a tile of attention. keys are transposed [dim][TILE], expanded [TILE][dim]. */
typedef struct {
    float *q, *keys, *weights, *out, *expanded, most[TILE], sum[TILE];
} Tile;

/* Up to TILE queries (token by token, the heads of one key head) of a sequence, over all keys that one of them sees: a tile
 * of keys at a time, with the largest score and the sum so far (FlashAttention, arXiv 2205.14135, algorithm 1). Tiles
 * begin at multiples of TILE from the sequence's first key, so that other sequences change nothing. */
LOCAL void attend_tile(const Rows *r, int64_t sequence, int64_t key_head, int64_t from, int64_t count,
                       Tile *t) {
    const Layer *l = r->l;
    const int64_t group = l->heads / l->key_heads, dim = l->dim, filled = r->s->length + r->from;
    const int64_t first = r->s->first ? r->s->first[sequence] : 0;
    const int64_t begin = first + (first_seen(r, sequence, filled + from / group) - first) / TILE * TILE;
    const int64_t end = filled + (from + count - 1) / group + 1; /* beyond the last key of the last query */
    const int64_t gone = larger(r->c->start - begin, 0); /* keys of the first tile that the cache no longer has */
    const int64_t length = end - begin, row = cache_row(r, sequence, key_head, begin);
    for (int64_t i = 0; i < count; i++) {
        const float *q = r->q + (sequence * r->count + (from + i) / group) * r->query_apart;
        const int64_t head = key_head * group + (from + i) % group;
        for (int64_t j = 0; j < dim; j++) t->q[i * dim + j] = q[head * dim + j] * l->scale;
        t->most[i] = -INFINITY;
        t->sum[i] = 0;
    }
    memset(t->out, 0, (size_t)(count * dim) * 4);
    for (int64_t start = 0; start < length; start += TILE) {
        const int64_t width = length - start < TILE ? length - start : TILE;
        const int64_t lost = gone - start < 0 ? 0 : gone - start < width ? gone - start : width, left = width - lost;
        const float *keys = t->expanded, *values = t->expanded;
        if (left) keys = expand(r, r->c->keys, r->c->key_scales, row + start + lost, left, t->expanded);
        for (int64_t j = 0; j < dim; j += LANES)
            for (int64_t k = 0; k < TILE; k++) {
                float lanes[LANES] = {0};
                if (k >= lost && k < width) store(lanes, load(keys + (k - lost) * dim, j, FLOAT32));
                for (int n = 0; n < LANES; n++) t->keys[(j + n) * TILE + k] = lanes[n];
            }
        if (left) values = expand(r, r->c->values, r->c->value_scales, row + start + lost, left, t->expanded);
        product(t->q, dim, t->keys, TILE, dim, count, TILE, 0, t->weights, TILE);
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
        product(t->weights + lost, TILE, values, dim, left, count, dim, 1, t->out, dim);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = sequence * r->count + (from + i) / group, head = key_head * group + (from + i) % group;
        const float factor = t->sum[i] == 0 ? 0 : 1 / t->sum[i]; /* a padding token's is 0 */
        for (int64_t j = 0; j < dim; j++) r->mixed[(row * l->heads + head) * dim + j] = t->out[i * dim + j] * factor;
    }
}

LOCAL void attend_tiles(Rows *r, Tile *t) {
    const Layer *l = r->l;
    const int64_t queries = r->count * (l->heads / l->key_heads), tiles = (queries + TILE - 1) / TILE;
    for (int64_t task; (task = atomic_fetch_add(&r->next, 1)) < r->s->batch * l->key_heads * tiles;) {
        const int64_t from = (tiles - 1 - task % tiles) * TILE, count = queries - from < TILE ? queries - from : TILE;
        attend_tile(r, task / tiles / l->key_heads, task / tiles % l->key_heads, from, count, t);
    }
}

TARGET static void attend(void *context) {
    Rows *r = context;
    const int64_t tile = TILE * r->l->dim, rooms = r->count == 1 ? EXPANDED * r->l->dim + PIECE * r->l->dim / LANES + 2 * r->l->dim
                                                                 : 4 * tile + TILE * TILE;
    float *memory = malloc((size_t)rooms * 4);
    if (!memory) {
        r->failed = 1;
        return;
    }
    if (r->count == 1) {
        Room room = {.expanded = memory};
#if LANES == 16
        room.scales = memory + EXPANDED * r->l->dim, room.q = (int16_t *)(room.scales + PIECE * r->l->dim / LANES);
#endif
        attend_tokens(r, &room);
    } else {
        Tile t = {.q = memory, .keys = memory + tile, .expanded = memory + 2 * tile, .out = memory + 3 * tile,
                        .weights = memory + 4 * tile};
        attend_tiles(r, &t);
    }
    free(memory);
}

LOCAL void activate(float *gate, const float *up, int64_t count, const Activation activation) {
    if (up) for (int64_t i = 0; i < count; i++) gate[i] = activated(gate[i], activation) * up[i];
    else for (int64_t i = 0; i < count; i++) gate[i] = activated(gate[i], activation);
}

/* Which of the step's tokens a row is. */
LOCAL int64_t token_of(const Rows *r, int64_t row) {
    return row / r->count * r->s->count + r->from + row % r->count;
}

/* What a row needs before the first layer; before, between and after a layer's products; and after the last layer. */
TARGET static void read_rows(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in, item = r->s->dtype == FLOAT32 ? 4 : 2;
    EACH_CLAIMED(row, r->rows, r->next)
        generic_widen((const char *)r->s->x + token_of(r, row) * hidden * item, (DType)r->s->dtype, hidden,
                      r->x + row * hidden);
}

TARGET static void begin_rows(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in;
    EACH_CLAIMED(row, r->rows, r->next) {
        memcpy(r->normed + row * hidden, r->x + row * hidden, (size_t)hidden * 4);
        norm_parts(r->normed + row * hidden, hidden, &r->l->norms[BEFORE_ATTENTION]);
    }
}

TARGET static void rotate_rows(void *context) {
    Rows *r = context;
    const Layer *l = r->l;
    const Context *c = r->c;
    const int64_t dim = l->dim, rotated = c->rotated, item = r->s->dtype == FLOAT32 ? 4 : 2;
    EACH_CLAIMED(row, r->rows, r->next) {
        const int64_t at = (row / r->count * c->apart + (r->from + row % r->count) * rotated) * item;
        float *cosine = r->rotation + row * 2 * dim, *sine = cosine + dim;
        float *q = r->q + row * r->query_apart, *k = r->k + row * r->key_apart;
        norm_parts(q, l->heads * dim, &l->norms[OF_QUERIES]);
        norm_parts(k, l->key_heads * dim, &l->norms[OF_KEYS]);
        if (rotated) {
            generic_widen((const char *)c->cos + at, (DType)r->s->dtype, rotated, cosine);
            generic_widen((const char *)c->sin + at, (DType)r->s->dtype, rotated, sine);
            rotate(q, l->heads, dim, rotated, cosine, sine);
            rotate(k, l->key_heads, dim, rotated, cosine, sine);
        }
        append(k, r, row, c->keys, c->key_scales);
        append(r->v + row * r->key_apart, r, row, c->values, c->value_scales);
    }
}

TARGET static void continue_rows(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in;
    EACH_CLAIMED(row, r->rows, r->next) {
        float *x = r->x + row * hidden, *normed = r->normed + row * hidden;
        norm_parts(normed, hidden, &r->l->norms[AFTER_ATTENTION]);
        for (int64_t i = 0; i < hidden; i++) x[i] += normed[i];
        memcpy(normed, x, (size_t)hidden * 4);
        norm_parts(normed, hidden, &r->l->norms[BEFORE_MLP]);
    }
}

TARGET static void activate_rows(void *context) {
    Rows *r = context;
    const int64_t inner = r->inner;
    EACH_CLAIMED(row, r->inner_rows, r->next) {
        float *gate = r->gate + row * r->inner_apart;
        const float *up = r->up ? r->up + row * r->inner_apart : NULL;
        if (r->l->activation == SILU) activate(gate, up, inner, SILU);
        else if (r->l->activation == GELU_TANH) activate(gate, up, inner, GELU_TANH);
        else if (r->l->activation == GELU) activate(gate, up, inner, GELU);
        else activate(gate, up, inner, RELU);
        if (r->activated != r->gate) memcpy(r->activated + row * inner, gate, (size_t)inner * 4);
    }
}

TARGET static void end_rows(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in;
    EACH_CLAIMED(row, r->rows, r->next) {
        float *x = r->x + row * hidden, *normed = r->normed + row * hidden;
        norm_parts(normed, hidden, &r->l->norms[AFTER_MLP]);
        for (int64_t i = 0; i < hidden; i++) x[i] += normed[i];
    }
}

TARGET static void write_rows(void *context) {
    Rows *r = context;
    const int64_t hidden = r->l->linears[QUERY].in, item = r->s->dtype == FLOAT32 ? 4 : 2;
    EACH_CLAIMED(row, r->rows, r->next) {
        float *x = r->x + row * hidden;
        norm_parts(x, hidden, &r->s->norm);
        narrow(x, hidden, (DType)r->s->dtype, (char *)r->s->y + token_of(r, row) * hidden * item);
    }
}

/* y [rows][hidden] = what gate, up and down make of x. */
TARGET static int mlp(Rows *r, const Linear *linears, int64_t rows, const float *x, float *y) {
    const Linear *gate = linears, *up = linears + 1, *down = linears + 2;
    const int fused = !up->packed && gate->out == 2 * down->in;
    r->inner = down->in, r->inner_rows = rows, r->inner_apart = gate->out;
    r->up = fused ? r->gate + r->inner : up->packed ? r->gate + rows * r->inner : NULL;
    r->activated = fused ? r->gate + rows * gate->out : r->gate;
    int failed = multiply(r, linears, 2, rows, x, (float *[]){r->gate, r->up});
    run(activate_rows, r, rows > 1 && rows * r->inner >= MIN_ROWS);
    return failed | multiply(r, down, 1, rows, r->activated, &y);
}

/* Which experts a row goes to, and with what shares. */
TARGET static void route_rows(void *context) {
    Rows *r = context;
    const Experts *e = r->l->experts;
    const int64_t hidden = r->l->linears[QUERY].in;
    EACH_CLAIMED(row, r->rows, r->next) {
        float *shares = r->shares + row * r->routes, sum = 0;
        int32_t *chosen = r->chosen + row * e->active;
        score((States){e->router, 0, e->count, hidden}, r->normed + row * hidden, 1, 1, 1, FLOAT32, r->routes,
              r->routes, shares, (Ahead){0});
        softmax(shares, r->routes);
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
TARGET static int consult(Rows *r, int many) {
    const Experts *e = r->l->experts;
    const int64_t hidden = r->l->linears[QUERY].in;
    run(route_rows, r, many);
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
        failed = mlp(r, linears, own, r->gathered, r->outputs);
        own = 0;
        for (int64_t row = 0; row < r->rows; row++) {
            float share = 1;
            int sent = shared;
            for (int64_t i = 0; i < e->active; i++) sent |= r->chosen[row * e->active + i] == n;
            if (!sent) continue;
            if (!shared) share = r->shares[row * r->routes + n];
            else if (e->shared_gate) {
                float scores[LANES];
                const States gate = {e->shared_gate, 0, 1, hidden};
                score(gate, r->normed + row * hidden, 1, 1, 1, FLOAT32, LANES, LANES, scores, (Ahead){0});
                share = 1 / (1 + exponential(-scores[0]));
            }
            const float *output = r->outputs + own++ * hidden;
            for (int64_t i = 0; i < hidden; i++) r->sum[row * hidden + i] += share * output[i];
        }
    }
    float *inputs = r->normed;
    r->normed = r->sum, r->sum = inputs;
    return failed;
}

TARGET static int layer(Rows *r) {
    const Layer *l = r->l;
    const int64_t hidden = l->linears[QUERY].in, end = r->s->length + r->from + r->count;
    const int64_t queries = l->heads * l->dim, keys = l->key_heads * l->dim, length = end - r->c->start;
    const int many = r->rows > 1 && r->rows * hidden >= MIN_ROWS, apart = !!l->linears[KEY].packed;
    r->query_apart = l->linears[QUERY].out, r->key_apart = apart ? keys : r->query_apart;
    r->k = r->q + (apart ? r->rows : 1) * queries, r->v = r->k + (apart ? r->rows : 1) * keys;
    run(begin_rows, r, many);
    int failed = multiply(r, l->linears, 3, r->rows, r->normed, (float *[]){r->q, r->k, r->v});
    run(rotate_rows, r, many);
    run(attend, r, r->rows * l->heads * l->dim * length >= MIN_ATTENTION);
    if (r->count == 1) run(join_parts, r, r->rows * l->heads * l->dim * r->pieces >= MIN_ROWS);
    failed |= r->failed | multiply(r, l->linears + OUTPUT, 1, r->rows, r->mixed, &r->normed);
    run(continue_rows, r, many);
    if (l->experts) failed |= consult(r, many);
    else failed |= mlp(r, l->linears + GATE, r->rows, r->normed, r->normed);
    run(end_rows, r, many);
    return failed;
}

/* Some tokens at a time go through all layers: later ones read the keys and values of earlier ones from the caches. */
TARGET static int layers(const Layer *const *layers, int64_t count, const Step *s) {
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
    const int64_t rows = s->batch * most, pieces = (s->length + s->count + PIECE - 1) / PIECE;
    const int64_t parts = most == 1 || s->count % most == 1 ? s->batch * heads * pieces * (dim + 2) : 0;
    const int64_t row = 2 * hidden + 2 * all + 2 * some + 3 * inner + 2 * dim + (active ? 3 * hidden + routes + active : 0);
    float *memory = malloc((size_t)(rows * row + parts) * 4);
    if (!memory) return 1;
    Rows r = {.l = layers[0], .s = s, .x = memory};
    r.normed = r.x + rows * hidden, r.q = r.normed + rows * hidden, r.mixed = r.q + rows * (all + 2 * some);
    r.gate = r.mixed + rows * all, r.rotation = r.gate + rows * 3 * inner, r.parts = r.rotation + rows * 2 * dim;
    r.gathered = r.parts + parts, r.outputs = r.gathered + rows * hidden, r.sum = r.outputs + rows * hidden;
    r.shares = r.sum + rows * hidden, r.chosen = (int32_t *)(r.shares + rows * routes);
    atomic_init(&r.failed, 0);
    int failed = 0;
    for (r.from = 0; r.from < s->count && !failed; r.from += r.count) {
        r.count = s->count - r.from < most ? s->count - r.from : most;
        r.rows = s->batch * r.count;
        r.pieces = (s->length + r.from + PIECE) / PIECE;
        const int many = r.rows > 1 && r.rows * hidden >= MIN_ROWS;
        run(read_rows, &r, many);
        for (int64_t i = 0; i < count && !failed; i++) {
            r.l = layers[i], r.c = &s->contexts[i];
            r.routes = r.l->experts ? (r.l->experts->count + LANES - 1) / LANES * LANES : 0;
            failed = layer(&r);
        }
        run(write_rows, &r, many);
    }
    free(memory);
    return failed;
}
