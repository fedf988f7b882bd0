/* The forward pass, once per instruction set: kernels.c includes this file with SUFFIX, USE_DPBF16 and a target set.
 *
 * Lanes are 16 floats, in GCC's vector extension; the compiler splits them where registers are narrower.
 * Every output element is one chain of multiply-adds in a fixed order, whatever else is computed beside it. So a
 * token's logits have the same bits alone or in a batch, in prefill or in decoding: the engine's results do not
 * depend on batches or interruptions, not even in the last place.
 */

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define FN(name) CAT(name, SUFFIX)
#define INLINE static inline __attribute__((always_inline))

INLINE v16f FN(load_f32)(const float *p) { v16f v; __builtin_memcpy(&v, p, 64); return v; }
INLINE void FN(store_f32)(float *p, v16f v) { __builtin_memcpy(p, &v, 64); }

INLINE v16f FN(load_bf16)(const uint16_t *p) {
    v16u16 half;
    __builtin_memcpy(&half, p, 32);
    v16u bits = __builtin_convertvector(half, v16u) << 16;
    return (v16f)bits;
}

/* Round to nearest even, as torch does; the inputs are finite or infinite, never NaN with a zero upper half. */
INLINE v16u16 FN(to_bf16)(v16f v) {
    v16u bits = (v16u)v;
    bits += 0x7FFF + ((bits >> 16) & 1);
    return __builtin_convertvector(bits >> 16, v16u16);
}

#define SELECT(mask, a, b) ((v16f)(((v16i)(a) & (mask)) | ((v16i)(b) & ~(mask))))
#define ALL(x) ((v16f){0} + (x))

/* exp for x <= 88, from 2^n * p(r): the error is under 2 units in the last place; very negative x gives 0. */
INLINE v16f FN(exp)(v16f x) {
    v16i tiny = x < -87.0f;
    v16f clamped = SELECT(tiny, ALL(-87.0f), x);
    v16f n = clamped * 1.44269504f;
    v16i whole = __builtin_convertvector(n + SELECT(n < 0, ALL(-0.5f), ALL(0.5f)), v16i);
    n = __builtin_convertvector(whole, v16f);
    v16f r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    v16f p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    v16i power = (whole + 127) << 23;
    return SELECT(tiny, ALL(0.0f), p * (v16f)power);
}

INLINE float FN(sum)(v16f v) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
}

/* Activations of one row: fp32 for fp32 weights, bf16 for bf16 weights. x: [width]; out: [width]. */
INLINE void FN(put)(const model_t *m, void *row, int at, v16f v) {
    if (m->is_bf16) {
        v16u16 half = FN(to_bf16)(v);
        __builtin_memcpy((uint16_t *)row + at, &half, 32);
    } else {
        FN(store_f32)((float *)row + at, v);
    }
}

/* 1 / rms(x). x: [hidden] */
INLINE float FN(inverse_rms)(const model_t *m, const float *x) {
    v16f squares = {0};
    for (int i = 0; i < m->hidden; i += 16) { v16f v = FN(load_f32)(x + i); squares += v * v; }
    return 1.0f / sqrtf(FN(sum)(squares) / m->hidden + m->epsilon);
}

/* out[row] = x[row] / rms(x[row]) * weight, for the rows of this thread; without a weight out[row] = x[row]. */
static void FN(norm)(const model_t *m, const float *x, const float *weight, void *out, int n) {
    const int width = m->hidden, bytes = m->is_bf16 ? 2 : 4;
#pragma omp for schedule(static)
    for (int r = 0; r < n; r++) {
        const float *row = x + (size_t)r * width;
        float scale = weight ? FN(inverse_rms)(m, row) : 1.0f;
        for (int i = 0; i < width; i += 16)
            FN(put)(m, (char *)out + (size_t)r * width * bytes, i,
                    weight ? FN(load_f32)(row + i) * scale * FN(load_f32)(weight + i) : FN(load_f32)(row + i));
    }
}

/* acc += a * b over two bf16 a lane: a holds pairs by lane, b one pair for all lanes. */
INLINE v16f FN(add_pairs)(v16f acc, v16u a, uint32_t b) {
#if USE_DPBF16
    return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)_mm512_set1_epi32((int)b));
#else
    union { uint32_t u; float f; } low = {b << 16}, high = {b & 0xFFFF0000u};
    acc += (v16f)(a << 16) * low.f;
    return acc + (v16f)(a & 0xFFFF0000u) * high.f;
#endif
}

INLINE v16u FN(load_pairs)(const void *p) { v16u v; __builtin_memcpy(&v, p, 64); return v; }

/* A tile of so many rows computes for long enough between two loads of weights that the processor does not look far ahead
 * by itself: it fetches what it will read so many bytes later. With fewer rows it waits for memory alone. */
#define FETCHING_ROWS 5
#define FETCHING_BYTES 4096

/* One tile of a matmul: rows x[0..rows) times `blocks` blocks of 16 outputs. acc: [rows][blocks].
 * Weights are packed [out / 16][in / 2][16][2] in bf16 and [out / 16][in][16] in fp32: a load is 16 outputs.
 * `ahead` is what to fetch meanwhile, a cache line a step, or NULL. */
INLINE void FN(tile)(const int is_bf16, const int rows, const int blocks, const void *x, const void *w, int in,
                     const char *ahead, v16f acc[12][4]) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++) acc[r][b] = (v16f){0};
    if (is_bf16) {
        const uint32_t *xs = x, *ws = w;
        const int pairs = in / 2;
        for (int k = 0; k < pairs; k++) {
            if (ahead) __builtin_prefetch(ahead + (size_t)k * 64, 0, 2);
            v16u weight[4];
#pragma GCC unroll 4
            for (int b = 0; b < blocks; b++) {
                const uint32_t *from = ws + ((size_t)b * pairs + k) * 16;
                if (rows >= FETCHING_ROWS) __builtin_prefetch((const char *)from + FETCHING_BYTES, 0, 2);
                weight[b] = FN(load_pairs)(from);
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                uint32_t pair = xs[(size_t)r * pairs + k];
#pragma GCC unroll 4
                for (int b = 0; b < blocks; b++) acc[r][b] = FN(add_pairs)(acc[r][b], weight[b], pair);
            }
        }
    } else {
        const float *xs = x;
        for (int k = 0; k < in; k++) {
            if (ahead) __builtin_prefetch(ahead + (size_t)k * 64, 0, 2);
            v16f weight[4];
#pragma GCC unroll 4
            for (int b = 0; b < blocks; b++) {
                const float *from = (const float *)w + ((size_t)b * in + k) * 16;
                if (rows >= FETCHING_ROWS) __builtin_prefetch((const char *)from + FETCHING_BYTES, 0, 2);
                weight[b] = FN(load_f32)(from);
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                float value = xs[(size_t)r * in + k];
#pragma GCC unroll 4
                for (int b = 0; b < blocks; b++) acc[r][b] += weight[b] * value;
            }
        }
    }
}

INLINE void FN(finish)(const model_t *m, int kind, const int rows, const int blocks, v16f acc[12][4], const float *bias,
                       void *out, int first_row, int first_block, int num_out) {
    for (int r = 0; r < rows; r++) {
        size_t row = (size_t)(first_row + r);
        if (kind == GATE) {
            const int width = m->intermediate, bytes = m->is_bf16 ? 2 : 4;
            for (int b = 0; b < blocks; b += 2) {
                int at = (first_block + b) * 8;
                if (at >= width) continue;
                v16f gate = acc[r][b], up = acc[r][b + 1];
                v16f negated = -gate;
                v16f decay = FN(exp)(SELECT(negated > 80.0f, ALL(80.0f), negated));
                FN(put)(m, (char *)out + row * width * bytes, at, gate / (decay + 1.0f) * up);
            }
            continue;
        }
        for (int b = 0; b < blocks; b++) {
            int at = (first_block + b) * 16, rest = num_out - at;
            if (rest <= 0) continue;
            float *to = (float *)out + row * num_out + at;
            v16f v = acc[r][b];
            if (bias) v += FN(load_f32)(bias + at); /* biases are padded like the weights */
            if (rest >= 16) {
                FN(store_f32)(to, kind == ADD ? FN(load_f32)(to) + v : v);
            } else {
                for (int i = 0; i < rest; i++) to[i] = kind == ADD ? to[i] + v[i] : v[i];
            }
        }
    }
}

#define TILE_ROWS(ROWS) \
    case ROWS: \
        FN(tile)(is_bf16, ROWS, blocks, xr, wb, in, ahead, acc); \
        FN(finish)(m, kind, ROWS, blocks, acc, bias, out, r, block, num_out); \
        break;

INLINE void FN(panel)(const model_t *m, const int is_bf16, const int blocks, int kind, const char *x, const char *w,
                      const float *bias, void *out, int n, int in, int block, int num_out) {
    const size_t bytes = is_bf16 ? 2 : 4;
    const char *wb = w + (size_t)block * 16 * in * bytes;
    v16f acc[12][4];
    const int most = blocks == 4 ? 6 : 12;
    const size_t block_bytes = (size_t)16 * in * bytes;
    for (int r = 0, number = 0; r < n; number++) {
        const int left = n - r, rows = left >= 2 * most ? most : left > most ? left / 2 : left; /* a small tile waits for its sums */
        const char *xr = x + (size_t)r * in * bytes;
        /* Only the first tile of a panel reads memory, the others find it in the cache. So that memory does not idle
         * meanwhile, each tile fetches one block of the next panel. */
        const char *ahead = n > most && number < blocks ? wb + (blocks + number) * block_bytes : 0;
        if (blocks == 4) {
            switch (rows) { TILE_ROWS(1) TILE_ROWS(2) TILE_ROWS(3) TILE_ROWS(4) TILE_ROWS(5) TILE_ROWS(6) }
        } else {
            switch (rows) {
                TILE_ROWS(1) TILE_ROWS(2) TILE_ROWS(3) TILE_ROWS(4) TILE_ROWS(5) TILE_ROWS(6)
                TILE_ROWS(7) TILE_ROWS(8) TILE_ROWS(9) TILE_ROWS(10) TILE_ROWS(11) TILE_ROWS(12)
            }
        }
        r += rows;
    }
}

/* out = x W^T for all threads of the team; ends with a barrier. x: [n, in]; num_out outputs, padded to 32.
 * Each thread has a run of panels, which it does in order, and then helps the others with theirs: threads rarely end
 * together on a machine that does other things as well. Which thread did a panel changes no bit of it. */
static void FN(matmul)(const model_t *m, turns_t *turns, int kind, const void *x, const void *w, const float *bias, void *out, int n,
                       int in, int num_out) {
    const int panels = ((kind == GATE ? 2 * num_out : num_out) + 31) / 32;
    const int limit = kind == GATE ? m->intermediate : num_out;
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    turn_t *done = turns->done[turns->number++ % 2];
    for (int i = 0; i < threads; i++) {
        const int who = (me + i) % threads;
        const int first = (int)((int64_t)panels * who / threads), last = (int)((int64_t)panels * (who + 1) / threads);
        for (;;) {
            const int p = first + __atomic_fetch_add(&done[who].panels, 1, __ATOMIC_RELAXED);
            if (p >= last) break;
            if (m->is_bf16) FN(panel)(m, 1, 2, kind, x, w, bias, out, n, in, p * 2, limit);
            else FN(panel)(m, 0, 2, kind, x, w, bias, out, n, in, p * 2, limit);
        }
    }
    turns->done[turns->number % 2][me].panels = 0; /* of the next matmul; nobody reads it before the barrier */
#pragma omp barrier
}

/* Normalise (Qwen3), rotate and scale one head in place. head: [head_dim]; cosine, sine: [head_dim / 2]. */
INLINE void FN(rotate)(const model_t *m, float *head, const float *weight, const float *cosine, const float *sine, float scale) {
    const int width = m->head_dim, half = width / 2;
    if (weight) {
        float squares = 0;
        for (int i = 0; i < width; i++) squares += head[i] * head[i];
        float inverse = 1.0f / sqrtf(squares / width + m->epsilon);
        for (int i = 0; i < width; i++) head[i] *= inverse * weight[i];
    }
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = (a * cosine[i] - b * sine[i]) * scale;
        head[i + half] = (b * cosine[i] + a * sine[i]) * scale;
    }
}

/* Rotate queries in place and write keys and values to the cache, of the row's slot and of those that share its past.
 * Keys: [slot][kv head][position / 16][head_dim][16]; values: [slot][kv head][position][head_dim]. In bf16 what is
 * summed over lies in pairs: keys [..][position / 16][head_dim / 2][16][2], values [..][position / 2][head_dim][2]. */
static void FN(store)(const model_t *m, const layer_t *layer, float *qkv, char *keys, char *values, const rows_t *rows) {
    const int width = m->head_dim, heads = m->num_heads, kv_heads = m->num_kv_heads, total = heads + 2 * kv_heads;
    const float scale = 1.0f / sqrtf((float)width);
#pragma omp for schedule(static)
    for (int r = 0; r < rows->num; r++) {
        float *row = qkv + (size_t)r * total * width;
        const int64_t at = rows->positions[r];
        const float *cosine = m->cosine + at * (width / 2), *sine = m->sine + at * (width / 2);
        for (int h = 0; h < heads; h++) FN(rotate)(m, row + h * width, layer->query_norm, cosine, sine, scale);
        for (int h = 0; h < kv_heads; h++) FN(rotate)(m, row + (heads + h) * width, layer->key_norm, cosine, sine, 1.0f);
        const int64_t first = rows->first_sharer ? rows->first_sharer[r] : 0, last = rows->first_sharer ? rows->first_sharer[r + 1] : 0;
        for (int64_t s = first - 1; s < last; s++) {
            const int64_t slot = s < first ? rows->slots[r] : rows->sharers[s];
            for (int h = 0; h < kv_heads; h++) {
                const float *key = row + (heads + h) * width, *value = row + (heads + kv_heads + h) * width;
                const size_t base = ((size_t)slot * kv_heads + h) * m->capacity * width;
                const size_t block = base + (size_t)(at / 16) * 16 * width, lane = at % 16;
                if (m->is_bf16) {
                    uint16_t *to = (uint16_t *)keys + block + lane * 2;
                    uint16_t *into = (uint16_t *)values + base + (size_t)(at / 2) * 2 * width + at % 2;
                    for (int d = 0; d < width; d += 16) {
                        v16u16 half = FN(to_bf16)(FN(load_f32)(key + d)), whole = FN(to_bf16)(FN(load_f32)(value + d));
                        for (int i = 0; i < 16; i++) to[(size_t)((d + i) / 2) * 32 + i % 2] = half[i];
                        for (int i = 0; i < 16; i++) into[(size_t)(d + i) * 2] = whole[i];
                    }
                } else {
                    for (int d = 0; d < width; d++) ((float *)keys)[block + lane + (size_t)d * 16] = key[d];
                    __builtin_memcpy((float *)values + base + (size_t)at * width, value, width * sizeof(float));
                }
            }
        }
    }
}

/* `group` query heads that share one KV head, over `length` positions: keys and values are read once for all of them.
 * queries, out: [group, head_dim]. scores: scratch [group, stride]. */
INLINE void FN(attend_group)(const int is_bf16, const int group, const int width, const float *queries, const void *keys,
                             const void *values, int length, float *scores, size_t stride, float *out) {
    const int num_blocks = (length + 15) / 16;
    uint32_t pairs[MAX_GROUP * MAX_HEAD_DIM / 2];
    if (is_bf16)
        for (int i = 0; i < group * width; i += 16) {
            v16u16 half = FN(to_bf16)(FN(load_f32)(queries + i));
            __builtin_memcpy((uint16_t *)pairs + i, &half, 32);
        }
    v16f most[MAX_GROUP];
    for (int g = 0; g < group; g++) most[g] = ALL(-INFINITY);
    for (int b = 0; b < num_blocks; b++) {
        v16f acc[MAX_GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < group; g++) acc[g] = ALL(0.0f);
        if (is_bf16) {
            for (int d = 0; d < width / 2; d++) {
                v16u key = FN(load_pairs)((const uint16_t *)keys + ((size_t)b * width + d * 2) * 16);
#pragma GCC unroll 4
                for (int g = 0; g < group; g++) acc[g] = FN(add_pairs)(acc[g], key, pairs[g * width / 2 + d]);
            }
        } else {
            for (int d = 0; d < width; d++) {
                v16f key = FN(load_f32)((const float *)keys + ((size_t)b * width + d) * 16);
#pragma GCC unroll 4
                for (int g = 0; g < group; g++) acc[g] += key * queries[g * width + d];
            }
        }
        for (int g = 0; g < group; g++) {
            if (b == num_blocks - 1)
                for (int i = length - b * 16; i < 16; i++) acc[g][i] = -INFINITY;
            most[g] = SELECT(acc[g] > most[g], acc[g], most[g]);
            FN(store_f32)(scores + g * stride + b * 16, acc[g]);
        }
    }
    float inverse[MAX_GROUP];
    for (int g = 0; g < group; g++) {
        float top = most[g][0];
        for (int i = 1; i < 16; i++) top = most[g][i] > top ? most[g][i] : top;
        v16f mass = {0};
        for (int b = 0; b < num_blocks; b++) {
            v16f e = FN(exp)(FN(load_f32)(scores + g * stride + b * 16) - top);
            mass += e;
            if (is_bf16) { /* in place: a block's halves take the place of its first eight floats, and of no later block */
                v16u16 half = FN(to_bf16)(e);
                __builtin_memcpy((uint16_t *)(scores + g * stride) + b * 16, &half, 32);
            } else {
                FN(store_f32)(scores + g * stride + b * 16, e);
            }
        }
        inverse[g] = 1.0f / FN(sum)(mass);
    }
    for (int at = 0; at < width; at += 64) {
        const int parts = width - at < 64 ? (width - at) / 16 : 4;
        v16f acc[MAX_GROUP][4];
#pragma GCC unroll 4
        for (int g = 0; g < group; g++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[g][i] = ALL(0.0f);
        if (is_bf16) {
            for (int p = 0; p < (length + 1) / 2; p++) { /* the weight of a position past the end is zero */
                v16u value[4];
#pragma GCC unroll 4
                for (int i = 0; i < parts; i++)
                    value[i] = FN(load_pairs)((const uint16_t *)values + ((size_t)p * width + at + i * 16) * 2);
#pragma GCC unroll 4
                for (int g = 0; g < group; g++) {
                    uint32_t pair = ((const uint32_t *)(scores + g * stride))[p];
#pragma GCC unroll 4
                    for (int i = 0; i < parts; i++) acc[g][i] = FN(add_pairs)(acc[g][i], value[i], pair);
                }
            }
        } else {
            for (int p = 0; p < length; p++) {
                v16f value[4];
#pragma GCC unroll 4
                for (int i = 0; i < parts; i++) value[i] = FN(load_f32)((const float *)values + (size_t)p * width + at + i * 16);
#pragma GCC unroll 4
                for (int g = 0; g < group; g++)
#pragma GCC unroll 4
                    for (int i = 0; i < parts; i++) acc[g][i] += value[i] * scores[g * stride + p];
            }
        }
        for (int g = 0; g < group; g++)
            for (int i = 0; i < parts; i++) FN(store_f32)(out + g * width + at + i * 16, acc[g][i] * inverse[g]);
    }
}

#define GROUP(SIZE) \
    case SIZE: \
        if (width == 64) FN(attend_group)(is_bf16, SIZE, 64, queries, keys, values, length, scores, stride, out); \
        else FN(attend_group)(is_bf16, SIZE, width, queries, keys, values, length, scores, stride, out); \
        break;

INLINE void FN(attend_heads)(const int is_bf16, int group, int width, const float *queries, const void *keys, const void *values,
                             int length, float *scores, size_t stride, float *out) {
    switch (group) { GROUP(1) GROUP(2) GROUP(3) GROUP(4) }
}

/* Attention of all rows; work is dealt out by (row, kv head). */
static void FN(attend)(const model_t *m, const float *qkv, const char *keys, const char *values, const rows_t *rows, void *out,
                       float *scratch) {
    const int width = m->head_dim, heads = m->num_heads, kv_heads = m->num_kv_heads, group = heads / kv_heads;
    const int bytes = m->is_bf16 ? 2 : 4, total = heads + 2 * kv_heads;
    const size_t stride = (size_t)m->capacity + 16;
    float *scores = scratch + (size_t)omp_get_thread_num() * MAX_GROUP * stride;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < rows->num * kv_heads; task++) {
        const int r = task / kv_heads, h = task % kv_heads, length = (int)rows->positions[r] + 1;
        const size_t base = ((size_t)rows->slots[r] * kv_heads + h) * m->capacity * width * bytes;
        for (int first = 0; first < group; first += MAX_GROUP) {
            const int size = group - first < MAX_GROUP ? group - first : MAX_GROUP, head = h * group + first;
            const float *queries = qkv + ((size_t)r * total + head) * width;
            float result[MAX_GROUP * MAX_HEAD_DIM];
            if (m->is_bf16) FN(attend_heads)(1, size, width, queries, keys + base, values + base, length, scores, stride, result);
            else FN(attend_heads)(0, size, width, queries, keys + base, values + base, length, scores, stride, result);
            char *row = (char *)out + (size_t)r * heads * width * bytes;
            for (int i = 0; i < size * width; i += 16) FN(put)(m, row, head * width + i, FN(load_f32)(result + i));
        }
    }
}

static void FN(forward)(const model_t *m, const rows_t *rows, float *hidden) {
    const int n = rows->num, width = m->hidden, heads_out = m->num_heads * m->head_dim, qkv_out = (m->num_heads + 2 * m->num_kv_heads) * m->head_dim;
    const size_t side = (size_t)m->num_slots * m->num_kv_heads * m->capacity * m->head_dim * (m->is_bf16 ? 2 : 4);
    turn_t done[2][MAX_THREADS];
    __builtin_memset(done, 0, sizeof done);
#pragma omp parallel num_threads(m->num_threads)
    {
        turns_t turns = {done, 0};
#pragma omp for schedule(static)
        for (int r = 0; r < n; r++)
            for (int i = 0; i < width; i += 16) {
                size_t at = (size_t)rows->tokens[r] * width + i;
                v16f v = m->is_bf16 ? FN(load_bf16)((const uint16_t *)m->embedding + at) : FN(load_f32)((const float *)m->embedding + at);
                FN(store_f32)(m->residual + (size_t)r * width + i, v);
            }
        for (int l = 0; l < m->num_layers; l++) {
            const layer_t *layer = &m->layers[l];
            char *keys = (char *)m->keys + side * l, *values = (char *)m->values + side * l;
            FN(norm)(m, m->residual, layer->attention_norm, m->input, n);
            FN(matmul)(m, &turns, STORE, m->input, layer->qkv, layer->qkv_bias, m->qkv, n, width, qkv_out);
            FN(store)(m, layer, m->qkv, keys, values, rows);
            FN(attend)(m, m->qkv, keys, values, rows, m->attended, m->scores);
            FN(matmul)(m, &turns, ADD, m->attended, layer->out, layer->out_bias, m->residual, n, heads_out, width);
            FN(norm)(m, m->residual, layer->mlp_norm, m->input, n);
            FN(matmul)(m, &turns, GATE, m->input, layer->gate_up, 0, m->activation, n, width, m->intermediate);
            FN(matmul)(m, &turns, ADD, m->activation, layer->down, 0, m->residual, n, m->intermediate, width);
        }
#pragma omp for schedule(static)
        for (int r = 0; r < n; r++) {
            const float *row = m->residual + (size_t)r * width;
            float scale = m->final_norm ? FN(inverse_rms)(m, row) : 1.0f;
            for (int i = 0; i < width; i += 16)
                FN(store_f32)(hidden + (size_t)r * width + i,
                              m->final_norm ? FN(load_f32)(row + i) * scale * FN(load_f32)(m->final_norm + i) : FN(load_f32)(row + i));
        }
    }
}

static void FN(logits)(const model_t *m, const float *hidden, int n, float *out) {
    const int width = m->hidden, bytes = m->is_bf16 ? 2 : 4;
    turn_t done[2][MAX_THREADS];
    __builtin_memset(done, 0, sizeof done);
#pragma omp parallel num_threads(m->num_threads)
    {
        turns_t turns = {done, 0};
#pragma omp for schedule(static)
        for (int r = 0; r < n; r++)
            for (int i = 0; i < width; i += 16)
                FN(put)(m, (char *)m->input + (size_t)r * width * bytes, i, FN(load_f32)(hidden + (size_t)r * width + i));
        FN(matmul)(m, &turns, STORE, m->input, m->head, 0, out, n, width, m->vocab);
    }
}

#include "attention.h"
#include "draw.h"
#include "training.h"

#undef SELECT
#undef ALL
#undef GROUP
#undef TILE_ROWS
#undef FETCHING_ROWS
#undef FETCHING_BYTES
#undef INLINE
#undef FN
#undef CAT
#undef CAT_
