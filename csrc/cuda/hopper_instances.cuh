// The one list of compiled Hopper kernels (as decode_instances.cuh). The build says with
// QC_SM90A that sm_90a is among its targets (the host's compiler can't see that); without, there are none.
#include "hopper.cuh"

namespace qcore {

#ifdef QC_SM90A
template <int BITS, typename T>
int hopper_with(const Args<T>& arg, const Device& device, int variant, void* workspace, cudaStream_t stream) {
  const bool small = int64_t(arg.n) * arg.k <= SMALL_WEIGHT; // has few tiles: narrow ones occupy more of the device (measured)
  if (!variant) variant = arg.m <= (small ? 64 : 32) ? 232 : arg.m <= 64 ? 264 : arg.m <= (small ? 256 : 128) ? 1128 : 1256;
  switch (variant) { // 1000s or 100s: row blocks of a warpgroup; the rest: tokens of a block
    case 232: return launch_hopper<BITS, T, 2, 32>(arg, device, workspace, stream);
    case 264: return launch_hopper<BITS, T, 2, 64>(arg, device, workspace, stream);
    case 1128: return launch_hopper<BITS, T, 1, 128>(arg, device, workspace, stream);
    case 1256: return launch_hopper<BITS, T, 1, 256>(arg, device, workspace, stream);
  }
  return QC_BAD_VARIANT;
}

#endif

template <>
int matmul_hopper<QC_BITS>(int dtype, const void* arg, const Device& device, int variant, void* workspace, cudaStream_t stream) {
#ifdef QC_SM90A
  if (dtype == 1) return hopper_with<QC_BITS>(*static_cast<const Args<__nv_bfloat16>*>(arg), device, variant, workspace, stream);
  return hopper_with<QC_BITS>(*static_cast<const Args<__half>*>(arg), device, variant, workspace, stream);
#else
  return QC_BAD_VARIANT;
#endif
}

} // namespace qcore
