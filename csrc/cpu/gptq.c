/*
 * GPTQ's inner loop on CPUs: grid search and column loop of a block of columns, for many rows at once.
 *
 * Rows of a weight are independent once the factor of the inverse Hessian is known. They are cut into bands of LANES; a band's
 * columns lie in a scratch buffer that fits the caches, and each thread takes the next band until none is left:
 *
 *      rows ->    |<- LANES ->|<- LANES ->| ...
 *      columns    |  band 0   |  band 1   |          W[column][row], one vector = one column of several rows
 *         |
 *         v
 *
 * One row's arithmetic is the same sequence of additions, multiplications and divisions in every build: the file is compiled
 * without contraction (-ffp-contract=off), and nothing is summed across rows. The naive reference is solve() of
 * plugins/algorithms/gptq.py with qcore/grid.py.
 */
#include "half.h"
#include "qcore_cpu.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float must be computed as float: results would depend on the compiler"
#endif

#ifndef QC_SOURCE
#define QC_SOURCE ""
#endif

#define LANES 32 /* rows in a band: 128 columns of them fill half a first-level cache */
#define CHUNK 128 /* columns summed before they join the total: long groups lose fewer bits */
#define MOST_THREADS 256

typedef struct {
    int bits, sym, search;
    int64_t rows, columns, extent, group_size;
    const float *W;
    int64_t ldw;
    const float *D;    /* [columns][columns]: D[j][i] = U[i][j] / U[i][i] for i < j */
    const float *diagonal; /* [columns]: U[i][i] */
    const float *weights;  /* [extent]: importance over its mean in each group */
    const int32_t *group_of;
    float *scales, *zeros;
    int64_t ldg;
    uint8_t *codes;
    int64_t ldc;
    float *Err;
    int64_t lde;
    int64_t wide; /* columns that a band's scratch holds */
    void (*solve_band)(const void *job, int64_t band, float *scratch);
    atomic_llong next;
    atomic_int status;
} Job;

#define LEVEL portable
#define LEVEL_TARGET
#define LEVEL_WIDTH 4
#include "gptq_band.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LEVEL avx2
#define LEVEL_TARGET __attribute__((target("avx2")))
#define LEVEL_WIDTH 8
#include "gptq_band.h"

#define LEVEL avx512
#define LEVEL_TARGET __attribute__((target("avx512f")))
#define LEVEL_WIDTH 16
#include "gptq_band.h"
#endif

int qc_abi_version(void) { return QC_CPU_ABI; }

const char *qc_source(void) { return QC_SOURCE; }

const char *qc_error_string(int status) {
    switch (status) {
        case QC_OK: return "no error";
        case QC_BAD_ARGUMENT: return "an argument is out of range or a pointer is null";
        case QC_NO_MEMORY: return "no memory for scratch buffers";
        case QC_SCALE_OVERFLOW: return "the weights need a scale of more than float16 holds";
        case QC_BAD_LEVEL: return "this machine lacks that instruction set";
        default: return "unknown status";
    }
}

int qc_cpu_level(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return QC_LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2")) return QC_LEVEL_AVX2;
#endif
    return QC_LEVEL_PORTABLE;
}

static void choose_level(Job *job, int level) {
    job->solve_band = solve_band_portable;
#if defined(__x86_64__)
    if (level == QC_LEVEL_AVX2) job->solve_band = solve_band_avx2;
    if (level == QC_LEVEL_AVX512) job->solve_band = solve_band_avx512;
#endif
}

/* Take bands until none is left, or until another thread has failed. */
static void *work(void *argument) {
    Job *job = argument;
    const int64_t bands = (job->rows + LANES - 1) / LANES;
    float *scratch = aligned_alloc(64, (size_t)(2 * job->wide * LANES) * sizeof(float));
    if (!scratch) {
        atomic_store(&job->status, QC_NO_MEMORY);
        return NULL;
    }
    int64_t band;
    while (atomic_load(&job->status) == QC_OK && (band = atomic_fetch_add(&job->next, 1)) < bands)
        job->solve_band(job, band, scratch);
    free(scratch);
    return NULL;
}

static void run_threads(Job *job, int threads) {
    const int64_t bands = (job->rows + LANES - 1) / LANES;
    pthread_t started[MOST_THREADS];
    int count = 0;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > bands) threads = (int)bands;
    while (count < threads - 1 && pthread_create(&started[count], NULL, work, job) == 0) count++;
    work(job);
    while (count > 0) pthread_join(started[--count], NULL);
}

/* D and the diagonal from U: what a column's error takes from each later column, per unit. */
static void scale_factor(const float *U, int64_t ldu, int64_t columns, float *D, float *diagonal) {
    for (int64_t i = 0; i < columns; i++) diagonal[i] = U[i * ldu + i];
    for (int64_t i = 0; i < columns; i++)
        for (int64_t j = i + 1; j < columns; j++) D[j * columns + i] = U[i * ldu + j] / diagonal[i];
}

/* The weights of the search: a column that hardly fires still keeps its weights within reach. */
static void weigh(const float *importance, int64_t extent, int64_t group_size, float *weights) {
    for (int64_t first = 0; first < extent; first += group_size) {
        const int64_t last = first + group_size < extent ? first + group_size : extent;
        double sum = 0;
        for (int64_t c = first; c < last; c++) sum += importance[c];
        const float mean = fmaxf((float)(sum / (double)(last - first)), 1e-30f);
        for (int64_t c = first; c < last; c++) weights[c] = fmaxf(importance[c] / mean, 1e-6f);
    }
}

static int check(const Job *job, const float *U, int64_t ldu, const float *importance, int64_t groups, int level) {
    const int finds = job->search != QC_SEARCH_NONE;
    if (job->bits < 2 || job->bits > 8 || job->search < QC_SEARCH_NONE || job->search > QC_SEARCH_MSE) return QC_BAD_ARGUMENT;
    if (job->rows < 1 || job->columns < 0 || job->extent < 1 || job->extent < job->columns || job->group_size < 1 || groups < 1)
        return QC_BAD_ARGUMENT;
    if (!job->W || !job->group_of || !job->scales || !job->zeros || (finds && !importance)) return QC_BAD_ARGUMENT;
    if (job->ldw < job->rows || job->ldg < job->rows || (!job->columns && !finds)) return QC_BAD_ARGUMENT;
    if (job->columns && (!U || !job->codes || !job->Err || ldu < job->columns || job->ldc < job->rows || job->lde < job->rows))
        return QC_BAD_ARGUMENT;
    if (job->columns > job->group_size && job->extent != job->columns) return QC_BAD_ARGUMENT; /* only whole groups */
    if (job->extent > (int64_t)1 << 24 || job->columns > 1 << 15) return QC_BAD_ARGUMENT;
    for (int64_t c = 0; c < job->extent; c++)
        if (job->group_of[c] < 0 || job->group_of[c] >= groups) return QC_BAD_ARGUMENT;
    return level < QC_LEVEL_BEST || level > qc_cpu_level() ? QC_BAD_LEVEL : QC_OK;
}

int qc_gptq_block(int bits, int sym, int search, int64_t rows, int64_t columns, int64_t extent, int64_t group_size,
                  int64_t groups, const float *W, int64_t ldw, const float *U, int64_t ldu, const float *importance,
                  const int32_t *group_of, float *scales, float *zeros, int64_t ldg, uint8_t *codes, int64_t ldc,
                  float *Err, int64_t lde, int threads, int level) {
    Job job = {.bits = bits, .sym = sym, .search = search, .rows = rows, .columns = columns, .extent = extent,
               .group_size = group_size, .W = W, .ldw = ldw, .group_of = group_of, .scales = scales, .zeros = zeros,
               .ldg = ldg, .codes = codes, .ldc = ldc, .Err = Err, .lde = lde};
    const int wrong = check(&job, U, ldu, importance, groups, level);
    if (wrong) return wrong;
    float *shared = malloc((size_t)(columns * columns + columns + extent) * sizeof(float));
    if (!shared) return QC_NO_MEMORY;
    float *diagonal = shared + columns * columns, *weights = diagonal + columns;
    scale_factor(U, ldu, columns, shared, diagonal);
    if (search != QC_SEARCH_NONE) weigh(importance, extent, group_size, weights);
    job.D = shared;
    job.diagonal = diagonal;
    job.weights = weights;
    job.wide = columns && search == QC_SEARCH_NONE ? columns : extent;
    choose_level(&job, level == QC_LEVEL_BEST ? qc_cpu_level() : level);
    run_threads(&job, threads);
    free(shared);
    return atomic_load(&job.status);
}
