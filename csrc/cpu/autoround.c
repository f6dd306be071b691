/*
 * AutoRound's step on CPUs: V, alpha and beta of one weight moved against the signs of their gradients, and the quantized
 * weight that follows, group by group while it lies in the first-level cache. The naive reference is signed_step() of
 * plugins/algorithms/autoround.py.
 *
 * Sums over a group are taken in LANES parts whatever the instruction set, and nothing is contracted: the bits are the same
 * in every build and with every number of threads.
 */
#include "half.h"
#include "qcore_cpu.h"

#include <math.h>
#include <stdatomic.h>

#define LANES 16
#define ROWS_AT_ONCE 16 /* that a thread takes */

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_LEVEL __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_LEVEL
#endif

typedef struct {
    int sym;
    float maxq, middle, lr, minmax_lr;
    int64_t rows, groups, group_size, columns;
    const float *W, *G, *low, *high;
    float *V, *Q, *alpha, *beta;
    atomic_llong next;
} Step;

static inline float between(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

static inline float nearest(float x) { /* ties to even, for |x| < 2^22 */
    return (x + 12582912.0f) - 12582912.0f;
}

static inline float sign(float x) { return (float)(x > 0) - (float)(x < 0); }

/* The scale and zero of a range: ranged_grid() of the reference. */
static void find_grid(const Step *step, int64_t group, float *s, float *z) {
    const float low = step->low[group], high = step->high[group], alpha = step->alpha[group], beta = step->beta[group];
    const float exact = (step->sym ? beta * (high - low) : beta * high - alpha * low) / step->maxq;
    *s = copysignf(round_half(between(fabsf(exact), 0x1p-24f, 65504.0f)), exact);
    *z = step->sym ? step->middle : between(nearest(between(-alpha * low / *s, -4e6f, 4e6f)), 1.0f, step->maxq);
}

/* Move V of a group; sums gets those that the gradients of s and z are made of. */
EVERY_LEVEL
static void move(const float *w, float *v, const float *g, int64_t n, float s, float bottom, float top, float lr, float *sums) {
    float of_s[LANES] = {0}, of_z[LANES] = {0};
    for (int64_t first = 0; first < n; first += LANES) {
        const int64_t count = n - first < LANES ? n - first : LANES;
        float r[LANES] = {0}, at[LANES] = {0}, grad[LANES] = {0};
        for (int64_t j = 0; j < count; j++) r[j] = w[first + j], at[j] = v[first + j], grad[j] = g[first + j];
        for (int j = 0; j < LANES; j++) {
            const float ratio = r[j] / s;
            const float free = nearest(between(ratio + at[j], -4e6f, 4e6f)), level = between(free, bottom, top);
            const float passed = level == free ? grad[j] : 0.0f;
            of_s[j] += level * grad[j] - passed * ratio;
            of_z[j] += passed - grad[j];
            at[j] = between(at[j] - lr * sign(passed), -0.5f, 0.5f);
        }
        for (int64_t j = 0; j < count; j++) v[first + j] = at[j];
    }
    for (int j = 0; j < LANES; j++) sums[0] += of_s[j], sums[1] += of_z[j];
}

EVERY_LEVEL
static void write_weight(const float *w, const float *v, float *q, int64_t n, float s, float bottom, float top) {
    for (int64_t c = 0; c < n; c++)
        q[c] = s * between(nearest(between(w[c] / s + v[c], -4e6f, 4e6f)), bottom, top);
}

/* Move the ends of a group's range. */
static void move_range(const Step *step, int64_t group, float s, const float *sums) {
    const float low = step->low[group], high = step->high[group];
    if (step->sym) {
        step->beta[group] -= sign(sums[0] * (high - low)) * step->minmax_lr;
    } else {
        const float of_z = s * sums[1];
        const float through_s = sums[0] + of_z * step->alpha[group] * low / (s * s);
        const float alpha = step->alpha[group] - sign((-through_s / step->maxq - of_z / s) * low) * step->minmax_lr;
        step->alpha[group] = between(alpha, 0.0f, 2.0f);
        step->beta[group] -= sign(through_s / step->maxq * high) * step->minmax_lr;
    }
    step->beta[group] = between(step->beta[group], 0.0f, 2.0f);
}

static void do_group(const Step *step, int64_t row, int64_t group) {
    const int64_t first = group * step->group_size, left = step->columns - first, index = row * step->groups + group;
    const int64_t n = left < step->group_size ? left : step->group_size;
    const float *w = step->W + index * step->group_size;
    float *v = step->V + index * step->group_size, s, z, sums[2] = {0, 0};
    find_grid(step, index, &s, &z);
    move(w, v, step->G + row * step->columns + first, n, s, -z, step->maxq - z, s < 0 ? -step->lr : step->lr, sums);
    if (step->minmax_lr >= 0) {
        move_range(step, index, s, sums);
        find_grid(step, index, &s, &z);
    }
    write_weight(w, v, step->Q + row * step->columns + first, n, s, -z, step->maxq - z);
}

static void work(void *argument) {
    Step *step = argument;
    int64_t first;
    while ((first = atomic_fetch_add(&step->next, ROWS_AT_ONCE)) < step->rows)
        for (int64_t row = first; row < first + ROWS_AT_ONCE && row < step->rows; row++)
            for (int64_t group = 0; group < step->groups; group++) do_group(step, row, group);
}

int qc_autoround_step(int bits, int sym, int64_t rows, int64_t groups, int64_t group_size, int64_t columns, const float *W,
                      float *V, const float *G, float *Q, const float *low, const float *high, float *alpha, float *beta,
                      const float *rates, int threads, void *parallel) {
    if (bits < 2 || bits > 8 || rows < 1 || groups < 1 || group_size < 1 || columns < 1) return QC_BAD_ARGUMENT;
    if ((groups - 1) * group_size >= columns || groups * group_size < columns) return QC_BAD_ARGUMENT;
    if (!W || !V || !G || !Q || !low || !high || !alpha || !beta || !rates) return QC_BAD_ARGUMENT;
    Step step = {.sym = sym, .maxq = (float)((1 << bits) - 1), .middle = (float)(1 << (bits - 1)), .lr = rates[0],
                 .minmax_lr = rates[1], .rows = rows, .groups = groups, .group_size = group_size, .columns = columns, .W = W,
                 .V = V, .G = G, .Q = Q, .low = low, .high = high, .alpha = alpha, .beta = beta};
    if (parallel && threads > 1)
        ((void (*)(void (*)(void *), void *, unsigned, unsigned))parallel)(work, &step, (unsigned)threads, 0);
    else
        work(&step);
    return QC_OK;
}
