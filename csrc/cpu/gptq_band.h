/*
 * One band of LANES rows, for one instruction set. Included once per set by gptq.c, which defines
 *
 *   LEVEL         the suffix of every name here
 *   LEVEL_TARGET  the attribute that lets the compiler use the set
 *   LEVEL_WIDTH   floats in a vector
 *
 * A value per row of the band is `band`, an array of PARTS vectors.
 */
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)
#define PARTS (LANES / LEVEL_WIDTH)
#define INLINE LEVEL_TARGET static inline __attribute__((always_inline))
#define EACH(p) for (int p = 0; p < PARTS; p++)

#define vec NAME(vec)
#define ints NAME(ints)
#define band NAME(band)

typedef float vec __attribute__((vector_size(4 * LEVEL_WIDTH), aligned(4 * LEVEL_WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * LEVEL_WIDTH)));
typedef struct {
    vec part[PARTS];
} band;

/* ---- the few operations that C has no word for ---- */

#if LEVEL_WIDTH == 16
INLINE vec NAME(lower)(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec NAME(upper)(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec NAME(rounded)(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec NAME(pick)(ints yes, vec a, vec b) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)yes, (__m512i)yes), b, a);
}
INLINE vec NAME(all)(float x) { return _mm512_set1_ps(x); }
#elif LEVEL_WIDTH == 8
INLINE vec NAME(lower)(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec NAME(upper)(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec NAME(rounded)(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec NAME(pick)(ints yes, vec a, vec b) { return _mm256_blendv_ps(b, a, (vec)yes); }
INLINE vec NAME(all)(float x) { return _mm256_set1_ps(x); }
#else
INLINE vec NAME(pick)(ints yes, vec a, vec b) { return (vec)((yes & (ints)a) | (~yes & (ints)b)); }
INLINE vec NAME(lower)(vec a, vec b) { return NAME(pick)(a < b, a, b); }
INLINE vec NAME(upper)(vec a, vec b) { return NAME(pick)(a > b, a, b); }
INLINE vec NAME(all)(float x) { return (vec){x, x, x, x}; }
/* To nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction. */
INLINE vec NAME(rounded)(vec x) {
    const vec big = NAME(all)(12582912.0f);
    return (x + big) - big;
}
#endif

#define lower NAME(lower)
#define upper NAME(upper)
#define rounded NAME(rounded)
#define pick NAME(pick)
#define all NAME(all)

INLINE vec NAME(between)(vec x, vec low, vec high) { return lower(upper(x, low), high); }
#define between NAME(between)

/* Every lane through round_half: a handful a group. */
LEVEL_TARGET static void NAME(halves)(band *x) {
    float *lane = (float *)x;
    for (int r = 0; r < LANES; r++) lane[r] = round_half(lane[r]);
}

/* ---- grids: see qcore/grid.py for what each step is there for ---- */

typedef struct {
    const vec *W;         /* [columns][PARTS] */
    vec *v;               /* [columns][PARTS]: W in units of the full range's step */
    const float *weights; /* [columns] */
    int64_t columns;
    float maxq, middle; /* largest code, zero point of a symmetric grid */
    int sym;
    band gain, ratio, scale, zero; /* the best so far */
} NAME(Search);
#define Search NAME(Search)

/* The smallest and the largest weight of each row, 0 included. */
LEVEL_TARGET static void NAME(extremes)(const vec *W, int64_t columns, band *low, band *high) {
    band least, most;
    EACH(p) least.part[p] = most.part[p] = all(0);
    for (int64_t c = 0; c < columns; c++) EACH(p) {
        least.part[p] = lower(W[c * PARTS + p], least.part[p]);
        most.part[p] = upper(W[c * PARTS + p], most.part[p]);
    }
    *low = least;
    *high = most;
}

/* The smallest grid that covers each row's weights and 0. */
LEVEL_TARGET static void NAME(cover)(const Search *s, const band *low, const band *high, band *scale, band *zero) {
    const vec maxq = all(s->maxq);
    EACH(p) {
        const vec range = s->sym ? upper(-low->part[p], high->part[p]) * all(2.0f / s->maxq)
                                 : (high->part[p] - low->part[p]) / maxq;
        scale->part[p] = pick(range == all(0), all(1), range);
    }
    NAME(halves)(scale);
    EACH(p) zero->part[p] = s->sym ? all(s->middle) : rounded(between(-low->part[p] / scale->part[p], all(1), maxq));
}

/* Take the codes of step r and zero z where, at their best scale, they leave less error. */
LEVEL_TARGET static void NAME(offer)(Search *s, const band *r, const band *z) {
    band inverse, low, high, product, square;
    EACH(p) {
        inverse.part[p] = all(1) / r->part[p];
        low.part[p] = s->sym ? all(-s->middle) : -z->part[p];
        high.part[p] = s->sym ? all(s->middle - 1) : all(s->maxq) - z->part[p];
        product.part[p] = square.part[p] = all(0);
    }
    for (int64_t start = 0; start < s->columns; start += CHUNK) {
        const int64_t stop = start + CHUNK < s->columns ? start + CHUNK : s->columns;
        band products, squares;
        EACH(p) products.part[p] = squares.part[p] = all(0);
        for (int64_t c = start; c < stop; c++) {
            const vec weight = all(s->weights[c]);
            EACH(p) {
                const vec x = s->v[c * PARTS + p];
                const vec level = rounded(between(x * inverse.part[p], low.part[p], high.part[p]));
                const vec weighed = level * weight;
                products.part[p] += x * weighed;
                squares.part[p] += level * weighed;
            }
        }
        EACH(p) {
            product.part[p] += products.part[p];
            square.part[p] += squares.part[p];
        }
    }
    EACH(p) {
        const vec below = upper(square.part[p], all(1e-12f));
        const vec found = product.part[p] * product.part[p] / below;
        const ints better = found > s->gain.part[p];
        s->gain.part[p] = pick(better, found, s->gain.part[p]);
        s->scale.part[p] = pick(better, product.part[p] / below, s->scale.part[p]);
        s->ratio.part[p] = pick(better, r->part[p], s->ratio.part[p]);
        s->zero.part[p] = pick(better, z->part[p], s->zero.part[p]);
    }
}

LEVEL_TARGET static void NAME(offer_near)(Search *s, const band *ratio, float distance, const band *zero) {
    band r;
    EACH(p) r.part[p] = ratio->part[p] + all(distance);
    NAME(offer)(s, &r, zero);
}

/* The weighted least-squares line v ~ slope * code + b through the codes found, where it rises; offered as a grid. */
LEVEL_TARGET static void NAME(offer_line)(Search *s) {
    const vec maxq = all(s->maxq);
    band inverse, code_sum, v_sum, mean_code, mean_v, product, square, slope, zero;
    float total = 0;
    for (int64_t c = 0; c < s->columns; c++) total += s->weights[c];
    EACH(p) {
        inverse.part[p] = all(1) / s->scale.part[p];
        code_sum.part[p] = v_sum.part[p] = product.part[p] = square.part[p] = all(0);
    }
    for (int64_t c = 0; c < s->columns; c++) EACH(p) {
        const vec x = s->v[c * PARTS + p], weight = all(s->weights[c]);
        const vec code = rounded(between(x * inverse.part[p] + s->zero.part[p], all(0), maxq));
        code_sum.part[p] += code * weight;
        v_sum.part[p] += x * weight;
    }
    EACH(p) {
        mean_code.part[p] = code_sum.part[p] / all(total);
        mean_v.part[p] = v_sum.part[p] / all(total);
    }
    for (int64_t c = 0; c < s->columns; c++) EACH(p) {
        const vec x = s->v[c * PARTS + p], weight = all(s->weights[c]);
        const vec code = rounded(between(x * inverse.part[p] + s->zero.part[p], all(0), maxq));
        const vec weighed = (code - mean_code.part[p]) * weight;
        product.part[p] += x * weighed;
        square.part[p] += (code - mean_code.part[p]) * weighed;
    }
    EACH(p) {
        const vec found = product.part[p] / upper(square.part[p], all(1e-12f));
        const ints rises = found > all(0);
        slope.part[p] = pick(rises, found, s->scale.part[p]);
        const vec through = rounded(between(mean_code.part[p] - mean_v.part[p] / slope.part[p], all(1), maxq));
        zero.part[p] = pick(rises, through, s->zero.part[p]);
    }
    NAME(offer)(s, &slope, &zero);
}

/* sum(weights * (w - grid(w))^2) over the group. */
LEVEL_TARGET static void NAME(grid_loss)(const Search *s, const band *scale, const band *zero, band *loss) {
    band inverse;
    EACH(p) {
        inverse.part[p] = all(1) / scale->part[p];
        loss->part[p] = all(0);
    }
    for (int64_t start = 0; start < s->columns; start += CHUNK) {
        const int64_t stop = start + CHUNK < s->columns ? start + CHUNK : s->columns;
        band sum;
        EACH(p) sum.part[p] = all(0);
        for (int64_t c = start; c < stop; c++) {
            const vec weight = all(s->weights[c]);
            EACH(p) {
                const vec w = s->W[c * PARTS + p], z = zero->part[p];
                const vec level = rounded(between(w * inverse.part[p], -z, all(s->maxq) - z));
                const vec error = level * scale->part[p] - w;
                sum.part[p] += error * error * weight;
            }
        }
        EACH(p) loss->part[p] += sum.part[p];
    }
}

/* The grid of least weighted error, never worse than the covering one. */
LEVEL_TARGET static void NAME(search)(Search *s, const band *low, const band *high, band *scale, band *zero) {
    const int few_levels = s->maxq <= 7;
    const double first = 0.5, last = 1.1;
    const int points = 6, refine = 2;
    band full, middle, covering, covering_zero, loss, covering_loss;
    EACH(p) {
        const vec least = low->part[p], most = high->part[p];
        if (s->sym) {
            const vec extreme = pick(most > -least, most, least);
            full.part[p] = pick(extreme == all(0), all(1), -extreme / all(s->middle));
            middle.part[p] = all(s->middle);
        } else {
            full.part[p] = pick(most > least, (most - least) / all(s->maxq), all(1));
            middle.part[p] = rounded(between(-least / full.part[p], all(1), all(s->maxq)));
        }
        s->gain.part[p] = all(0);
        s->ratio.part[p] = s->scale.part[p] = all(1);
        s->zero.part[p] = middle.part[p];
    }
    for (int64_t c = 0; c < s->columns; c++) EACH(p) s->v[c * PARTS + p] = s->W[c * PARTS + p] / full.part[p];

    double step = (last - first) / (points - 1);
    for (int i = 0; i < points; i++)
        for (int sign = 1; sign >= (s->sym && few_levels ? -1 : 1); sign -= 2)
            for (int shift = 0; shift < (!s->sym && few_levels ? 3 : 1); shift++) {
                const float offset = shift == 0 ? 0.0f : shift == 1 ? -1.0f : 1.0f;
                band r, z;
                EACH(p) {
                    r.part[p] = all((float)(sign * (first + i * step)));
                    z.part[p] = between(middle.part[p] + all(offset), all(1), all(s->maxq));
                }
                NAME(offer)(s, &r, &z);
            }
    for (int i = 0; i < refine; i++) {
        const band around = s->ratio, at = s->zero;
        step /= 2;
        NAME(offer_near)(s, &around, (float)-step, &at);
        NAME(offer_near)(s, &around, (float)step, &at);
    }
    if (s->sym) {
        const band found = s->scale, at = s->zero;
        NAME(offer)(s, &found, &at);
    } else
        NAME(offer_line)(s);

    EACH(p) scale->part[p] = full.part[p] * s->scale.part[p];
    NAME(halves)(scale);
    NAME(cover)(s, low, high, &covering, &covering_zero);
    NAME(grid_loss)(s, scale, &s->zero, &loss);
    NAME(grid_loss)(s, &covering, &covering_zero, &covering_loss);
    EACH(p) {
        const ints worse = loss.part[p] > covering_loss.part[p];
        scale->part[p] = pick(worse, covering.part[p], scale->part[p]);
        zero->part[p] = pick(worse, covering_zero.part[p], s->zero.part[p]);
    }
}

/* ---- rows in and out of the band; a band that is not full is filled up with zeros ---- */

LEVEL_TARGET static void NAME(take)(const float *from, int64_t count, vec *to) {
    memcpy(to, from, (size_t)count * sizeof(float));
    if (count < LANES) memset((float *)to + count, 0, (size_t)(LANES - count) * sizeof(float));
}

LEVEL_TARGET static void NAME(give)(const vec *from, int64_t count, float *to) {
    memcpy(to, from, (size_t)count * sizeof(float));
}

LEVEL_TARGET static void NAME(give_codes)(const band *codes, int64_t count, uint8_t *to) {
    const float *lane = (const float *)codes;
    uint8_t bytes[LANES];
    for (int r = 0; r < LANES; r++) bytes[r] = (uint8_t)(int32_t)lane[r];
    memcpy(to, bytes, (size_t)count);
}

/* Find the grid of the group at columns [first, last) of the band; false when a scale is more than float16 holds. */
LEVEL_TARGET static int NAME(find_grid)(const Job *job, vec *W, vec *v, int64_t first, int64_t last, band *scale, band *zero) {
    Search s = {.W = W + first * PARTS, .v = v, .weights = job->weights + first, .columns = last - first,
                .maxq = (float)((1 << job->bits) - 1), .middle = (float)(1 << (job->bits - 1)), .sym = job->sym};
    band low, high;
    NAME(extremes)(s.W, s.columns, &low, &high);
    if (job->search == QC_SEARCH_MINMAX)
        NAME(cover)(&s, &low, &high, scale, zero);
    else
        NAME(search)(&s, &low, &high, scale, zero);
    const float *lane = (const float *)scale;
    int finite = 1;
    for (int r = 0; r < LANES; r++) finite &= isfinite(lane[r]) != 0;
    return finite;
}

/* W[c] -= D[c][j] * E[j] for columns c in [first, last) and the columns j in [from, to) that are done. Blocked by 4 columns,
   so that an error that is loaded serves four. */
LEVEL_TARGET static void NAME(catch_up)(vec *W, const float *D, int64_t ldd, int64_t first, int64_t last, int64_t from, int64_t to) {
    int64_t c = first;
    for (; c + 4 <= last; c += 4) {
        band sum[4];
        for (int k = 0; k < 4; k++) EACH(p) sum[k].part[p] = W[(c + k) * PARTS + p];
        for (int64_t j = from; j < to; j++)
            for (int k = 0; k < 4; k++) {
                const vec d = all(D[(c + k) * ldd + j]);
                EACH(p) sum[k].part[p] -= d * W[j * PARTS + p];
            }
        for (int k = 0; k < 4; k++) EACH(p) W[(c + k) * PARTS + p] = sum[k].part[p];
    }
    for (; c < last; c++) {
        band sum;
        EACH(p) sum.part[p] = W[c * PARTS + p];
        for (int64_t j = from; j < to; j++) {
            const vec d = all(D[c * ldd + j]);
            EACH(p) sum.part[p] -= d * W[j * PARTS + p];
        }
        EACH(p) W[c * PARTS + p] = sum.part[p];
    }
}

/* Quantize column c, which has caught up with all before it, and leave its error in its place. With scale * zero added
   the code stands for scale * code. */
LEVEL_TARGET static void NAME(quantize_column)(const Job *job, vec *W, int64_t c, const band *scale, const band *zero, int64_t row, int64_t count) {
    const vec maxq = all((float)((1 << job->bits) - 1)), diagonal = all(job->diagonal[c]);
    band codes, Err;
    EACH(p) {
        const vec s = scale->part[p];
        const vec w = W[c * PARTS + p] + s * zero->part[p];
        codes.part[p] = rounded(between(w * (all(1) / s), all(0), maxq));
        const vec error = w - s * codes.part[p];
        W[c * PARTS + p] = error;
        Err.part[p] = error / diagonal;
    }
    NAME(give_codes)(&codes, count, job->codes + c * job->ldc + row);
    NAME(give)(Err.part, count, job->Err + c * job->lde + row);
}

/* Columns are quantized STRIP at a time: the strip catches up with all columns before it at once, then within itself. */
#define STRIP 8

LEVEL_TARGET static void NAME(quantize_columns)(const Job *job, vec *W, int64_t first, int64_t last, int64_t caught_up, int64_t row, int64_t count) {
    for (int64_t start = first; start < last; start += STRIP) {
        const int64_t stop = start + STRIP < last ? start + STRIP : last;
        NAME(catch_up)(W, job->D, job->columns, start, stop, caught_up, start);
        for (int64_t c = start; c < stop; c++) {
            band scale, zero;
            NAME(catch_up)(W, job->D, job->columns, c, c + 1, start, c);
            NAME(take)(job->scales + job->group_of[c] * job->ldg + row, count, scale.part);
            NAME(take)(job->zeros + job->group_of[c] * job->ldg + row, count, zero.part);
            NAME(quantize_column)(job, W, c, &scale, &zero, row, count);
        }
    }
}

LEVEL_TARGET static void NAME(solve_band)(const void *argument, int64_t number, float *scratch) {
    const Job *job = argument;
    const int64_t row = number * LANES, count = job->rows - row < LANES ? job->rows - row : LANES;
    vec *W = (vec *)scratch, *v = W + job->wide * PARTS;
    for (int64_t c = 0; c < job->wide; c++) NAME(take)(job->W + c * job->ldw + row, count, W + c * PARTS);
    if (job->search == QC_SEARCH_NONE) {
        NAME(quantize_columns)(job, W, 0, job->columns, 0, row, count);
        return;
    }
    const int64_t end = job->columns ? job->columns : job->extent;
    for (int64_t first = 0; first < end; first += job->group_size) {
        const int64_t last = first + job->group_size < job->extent ? first + job->group_size : job->extent;
        const int64_t stop = last < end ? last : end, group = job->group_of[first];
        band scale, zero;
        if (job->columns) NAME(catch_up)(W, job->D, job->columns, first, stop, 0, first);
        const int finite = NAME(find_grid)(job, W, v, first, last, &scale, &zero);
        NAME(give)(scale.part, count, job->scales + group * job->ldg + row);
        NAME(give)(zero.part, count, job->zeros + group * job->ldg + row);
        if (!finite) {
            atomic_store(&((Job *)job)->status, QC_SCALE_OVERFLOW);
            return;
        }
        if (job->columns) NAME(quantize_columns)(job, W, first, stop, first, row, count);
    }
}

#undef PASTE_
#undef PASTE
#undef NAME
#undef PARTS
#undef INLINE
#undef EACH
#undef STRIP
#undef Search
#undef vec
#undef ints
#undef band
#undef lower
#undef upper
#undef rounded
#undef pick
#undef all
#undef between
#undef LEVEL
#undef LEVEL_TARGET
#undef LEVEL_WIDTH
