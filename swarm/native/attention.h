/* Training attention over a packed row, forward and backward: kernels.c includes this file once per instruction set.
 *
 * Scores live in tiles that stay in the processor's cache (FlashAttention-2, arXiv 2307.08691): nothing of size
 * queries x keys is ever in memory, and no key is repeated for the completions that share a prompt. The rows of a tile
 * are the queries of all heads that share a key head. A completion's queries see the keys of its prompt, then their own
 * past.
 *
 * All products go through `mac`: four rows by up to four vectors of accumulators. Its reduction runs in units of 32
 * bits: a float, or a pair of bf16 that lie one after the other along the reduction. So each operand is laid out once
 * per side on which it is reduced: `by_width` for products over head_dim, `by_key` for products over keys.
 *
 * A work item is done by one thread in a fixed order, so results do not depend on which thread did what.
 */

/* 2^x for x <= 127, to about one unit in the last place; 0 for x < -126. */
INLINE v16f FN(exp2)(v16f x) {
    v16i tiny = x < -126.0f;
    v16f shifted = SELECT(tiny, ALL(0.0f), x) + 12582912.0f; /* 1.5 * 2^23: the last bits are now the nearest whole number */
    v16f r = SELECT(tiny, ALL(0.0f), x) - (shifted - 12582912.0f);
    v16f p = r * 1.540353039e-4f + 1.333355815e-3f;
    p = p * r + 9.618129108e-3f;
    p = p * r + 5.550410866e-2f;
    p = p * r + 2.402265070e-1f;
    p = p * r + 6.931471806e-1f;
    p = p * r + 1.0f;
    return SELECT(tiny, ALL(0.0f), (v16f)((v16i)p + ((v16i)shifted << 23)));
}

INLINE float FN(largest)(v16f v) {
    v16f w = SELECT(v > __builtin_shuffle(v, (v16i){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}), v,
                    __builtin_shuffle(v, (v16i){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    v16f x = __builtin_shuffle(w, (v16i){4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3});
    w = SELECT(w > x, w, x);
    x = __builtin_shuffle(w, (v16i){2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1});
    w = SELECT(w > x, w, x);
    return w[0] > w[1] ? w[0] : w[1];
}

/* 16 floats, rounded to bf16, in the low halves of 16 units. */
INLINE v16u FN(halves)(v16f v) {
#if USE_DPBF16
    return __builtin_convertvector((v16u16)_mm512_cvtneps_pbh((__m512)v), v16u);
#else
    return __builtin_convertvector(FN(to_bf16)(v), v16u);
#endif
}

/* acc[r][b] += sum over k of a[r][k] * w[k][b], in units; w holds 16 lanes a unit. */
INLINE void FN(mac)(const int is_bf16, const int vectors, int steps, const uint32_t *a, size_t a_row, size_t a_step,
                    const uint32_t *w, size_t w_step, size_t w_vector, v16f acc[4][4]) {
    for (int k = 0; k < steps; k++) {
        v16u weight[4];
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++) weight[b] = FN(load_pairs)(w + k * w_step + b * w_vector);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            uint32_t unit = a[r * a_row + k * a_step];
#pragma GCC unroll 4
            for (int b = 0; b < vectors; b++) {
                if (is_bf16) {
                    acc[r][b] = FN(add_pairs)(acc[r][b], weight[b], unit);
                } else {
                    union { uint32_t u; float f; } value = {unit};
                    acc[r][b] += (v16f)weight[b] * value.f;
                }
            }
        }
    }
}

/* c = a w (+ c where `adds`): rows a multiple of 4, columns vectors of 16. c: float [rows][c_row]. */
#define DEFINE_PRODUCT(NAME, IS_BF16) \
    static __attribute__((noinline)) void FN(NAME)(int adds, int rows, int columns, int steps, const uint32_t *a, size_t a_row, \
                                                   size_t a_step, const uint32_t *w, size_t w_step, size_t w_vector, float *c, \
                                                   size_t c_row) { \
        for (int r = 0; r < rows; r += 4) \
            for (int b = 0; b < columns; b += 4) { \
                v16f acc[4][4]; \
                float *to = c + r * c_row + b * 16; \
                switch (columns - b) { \
                    PRODUCT(IS_BF16, 1) break; \
                    PRODUCT(IS_BF16, 2) break; \
                    PRODUCT(IS_BF16, 3) break; \
                    default: PRODUCT_OF(IS_BF16, 4) \
                } \
            } \
    }
#define PRODUCT(IS_BF16, VECTORS) case VECTORS: PRODUCT_OF(IS_BF16, VECTORS)
#define PRODUCT_OF(IS_BF16, VECTORS) \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) \
        _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) \
            acc[i][j] = adds ? FN(load_f32)(to + i * c_row + j * 16) : ALL(0.0f); \
    FN(mac)(IS_BF16, VECTORS, steps, a + r * a_row, a_row, a_step, w + b * w_vector, w_step, w_vector, acc); \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) \
        _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) FN(store_f32)(to + i * c_row + j * 16, acc[i][j]);
DEFINE_PRODUCT(product_f32, 0)
DEFINE_PRODUCT(product_bf16, 1)
#undef DEFINE_PRODUCT
#undef PRODUCT
#undef PRODUCT_OF
#define PRODUCT(...) (is_bf16 ? FN(product_bf16) : FN(product_f32))(__VA_ARGS__)

/* Lay out the keys or values of one segment and head, zero beyond its end. from: the first token's vector.
 * by_width: [key / 16][width / unit][16]; by_key: [key / unit][width]; each in units. */
INLINE void FN(lay_out)(const int is_bf16, const char *from, size_t token_bytes, int length, int padded, int width,
                        uint32_t *by_width, uint32_t *by_key) {
    for (int key = 0; key < padded; key++) {
        const void *row = from + (size_t)key * token_bytes;
        const int is_real = key < length;
        uint32_t *column = by_width + (size_t)(key / 16) * width * (is_bf16 ? 8 : 16) + key % 16;
        if (is_bf16) {
            const uint32_t *pairs = row;
            for (int d = 0; d < width / 2; d++) column[d * 16] = is_real ? pairs[d] : 0;
            if (!by_key) continue;
            const uint16_t *halves = row;
            uint16_t *to = (uint16_t *)(by_key + (size_t)(key / 2) * width) + key % 2;
            for (int d = 0; d < width; d++) to[d * 2] = is_real ? halves[d] : 0;
        } else {
            const uint32_t *values = row;
            for (int d = 0; d < width; d++) column[d * 16] = is_real ? values[d] : 0;
            if (!by_key) continue;
            for (int d = 0; d < width; d++) by_key[(size_t)key * width + d] = is_real ? values[d] : 0;
        }
    }
}

/* Lay out all keys and values; ends with a barrier. */
static void FN(attention_lay_out)(const attention_t *a, const int is_bf16, int needs_all) {
    const int width = a->head_dim, heads = a->num_kv_heads, bytes = is_bf16 ? 2 : 4;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < a->num_segments * heads; task++) {
        const segment_t *s = &a->segments[task / heads];
        const int h = task % heads;
        const size_t at = (((size_t)h * a->num_keys + s->first_key) * width) / (is_bf16 ? 2 : 1);
        const char *key = (const char *)a->key + (s->first_token * a->key_token + h * a->key_head) * bytes;
        const char *value = (const char *)a->value + (s->first_token * a->value_token + h * a->value_head) * bytes;
        const int padded = (s->num_tokens + 15) / 16 * 16;
        FN(lay_out)(is_bf16, key, a->key_token * bytes, s->num_tokens, padded, width, a->keys_by_width + at,
                    needs_all ? a->keys_by_key + at : 0);
        FN(lay_out)(is_bf16, value, a->value_token * bytes, s->num_tokens, padded, width, a->values_by_width + at,
                    a->values_by_key + at);
    }
}

/* Gather the rows of a chunk, query after query and head after head, up to a multiple of 4; rows beyond are zero.
 * rows: [row][width / unit] units. pairs, where not NULL: [row / 2][width] units, for bf16 products over rows. */
INLINE void FN(gather)(const int is_bf16, const char *from, size_t token_bytes, size_t head_bytes, int num_queries, int group,
                       int width, uint32_t *rows, uint32_t *pairs) {
    const int units = is_bf16 ? width / 2 : width, count = num_queries * group, padded = (count + 3) / 4 * 4;
    for (int r = 0; r < padded; r++) {
        uint32_t *to = rows + (size_t)r * units;
        const char *row = from + (r / group) * token_bytes + (r % group) * head_bytes;
        for (int i = 0; i < units; i += 8) { /* a width is a multiple of 16 */
            if (r < count) __builtin_memcpy(to + i, row + i * 4, 32);
            else __builtin_memset(to + i, 0, 32);
        }
        if (pairs && is_bf16) {
            const uint16_t *halves = (const uint16_t *)to;
            uint16_t *into = (uint16_t *)(pairs + (size_t)(r / 2) * width) + r % 2;
            for (int d = 0; d < width; d++) into[d * 2] = halves[d];
        }
    }
}

/* Store 16 floats of a row as an operand: floats, or halves. at: in elements. */
INLINE void FN(put_operand)(const int is_bf16, void *row, int at, v16f v) {
    if (is_bf16) {
        v16u16 half = __builtin_convertvector(FN(halves)(v), v16u16);
        __builtin_memcpy((uint16_t *)row + at, &half, 32);
    } else {
        FN(store_f32)((float *)row + at, v);
    }
}

/* -inf where a key lies beyond `last`, the last key that the row sees, counted from the tile's first. */
INLINE v16f FN(mask)(v16f scores, int at, int last) {
    const v16i lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return SELECT(lanes + at > last, ALL(-INFINITY), scores);
}

/* The keys that a chunk of queries sees: first those of its prompt, then its own past. */
typedef struct { const segment_t *of; int num_keys, is_own; } FN(span_t);

INLINE int FN(spans)(const attention_t *a, const chunk_t *chunk, FN(span_t) out[2]) {
    const segment_t *s = &a->segments[chunk->segment];
    int count = 0;
    if (s->trunk >= 0) {
        const segment_t *trunk = &a->segments[s->trunk];
        out[count++] = (FN(span_t)){trunk, trunk->num_tokens, 0};
    }
    out[count++] = (FN(span_t)){s, chunk->last_query, 1};
    return count;
}

/* The last key that row r of a chunk sees, counted from key `first` of the span. */
#define LAST_SEEN(span, first, r) ((span).is_own ? chunk->first_query + (r) / group - (first) : (span).num_keys - 1 - (first))

static void FN(attention_forward_item)(const attention_t *a, const int is_bf16, const chunk_t *chunk, int h, char *scratch) {
    const int width = a->head_dim, group = a->num_heads / a->num_kv_heads, bytes = is_bf16 ? 2 : 4, unit = is_bf16 ? 2 : 1;
    const int num_queries = chunk->last_query - chunk->first_query, count = num_queries * group, rows = (count + 3) / 4 * 4;
    const size_t token = a->segments[chunk->segment].first_token + chunk->first_query;
    uint32_t *queries = (uint32_t *)scratch;
    float *scores = (float *)(queries + (size_t)a->max_rows * width);
    void *weights = scores + (size_t)a->max_rows * KEY_TILE;
    float *out = (float *)weights + (size_t)a->max_rows * KEY_TILE;
    float *mass = out + (size_t)a->max_rows * width, *most = mass + (size_t)a->max_rows * 16; /* mass: 16 lanes a row */
    const float scale = a->scale * LOG2_E;
    FN(gather)(is_bf16, (const char *)a->query + (token * a->query_token + (size_t)h * group * a->query_head) * bytes,
               a->query_token * bytes, a->query_head * bytes, num_queries, group, width, queries, 0);
    for (int r = 0; r < rows; r++) { most[r] = -INFINITY; FN(store_f32)(mass + r * 16, ALL(0.0f)); }
    __builtin_memset(out, 0, (size_t)rows * width * sizeof(float));
    FN(span_t) spans[2];
    const int num_spans = FN(spans)(a, chunk, spans);
    for (int s = 0; s < num_spans; s++)
        for (int first = 0; first < spans[s].num_keys; first += KEY_TILE) {
            const int left = spans[s].num_keys - first, tile = left < KEY_TILE ? (left + 15) / 16 * 16 : KEY_TILE;
            const size_t at = ((size_t)h * a->num_keys + spans[s].of->first_key + first) * width / unit;
            PRODUCT(0, rows, tile / 16, width / unit, queries, width / unit, 1, a->keys_by_width + at, 16,
                        (size_t)width / unit * 16, scores, KEY_TILE);
            for (int r = 0; r < rows; r++) {
                float *row = scores + r * KEY_TILE;
                const int last = LAST_SEEN(spans[s], first, r);
                v16f top = ALL(-INFINITY);
                for (int i = 0; i < tile; i += 16) {
                    v16f v = FN(load_f32)(row + i) * scale;
                    if (last < i + 15) v = FN(mask)(v, i, last);
                    FN(store_f32)(row + i, v);
                    top = SELECT(v > top, v, top);
                }
                const float highest = FN(largest)(top);
                v16f sum = FN(load_f32)(mass + r * 16);
                if (highest > most[r]) {
                    const float shrink = most[r] == -INFINITY ? 0.0f : FN(exp2)(ALL(most[r] - highest))[0];
                    sum *= shrink;
                    for (int d = 0; d < width; d += 16)
                        FN(store_f32)(out + r * width + d, FN(load_f32)(out + r * width + d) * shrink);
                    most[r] = highest;
                }
                char *weight = (char *)weights + (size_t)r * KEY_TILE * bytes;
                for (int i = 0; i < tile; i += 16) {
                    v16f e = FN(exp2)(FN(load_f32)(row + i) - most[r]);
                    sum += e;
                    FN(put_operand)(is_bf16, weight, i, e);
                }
                FN(store_f32)(mass + r * 16, sum);
            }
            PRODUCT(1, rows, width / 16, tile / unit, weights, KEY_TILE / unit, 1, a->values_by_key + at, width,
                        16, out, width);
        }
    for (int r = 0; r < count; r++) {
        const int head = h * group + r % group;
        const float total = FN(sum)(FN(load_f32)(mass + r * 16)), inverse = 1.0f / total;
        char *to = (char *)a->out + ((token + r / group) * a->num_heads + head) * (size_t)width * bytes;
        for (int d = 0; d < width; d += 16) FN(put_operand)(is_bf16, to, d, FN(load_f32)(out + r * width + d) * inverse);
        a->log_mass[(size_t)head * a->num_tokens + token + r / group] = most[r] + log2f(total);
    }
}

/* Gradients of one chunk: query gradients are complete, those of keys and values are added to the item's own sums. */
static void FN(attention_backward_chunk)(const attention_t *a, const int is_bf16, const chunk_t *chunk, const item_t *item,
                                         int h, char *scratch) {
    const int width = a->head_dim, group = a->num_heads / a->num_kv_heads, bytes = is_bf16 ? 2 : 4, unit = is_bf16 ? 2 : 1;
    const int num_queries = chunk->last_query - chunk->first_query, count = num_queries * group, rows = (count + 3) / 4 * 4;
    const size_t token = a->segments[chunk->segment].first_token + chunk->first_query, most = a->max_rows;
    const size_t row_bytes = (size_t)a->num_heads * width * bytes; /* of a token in out, grad_out and grad_query */
    uint32_t *queries = (uint32_t *)scratch, *query_pairs = queries + most * width;
    uint32_t *grads = query_pairs + most * width, *grad_pairs = grads + most * width;
    float *scores = (float *)(grad_pairs + most * width), *slopes = scores + most * KEY_TILE;
    uint32_t *by_row = (uint32_t *)(slopes + most * KEY_TILE), *weights = by_row + most * KEY_TILE;
    float *grad_queries = (float *)(weights + most * KEY_TILE), *log_mass = grad_queries + most * width, *along = log_mass + most;
    const float scale = a->scale * LOG2_E;
    FN(gather)(is_bf16, (const char *)a->query + (token * a->query_token + (size_t)h * group * a->query_head) * bytes,
               a->query_token * bytes, a->query_head * bytes, num_queries, group, width, queries, query_pairs);
    FN(gather)(is_bf16, (const char *)a->grad_out + token * row_bytes + (size_t)h * group * width * bytes, row_bytes,
               (size_t)width * bytes, num_queries, group, width, grads, grad_pairs);
    if (!is_bf16) { query_pairs = queries; grad_pairs = grads; }
    for (int r = 0; r < rows; r++) {
        log_mass[r] = INFINITY; /* rows beyond the last get weights of zero */
        along[r] = 0;
        if (r >= count) continue;
        const int head = h * group + r % group;
        const size_t at = ((token + r / group) * a->num_heads + head) * width;
        v16f sum = {0};
        for (int d = 0; d < width; d += 16)
            sum += is_bf16 ? FN(load_bf16)((const uint16_t *)a->out + at + d) * FN(load_bf16)((const uint16_t *)a->grad_out + at + d)
                           : FN(load_f32)((const float *)a->out + at + d) * FN(load_f32)((const float *)a->grad_out + at + d);
        along[r] = FN(sum)(sum);
        log_mass[r] = a->log_mass[(size_t)head * a->num_tokens + token + r / group];
    }
    __builtin_memset(grad_queries, 0, (size_t)rows * width * sizeof(float));
    FN(span_t) spans[2];
    const int num_spans = FN(spans)(a, chunk, spans);
    for (int s = 0; s < num_spans; s++)
        for (int first = 0; first < spans[s].num_keys; first += KEY_TILE) {
            const int left = spans[s].num_keys - first, tile = left < KEY_TILE ? (left + 15) / 16 * 16 : KEY_TILE;
            const size_t key = spans[s].of->first_key + first, at = ((size_t)h * a->num_keys + key) * width / unit;
            const size_t sums = ((size_t)h * a->num_sums + item->first_sum + key - item->first_key) * width;
            PRODUCT(0, rows, tile / 16, width / unit, queries, width / unit, 1, a->keys_by_width + at, 16,
                        (size_t)width / unit * 16, scores, KEY_TILE);
            PRODUCT(0, rows, tile / 16, width / unit, grads, width / unit, 1, a->values_by_width + at, 16,
                        (size_t)width / unit * 16, slopes, KEY_TILE);
            for (int r = 0; r < rows; r += 2)
                for (int i = 0; i < tile; i += 16) {
                    v16f weight[2], slope[2];
#pragma GCC unroll 2
                    for (int j = 0; j < 2; j++) {
                        const int last = LAST_SEEN(spans[s], first, r + j);
                        v16f v = FN(load_f32)(scores + (r + j) * KEY_TILE + i) * scale - log_mass[r + j];
                        if (last < i + 15) v = FN(mask)(v, i, last);
                        weight[j] = FN(exp2)(v);
                        slope[j] = weight[j] * (FN(load_f32)(slopes + (r + j) * KEY_TILE + i) - along[r + j]) * a->scale;
                    }
                    if (is_bf16) { /* by row: halves, for the product over keys; in pairs of rows, for those over rows */
                        v16u half[2] = {FN(halves)(slope[0]), FN(halves)(slope[1])};
#pragma GCC unroll 2
                        for (int j = 0; j < 2; j++) {
                            v16u16 narrow = __builtin_convertvector(half[j], v16u16);
                            __builtin_memcpy((uint16_t *)by_row + (size_t)(r + j) * KEY_TILE + i, &narrow, 32);
                        }
                        FN(store_f32)(slopes + (r / 2) * KEY_TILE + i, (v16f)(half[0] | half[1] << 16));
                        v16u pair = FN(halves)(weight[0]) | FN(halves)(weight[1]) << 16;
                        FN(store_f32)((float *)weights + (r / 2) * KEY_TILE + i, (v16f)pair);
                    } else {
#pragma GCC unroll 2
                        for (int j = 0; j < 2; j++) {
                            FN(store_f32)((float *)by_row + (r + j) * KEY_TILE + i, slope[j]);
                            FN(store_f32)((float *)weights + (r + j) * KEY_TILE + i, weight[j]);
                        }
                    }
                }
            const uint32_t *slope_pairs = is_bf16 ? (const uint32_t *)slopes : by_row;
            PRODUCT(1, rows, width / 16, tile / unit, by_row, KEY_TILE / unit, 1, a->keys_by_key + at, width, 16,
                        grad_queries, width);
            PRODUCT(1, tile, width / 16, rows / unit, slope_pairs, 1, KEY_TILE, query_pairs, width, 16,
                        a->key_sums + sums, width);
            PRODUCT(1, tile, width / 16, rows / unit, weights, 1, KEY_TILE, grad_pairs, width, 16,
                        a->value_sums + sums, width);
        }
    for (int r = 0; r < count; r++) {
        char *to = (char *)a->grad_query + (token + r / group) * row_bytes + (size_t)(h * group + r % group) * width * bytes;
        for (int d = 0; d < width; d += 16) FN(put_operand)(is_bf16, to, d, FN(load_f32)(grad_queries + r * width + d));
    }
}

/* Add up what the items of each family found for its keys and values; ends with a barrier. */
static void FN(attention_add_up)(const attention_t *a, const int is_bf16) {
    const int width = a->head_dim, heads = a->num_kv_heads, bytes = is_bf16 ? 2 : 4;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < a->num_segments * heads; task++) {
        const segment_t *s = &a->segments[task / heads];
        const int h = task % heads;
        for (int t = 0; t < s->num_tokens; t++)
            for (int d = 0; d < width; d += 16) {
                v16f key = {0}, value = {0};
                for (int i = s->first_item; i < s->last_item; i++) {
                    const item_t *item = &a->items[i];
                    const size_t at = ((size_t)h * a->num_sums + item->first_sum + s->first_key - item->first_key + t) * width + d;
                    key += FN(load_f32)(a->key_sums + at);
                    value += FN(load_f32)(a->value_sums + at);
                }
                const size_t to = ((size_t)(s->first_token + t) * heads + h) * width * bytes;
                FN(put_operand)(is_bf16, (char *)a->grad_key + to, d, key);
                FN(put_operand)(is_bf16, (char *)a->grad_value + to, d, value);
            }
    }
}

INLINE void FN(attention_forward_as)(const attention_t *a, const int is_bf16) {
#pragma omp parallel num_threads(a->num_threads)
    {
        char *scratch = (char *)a->scratch + (size_t)omp_get_thread_num() * a->scratch_bytes;
        FN(attention_lay_out)(a, is_bf16, 0);
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < a->num_chunks * a->num_kv_heads; task++)
            FN(attention_forward_item)(a, is_bf16, &a->chunks[task / a->num_kv_heads], task % a->num_kv_heads, scratch);
    }
}

INLINE void FN(attention_backward_as)(const attention_t *a, const int is_bf16) {
#pragma omp parallel num_threads(a->num_threads)
    {
        char *scratch = (char *)a->scratch + (size_t)omp_get_thread_num() * a->scratch_bytes;
        FN(attention_lay_out)(a, is_bf16, 1);
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < a->num_items * a->num_kv_heads; task++) {
            const item_t *item = &a->items[task / a->num_kv_heads];
            const int h = task % a->num_kv_heads;
            const size_t sums = ((size_t)h * a->num_sums + item->first_sum) * a->head_dim;
            const size_t size = (size_t)item->num_keys * a->head_dim * sizeof(float);
            __builtin_memset(a->key_sums + sums, 0, size);
            __builtin_memset(a->value_sums + sums, 0, size);
            for (int c = item->first_chunk; c < item->last_chunk; c++)
                FN(attention_backward_chunk)(a, is_bf16, &a->chunks[c], item, h, scratch);
        }
        FN(attention_add_up)(a, is_bf16);
    }
}

static void FN(attention_forward)(const attention_t *a) {
    if (a->is_bf16) FN(attention_forward_as)(a, 1);
    else FN(attention_forward_as)(a, 0);
}

static void FN(attention_backward)(const attention_t *a) {
    if (a->is_bf16) FN(attention_backward_as)(a, 1);
    else FN(attention_backward_as)(a, 0);
}

#undef LAST_SEEN
#undef PRODUCT
