// The one list of compiled tile kernels (as decode_instances.cuh). (row tiles a warp, token tiles): the wide one needs
// 132 KiB of shared memory; GPUs with less (sm_86, sm_89) take the next that fits.
#include "tile.cuh"

namespace qcore {

template <int BITS, typename T>
int tile_with(const Args<T>& arg, const Device& device, int row_tiles, void* workspace, cudaStream_t stream) {
  int status = QC_BAD_VARIANT;
  if (arg.m > 32 && (!row_tiles || row_tiles == 4)) {
    status = launch_tile<BITS, T, 4, 8>(arg, device, workspace, stream);
    if (status != QC_BAD_DEVICE) return status;
  }
  if (arg.m > 32 && (!row_tiles || row_tiles == 2)) {
    status = launch_tile<BITS, T, 2, 8>(arg, device, workspace, stream);
    if (status != QC_BAD_DEVICE) return status;
  }
  if (!row_tiles || row_tiles == 4) {
    status = launch_tile<BITS, T, 4, 4>(arg, device, workspace, stream);
    if (status != QC_BAD_DEVICE) return status;
  }
  return launch_tile<BITS, T, 2, 4>(arg, device, workspace, stream);
}

template <>
int matmul_tile<QC_BITS>(int dtype, const void* arg, const Device& device, int row_tiles, void* workspace, cudaStream_t stream) {
  if (dtype == 1) return tile_with<QC_BITS>(*static_cast<const Args<__nv_bfloat16>*>(arg), device, row_tiles, workspace, stream);
  return tile_with<QC_BITS>(*static_cast<const Args<__half>*>(arg), device, row_tiles, workspace, stream);
}

} // namespace qcore
