/*
 * Codes of a weight, a byte each, to the words that files hold and back. In two layouts what is side by side in one is rows apart
 * in the other: tiles are turned while they lie in the first-level cache, so that whole cache lines move on both sides. What
 * is written of a large weight goes past the cache, which need not read it first.
 *
 *      codes           uint8 [n][ldc], k of each row
 *      QC_ALONG        [n][ceil(k * bits / 32)]  the dense little-endian stream of an output's codes is a row of words
 *      QC_DOWN         [k * bits / 32][n]        it runs down a column of words
 *      QC_INTERLEAVED  [k][n / 8]                4 bits: bits 4s to 4s + 3 of a word hold output ORDER[s] of its eight
 *
 * The naive reference is pack() and unpack() of qcore/packing.py and a transposition.
 */
#include "qcore_cpu.h"

#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define CODES 256       /* of an output in a tile: whole words at every width */
#define OUTPUTS 16      /* of a tile of QC_DOWN: one cache line of words */
#define WORDS 16        /* of a row in a tile of QC_INTERLEAVED: one cache line */
#define STRIP 1024      /* codes of an output that pack_interleaved reads on end, so that the processor fetches ahead */
#define AHEAD 16        /* rows fetched before they are needed, since each lies in another page */
#define SLACK 2         /* words behind a row of a tile: rows then begin in different sets of the cache, and eights may run over */
#define LARGE (1 << 22) /* codes that no second-level cache holds */

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_LEVEL __attribute__((target_clones("avx2", "default")))
#else
#define EVERY_LEVEL
#endif
#define INLINE static inline __attribute__((always_inline))

static const int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};

/* ---- eight codes in 64 bits: a byte each, or side by side. Pairs, fours and then all eight move together ---- */

#define ONES(bits, codes) ((1ull << (bits) * (codes)) - 1)
#define SINGLE(bits) (ONES(bits, 1) * 0x0101010101010101ull)
#define PAIR(bits) (ONES(bits, 1) * 0x0001000100010001ull) /* the first of each pair, where it stays */
#define FOUR(bits) (ONES(bits, 2) * 0x0000000100000001ull)
#define EIGHT(bits) ONES(bits, 4)

INLINE uint64_t join(uint64_t x, int bits) {
    x &= SINGLE(bits);
    x = (x & PAIR(bits)) | (x >> (8 - bits) & PAIR(bits) << bits);
    x = (x & FOUR(bits)) | (x >> 2 * (8 - bits) & FOUR(bits) << 2 * bits);
    return (x & EIGHT(bits)) | (x >> 4 * (8 - bits) & EIGHT(bits) << 4 * bits);
}

INLINE uint64_t part(uint64_t x, int bits) {
    x = (x & EIGHT(bits)) | (x & EIGHT(bits) << 4 * bits) << 4 * (8 - bits);
    x = (x & FOUR(bits)) | (x & FOUR(bits) << 2 * bits) << 2 * (8 - bits);
    return (x & PAIR(bits)) | (x & PAIR(bits) << bits) << (8 - bits);
}

typedef void (*Stream)(const uint8_t *from, uint8_t *to); /* CODES codes of an output to their stream, or back */

/* Eight bytes are read and written for every eight codes: what is too much lies in the slack, or is written over next. */
#define WIDTH(bits)                                                            \
    EVERY_LEVEL static void join_##bits(const uint8_t *codes, uint8_t *to) {   \
        for (int i = 0; i < CODES / 8; i++) {                                  \
            uint64_t x;                                                        \
            memcpy(&x, codes + 8 * i, 8);                                      \
            x = join(x, bits);                                                 \
            memcpy(to + bits * i, &x, 8);                                      \
        }                                                                      \
    }                                                                          \
    EVERY_LEVEL static void part_##bits(const uint8_t *from, uint8_t *codes) { \
        for (int i = 0; i < CODES / 8; i++) {                                  \
            uint64_t x;                                                        \
            memcpy(&x, from + bits * i, 8);                                    \
            x = part(x, bits);                                                 \
            memcpy(codes + 8 * i, &x, 8);                                      \
        }                                                                      \
    }
WIDTH(1) WIDTH(2) WIDTH(3) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8)

EVERY_LEVEL static void join_4(const uint8_t *codes, uint8_t *to) {
    for (int i = 0; i < CODES / 2; i++) to[i] = (uint8_t)((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
}

EVERY_LEVEL static void part_4(const uint8_t *from, uint8_t *codes) {
    for (int i = 0; i < CODES / 2; i++) codes[2 * i] = from[i] & 15, codes[2 * i + 1] = from[i] >> 4;
}

static const Stream JOIN[] = {0, join_1, join_2, join_3, join_4, join_5, join_6, join_7, join_8};
static const Stream PART[] = {0, part_1, part_2, part_3, part_4, part_5, part_6, part_7, part_8};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- tiles ---- */

static inline void put(void *to, const void *from, int64_t bytes, int past_cache) {
#ifdef __SSE2__
    if (past_cache && bytes % 16 == 0 && (uintptr_t)to % 16 == 0) {
        for (int64_t i = 0; i < bytes / 16; i++) _mm_stream_si128((__m128i *)to + i, _mm_load_si128((const __m128i *)from + i));
        return;
    }
#endif
    memcpy(to, from, (size_t)bytes);
}

/* What was written past the cache is there for other threads. */
static inline void settle(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

static int64_t words_of(int bits, int64_t codes) { return (codes * bits + 31) / 32; }

static void pack_along(int bits, int64_t n, int64_t k, const uint8_t *codes, int64_t ldc, uint32_t *words) {
    _Alignas(64) uint32_t stream[CODES / 4 + SLACK];
    uint8_t edge[CODES] = {0};
    for (int64_t row = 0; row < n; row++)
        for (int64_t c = 0; c < k; c += CODES) {
            const int64_t count = least(CODES, k - c);
            const uint8_t *from = codes + row * ldc + c;
            if (count < CODES) from = memcpy(edge, from, (size_t)count);
            JOIN[bits](from, (uint8_t *)stream);
            put(words + row * words_of(bits, k) + c * bits / 32, stream, words_of(bits, count) * 4, n * k > LARGE);
        }
    settle();
}

static void unpack_along(int bits, int64_t n, int64_t k, const uint32_t *words, uint8_t *codes, int64_t ldc) {
    uint32_t stream[CODES / 4 + SLACK] = {0};
    _Alignas(64) uint8_t row[CODES];
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < k; c += CODES) {
            const int64_t count = least(CODES, k - c);
            memcpy(stream, words + r * words_of(bits, k) + c * bits / 32, (size_t)words_of(bits, count) * 4);
            PART[bits]((const uint8_t *)stream, row);
            put(codes + r * ldc + c, row, count, n * k > LARGE);
        }
    settle();
}

static void pack_down(int bits, int64_t n, int64_t k, const uint8_t *codes, int64_t ldc, uint32_t *words) {
    uint32_t tile[OUTPUTS][CODES / 4 + SLACK];
    _Alignas(64) uint32_t line[OUTPUTS];
    uint8_t edge[CODES] = {0};
    memset(tile, 0, sizeof tile);
    for (int64_t first = 0; first < n; first += OUTPUTS)
        for (int64_t c = 0; c < k; c += CODES) {
            const int64_t outputs = least(OUTPUTS, n - first), count = least(CODES, k - c);
            for (int64_t j = 0; j < outputs; j++) {
                const uint8_t *row = codes + (first + j) * ldc + c;
                for (int64_t next = CODES; next < 2 * CODES; next += 64) __builtin_prefetch(row + next);
                if (count < CODES) row = memcpy(edge, row, (size_t)count);
                JOIN[bits](row, (uint8_t *)tile[j]);
            }
            uint32_t *to = words + c * bits / 32 * n + first;
            for (int64_t i = 0; i < count * bits / 32; i++, to += n) {
                for (int64_t j = 0; j < OUTPUTS; j++) line[j] = tile[j][i];
                put(to, line, outputs * 4, n * k > LARGE);
            }
        }
    settle();
}

static void unpack_down(int bits, int64_t n, int64_t k, const uint32_t *words, uint8_t *codes, int64_t ldc) {
    uint32_t tile[OUTPUTS][CODES / 4 + SLACK];
    _Alignas(64) uint8_t row[CODES];
    memset(tile, 0, sizeof tile);
    for (int64_t first = 0; first < n; first += OUTPUTS)
        for (int64_t c = 0; c < k; c += CODES) {
            const int64_t outputs = least(OUTPUTS, n - first), count = least(CODES, k - c);
            const uint32_t *from = words + c * bits / 32 * n + first;
            for (int64_t i = 0; i < count * bits / 32; i++, from += n) {
                __builtin_prefetch(from + AHEAD * n);
                for (int64_t j = 0; j < outputs; j++) tile[j][i] = from[j];
            }
            for (int64_t j = 0; j < outputs; j++) {
                PART[bits]((const uint8_t *)tile[j], row);
                put(codes + (first + j) * ldc + c, row, count, n * k > LARGE);
            }
        }
    settle();
}

EVERY_LEVEL
static void pack_interleaved(int64_t n, int64_t k, const uint8_t *codes, int64_t ldc, uint32_t *words) {
    uint32_t tile[WORDS][STRIP + SLACK];
    _Alignas(64) uint32_t line[WORDS];
    memset(tile, 0, sizeof tile);
    for (int64_t first = 0; first < n / 8; first += WORDS)
        for (int64_t c = 0; c < k; c += STRIP) {
            const int64_t across = least(WORDS, n / 8 - first), count = least(STRIP, k - c);
            for (int64_t j = 0; j < across; j++) {
                const uint8_t *from = codes + (first + j) * 8 * ldc + c;
                uint32_t *restrict row = tile[j];
                for (int64_t i = 0; i < count; i++) {
                    uint32_t word = 0;
                    for (int s = 0; s < 8; s++) word |= (uint32_t)(from[ORDER[s] * ldc + i] & 15) << 4 * s;
                    row[i] = word;
                }
            }
            uint32_t *to = words + c * (n / 8) + first;
            for (int64_t i = 0; i < count; i++, to += n / 8) {
                for (int64_t j = 0; j < WORDS; j++) line[j] = tile[j][i];
                put(to, line, across * 4, n * k > LARGE);
            }
        }
    settle();
}

EVERY_LEVEL
static void unpack_interleaved(int64_t n, int64_t k, const uint32_t *words, uint8_t *codes, int64_t ldc) {
    uint32_t tile[WORDS][CODES + SLACK];
    _Alignas(64) uint8_t low[CODES], high[CODES]; /* of a byte of each word: the codes of two outputs */
    memset(tile, 0, sizeof tile);
    for (int64_t first = 0; first < n / 8; first += WORDS)
        for (int64_t c = 0; c < k; c += CODES) {
            const int64_t across = least(WORDS, n / 8 - first), count = least(CODES, k - c);
            const uint32_t *from = words + c * (n / 8) + first;
            for (int64_t i = 0; i < count; i++, from += n / 8) {
                __builtin_prefetch(from + AHEAD * (n / 8));
                for (int64_t j = 0; j < across; j++) tile[j][i] = from[j];
            }
            for (int64_t j = 0; j < across; j++)
                for (int s = 0; s < 8; s += 2) {
                    uint8_t *to = codes + (first + j) * 8 * ldc + c;
                    for (int i = 0; i < CODES; i++) high[i] = (uint8_t)(tile[j][i] >> 4 * s);
                    for (int i = 0; i < CODES; i++) low[i] = high[i] & 15, high[i] >>= 4;
                    put(to + ORDER[s] * ldc, low, count, n * k > LARGE);
                    put(to + ORDER[s + 1] * ldc, high, count, n * k > LARGE);
                }
        }
    settle();
}

static int fits(int bits, int layout, int64_t n, int64_t k, int64_t ldc) {
    if (bits < 1 || bits > 8 || n < 1 || k < 1 || ldc < k) return 0;
    if (layout == QC_INTERLEAVED) return bits == 4 && n % 8 == 0;
    return layout == QC_ALONG || (layout == QC_DOWN && k * bits % 32 == 0);
}

int qc_pack_codes(int bits, int layout, int64_t n, int64_t k, const uint8_t *codes, int64_t ldc, uint32_t *words) {
    if (!fits(bits, layout, n, k, ldc) || !codes || !words || (uintptr_t)words % 4) return QC_BAD_ARGUMENT;
    switch (layout) {
    case QC_ALONG: pack_along(bits, n, k, codes, ldc, words); break;
    case QC_DOWN: pack_down(bits, n, k, codes, ldc, words); break;
    default: pack_interleaved(n, k, codes, ldc, words);
    }
    return QC_OK;
}

int qc_unpack_codes(int bits, int layout, int64_t n, int64_t k, const uint32_t *words, uint8_t *codes, int64_t ldc) {
    if (!fits(bits, layout, n, k, ldc) || !codes || !words || (uintptr_t)words % 4) return QC_BAD_ARGUMENT;
    switch (layout) {
    case QC_ALONG: unpack_along(bits, n, k, words, codes, ldc); break;
    case QC_DOWN: unpack_down(bits, n, k, words, codes, ldc); break;
    default: unpack_interleaved(n, k, words, codes, ldc);
    }
    return QC_OK;
}
