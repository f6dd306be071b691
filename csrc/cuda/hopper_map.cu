// The tensor maps of x, packed and meta. The driver makes it; asking the runtime for the driver's function leaves nothing to link with.
#include <atomic>

#include "hopper.cuh"

namespace qcore {

int make_map(CUtensorMap* map, const void* base, bool two_bytes, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows,
             int box_columns, bool swizzled) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static std::atomic<Encode> known{nullptr};
  Encode encode = known.load(std::memory_order_relaxed);
  if (!encode) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return QC_CUDA_ERROR + error;
    if (result != cudaDriverEntryPointSuccess) return QC_BAD_DEVICE;
    known.store(encode = reinterpret_cast<Encode>(found), std::memory_order_relaxed);
  }
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUresult result =
      encode(map, two_bytes ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_INT32, 2, const_cast<void*>(base), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? QC_OK : QC_CUDA_ERROR + cudaErrorInvalidValue;
}

} // namespace qcore
