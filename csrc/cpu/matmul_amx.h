/*
 * One tile of TILE outputs times one panel of 16 tokens of bfloat16 in AMX's matrix registers. Included once by matmul.c, after the
 * bfloat16 of AVX-512, whose vectors of codes are the rows that AMX multiplies:
 *
 *      A  [16 tokens][32 columns]                  a block of the panel, as it lies there
 *      B  [16 pairs of columns][16 outputs][2]     the block's codes, unpacked into 1 KB
 *      C  [16 tokens][16 outputs]                  float sums over a group
 *
 * QC_EMULATE_AMX compiles the same code with the instructions written out in C, for tests on CPUs without them.
 */
#define AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define AMX_ROWS 16
/* Registers are named by literals, which is what compilers take: C is 0, A is 1, B is 2. */

#ifdef QC_EMULATE_AMX
static _Thread_local uint32_t emulated[3][16][16];
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) memset(emulated, 0xff, sizeof emulated) /* NaN: what is used must have been written */
#define _tile_release() (void)0
#define _tile_zero(t) memset(emulated[t], 0, sizeof emulated[t])
#define _tile_loadd(t, from, stride) for (int r_ = 0; r_ < 16; r_++) memcpy(emulated[t][r_], (const char *)(from) + r_ * (stride), 64)
#define _tile_stored(t, to, stride) for (int r_ = 0; r_ < 16; r_++) memcpy((char *)(to) + r_ * (stride), emulated[t][r_], 64)
static void _tile_dpbf16ps(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                const uint32_t x = emulated[a][m][k], w = emulated[b][k][n];
                const float low = bits_to_float(x << 16) * bits_to_float(w << 16);
                const float high = bits_to_float(x & 0xffff0000) * bits_to_float(w & 0xffff0000);
                emulated[c][m][n] = float_to_bits(bits_to_float(emulated[c][m][n]) + low + high);
            }
}
static int machine_has_amx(void) { return 1; }
#elif defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
/* The CPU has the instructions, and the system lets this process have their registers, which it must be asked for. */
static int machine_has_amx(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
static int machine_has_amx(void) { return 0; }
#endif

/* Rows of 64 bytes, 16 of them, for each of the three registers: what ldtilecfg reads. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_config = {.palette = 1, .row_bytes = {64, 64, 64}, .rows = {16, 16, 16}};

AMX_TARGET static inline __attribute__((always_inline)) void amx_tile(const Matmul *job, int64_t tile, int64_t panel, const int bits) {
    const uint8_t *block = job->packed + tile * job->blocks * BLOCK_BYTES(bits);
    const char *meta = job->meta + tile * job->groups * job->group_bytes;
    const panel_float *x = job->panels + panel * job->panel_size;
    const float *x_sums = job->x_sums + panel * job->groups * AMX_ROWS;
    _Alignas(64) __m512 total[AMX_ROWS], sums[AMX_ROWS], unpacked[TILE];
    _tile_loadconfig(&amx_config);
    for (int r = 0; r < AMX_ROWS; r++) total[r] = _mm512_setzero_ps();
    for (int64_t g = 0, left = job->blocks; g < job->groups; g++, meta += job->group_bytes, x_sums += AMX_ROWS) {
        const int64_t blocks = left < job->group_blocks ? left : job->group_blocks;
        left -= blocks;
        _tile_zero(0);
        for (int64_t b = 0; b < blocks; b++, block += BLOCK_BYTES(bits), x += AMX_ROWS * BLOCK / 2) {
            UNROLL
            for (int part = 0; part < 4; part++) unpack_avx512_bf16(block, bits, part, unpacked + 4 * part);
            _tile_loadd(1, x, 64);
            _tile_loadd(2, unpacked, 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, sums, 64);
        const __m512 scale = meta_avx512_bf16(meta, job->half_meta);
        for (int r = 0; r < AMX_ROWS; r++) {
            __m512 group = sums[r];
            if (job->asym) group = _mm512_fmadd_ps(meta_avx512_bf16(meta + job->group_bytes / 2, job->half_meta), _mm512_set1_ps(-x_sums[r]), group);
            total[r] = _mm512_fmadd_ps(scale, group, total[r]);
        }
    }
    _tile_release();
    for (int r = 0; r < AMX_ROWS; r++) write_out(job, panel * AMX_ROWS + r, tile, (const float *)&total[r]);
}

AMX_TARGET static void multiply_amx(const Matmul *job, int64_t tile, int64_t panel) {
    switch (job->bits) {
        case 2: amx_tile(job, tile, panel, 2); break;
        case 3: amx_tile(job, tile, panel, 3); break;
        case 4: amx_tile(job, tile, panel, 4); break;
        default: amx_tile(job, tile, panel, 8);
    }
}
