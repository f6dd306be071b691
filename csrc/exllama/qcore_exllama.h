/* qcore's decode-first kernel for 4 bits and float16: the whole C ABI. Raw device pointers, sizes, a stream; no torch, no Python.
 *
 *   y[m, n] = x[m, columns] . dequantize(W)^T,   w = scales[g] * (code - zeros[g])
 *
 * packed   uint32 [4 ceil(k / 32)][ceil(n / 128) 128]: a word holds eight columns of one output; the pair 2 p, 2 p + 1 of them
 *          in nibbles p and p + 4
 * scales   half [groups][ceil(n / 128) 128]; zeros likewise, whole numbers from 0 to 16, or null: all are 8
 * perm     int32 [k] or null: packed column c holds column perm[c], nothing where that is -1. Null: k = columns, in order
 * group_size  of packed columns: a multiple of 32, or -1 for one group
 *
 * Every function returns 0 or a code that qc_error_string turns into words; nothing is launched unless it returns 0. All
 * pointers are device pointers. `stream` is a cudaStream_t.
 */
#ifndef QCORE_EXLLAMA_H
#define QCORE_EXLLAMA_H
#include <stdint.h>

#define QC_EXLLAMA_ABI 1

enum { QC_OK = 0, QC_BAD_ARGUMENT = 1, QC_BAD_ALIGNMENT = 2, QC_BAD_DEVICE = 3, QC_SMALL_WORKSPACE = 4, QC_CUDA_ERROR = 1000 };

#ifdef __cplusplus
extern "C" {
#endif

int qc_abi_version(void);
const char* qc_error_string(int code);

/* Floats of `partial` that qc_exl_matmul needs for these sizes on the current device; negative: an error code, negated. */
int64_t qc_exl_partial(int64_t m, int64_t n, int64_t k);

/* codes uint8 [n][columns] -> packed */
int qc_exl_pack(int64_t n, int64_t columns, int64_t k, const uint8_t* codes, const int32_t* perm, void* packed, void* stream);

/* packed -> w half [columns][ldw], transposed; columns that no packed one holds are left alone */
int qc_exl_dequantize(int64_t n, int64_t columns, int64_t k, int64_t group_size, const void* packed, const void* scales,
                      const void* zeros, const int32_t* perm, void* w, int64_t ldw, void* stream);

/* arrived: int32 [counters], at least ceil(n / 128) ceil(m / 8) of them, zero before and after; one set serves one stream at a
   time. The same input gives the same bits. */
int qc_exl_matmul(int64_t m, int64_t n, int64_t columns, int64_t k, int64_t group_size, const void* x, int64_t ldx,
                  const void* packed, const void* scales, const void* zeros, const int32_t* perm, void* y, int64_t ldy,
                  float* partial, int64_t partial_size, int32_t* arrived, int64_t counters, void* stream);

#ifdef __cplusplus
}
#endif
#endif
