/* qcore's CUDA kernels: the whole C ABI. No torch, no Python: raw device pointers, sizes, a stream.
 *
 *   Y[m, n] = X[m, k] . dequantize(W)^T (+ bias),   W ~ scales[:, g] * (codes - zeros[:, g]),  g = column / group_size
 *
 * Every function returns 0 or one of the codes below; qc_error_string turns it into words. Nothing is launched
 * unless 0 is returned. All pointers are device pointers, except none. m == 0 is allowed and does nothing.
 * `stream` is a cudaStream_t. Functions are safe to call from several threads and under graph capture.
 *
 *   dtype       0 = float16, 1 = bfloat16: the dtype of x, y, bias and scales alike
 *   bits        2, 3, 4, 8
 *   k           packed columns. Where `perm` is given (act-order), packed column c holds column perm[c] of the
 *               original weight, or nothing where perm[c] == -1 (padding, so that every group may start at a
 *               multiple of 32).
 *   group_size  a positive multiple of 32, or -1: one group. The last group may be shorter.
 *   asym        0: every zero is 2^(bits-1) and meta holds no zeros. 1: meta holds zeros.
 *   ldx, ldy    row strides in elements. ldx is a multiple of 8 and x is 16-byte aligned.
 */
#ifndef QCORE_CUDA_H
#define QCORE_CUDA_H
#include <stdint.h>

#define QC_CUDA_ABI 1

enum {
  QC_OK = 0,
  QC_BAD_BITS = 1,        /* bits is not one this function serves */
  QC_BAD_DTYPE = 2,       /* dtype is neither 0 nor 1 */
  QC_BAD_SHAPE = 3,       /* a size is negative, zero where it may not be, or past 2^31 - 1 elements of K or N */
  QC_BAD_GROUP = 4,       /* group_size is neither -1 nor a positive multiple of 32 */
  QC_BAD_ALIGNMENT = 5,   /* a pointer is not 16-byte aligned, or ldx is no multiple of 8 */
  QC_NULL_POINTER = 6,
  QC_SMALL_WORKSPACE = 7, /* workspace_bytes is under what qc_workspace_bytes says */
  QC_BAD_DEVICE = 8,      /* no sm_80 or later, or too little shared memory for this instance */
  QC_BAD_STRIDE = 9,      /* ldx < k or ldy < n */
  QC_BAD_VARIANT = 10,    /* the kernel asked for is not compiled, or does not serve this m */
  QC_CUDA_ERROR = 1000    /* 1000 + cudaError_t */
};

/* Which kernel qc_matmul runs. QC_AUTO chooses by m and the device. QC_DECODE: m <= 32, every width, no workspace.
   QC_TILE: any m, 4 and 8 bits. QC_WGMMA: the same, on sm_90 and in a build that has sm_90a. */
enum { QC_AUTO = 0, QC_DECODE = 1, QC_TILE = 2, QC_WGMMA = 3 };

/* flags of qc_matmul */
enum {
  QC_OVERLAP = 1 /* sm_90: start while the kernel before it in the stream still runs and read weights meanwhile
                    (x is read after that kernel has ended). Only where that kernel does not write the weights. */
};

#ifdef __cplusplus
extern "C" {
#endif

int qc_abi_version(void);
const char* qc_error_string(int code);

int64_t qc_packed_bytes(int bits, int64_t n, int64_t k);          /* < 0: bad bits or shape */
int64_t qc_meta_bytes(int64_t n, int64_t groups, int asym);
int64_t qc_workspace_bytes(void); /* of the current device; zero-filled once by the caller, left zero where it matters */

/* codes uint8 [n, k_codes] -> packed; perm int32 [k] or null (then k == k_codes) */
int qc_repack(int bits, int64_t n, int64_t k_codes, int64_t k, const uint8_t* codes, const int32_t* perm,
              void* packed, void* stream);
/* packed -> codes uint8 [n, k_codes]; the inverse */
int qc_unpack(int bits, int64_t n, int64_t k_codes, int64_t k, const void* packed, const int32_t* perm,
              uint8_t* codes, void* stream);
/* scales dtype [n, groups], zeros int32 [n, groups] in 0 .. 2^bits or null (sym) -> meta */
int qc_pack_meta(int bits, int dtype, int64_t n, int64_t groups, const void* scales, const int32_t* zeros,
                 void* meta, void* stream);
/* packed, meta -> w dtype [n, k_out], row stride ldw; perm as above puts columns back (k_out original columns) */
int qc_dequantize(int bits, int dtype, int64_t n, int64_t k_out, int64_t k, int64_t group_size, int asym,
                  const void* packed, const void* meta, const int32_t* perm, void* w, int64_t ldw, void* stream);
/* out[m, k_out] = x[:, perm], 0 where perm is -1; perm null: x, then zeros. out rows are k_out long, k_out % 8 == 0 */
int qc_gather(int dtype, int64_t m, int64_t k_in, int64_t k_out, const void* x, int64_t ldx, const int32_t* perm,
              void* out, void* stream);
/* workspace: null is enough where QC_DECODE runs. One workspace serves one stream at a time. */
int qc_matmul(int bits, int dtype, int64_t m, int64_t n, int64_t k, int64_t group_size, int asym,
              const void* x, int64_t ldx, const void* packed, const void* meta, const void* bias,
              void* y, int64_t ldy, void* workspace, int64_t workspace_bytes, int kernel, int flags, void* stream);
/* benchmarks and tests only: qc_matmul with the kernel's own choices given, 0 = leave it. row_tiles: of QC_DECODE 2, 4, 8;
   of QC_TILE 2, 4; of QC_WGMMA e.g. 311284: 3 warpgroups, 1 row block each, 128 tokens, split in 4 (hopper_instances.cuh). warps: of QC_DECODE 8, 16 */
int qc_matmul_tuned(int bits, int dtype, int64_t m, int64_t n, int64_t k, int64_t group_size, int asym,
                    const void* x, int64_t ldx, const void* packed, const void* meta, const void* bias, void* y,
                    int64_t ldy, void* workspace, int64_t workspace_bytes, int kernel, int flags, int row_tiles,
                    int warps, void* stream);
/* one thread per output, float64 sums, reads the same packed bytes: what the others are checked against */
int qc_matmul_reference(int bits, int dtype, int64_t m, int64_t n, int64_t k, int64_t group_size, int asym,
                        const void* x, int64_t ldx, const void* packed, const void* meta, const void* bias,
                        void* y, int64_t ldy, void* stream);

#ifdef __cplusplus
}
#endif
#endif
