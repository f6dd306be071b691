/*
 * Products by a weight of 2 to 8 bits on CPUs: y[m][n] = x[m][k] W[n][k]^T.
 *
 * Outputs are cut into tiles of 16, one for each lane of a vector; a tile's codes lie one after the other as they are multiplied, so
 * that each tile is one stream of whole cache lines:
 *
 *      packed [tile][block of 32 columns][lines of 64 bytes]     a word of 32 bits for each output of the tile
 *
 *      4 bits   4 lines of 8 columns      codes are signed (code - 2^(bits-1)), even columns in a word's low half, odd ones in its
 *      2 bits   2 lines of 16 columns     high half, so that pairs of them can be looked up for bfloat16
 *      3 bits   2 lines of the low bits as with 2 bits, 1 line of the top bits of 32 columns
 *      8 bits   32 columns of 16 bytes    5, 6 and 7 bits too
 *      16 bits  32 columns of 16 halves   no codes but the weight itself; with 17 bfloat16
 *
 *      meta   [tile][group][scales, then zeros - 2^(bits-1) where asym][16]     float or half
 *
 * Tokens are cut into panels of 1, 2, 4 or 8 rows, x copied so that the values that meet one column lie side by side. A thread
 * takes some tiles at a time and multiplies them with all panels while they are in its cache.
 *
 * An element of a panel is a float; two bfloat16 of neighbouring columns; or two integers of 16 bits, what x is in units of a power of
 * two that up to 256 columns of a token share (a segment), so that 32 products are one instruction where there are none of bfloat16.
 * With AMX a panel is 16 rows, and in it each block of 32 columns lies row by row.
 */
#define _GNU_SOURCE /* syscall */
#include "qcore_cpu.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define TILE 16
#define BLOCK_BYTES(bits) (64 * ((bits) == QC_BFLOAT_WEIGHT ? 16 : (bits)))
#define BLOCK 32 /* columns of a block; groups begin at multiples of it */
#define MOST_THREADS 256
#define SERIAL_WORK (1 << 17) /* products of codes and tokens that one thread does sooner than it wakes another */
#define CACHED 262144         /* bytes of x that are multiplied with several tiles before the next come */
#define UNROLL _Pragma("GCC unroll 16")

#define SEGMENT 8 /* blocks whose products 32 bits hold: 256 columns * 2^15 * 2^7 */
typedef float panel_float; /* an element of a panel: a float, or a pair of numbers of 16 bits */
typedef void (*Parallel)(void (*work)(void *), void *job, unsigned threads, unsigned flags); /* GOMP_parallel */

enum { FLOATS, BFLOATS, INTEGERS, TILES }; /* what panels hold: all but the first in pairs; TILES are bfloat16 as AMX takes them */

typedef struct Matmul {
    int bits, dtype, rows, asym, half_meta, panels_of; /* bits as stored; rows of a panel */
    int64_t m, n, columns, k, blocks, groups, group_blocks, group_bytes, segments; /* segments of a group */
    const char *x, *meta;
    int64_t ldx;
    const uint8_t *packed;
    const int32_t *perm;
    char *y;
    int64_t ldy;
    panel_float *panels; /* [panel][column or pair of columns][rows] */
    int64_t panel_size;
    float *x_units; /* [panel][group][segment][rows], where panels hold integers */
    float *x_sums;  /* [panel][group][rows], where asym */
    int64_t pieces, piece_tiles;
    void (*multiply)(const struct Matmul *job, int64_t tile, int64_t panel);
    atomic_llong next;
    atomic_int status;
} Matmul;

/* ---- numbers ---- */

static float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint32_t float_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (!exponent) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f; /* no float32 subnormal on the way */
    return bits_to_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

/* To nearest, ties to even. */
static uint16_t float_to_half(float f) {
    const uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) /* the step of floats from 0.5 to 1 is that of subnormal halves */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10)));
}

static uint16_t float_to_bfloat(float f) {
    const uint32_t bits = float_to_bits(f);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float load(const char *from, int dtype, int64_t i) {
    if (dtype == QC_FLOAT32) return ((const float *)from)[i];
    const uint16_t half = ((const uint16_t *)from)[i];
    return dtype == QC_BFLOAT16 ? bits_to_float((uint32_t)half << 16) : half_to_float(half);
}

static inline void store(char *to, int dtype, int64_t i, float value) {
    if (dtype == QC_FLOAT32)
        ((float *)to)[i] = value;
    else
        ((uint16_t *)to)[i] = dtype == QC_BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

static int64_t size_of(int dtype) { return dtype == QC_FLOAT32 ? 4 : 2; }

static void write_out(const Matmul *job, int64_t row, int64_t tile, const float *values) {
    const int64_t first = tile * TILE, count = job->n - first < TILE ? job->n - first : TILE;
    if (row >= job->m) return;
    char *to = job->y + (row * job->ldy + first) * size_of(job->dtype);
    if (job->dtype == QC_FLOAT32)
        memcpy(to, values, (size_t)count * 4);
    else
        for (int64_t j = 0; j < count; j++) store(to, job->dtype, j, values[j]);
}

/* ---- the products ---- */

/* What a look-up of sixteen finds: signed codes of `bits` bits, whatever is in the bits above them. */
#define OF16(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#define SIGNED2(i) ((i) & 2 ? ((i) & 3) - 4 : (i) & 3)
#define SIGNED3(i) ((i) & 4 ? ((i) & 7) - 8 : (i) & 7)
#define SIGNED4(i) ((i) & 8 ? (i) - 16 : (i))

#define PORTABLE 1
#define AVX2 2
#define AVX512 3
#define AVX512_VNNI 4
#define AVX512_BF16 5

#define LEVEL portable
#define LEVEL_TARGET
#define LEVEL_KIND PORTABLE
#define LEVEL_ROWS 4
#define STEP 1
#include "matmul_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
static const float float_table[9][TILE] = {[2] = {OF16(SIGNED2)}, [3] = {OF16(SIGNED3)}, [4] = {OF16(SIGNED4)}};

#define LEVEL avx2
#define LEVEL_TARGET __attribute__((target("avx2,fma,f16c")))
#define LEVEL_KIND AVX2
#define LEVEL_ROWS 4
#define STEP 1
#include "matmul_tile.h"

#define LEVEL avx512
#define LEVEL_TARGET __attribute__((target("avx512f")))
#define LEVEL_KIND AVX512
#define LEVEL_ROWS 8
#define STEP 1
#include "matmul_tile.h"

#define WORDS(f) {OF16(f), OF16(f)}
static const uint16_t integer_table[9][2 * TILE] = {[2] = WORDS(SIGNED2), [3] = WORDS(SIGNED3), [4] = WORDS(SIGNED4)};

#define LEVEL avx512_vnni
#define LEVEL_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define LEVEL_KIND AVX512_VNNI
#define LEVEL_ROWS 8
#define STEP 2
#define TABLE integer_table
#include "matmul_tile.h"

#if defined(__clang__) || __GNUC__ >= 11
#define HAS_BF16 1
/* The upper half of a small integer as a float: 0, ±1, ±2 … ±8. */
#define SMALL(v) ((v) < 0 ? 0x8000 | POSITIVE(-(v)) : POSITIVE(v))
#define POSITIVE(v)                                                                                                    \
    ((v) == 0   ? 0                                                                                                    \
     : (v) == 1 ? 0x3f80                                                                                               \
     : (v) < 4  ? 0x4000 | ((v) - 2) << 6                                                                              \
     : (v) < 8  ? 0x4080 | ((v) - 4) << 5                                                                              \
                : 0x4100 | ((v) - 8) << 4)
#define BFLOAT2(i) SMALL(SIGNED2(i))
#define BFLOAT3(i) SMALL(SIGNED3(i))
#define BFLOAT4(i) SMALL(SIGNED4(i))
static const uint16_t bfloat_table[9][2 * TILE] = {[2] = WORDS(BFLOAT2), [3] = WORDS(BFLOAT3), [4] = WORDS(BFLOAT4)};

#define LEVEL avx512_bf16
#define LEVEL_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define LEVEL_KIND AVX512_BF16
#define LEVEL_ROWS 8
#define STEP 2
#define TABLE bfloat_table
#include "matmul_tile.h"
#include "matmul_amx.h"
#endif
#endif

static int machine_level(void) {
#if defined(__x86_64__)
    const int words = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#if HAS_BF16
    if (words && __builtin_cpu_supports("avx512bf16")) return QC_LEVEL_AVX512_BF16;
#endif
    if (words) return QC_LEVEL_AVX512_VNNI;
    if (__builtin_cpu_supports("avx512f")) return QC_LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return QC_LEVEL_AVX2;
#endif
    return QC_LEVEL_PORTABLE;
}

/* AMX is there for who asks for it: it never ran on hardware. */
static int has_level(int level) {
#if HAS_BF16
    if (level == QC_LEVEL_AMX_BF16) return machine_has_amx() && machine_level() == QC_LEVEL_AVX512_BF16;
#endif
    return level >= QC_LEVEL_BEST && level <= machine_level();
}

static atomic_int limit = QC_LEVEL_BEST;

int qc_matmul_level(void) {
    const int set = atomic_load(&limit);
    return set == QC_LEVEL_BEST ? machine_level() : set;
}

int qc_limit_matmul_level(int level) {
    if (!has_level(level)) return QC_BAD_LEVEL;
    atomic_store(&limit, level);
    return QC_OK;
}

static void choose_level(Matmul *job, int level) {
    int widest = 4;
    job->multiply = multiply_portable;
#if defined(__x86_64__)
    if (level == QC_LEVEL_AVX2) job->multiply = multiply_avx2;
    if (level >= QC_LEVEL_AVX512) {
        job->multiply = multiply_avx512;
        widest = 8;
    }
    if (level >= QC_LEVEL_AVX512_VNNI && job->dtype != QC_FLOAT32 && job->bits <= 8) {
        job->panels_of = INTEGERS;
        job->multiply = multiply_avx512_vnni;
    }
#if HAS_BF16
    if (level >= QC_LEVEL_AVX512_BF16 && job->dtype == QC_BFLOAT16 && job->bits <= 8) {
        job->panels_of = BFLOATS;
        job->multiply = multiply_avx512_bf16;
        if (level == QC_LEVEL_AMX_BF16 && job->m > 4) {
            job->panels_of = TILES;
            job->multiply = multiply_amx;
            job->rows = AMX_ROWS;
            return;
        }
    }
#endif
#endif
    job->rows = widest;
    if (job->m == 1) job->rows = 1;
    if (level >= QC_LEVEL_AVX2 && job->m == 2) job->rows = 2;
    if (job->m == 3 || job->m == 4) job->rows = 4;
}

/* Element `column` of a row of x in packed order, 0 where there is none. */
static inline float x_at(const Matmul *job, const char *row, int64_t column) {
    if (job->perm) column = job->perm[column];
    return column < 0 || column >= job->columns ? 0.0f : load(row, job->dtype, column);
}

/* The integers of a segment's floats, of 16 bits, and the power of two that they are multiples of: NaN where a float is not finite. */
static float to_integers(const float *values, int64_t count, int16_t *integers) {
    uint32_t largest = 20u << 23; /* what is smaller still becomes 0: no power of two here or below is beyond float32 */
    for (int64_t i = 0; i < count; i++) {
        const uint32_t size = float_to_bits(values[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    const uint32_t exponent = largest >> 23;
    const float up = bits_to_float((268 - exponent) << 23); /* the largest becomes 2^14 to 2^15, as halves round no higher */
    for (int64_t i = 0; i < count; i++) /* this float's last bit is worth 1: added to it, values are rounded to integers */
        integers[i] = (int16_t)(float_to_bits(values[i] * up + 0x1.8p23f) - 0x4b400000);
    return exponent == 255 ? NAN : bits_to_float((exponent - 14) << 23);
}

/* Columns c to c + count of one token, `values`, to where row r of a panel has them; where integers, `values` become those. */
static void fill_segment(const Matmul *job, panel_float *panel, float *unit, int64_t r, int64_t c, int64_t count, float *values) {
    const int rows = job->rows;
    if (job->panels_of == FLOATS) {
        for (int64_t i = 0; i < count; i++) panel[(c + i) * rows + r] = values[i];
        return;
    }
    uint16_t words[SEGMENT * BLOCK], *to = (uint16_t *)(panel + c / 2 * rows + r);
    if (job->panels_of == INTEGERS)
        *unit = to_integers(values, count, (int16_t *)words);
    else
        for (int64_t i = 0; i < count; i++) words[i] = (uint16_t)(float_to_bits(values[i]) >> 16);
    if (job->panels_of == TILES)
        for (int64_t b = 0; b < count; b += BLOCK) memcpy(panel + (c + b) / 2 * rows + r * BLOCK / 2, words + b, BLOCK * 2);
    else
        for (int64_t i = 0; i < count; i += 2) memcpy(to + i * rows, words + i, 4);
    for (int64_t i = 0; job->panels_of == INTEGERS && i < count; i++) values[i] = (float)(int16_t)words[i] * *unit;
}

/* Copy the tokens of a panel next to each other, and sum them over groups. */
static void fill_panel(const Matmul *job, int64_t panel) {
    const int rows = job->rows;
    const int64_t padded = job->blocks * BLOCK;
    panel_float *to = job->panels + panel * job->panel_size;
    for (int r = 0; r < rows; r++) {
        const int64_t row = panel * rows + r;
        const char *from = job->x + row * job->ldx * size_of(job->dtype);
        for (int64_t g = 0, c = 0; g < job->groups; g++) {
            const int64_t end = c + job->group_blocks * BLOCK < padded ? c + job->group_blocks * BLOCK : padded;
            float *unit = job->x_units + (panel * job->groups + g) * job->segments * rows + r, values[SEGMENT * BLOCK];
            double sum = 0;
            for (int64_t count; c < end; c += count, unit += rows) {
                count = end - c < SEGMENT * BLOCK ? end - c : SEGMENT * BLOCK;
                for (int64_t i = 0; i < count; i++) values[i] = row < job->m && c + i < job->k ? x_at(job, from, c + i) : 0.0f;
                fill_segment(job, to, unit, r, c, count, values);
                for (int64_t i = 0; job->asym && i < count; i++) sum += values[i];
            }
            if (job->asym) job->x_sums[(panel * job->groups + g) * rows + r] = (float)sum;
        }
    }
}

static void fill_panels(void *argument) {
    Matmul *job = argument;
    const int64_t panels = (job->m + job->rows - 1) / job->rows;
    int64_t panel;
    while ((panel = atomic_fetch_add(&job->next, 1)) < panels) fill_panel(job, panel);
}

static void multiply_tiles(void *argument) {
    Matmul *job = argument;
    const int64_t tiles = (job->n + TILE - 1) / TILE, panels = (job->m + job->rows - 1) / job->rows;
    int64_t some = CACHED / (job->panel_size * 4), piece;
    if (some < 1) some = 1;
    while ((piece = atomic_fetch_add(&job->next, 1)) < job->pieces) {
        const int64_t last = (piece + 1) * job->piece_tiles < tiles ? (piece + 1) * job->piece_tiles : tiles;
        for (int64_t first = 0; first < panels; first += some)
            for (int64_t tile = piece * job->piece_tiles; tile < last; tile++)
                for (int64_t panel = first; panel < panels && panel < first + some; panel++) job->multiply(job, tile, panel);
    }
}

/* ---- threads ---- */

typedef struct {
    void (*work)(void *);
    void *job;
} Task;

static void *start(void *argument) {
    const Task *task = argument;
    task->work(task->job);
    return NULL;
}

/* Have `threads` threads do a job, this one among them: those of an OpenMP runtime when one is given, otherwise new ones. */
static void in_threads(void (*work)(void *), void *job, int threads, void *parallel) {
    if (threads > 1 && parallel) {
        ((Parallel)parallel)(work, job, (unsigned)threads, 0);
        return;
    }
    Task task = {work, job};
    pthread_t started[MOST_THREADS];
    int count = 0;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    while (count < threads - 1 && pthread_create(&started[count], NULL, start, &task) == 0) count++;
    work(job);
    while (count > 0) pthread_join(started[--count], NULL);
}

/* ---- the interface ---- */

static int stored_bits(int bits) { return bits <= 4 ? bits : bits <= 8 ? 8 : bits; }

/* Fill in the sizes; 0 when they are out of range. */
static int sizes(Matmul *job, int bits, int64_t n, int64_t columns, int64_t k, int64_t group_size, int asym, int half_meta) {
    const int64_t most = (int64_t)1 << 31;
    if (bits < 2 || (bits > 8 && bits != QC_HALF_WEIGHT && bits != QC_BFLOAT_WEIGHT) || n < 1 || columns < 1 || k < 1 || n > most || columns > most || k > most) return 0;
    if (group_size != -1 && (group_size < BLOCK || group_size % BLOCK)) return 0;
    job->bits = stored_bits(bits);
    job->n = n;
    job->columns = columns;
    job->k = k;
    job->blocks = (k + BLOCK - 1) / BLOCK;
    job->group_blocks = group_size == -1 ? job->blocks : group_size / BLOCK;
    job->groups = (job->blocks + job->group_blocks - 1) / job->group_blocks;
    job->segments = (job->group_blocks + SEGMENT - 1) / SEGMENT;
    job->asym = asym != 0;
    job->half_meta = half_meta != 0;
    job->group_bytes = TILE * (half_meta ? 2 : 4) * (asym ? 2 : 1);
    return 1;
}

int qc_cpu_matmul(int bits, int dtype, int64_t m, int64_t n, int64_t columns, int64_t k, int64_t group_size, int asym,
                  int half_meta, const void *x, int64_t ldx, const void *packed, const void *meta, const int32_t *perm,
                  void *y, int64_t ldy, int threads, int level, void *parallel) {
    Matmul job = {.dtype = dtype, .m = m, .x = x, .ldx = ldx, .packed = packed, .meta = meta, .perm = perm, .y = y, .ldy = ldy};
    if (!sizes(&job, bits, n, columns, k, group_size, asym, half_meta)) return QC_BAD_ARGUMENT;
    if (m < 0 || m > (int64_t)1 << 31 || dtype < QC_FLOAT32 || dtype > QC_FLOAT16 || threads < 1) return QC_BAD_ARGUMENT;
    if (!perm && columns != k) return QC_BAD_ARGUMENT;
    if (m == 0) return QC_OK;
    if (!x || !packed || !meta || !y || (m > 1 && (ldx < columns || ldy < n)) || (uintptr_t)packed % 4) return QC_BAD_ARGUMENT;
    if (level != QC_LEVEL_BEST && !has_level(level)) return QC_BAD_LEVEL;
    choose_level(&job, level == QC_LEVEL_BEST ? qc_matmul_level() : level);

    const int64_t panels = (m + job.rows - 1) / job.rows, tiles = (n + TILE - 1) / TILE;
    job.panel_size = job.blocks * BLOCK * job.rows / (job.panels_of == FLOATS ? 1 : 2);
    const int64_t sums = panels * job.groups * job.rows, units = job.panels_of == INTEGERS ? sums * job.segments : 0;
    char *scratch = malloc((size_t)(panels * job.panel_size + units + (job.asym ? sums : 0)) * 4 + 64);
    if (!scratch) return QC_NO_MEMORY;
    job.panels = (panel_float *)(scratch + (64 - (uintptr_t)scratch % 64));
    job.x_units = job.panels + panels * job.panel_size;
    job.x_sums = job.x_units + units;
    const int64_t work = tiles * TILE * job.blocks * BLOCK;
    if (work * job.rows * panels < SERIAL_WORK || tiles == 1) threads = 1;
    in_threads(fill_panels, &job, panels > 1 && m * k > SERIAL_WORK ? threads : 1, parallel);
    /* a thread takes about a sixteenth of its share at a time, as others may be held up; and few tiles, which stay in its cache */
    job.piece_tiles = tiles / (16 * threads) < 1 ? 1 : tiles / (16 * threads) > 8 ? 8 : tiles / (16 * threads);
    job.pieces = (tiles + job.piece_tiles - 1) / job.piece_tiles;
    atomic_store(&job.next, 0);
    in_threads(multiply_tiles, &job, threads, parallel);
    free(scratch);
    return QC_OK;
}

/* ---- the layout ---- */

/* Where column c (of 32) of an output (of 16) lies in a block of 2 or 4 bits: word and shift. */
static inline int64_t word_of(int bits, int64_t c, int64_t lane) { return TILE * (c / (32 / bits)) + lane; }
static inline int shift_of(int bits, int64_t c) {
    const int64_t in_line = c % (32 / bits);
    return (int)(bits * (in_line >> 1) + 16 * (in_line & 1));
}

/* Eight codes, a byte each, with `bits` bits of each side by side: those of even columns from bit 0 on, of odd ones from bit 16 on. */
static inline uint32_t squeezed(const uint8_t *codes, int from, int bits) {
    uint64_t v = 0, mask = ((1u << bits) - 1) * 0x0001000100010001u;
    for (int i = 0; i < 8; i++) v |= (uint64_t)codes[i] << 8 * i;
    const uint64_t even = v >> from & mask, odd = v >> (8 + from) & mask;
    const int step = 16 - bits;
    const uint64_t low = even | even >> step | even >> 2 * step | even >> 3 * step;
    const uint64_t high = odd | odd >> step | odd >> 2 * step | odd >> 3 * step;
    return (uint32_t)(low & ((1u << 4 * bits) - 1)) | (uint32_t)(high & ((1u << 4 * bits) - 1)) << 16;
}

/* Put the codes of one output, 32 columns, into a block: signed, which turns their top bit round. */
static inline void pack_codes(uint8_t *block, const int bits, int64_t lane, const uint8_t *codes) {
    uint32_t *words = (uint32_t *)block + lane;
    uint8_t turned[BLOCK];
    for (int c = 0; c < BLOCK; c++) turned[c] = (uint8_t)(codes[c] ^ 1 << (bits - 1));
    if (bits == 8)
        for (int c = 0; c < BLOCK; c++) block[TILE * c + lane] = turned[c];
    else if (bits == 4)
        for (int i = 0; i < 4; i++) words[TILE * i] = squeezed(turned + 8 * i, 0, 4);
    else
        for (int i = 0; i < 2; i++) words[TILE * i] = squeezed(turned + 16 * i, 0, 2) | squeezed(turned + 16 * i + 8, 0, 2) << 8;
    if (bits == 3)
        words[2 * TILE] = squeezed(turned, 2, 1) | squeezed(turned + 8, 2, 1) << 4 | squeezed(turned + 16, 2, 1) << 8 | squeezed(turned + 24, 2, 1) << 12;
}

static int get_code(const uint8_t *block, int bits, int64_t c, int64_t lane) {
    const uint32_t *words = (const uint32_t *)block;
    if (bits == 8) return (int8_t)block[TILE * c + lane];
    const uint32_t low = words[word_of(bits == 3 ? 2 : bits, c, lane)] >> shift_of(bits == 3 ? 2 : bits, c);
    const uint32_t code = bits == 3 ? (low & 3) | (words[2 * TILE + lane] >> shift_of(1, c) & 1) << 2 : low & ((1u << bits) - 1);
    return (int)code - (code >> (bits - 1) ? 1 << bits : 0);
}

static float get_value(const uint8_t *block, int bits, int64_t c, int64_t lane) {
    if (bits <= 8) return (float)get_code(block, bits, c, lane);
    return load((const char *)block, bits == QC_HALF_WEIGHT ? QC_FLOAT16 : QC_BFLOAT16, TILE * c + lane);
}

typedef struct {
    Matmul job;
    const char *codes;
    uint8_t *packed;
    int bits; /* as given: 5 to 8 are stored as 8 */
} Packing;

/* The codes of one output in packed order, where a column is missing those of 0: the row itself, or a copy in `copy`. */
static const char *row_in_order(const Packing *p, int64_t output, char *copy) {
    const Matmul *job = &p->job;
    const int64_t size = job->bits > 8 ? 2 : 1, padded = job->blocks * BLOCK;
    const char *row = p->codes + output * job->columns * size;
    if (!job->perm && job->k == padded) return row;
    memset(copy, job->bits > 8 ? 0 : 1 << (p->bits - 1), (size_t)(padded * size));
    if (!job->perm) {
        memcpy(copy, row, (size_t)(job->k * size));
        return copy;
    }
    for (int64_t c = 0; c < job->k; c++)
        if (job->perm[c] >= 0) memcpy(copy + c * size, row + job->perm[c] * size, (size_t)size);
    return copy;
}

static void pack_row(const Packing *p, uint8_t *base, int64_t lane, const char *row) {
    const uint8_t *codes = (const uint8_t *)row;
    const int bits = p->job.bits;
    const uint8_t shift = (uint8_t)(bits == 8 ? 128 - (1 << (p->bits - 1)) : 0); /* 5 to 7 bits: their middle becomes that of 8 */
    for (int64_t b = 0; b < p->job.blocks; b++, base += BLOCK_BYTES(bits), codes += BLOCK) {
        uint8_t raised[BLOCK];
        if (bits > 8) {
            for (int c = 0; c < BLOCK; c++) memcpy(base + 2 * (TILE * c + lane), row + 2 * (b * BLOCK + c), 2);
            continue;
        }
        for (int c = 0; shift && c < BLOCK; c++) raised[c] = (uint8_t)(codes[c] + shift);
        switch (bits) {
            case 2: pack_codes(base, 2, lane, codes); break;
            case 3: pack_codes(base, 3, lane, codes); break;
            case 4: pack_codes(base, 4, lane, codes); break;
            default: pack_codes(base, 8, lane, shift ? raised : codes);
        }
    }
}

static void pack_tiles(void *argument) {
    Packing *p = argument;
    Matmul *job = &p->job;
    const int64_t tiles = (job->n + TILE - 1) / TILE, tile_bytes = job->blocks * BLOCK_BYTES(job->bits);
    char *copy = malloc((size_t)(2 * job->blocks * BLOCK));
    if (!copy) atomic_store(&job->status, QC_NO_MEMORY);
    int64_t tile;
    while (copy && (tile = atomic_fetch_add(&job->next, 1)) < tiles) {
        uint8_t *base = p->packed + tile * tile_bytes;
        if ((tile + 1) * TILE > job->n) memset(base, 0, (size_t)tile_bytes);
        for (int64_t lane = 0; lane < TILE && tile * TILE + lane < job->n; lane++)
            pack_row(p, base, lane, row_in_order(p, tile * TILE + lane, copy));
    }
    free(copy);
}

static int valid_perm(const int32_t *perm, int64_t k, int64_t columns) {
    for (int64_t c = 0; perm && c < k; c++)
        if (perm[c] < -1 || perm[c] >= columns) return 0;
    return perm || k == columns;
}

int qc_cpu_pack(int bits, int64_t n, int64_t columns, int64_t k, const void *codes, const int32_t *perm, void *packed,
                int threads, void *parallel) {
    Packing p = {.codes = codes, .packed = packed, .bits = bits};
    if (!sizes(&p.job, bits, n, columns, k, -1, 0, 0) || !codes || !packed || threads < 1 || (uintptr_t)packed % 4) return QC_BAD_ARGUMENT;
    if (!valid_perm(perm, k, columns)) return QC_BAD_ARGUMENT;
    p.job.perm = perm;
    in_threads(pack_tiles, &p, n * k < SERIAL_WORK ? 1 : threads, parallel);
    return atomic_load(&p.job.status);
}

/* The weight of 16 outputs at a time; columns that no packed one holds are left alone. */
static void unpack_tiles(void *argument) {
    Matmul *job = argument;
    const int64_t tiles = (job->n + TILE - 1) / TILE;
    const int meta_type = job->half_meta ? QC_FLOAT16 : QC_FLOAT32;
    int64_t tile;
    while ((tile = atomic_fetch_add(&job->next, 1)) < tiles)
        for (int64_t lane = 0; lane < TILE && tile * TILE + lane < job->n; lane++) {
            char *row = job->y + (tile * TILE + lane) * job->ldy * size_of(job->dtype);
            for (int64_t c = 0; c < job->k; c++) {
                const int64_t column = job->perm ? job->perm[c] : c, group = c / BLOCK / job->group_blocks;
                if (column < 0) continue;
                const char *meta = job->meta + (tile * job->groups + group) * job->group_bytes;
                const float zero = job->asym ? load(meta + job->group_bytes / 2, meta_type, lane) : 0.0f;
                const uint8_t *block = job->packed + (tile * job->blocks + c / BLOCK) * BLOCK_BYTES(job->bits);
                const float value = get_value(block, job->bits, c % BLOCK, lane) - zero;
                store(row, job->dtype, column, load(meta, meta_type, lane) * value);
            }
        }
}

int qc_cpu_dequantize(int bits, int dtype, int64_t n, int64_t columns, int64_t k, int64_t group_size, int asym, int half_meta,
                      const void *packed, const void *meta, const int32_t *perm, void *weight, int64_t ldw, int threads,
                      void *parallel) {
    Matmul job = {.dtype = dtype, .packed = packed, .meta = meta, .perm = perm, .y = weight, .ldy = ldw};
    if (!sizes(&job, bits, n, columns, k, group_size, asym, half_meta) || threads < 1) return QC_BAD_ARGUMENT;
    if (dtype < QC_FLOAT32 || dtype > QC_FLOAT16 || !packed || !meta || !weight || ldw < columns || (uintptr_t)packed % 4) return QC_BAD_ARGUMENT;
    if (!valid_perm(perm, k, columns)) return QC_BAD_ARGUMENT;
    in_threads(unpack_tiles, &job, n * k < SERIAL_WORK ? 1 : threads, parallel);
    return QC_OK;
}
