// The one list of compiled Hopper kernels (as decode_instances.cuh). The build says with QC_SM90A that
// sm_90a is among its targets (the host's compiler can't see that); without, there are none.
#include "hopper.cuh"

namespace qcore {

#ifdef QC_SM90A
// Warpgroups, row blocks of each, tokens, clocks for 128 columns.
#define QC_HOPPER_LIST(X) \
  X(2, 2, 16, 1200) X(2, 2, 32, 1260) X(3, 1, 32, 1080) X(3, 1, 64, 1300) X(2, 1, 128, 1340) X(3, 1, 128, 1775) X(2, 1, 256, 2090)

// `variant`: a shape's warpgroups, row blocks and tokens (three digits), then a digit for the split; 0 leaves it to the estimate.
template <int BITS, typename T>
int hopper_with(const Args<T>& arg, const Device& device, int variant, void* workspace, cudaStream_t stream) {
  if (!variant) {
    int64_t least = INT64_MAX;
    auto consider = [&](int candidate, int64_t clocks) {
      if (clocks < least) least = clocks, variant = candidate;
    };
#define QC_CONSIDER(WARPGROUPS, ROW_BLOCKS, TOKENS, CLOCKS)                                                         \
  {                                                                                                                 \
    using Shape = HopperShape<WARPGROUPS, ROW_BLOCKS, TOKENS, CLOCKS>;                                              \
    const int shape = WARPGROUPS * 100000 + ROW_BLOCKS * 10000 + TOKENS * 10;                                       \
    consider(shape + STREAM_K, hopper_clocks<Shape>(arg, STREAM_K, device.sms));                                    \
    if (hopper_tiles<Shape>(arg) <= 64 * device.sms) { /* of more, one block more or less is nothing */             \
      consider(shape + WHOLE_TILES, hopper_clocks<Shape>(arg, WHOLE_TILES, device.sms));                            \
      for (int split = 2; split <= min(MOST_SPLIT, div_up(arg.chunks, Shape::CHUNKS)); split++)                     \
        if (const int clusters = clusters_at_once<BITS, T, Shape>(arg, device, split))                              \
          consider(shape + split, hopper_clocks<Shape>(arg, split, clusters));                                      \
    }                                                                                                               \
  }
    QC_HOPPER_LIST(QC_CONSIDER)
#undef QC_CONSIDER
  }
  const int split = variant % 10;
  if (split > MOST_SPLIT) return QC_BAD_VARIANT;
#define QC_TRY(WARPGROUPS, ROW_BLOCKS, TOKENS, CLOCKS)                     \
  if (variant / 10 == WARPGROUPS * 10000 + ROW_BLOCKS * 1000 + TOKENS)     \
    return launch_hopper<BITS, T, HopperShape<WARPGROUPS, ROW_BLOCKS, TOKENS, CLOCKS>>(arg, device, split, workspace, stream);
  QC_HOPPER_LIST(QC_TRY)
#undef QC_TRY
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
