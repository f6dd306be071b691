/*
 * Blocks of GGUF: 32 codes of one output with their scale, as ggml lays them out. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0:
 *
 *      d (half), m (half; where there is an offset), the top bits of 32 codes (5 bits), then
 *      16 bytes, code i low and code i + 16 high in byte i (4 and 5 bits), or 32 bytes, code - 128 (8 bits)
 *
 * The naive reference is encode() and decode() of plugins/exporters/gguf_file.py.
 */
#include "qcore_cpu.h"

#include <string.h>

#define BLOCK 32
#define INLINE static inline __attribute__((always_inline))

/* Bit 4 of each of eight codes, and back. */
INLINE uint8_t tops(const uint8_t *codes) {
    uint64_t x;
    memcpy(&x, codes, 8);
    return (uint8_t)(((x >> 4 & 0x0101010101010101ull) * 0x0102040810204080ull) >> 56);
}

INLINE uint64_t spread_tops(uint8_t bits) {
    const uint64_t own = bits * 0x0101010101010101ull & 0x8040201008040201ull; /* byte i keeps bit i */
    return (own + 0x7f7f7f7f7f7f7f7full) >> 3 & 0x1010101010101010ull;
}

INLINE void pack(int bits, int offset, int64_t blocks, const uint8_t *codes, const uint16_t *d, const uint16_t *m, uint8_t *to) {
    for (int64_t b = 0; b < blocks; b++, codes += BLOCK) {
        memcpy(to, d + b, 2), to += 2;
        if (offset) memcpy(to, m + b, 2), to += 2;
        if (bits == 8) {
            for (int i = 0; i < BLOCK; i++) to[i] = codes[i] ^ 0x80;
            to += BLOCK;
            continue;
        }
        if (bits == 5) {
            for (int i = 0; i < 4; i++) to[i] = tops(codes + 8 * i);
            to += 4;
        }
        for (int i = 0; i < 16; i++) to[i] = (uint8_t)((codes[i] & 15) | codes[i + 16] << 4);
        to += 16;
    }
}

INLINE void unpack(int bits, int offset, int64_t blocks, const uint8_t *from, uint8_t *codes, uint16_t *d, uint16_t *m) {
    for (int64_t b = 0; b < blocks; b++, codes += BLOCK) {
        memcpy(d + b, from, 2), from += 2;
        if (offset) memcpy(m + b, from, 2), from += 2;
        if (bits == 8) {
            for (int i = 0; i < BLOCK; i++) codes[i] = from[i] ^ 0x80;
            from += BLOCK;
            continue;
        }
        const uint8_t *low = from + (bits == 5 ? 4 : 0);
        for (int i = 0; i < 16; i++) codes[i] = low[i] & 15, codes[i + 16] = low[i] >> 4;
        if (bits == 5)
            for (int i = 0; i < 4; i++) {
                uint64_t x;
                memcpy(&x, codes + 8 * i, 8);
                x |= spread_tops(from[i]);
                memcpy(codes + 8 * i, &x, 8);
            }
        from = low + 16;
    }
}

static int fits(int bits, int64_t blocks, const void *codes, const void *d, const void *m, const void *packed) {
    if ((bits != 4 && bits != 5 && bits != 8) || (bits == 8 && m)) return 0;
    return blocks > 0 && codes && d && packed && (uintptr_t)d % 2 == 0 && (uintptr_t)m % 2 == 0;
}

#define EACH(CASE) CASE(4, 0) CASE(4, 1) CASE(5, 0) CASE(5, 1) CASE(8, 0)

int qc_pack_blocks(int bits, int64_t blocks, const uint8_t *codes, const uint16_t *d, const uint16_t *m, uint8_t *packed) {
    if (!fits(bits, blocks, codes, d, m, packed)) return QC_BAD_ARGUMENT;
#define CASE(b, offset) \
    if (bits == b && !m == !offset) pack(b, offset, blocks, codes, d, m, packed);
    EACH(CASE)
#undef CASE
    return QC_OK;
}

int qc_unpack_blocks(int bits, int64_t blocks, const uint8_t *packed, uint8_t *codes, uint16_t *d, uint16_t *m) {
    if (!fits(bits, blocks, codes, d, m, packed)) return QC_BAD_ARGUMENT;
#define CASE(b, offset) \
    if (bits == b && !m == !offset) unpack(b, offset, blocks, packed, codes, d, m);
    EACH(CASE)
#undef CASE
    return QC_OK;
}
