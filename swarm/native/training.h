/* The parts of a training step that are no matrix products: kernels.c includes this file once per instruction set.
 *
 * Each reads its inputs once, computes in float32 and rounds once. Rows are dealt out to threads in fixed runs.
 */

INLINE v16f FN(load)(const int is_bf16, const void *p, size_t at) {
    return is_bf16 ? FN(load_bf16)((const uint16_t *)p + at) : FN(load_f32)((const float *)p + at);
}

INLINE float FN(load_one)(const int is_bf16, const void *p, size_t at) {
    if (!is_bf16) return ((const float *)p)[at];
    union { uint32_t u; float f; } value = {(uint32_t)((const uint16_t *)p)[at] << 16};
    return value.f;
}

INLINE void FN(store_one)(const int is_bf16, void *p, size_t at, float value) {
    if (is_bf16) ((uint16_t *)p)[at] = (uint16_t)FN(halves)(ALL(value))[0];
    else ((float *)p)[at] = value;
}

/* Log of the sum of exponentials of each row, and its target: of scale * logits. logits: [n, vocab]; vocab a multiple of 16. */
INLINE void FN(logit_mass_as)(const int is_bf16, int threads, const void *logits, int n, int vocab, float scale, const int64_t *targets,
                              float *log_mass, float *target_logits) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int r = 0; r < n; r++) {
        const size_t row = (size_t)r * vocab;
        float most = -INFINITY;
        v16f mass = {0};
        for (int low = 0; low < vocab; low += 1024) { /* the second pass over a block finds it in the first-level cache */
            const int high = low + 1024 < vocab ? low + 1024 : vocab;
            v16f top = ALL(-INFINITY);
            for (int i = low; i < high; i += 16) {
                v16f v = FN(load)(is_bf16, logits, row + i);
                top = SELECT(v > top, v, top);
            }
            const float highest = FN(largest)(top) * scale * LOG2_E;
            if (highest > most) {
                mass *= most == -INFINITY ? ALL(0.0f) : FN(exp2)(ALL(most - highest));
                most = highest;
            }
            for (int i = low; i < high; i += 16) mass += FN(exp2)(FN(load)(is_bf16, logits, row + i) * (scale * LOG2_E) - most);
        }
        log_mass[r] = (most + log2f(FN(sum)(mass))) / LOG2_E;
        target_logits[r] = FN(load_one)(is_bf16, logits, row + targets[r]) * scale;
    }
}

/* Replace logits by scale * grad * (onehot(target) - softmax(scale * logits)). */
INLINE void FN(logit_gradient_as)(const int is_bf16, int threads, void *logits, int n, int vocab, float scale, const int64_t *targets,
                                  const float *log_mass, const float *grad) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int r = 0; r < n; r++) {
        const size_t row = (size_t)r * vocab;
        const float factor = grad[r] * scale, shift = log_mass[r] * LOG2_E;
        const float target = factor - factor * FN(exp2)(ALL(FN(load_one)(is_bf16, logits, row + targets[r]) * (scale * LOG2_E) - shift))[0];
        for (int i = 0; i < vocab; i += 16)
            FN(put_operand)(is_bf16, logits, row + i, FN(exp2)(FN(load)(is_bf16, logits, row + i) * (scale * LOG2_E) - shift) * -factor);
        FN(store_one)(is_bf16, logits, row + targets[r], target);
    }
}

/* out = round(x / rms(x)) * weight; inverse: 1 / rms(x). x, out: [n, width]; weight: [width]. */
INLINE void FN(norm_forward_as)(const int is_bf16, int threads, const void *x, const void *weight, int n, int width, float epsilon,
                                void *out, float *inverse) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int r = 0; r < n; r++) {
        const size_t row = (size_t)r * width;
        v16f squares = {0};
        for (int i = 0; i < width; i += 16) { v16f v = FN(load)(is_bf16, x, row + i); squares += v * v; }
        const float scale = inverse[r] = 1.0f / sqrtf(FN(sum)(squares) / width + epsilon);
        for (int i = 0; i < width; i += 16) {
            v16f v = FN(load)(is_bf16, x, row + i) * scale;
            if (is_bf16) v = (v16f)(FN(halves)(v) << 16); /* as transformers rounds it */
            FN(put_operand)(is_bf16, out, row + i, v * FN(load)(is_bf16, weight, i));
        }
    }
}

/* grad_weight, where not NULL: float [threads, width], the sum over the rows of each thread. */
INLINE void FN(norm_backward_as)(const int is_bf16, int threads, const void *x, const void *weight, const float *inverse, const void *grad,
                                 int n, int width, void *grad_x, float *grad_weight) {
#pragma omp parallel num_threads(threads)
    {
        float *sums = grad_weight ? grad_weight + (size_t)omp_get_thread_num() * width : 0;
#pragma omp for schedule(static)
        for (int r = 0; r < n; r++) {
            const size_t row = (size_t)r * width;
            const float scale = inverse[r];
            v16f product = {0};
            for (int i = 0; i < width; i += 16) {
                v16f g = FN(load)(is_bf16, grad, row + i), normed = FN(load)(is_bf16, x, row + i) * scale;
                product += g * FN(load)(is_bf16, weight, i) * normed;
                if (sums) FN(store_f32)(sums + i, FN(load_f32)(sums + i) + g * normed);
            }
            const float along = FN(sum)(product) / width;
            for (int i = 0; i < width; i += 16) {
                v16f g = FN(load)(is_bf16, grad, row + i), normed = FN(load)(is_bf16, x, row + i) * scale;
                FN(put_operand)(is_bf16, grad_x, row + i, (g * FN(load)(is_bf16, weight, i) - normed * along) * scale);
            }
        }
    }
}

INLINE v16f FN(sigmoid)(v16f x) {
    v16f negated = x * -LOG2_E;
    return 1.0f / (1.0f + FN(exp2)(SELECT(negated > 126.0f, ALL(126.0f), negated)));
}

/* out = silu(gate) * up; all [size], a multiple of 16. With `grad`: the gradients of both, in grad_gate and grad_up. */
INLINE void FN(gated_silu_as)(const int is_bf16, int threads, const void *gate, const void *up, const void *grad, int64_t size, void *out,
                              void *grad_gate, void *grad_up) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < size; i += 16) {
        v16f g = FN(load)(is_bf16, gate, i), u = FN(load)(is_bf16, up, i), s = FN(sigmoid)(g);
        if (!grad) {
            FN(put_operand)(is_bf16, out, i, g * s * u);
            continue;
        }
        v16f d = FN(load)(is_bf16, grad, i);
        FN(put_operand)(is_bf16, grad_gate, i, d * u * s * (1.0f + g * (1.0f - s)));
        FN(put_operand)(is_bf16, grad_up, i, d * g * s);
    }
}

static void FN(training)(const training_t *t) {
#define AS(NAME, ...) do { if (t->is_bf16) FN(NAME)(1, t->threads, __VA_ARGS__); else FN(NAME)(0, t->threads, __VA_ARGS__); } while (0)
    switch (t->operation) {
    case LOGIT_MASS: AS(logit_mass_as, t->x, t->rows, t->width, t->scalar, t->targets, t->sums, t->more_sums); break;
    case LOGIT_GRADIENT: AS(logit_gradient_as, t->out, t->rows, t->width, t->scalar, t->targets, t->sums, t->more_sums); break;
    case NORM: AS(norm_forward_as, t->x, t->weight, t->rows, t->width, t->scalar, t->out, t->sums); break;
    case NORM_GRADIENT: AS(norm_backward_as, t->x, t->weight, t->sums, t->grad, t->rows, t->width, t->out, t->more_sums); break;
    case GATED_SILU: AS(gated_silu_as, t->x, t->weight, t->grad, (int64_t)t->rows * t->width, t->out, t->out, t->more_out); break;
    }
#undef AS
}
