/* Drawing tokens by Gumbel-max in two levels; sampling.py says why, noise.py what the noise is. Included by kernels.h. */

/* SplitMix64's finaliser. */
INLINE uint64_t FN(mix)(uint64_t v) {
    v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
    v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
    return v ^ (v >> 31);
}

/* Standard Gumbel noise of a lane; 40 bits of it, so that no value rounds to 0 or 1. */
INLINE float FN(gumbel)(uint64_t key, int lane) {
    const uint64_t bits = FN(mix)(key + (uint64_t)(lane + 1) * 0x9E3779B97F4A7C15u) >> 24;
    return (float)-log(-log(((double)bits + 0.5) * 0x1p-40));
}

/* Up to 16 logits at temperature 1, -inf behind the end. */
INLINE v16f FN(load_logits)(const float *logits, int num, float temperature) {
    v16f v;
    if (num >= 16) {
        v = FN(load_f32)(logits);
    } else {
        v = ALL(-INFINITY);
        for (int i = 0; i < num; i++) v[i] = logits[i];
    }
    return temperature == 1.0f ? v : v / temperature;
}

/* log of the sum of exponentials. */
static float FN(mass)(const float *logits, int num, float temperature) {
    v16f most = FN(load_logits)(logits, num, temperature);
    for (int at = 16; at < num; at += 16) {
        v16f v = FN(load_logits)(logits + at, num - at, temperature);
        most = SELECT(v > most, v, most);
    }
    const float top = FN(largest)(most);
    if (top == -INFINITY) return top;
    v16f mass = {0};
    for (int at = 0; at < num; at += 16) mass += FN(exp)(FN(load_logits)(logits + at, num - at, temperature) - top);
    return top + logf(FN(sum)(mass));
}

/* The place of the first of the largest of logits / temperature, plus the noise of lane first_lane + token if `key` is given.
   margin: by how much it is the largest. */
static int FN(pick)(const float *logits, const int64_t *tokens, int begin, int end, float temperature, const uint64_t *key,
                    int first_lane, float *margin) {
    int found = begin;
    float most = -INFINITY, second = -INFINITY;
    for (int i = begin; i < end; i++) {
        float value = temperature == 1.0f ? logits[i] : logits[i] / temperature;
        if (key) value += FN(gumbel)(*key, first_lane + (int)(tokens ? tokens[i] : i));
        if (value > most) { second = most; most = value; found = i; }
        else if (value > second) second = value;
    }
    *margin = most - second;
    return found;
}

/* One row. masses, starts: scratch [num_blocks]; starts[num_blocks]: the end. */
static void FN(draw_row)(const draw_t *d, int row, float *masses, int32_t *starts) {
    const float *logits = d->logits + (size_t)row * d->num_logits;
    const int num_blocks = (d->vocab + d->width - 1) / d->width, greedy = d->temperature[row] == 0;
    const float temperature = greedy ? 1.0f : d->temperature[row];
    const uint64_t key = FN(mix)((uint64_t)d->seeds[row] + ((uint64_t)d->positions[row] + 1) * 0x9E3779B97F4A7C15u);
    float top = -INFINITY, most = -INFINITY, second = -INFINITY, margin;
    int chosen = 0;
    for (int b = 0, at = 0; b < num_blocks; b++) {
        const int64_t limit = (int64_t)(b + 1) * d->width;
        starts[b] = at;
        if (d->tokens) while (at < d->num_logits && d->tokens[at] < limit) at++;
        else at = limit < d->num_logits ? (int)limit : d->num_logits;
        starts[b + 1] = at;
        masses[b] = at > starts[b] ? FN(mass)(logits + starts[b], at - starts[b], temperature) : -INFINITY;
        if (masses[b] > top) top = masses[b];
        if (greedy || masses[b] == -INFINITY) continue;
        const float value = masses[b] + FN(gumbel)(key, b);
        if (value > most) { second = most; most = value; chosen = b; }
        else if (value > second) second = value;
    }
    float sum = 0;
    for (int b = 0; b < num_blocks; b++) sum += expf(masses[b] - top);
    const int place = greedy ? FN(pick)(logits, d->tokens, 0, d->num_logits, 1.0f, 0, 0, &margin)
                             : FN(pick)(logits, d->tokens, starts[chosen], starts[chosen + 1], temperature, &key,
                                        num_blocks - chosen * d->width, &margin);
    d->margins[row] = greedy || margin < most - second ? margin : most - second;
    d->drawn[row] = d->tokens ? d->tokens[place] : place;
    d->logprobs[row] = logits[place] / temperature - (top + logf(sum));
}

static void FN(draw)(const draw_t *d) {
    const int num_blocks = (d->vocab + d->width - 1) / d->width;
    const int threads = (int64_t)d->num_rows * d->num_logits < 1 << 15 ? 1 : d->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const size_t at = (size_t)omp_get_thread_num() * (num_blocks + 1);
#pragma omp for schedule(dynamic, 1)
        for (int row = 0; row < d->num_rows; row++) FN(draw_row)(d, row, d->masses + at, d->starts + at);
    }
}
