/*
 * One tile of TILE outputs times one panel of tokens, for one instruction set. Included once per set by matmul.c, which defines
 *
 *   LEVEL         the suffix of every name here
 *   LEVEL_TARGET  the attribute that lets the compiler use the set
 *   LEVEL_KIND    PORTABLE, AVX2, AVX512, AVX512_VNNI or AVX512_BF16
 *   LEVEL_ROWS    tokens of the widest panel it keeps in registers
 *   STEP          columns that one multiplication takes: 1, or 2 where numbers of 16 bits are multiplied in pairs
 *   TABLE         where STEP is 2: codes of 2, 3 and 4 bits as such numbers
 *
 * A vector `vec` holds one float for each output of the tile (or an integer, where those are multiplied, until they are joined). Codes
 * become vectors of integers, exact in any dtype; the scale is applied to the sum over a group.
 */
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)
#define INLINE LEVEL_TARGET static inline __attribute__((always_inline))
#define vec NAME(vec)

/* A line is 64 bytes, a word for each output; SHIFT is where the code of column c of a line of such codes begins in a word. */
#define SHIFT(bits, c) ((bits) * ((c) >> 1) + 16 * ((c) & 1))

#if LEVEL_KIND >= AVX512
typedef __m512 vec;
INLINE vec NAME(zero)(void) { return _mm512_setzero_ps(); }
INLINE vec NAME(all)(float x) { return _mm512_set1_ps(x); }
INLINE vec NAME(add)(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec NAME(madd)(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE void NAME(put)(float *to, vec a) { _mm512_storeu_ps(to, a); }
INLINE vec NAME(meta)(const void *from, int half) {
    return half ? _mm512_cvtph_ps(_mm256_loadu_si256(from)) : _mm512_loadu_ps(from);
}
#define LINE(block, line) _mm512_loadu_si512((const uint8_t *)(block) + 64 * (line))
/* Whole signed bytes of one column as floats. */
INLINE vec NAME(bytes)(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
#endif

#if LEVEL_KIND == AVX512
INLINE vec NAME(times)(vec w, const panel_float *x, vec sum) { return _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum); }
/* vpermps looks up the low four bits of each word: no mask is needed, whatever lies above the code. */
#define LOOK_UP(codes) _mm512_permutexvar_ps(codes, table)
INLINE __m512i NAME(move)(__m512i bits, int by) {
    return by < 0 ? _mm512_slli_epi32(bits, (unsigned)-by) : _mm512_srli_epi32(bits, (unsigned)by);
}
/* The vectors of columns 8 * part … 8 * part + 7 of a block. */
INLINE void NAME(unpack)(const uint8_t *block, const int bits, const int part, vec w[8]) {
#define HALVES(c) _mm256_loadu_si256((const __m256i *)(block + 32 * (c)))
    const vec table = _mm512_loadu_ps(float_table[bits <= 8 ? bits : 0]);
    const __m512i three = _mm512_set1_epi32(3);
    const __m512i low = LINE(block, bits == 4 ? part : part / 2), high = LINE(block, bits == 3 ? 2 : 0);
#define COLUMN(c)                                                                                                      \
    if (bits == QC_HALF_WEIGHT)                                                                                        \
        w[c] = _mm512_cvtph_ps(HALVES(8 * part + c));                                                                  \
    else if (bits == QC_BFLOAT_WEIGHT)                                                                                 \
        w[c] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(HALVES(8 * part + c)), 16));                \
    else if (bits == 8)                                                                                                     \
        w[c] = NAME(bytes)(block + 16 * (8 * part + c));                                                               \
    else if (bits == 4)                                                                                                \
        w[c] = LOOK_UP(NAME(move)(low, SHIFT(4, c)));                                                                  \
    else if (bits == 2)                                                                                                \
        w[c] = LOOK_UP(NAME(move)(low, SHIFT(2, 8 * (part % 2) + c)));                                                 \
    else                                                                                                               \
        w[c] = LOOK_UP(_mm512_ternarylogic_epi32(three, NAME(move)(low, SHIFT(2, 8 * (part % 2) + c)),                 \
                                                 NAME(move)(high, SHIFT(1, 8 * part + c) - 2), 0xCA));
    COLUMN(0) COLUMN(1) COLUMN(2) COLUMN(3) COLUMN(4) COLUMN(5) COLUMN(6) COLUMN(7)
#undef COLUMN
#undef HALVES
}
#undef LOOK_UP

#elif LEVEL_KIND > AVX512
#if LEVEL_KIND == AVX512_BF16
INLINE vec NAME(times)(vec w, const panel_float *x, vec sum) {
    uint32_t pair;
    memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)pair));
}
/* A pair of bytes, taken from their columns' words. */
#define PAIR(even, odd)                                                                                                \
    _mm512_ternarylogic_epi32(upper, (__m512i)NAME(bytes)(odd), _mm512_srli_epi32((__m512i)NAME(bytes)(even), 16), 0xCA)
#else
INLINE vec NAME(times)(vec w, const panel_float *x, vec sum) {
    uint32_t pair;
    memcpy(&pair, x, 4);
    return (vec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32((int)pair));
}
INLINE __m512i NAME(integers)(const uint8_t *from) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)); }
#define PAIR(even, odd)                                                                                                \
    _mm512_ternarylogic_epi32(upper, _mm512_slli_epi32(NAME(integers)(odd), 16), NAME(integers)(even), 0xCA)
#endif
/* vpermw looks up the low five bits of each half word; the table repeats after sixteen. */
#define LOOK_UP(codes) (vec) _mm512_permutexvar_epi16(codes, table)
INLINE __m512i NAME(move)(__m512i bits, int by) {
    return by < 0 ? _mm512_slli_epi16(bits, (unsigned)-by) : _mm512_srli_epi16(bits, (unsigned)by);
}
/* The pairs of columns 8 * part … 8 * part + 7 of a block: integers up to 128 are exact in bfloat16 too. */
INLINE void NAME(unpack)(const uint8_t *block, const int bits, const int part, vec w[4]) {
    const __m512i table = _mm512_loadu_si512(TABLE[bits]);
    const __m512i three = _mm512_set1_epi16(3), upper = _mm512_set1_epi32((int)0xffff0000);
    const __m512i low = LINE(block, bits == 4 ? part : part / 2), high = LINE(block, bits == 3 ? 2 : 0);
#define COLUMNS(p)                                                                                                     \
    if (bits == 8)                                                                                                     \
        w[p] = (vec)PAIR(block + 16 * (8 * part + 2 * p), block + 16 * (8 * part + 2 * p + 1));                        \
    else if (bits == 4)                                                                                                \
        w[p] = LOOK_UP(NAME(move)(low, 4 * p));                                                                        \
    else if (bits == 2)                                                                                                \
        w[p] = LOOK_UP(NAME(move)(low, 2 * (4 * (part % 2) + p)));                                                     \
    else                                                                                                               \
        w[p] = LOOK_UP(_mm512_ternarylogic_epi32(three, NAME(move)(low, 2 * (4 * (part % 2) + p)),                     \
                                                 NAME(move)(high, 4 * part + p - 2), 0xCA));
    COLUMNS(0) COLUMNS(1) COLUMNS(2) COLUMNS(3)
#undef COLUMNS
}
#undef LOOK_UP
#undef PAIR

#elif LEVEL_KIND == AVX2
typedef struct {
    __m256 a, b;
} vec;
INLINE vec NAME(zero)(void) { return (vec){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE vec NAME(all)(float x) { return (vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vec NAME(add)(vec a, vec b) { return (vec){_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE vec NAME(madd)(vec a, vec b, vec c) {
    return (vec){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE void NAME(put)(float *to, vec a) {
    _mm256_storeu_ps(to, a.a);
    _mm256_storeu_ps(to + 8, a.b);
}
INLINE vec NAME(meta)(const void *from, int half) {
    const uint16_t *h = from;
    const float *f = from;
    return half ? (vec){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h)),
                        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + 8)))}
                : (vec){_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
}
INLINE vec NAME(times)(vec w, const panel_float *x, vec sum) {
    const __m256 each = _mm256_broadcast_ss(x);
    return (vec){_mm256_fmadd_ps(w.a, each, sum.a), _mm256_fmadd_ps(w.b, each, sum.b)};
}
#define LINE(block, line, side) _mm256_loadu_si256((const __m256i *)((block) + 64 * (line) + 32 * (side)))
/* A signed code of `bits` bits that begins at `at` in each word: moved to the top, then down with its sign. */
INLINE __m256i NAME(code)(__m256i line, int bits, int at) {
    return _mm256_srai_epi32(_mm256_slli_epi32(line, 32 - bits - at), 32 - bits);
}
INLINE __m256 NAME(column)(const uint8_t *block, const int bits, const int c, const int side) {
    if (bits > 8) {
        const __m128i halves = _mm_loadu_si128((const __m128i *)(block + 32 * c + 16 * side));
        return bits == QC_HALF_WEIGHT ? _mm256_cvtph_ps(halves) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    if (bits == 8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(block + 16 * c + 8 * side))));
    if (bits == 4) return _mm256_cvtepi32_ps(NAME(code)(LINE(block, c / 8, side), 4, SHIFT(4, c % 8)));
    const __m256i line = LINE(block, c / 16, side);
    if (bits == 2) return _mm256_cvtepi32_ps(NAME(code)(line, 2, SHIFT(2, c % 16)));
    const __m256i three = _mm256_set1_epi32(3), sign = NAME(code)(LINE(block, 2, side), 1, SHIFT(1, c));
    const __m256i low = _mm256_and_si256(_mm256_srli_epi32(line, SHIFT(2, c % 16)), three);
    return _mm256_cvtepi32_ps(_mm256_or_si256(low, _mm256_andnot_si256(three, sign)));
}
INLINE void NAME(unpack)(const uint8_t *block, const int bits, const int part, vec w[8]) {
    UNROLL
    for (int c = 0; c < 8; c++)
        w[c] = (vec){NAME(column)(block, bits, 8 * part + c, 0), NAME(column)(block, bits, 8 * part + c, 1)};
}

#else
typedef float four __attribute__((vector_size(16)));
typedef int32_t four_ints __attribute__((vector_size(16)));
typedef struct {
    four q[4];
} vec;
#define EACH(expression)                                                                                               \
    vec result;                                                                                                        \
    UNROLL                                                                                                             \
    for (int i = 0; i < 4; i++) result.q[i] = (expression);                                                            \
    return result
INLINE vec NAME(all)(float x) { EACH(((four){x, x, x, x})); }
INLINE vec NAME(zero)(void) { return NAME(all)(0.0f); }
INLINE vec NAME(add)(vec a, vec b) { EACH(a.q[i] + b.q[i]); }
INLINE vec NAME(madd)(vec a, vec b, vec c) { EACH(a.q[i] * b.q[i] + c.q[i]); }
INLINE vec NAME(times)(vec w, const panel_float *x, vec sum) { return NAME(madd)(w, NAME(all)(*x), sum); }
INLINE void NAME(put)(float *to, vec a) { memcpy(to, &a, sizeof a); }
INLINE vec NAME(meta)(const void *from, int half) {
    float lanes[TILE];
    vec result;
    for (int j = 0; j < TILE; j++) lanes[j] = half ? half_to_float(((const uint16_t *)from)[j]) : ((const float *)from)[j];
    memcpy(&result, lanes, sizeof result);
    return result;
}
/* A signed code of `bits` bits that begins at `at` in each word: moved to the top, then down with its sign. */
INLINE four_ints NAME(code)(const uint8_t *line, int i, int bits, int at) {
    four_ints words;
    memcpy(&words, line + 16 * i, 16);
    return (words << (32 - bits - at)) >> (32 - bits);
}
INLINE four_ints NAME(column)(const uint8_t *block, const int bits, const int c, const int i) {
    if (bits == 8) {
        const int8_t *at = (const int8_t *)block + 16 * c + 4 * i;
        return (four_ints){at[0], at[1], at[2], at[3]};
    }
    if (bits == 4) return NAME(code)(block + 64 * (c / 8), i, 4, SHIFT(4, c % 8));
    const four_ints low = NAME(code)(block + 64 * (c / 16), i, 2, SHIFT(2, c % 16));
    return bits == 2 ? low : (low & 3) | (NAME(code)(block + 128, i, 1, SHIFT(1, c)) & ~3);
}
/* Not a constant of the caller here: one copy does for all. */
static __attribute__((noinline)) void NAME(unpack)(const uint8_t *block, const int bits, const int part, vec w[8]) {
    for (int c = 0; c < 8 && bits > 8; c++)
        for (int j = 0; j < TILE; j++)
            w[c].q[j / 4][j % 4] = load((const char *)block, bits == QC_HALF_WEIGHT ? QC_FLOAT16 : QC_BFLOAT16, TILE * (8 * part + c) + j);
    for (int c = 0; c < 8 && bits <= 8; c++)
        for (int i = 0; i < 4; i++) w[c].q[i] = __builtin_convertvector(NAME(column)(block, bits, 8 * part + c, i), four);
}
#endif

/* What the products of a segment add to the sum over a group: theirs, `unit` being what x was counted in where it was. */
#if LEVEL_KIND == AVX512_VNNI
INLINE vec NAME(both)(vec a, vec b) { return (vec)_mm512_add_epi32((__m512i)a, (__m512i)b); }
INLINE vec NAME(joined)(vec group, vec sum, const float *unit) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum), _mm512_set1_ps(*unit), group);
}
#else
INLINE vec NAME(both)(vec a, vec b) { return NAME(add)(a, b); }
INLINE vec NAME(joined)(vec group, vec sum, const float *unit) { return (void)unit, NAME(add)(group, sum); }
#endif

/* Sums that run side by side for one token, so that the latency of an addition is hidden. */
#define CHAINS(rows) ((rows) >= 4 ? 1 : 4 / (rows))

/* sum[r][chain] += the eight columns of a part times the panel's x. */
INLINE const panel_float *NAME(part)(const uint8_t *block, const panel_float *x, vec *sum, const int bits, const int rows,
                                     const int part) {
    vec w[8 / STEP];
    NAME(unpack)(block, bits, part, w);
    UNROLL
    for (int c = 0; c < 8 / STEP; c++, x += rows) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            vec *s = &sum[r * CHAINS(rows) + c % CHAINS(rows)];
            *s = NAME(times)(w[c], x + r, *s);
        }
    }
    return x;
}

/* y[tile's outputs][panel's tokens]; `bits` as stored and `rows` of a panel are constants of each instance. */
INLINE void NAME(tile)(const Matmul *job, int64_t tile, int64_t panel, const int bits, const int rows) {
    const uint8_t *block = job->packed + tile * job->blocks * BLOCK_BYTES(bits);
    const char *meta = job->meta + tile * job->groups * job->group_bytes;
    const panel_float *x = job->panels + panel * job->panel_size;
    const float *x_sums = job->x_sums + panel * job->groups * rows;
    const float *units = job->x_units + panel * job->groups * job->segments * rows;
    vec total[LEVEL_ROWS], group[LEVEL_ROWS], sum[LEVEL_ROWS > 4 ? LEVEL_ROWS : 4];
    UNROLL
    for (int r = 0; r < rows; r++) total[r] = NAME(zero)();
    for (int64_t g = 0, left = job->blocks; g < job->groups; g++, meta += job->group_bytes, x_sums += rows) {
        const int64_t blocks = left < job->group_blocks ? left : job->group_blocks;
        left -= blocks;
        for (int r = 0; r < rows; r++) group[r] = NAME(zero)();
        for (int64_t first = 0; first < blocks; first += SEGMENT, units += rows) {
            for (int s = 0; s < rows * CHAINS(rows); s++) sum[s] = NAME(zero)();
            for (int64_t b = first; b < blocks && b < first + SEGMENT; b++, block += BLOCK_BYTES(bits)) {
                x = NAME(part)(block, x, sum, bits, rows, 0);
                x = NAME(part)(block, x, sum, bits, rows, 1);
                x = NAME(part)(block, x, sum, bits, rows, 2);
                x = NAME(part)(block, x, sum, bits, rows, 3);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                vec all = sum[r * CHAINS(rows)];
                for (int c = 1; c < CHAINS(rows); c++) all = NAME(both)(all, sum[r * CHAINS(rows) + c]);
                group[r] = NAME(joined)(group[r], all, units + r);
            }
        }
        const vec scale = NAME(meta)(meta, job->half_meta);
        UNROLL
        for (int r = 0; r < rows; r++) {
            if (job->asym) group[r] = NAME(madd)(NAME(meta)(meta + job->group_bytes / 2, job->half_meta), NAME(all)(-x_sums[r]), group[r]);
            total[r] = NAME(madd)(scale, group[r], total[r]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        float out[TILE];
        NAME(put)(out, total[r]);
        write_out(job, panel * rows + r, tile, out);
    }
}

#if LEVEL_KIND > AVX512 /* floats are multiplied as such */
#define WIDER(rows)
#else
#define WIDER(rows)                                                                                                    \
    case QC_HALF_WEIGHT: NAME(tile)(job, tile, panel, QC_HALF_WEIGHT, rows); break;                                    \
    case QC_BFLOAT_WEIGHT: NAME(tile)(job, tile, panel, QC_BFLOAT_WEIGHT, rows); break;
#endif
#if LEVEL_KIND == PORTABLE
#define WIDTHS(rows) NAME(tile)(job, tile, panel, job->bits, rows);
#else
#define WIDTHS(rows)                                                                                                   \
    switch (job->bits) {                                                                                               \
        case 2: NAME(tile)(job, tile, panel, 2, rows); break;                                                          \
        case 3: NAME(tile)(job, tile, panel, 3, rows); break;                                                          \
        case 4: NAME(tile)(job, tile, panel, 4, rows); break;                                                          \
        WIDER(rows)                                                                                                    \
        default: NAME(tile)(job, tile, panel, 8, rows);                                                                \
    }
#endif

LEVEL_TARGET static void NAME(multiply)(const Matmul *job, int64_t tile, int64_t panel) {
    switch (job->rows) {
        case 1: WIDTHS(1) break;
#if LEVEL_KIND != PORTABLE
        case 2: WIDTHS(2) break;
#endif
#if LEVEL_ROWS > 4
        case 4: WIDTHS(4) break;
#endif
        default: WIDTHS(LEVEL_ROWS)
    }
}

#undef PASTE_
#undef PASTE
#undef NAME
#undef INLINE
#undef SHIFT
#undef LINE
#undef EACH
#undef CHAINS
#undef WIDTHS
#undef WIDER
#undef vec
#undef LEVEL
#undef LEVEL_TARGET
#undef LEVEL_KIND
#undef LEVEL_ROWS
#undef STEP
#undef TABLE
