/*
 * qcore's native code for CPUs: a plain C interface. No torch, Python or C++ headers.
 *
 * Every function returns a status: QC_OK, or what was wrong. Nothing is kept between calls; calls from several threads at
 * once are independent. The same input gives the same bits whatever the number of threads and whatever the instruction
 * set: every row of a weight is computed by the same sequence of IEEE operations, and vectors only put rows side by side.
 */
#ifndef QCORE_CPU_H
#define QCORE_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QC_CPU_ABI 4

enum { QC_OK = 0, QC_BAD_ARGUMENT = 1, QC_NO_MEMORY = 2, QC_SCALE_OVERFLOW = 3, QC_BAD_LEVEL = 4 };

enum { QC_SEARCH_NONE = 0, QC_SEARCH_MINMAX = 1, QC_SEARCH_MSE = 2 }; /* where a group's grid comes from */

/* instruction sets */
enum { QC_LEVEL_BEST = 0, QC_LEVEL_PORTABLE = 1, QC_LEVEL_AVX2 = 2, QC_LEVEL_AVX512 = 3, QC_LEVEL_AVX512_VNNI = 4, QC_LEVEL_AVX512_BF16 = 5 };

enum { QC_FLOAT32 = 0, QC_BFLOAT16 = 1, QC_FLOAT16 = 2 }; /* dtypes of activations */

/* bits of a weight that is not quantized, halves or bfloat16 as they are: its meta are ones, its group_size is -1 */
enum { QC_HALF_WEIGHT = 16, QC_BFLOAT_WEIGHT = 17 };

int qc_abi_version(void);
const char *qc_source(void); /* the hash of the sources, as given to the compiler (QC_SOURCE) */
const char *qc_error_string(int status);
int qc_cpu_level(void); /* the best instruction set of this machine */
int qc_matmul_level(void); /* that of the matmul functions below, which know two more: what QC_LEVEL_BEST means to them */
int qc_limit_matmul_level(int level); /* let QC_LEVEL_BEST mean this one, or with QC_LEVEL_BEST the machine's best again */

/*
 * Quantize a block of columns of W by GPTQ, and find the grids of the groups that begin in it.
 *
 * Matrices are stored by columns of the weight: rows of the weight lie side by side, `ld…` floats (or bytes) apart from one
 * column to the next.
 *
 * W           float  [extent][ldw]       the live weights; read only
 * U           float  [columns][ldu]      the block's own part of the upper factor of the inverse Hessian
 * importance  float  [extent]            the weight of each column's error in the search
 * group_of    int32  [extent]            the group of each column
 * scales      float  [groups][ldg]       written for the groups that begin here when search is not QC_SEARCH_NONE,
 * zeros       float  [groups][ldg]         otherwise read
 * codes       uint8  [columns][ldc]      written
 * Err         float  [columns][lde]      written: (w - grid(w)) / U_ii, what later columns have to make up for
 *
 * Columns before `columns` are quantized; those up to `extent` are there because a group may reach beyond the block. Groups
 * begin at every multiple of group_size, counted from the block's first column. With columns = 0 only grids are found,
 * those of all groups up to `extent`, and U, codes and Err may be null. Otherwise only a lone group reaches beyond the block.
 */
int qc_gptq_block(int bits, int sym, int search, int64_t rows, int64_t columns, int64_t extent, int64_t group_size,
                  int64_t groups, const float *W, int64_t ldw, const float *U, int64_t ldu, const float *importance,
                  const int32_t *group_of, float *scales, float *zeros, int64_t ldg, uint8_t *codes, int64_t ldc,
                  float *Err, int64_t lde, int threads, int level);

/*
 * Take one step of AutoRound on a weight, in place, and write the quantized weight that follows (autoround.c).
 *
 * W, V              float  [rows][groups][group_size]   a shorter last group is filled up
 * G, Q              float  [rows][columns]              the gradient of the quantized weight (read), the weight (written)
 * low, high         float  [rows][groups]               the ends of the grid's range
 * alpha, beta       float  [rows][groups]               their factors
 * rates             float  [2]                          of V, and of alpha and beta: those stay where it is negative
 * parallel          as below
 */
int qc_autoround_step(int bits, int sym, int64_t rows, int64_t groups, int64_t group_size, int64_t columns, const float *W,
                      float *V, const float *G, float *Q, const float *low, const float *high, float *alpha, float *beta,
                      const float *rates, int threads, void *parallel);

/*
 * Products by a quantized weight W [n][columns], w = scale * (code - zero), as one layout holds it (matmul.c draws it):
 *
 * packed      the codes, qc_cpu_pack makes it: ceil(n / 16) * ceil(k / 32) * 64 * bits bytes (bits as stored: 8 for 5 to 8, 16 for 17)
 * meta        [ceil(n / 16)][groups][scales, then zeros - 2^(bits-1) where asym][16], half where half_meta, else float
 * perm        int32 [k] or null: packed column c holds column perm[c], nothing where that is -1. Null: k = columns, in order
 * group_size  of packed columns: a multiple of 32, or -1 for one group
 * parallel    GOMP_parallel of an OpenMP runtime whose threads do the work; null: threads are started for each call
 *
 * `packed` is aligned to 4 bytes, every other pointer to its element. Here the instruction set does change the bits: sums are taken in different
 * orders, with fused multiply-add or without; so does the number of tokens (1, 2, 3 to 4, more). The number of threads does not.
 */
int qc_cpu_matmul(int bits, int dtype, int64_t m, int64_t n, int64_t columns, int64_t k, int64_t group_size, int asym,
                  int half_meta, const void *x, int64_t ldx, const void *packed, const void *meta, const int32_t *perm,
                  void *y, int64_t ldy, int threads, int level, void *parallel);

/* Lay codes uint8 [n][columns], or a weight of 16 bits, out as `packed`. */
int qc_cpu_pack(int bits, int64_t n, int64_t columns, int64_t k, const void *codes, const int32_t *perm, void *packed,
                int threads, void *parallel);

/* W as dtype [n][ldw], in its own order. */
int qc_cpu_dequantize(int bits, int dtype, int64_t n, int64_t columns, int64_t k, int64_t group_size, int asym, int half_meta,
                      const void *packed, const void *meta, const int32_t *perm, void *weight, int64_t ldw, int threads,
                      void *parallel);

/*
 * Codes uint8 [n][ldc], k of each row, to the words of a file's layout (codes.c draws them) and back, on the calling thread.
 * `words` is aligned to 4 bytes. QC_DOWN: k * bits is a multiple of 32. QC_INTERLEAVED: 4 bits, n is a
 * multiple of 8.
 */
enum { QC_ALONG = 0, QC_DOWN = 1, QC_INTERLEAVED = 2 };
int qc_pack_codes(int bits, int layout, int64_t n, int64_t k, const uint8_t *codes, int64_t ldc, uint32_t *words);
int qc_unpack_codes(int bits, int layout, int64_t n, int64_t k, const uint32_t *words, uint8_t *codes, int64_t ldc);

/*
 * Codes uint8 [blocks][32] with a scale d for each block, and an offset m where it is not null, to GGUF's blocks of 4, 5 or 8 bits
 * (8 has no offset) and back (blocks.c). d and m are halves as they are.
 */
int qc_pack_blocks(int bits, int64_t blocks, const uint8_t *codes, const uint16_t *d, const uint16_t *m, uint8_t *packed);
int qc_unpack_blocks(int bits, int64_t blocks, const uint8_t *packed, uint8_t *codes, uint16_t *d, uint16_t *m);

/*
 * Give torch's dispatcher qcore::cpu_matmul and qcore::cpu_matmul_out, whose schemas the caller has defined (torch_op.c).
 *
 * functions   torch's C functions, omp_get_max_threads and GOMP_parallel, in the order of the struct there; count of them
 */
int qc_torch_register(const void *const *functions, int64_t count);

#ifdef __cplusplus
}
#endif

#endif
