// The one list of compiled decode kernels: a file decode_<bits>.cu sets QC_BITS and includes this, so that widths
// compile in parallel.
//
// Row tiles a pass and warps, chosen by measurement (README.md): a block with few tiles keeps more stages of them in
// flight, many tiles share one read of x. 16 warps leave 128 registers a thread.
#include "decode.cuh"

namespace qcore {

#define QC_DECODE_LIST(X) X(1, 2, 16) X(1, 4, 16) X(1, 8, 16) X(1, 8, 8) X(2, 2, 16) X(2, 4, 16) X(2, 8, 8) X(4, 4, 8)

template <int BITS, typename T>
int decode_with(const Args<T>& arg, const Device& device, int flags, int row_tiles, int warps, cudaStream_t stream) {
  const int token_tiles = arg.m <= 8 ? 1 : arg.m <= 16 ? 2 : 4;
  if (!row_tiles) row_tiles = min(8, div_up(arg.tiles, device.sms));
  int status = QC_BAD_VARIANT;
#define QC_TRY(TOKENS, ROWS, WARPS)                                                              \
  if (token_tiles == TOKENS && row_tiles <= ROWS && (!warps || warps == WARPS)) {                \
    status = launch_decode<BITS, T, TOKENS, ROWS, WARPS>(arg, device, flags, stream);            \
    if (status != QC_BAD_DEVICE) return status; /* too little shared memory for so many warps */ \
  }
  QC_DECODE_LIST(QC_TRY)
#undef QC_TRY
  return row_tiles > 4 ? decode_with<BITS>(arg, device, flags, 4, warps, stream) : status;
}

template <>
int matmul_decode<QC_BITS>(int dtype, const void* arg, const Device& device, int flags, int row_tiles,
                           int warps, cudaStream_t stream) {
  if (dtype == 1)
    return decode_with<QC_BITS>(*static_cast<const Args<__nv_bfloat16>*>(arg), device, flags, row_tiles, warps, stream);
  return decode_with<QC_BITS>(*static_cast<const Args<__half>*>(arg), device, flags, row_tiles, warps, stream);
}

} // namespace qcore
