// Matmul on AMD GPUs with matrix cores (CDNA 2 and later), any m, 2, 3, 4 and 8 bits, fp16 and bf16, from the same packed layout.
//
//     block    4 wavefronts of 64: one 16-row tile, 16 tokens; chunks of 64 columns fall to the wavefronts in turn
//     lane     16 j + r of v_mfma 16x16x16: A is row r, columns 4 j .. 4 j + 3 of a k-step; B token r, the same columns;
//              D rows 4 j .. 4 j + 3 of token r
//
// The trade-off: it is plain. Codes are read from where common.cuh says they lie, word by word through the cache, without
// staging; no AMD GPU was at hand to tell what more would give. The wavefronts' sums are added in order: the same bits every time.
#include "common.cuh"

#ifdef QC_AMD
#if defined(__HIP_DEVICE_COMPILE__) && !defined(__gfx90a__) && !defined(__gfx940__) && !defined(__gfx941__) && !defined(__gfx942__)
#error "amd.cu needs the matrix instructions of gfx90a or gfx940 and later"
#endif

namespace qcore {

constexpr int WAVES = 4, TOKENS = 16;

typedef _Float16 Half4 __attribute__((ext_vector_type(4)));
typedef short Short4 __attribute__((ext_vector_type(4))); // of bfloat16's bits
typedef float Float4 __attribute__((ext_vector_type(4)));

template <typename T> struct Operand;
template <> struct Operand<__half> {
  using Vector = Half4;
  static __device__ _Float16 of(__half v) { return __builtin_bit_cast(_Float16, v); }
  static __device__ Float4 mma(Vector a, Vector b, Float4 d) { return __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, d, 0, 0, 0); }
};
template <> struct Operand<__nv_bfloat16> {
  using Vector = Short4;
  static __device__ short of(__nv_bfloat16 v) { return short(v.bits); }
  static __device__ Float4 mma(Vector a, Vector b, Float4 d) { return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, d, 0, 0, 0); }
};

template <int BITS, typename T> __global__ void __launch_bounds__(WAVES * 64) amd_kernel(const Args<T> arg) {
  __shared__ Float4 sums[WAVES][64];
  const int lane = threadIdx.x % 64, wave = threadIdx.x / 64, r = lane % 16, j = lane / 16;
  const int64_t tile = blockIdx.x;
  const int token = blockIdx.y * TOKENS + r;
  const bool asym = arg.group_bytes == 64;
  Float4 acc = {0, 0, 0, 0};
  for (int chunk = wave; chunk < arg.chunks; chunk += WAVES) {
    const uint32_t* codes = reinterpret_cast<const uint32_t*>(arg.packed + (tile * arg.chunks + chunk) * chunk_bytes(BITS));
#pragma unroll
    for (int half = 0; half < 2; half++) { // 32 columns have one scale a row
      const int group = min(arg.group_of(chunk * 2 + half), arg.groups - 1);
      const T* meta = reinterpret_cast<const T*>(arg.meta + (tile * arg.groups + group) * arg.group_bytes);
      const float zero = asym ? Dtype<T>::to_float(meta[16 + row_slot(r)]) : float(1 << (BITS - 1));
      Float4 part = {0, 0, 0, 0};
#pragma unroll
      for (int step = 2 * half; step < 2 * half + 2; step++) {
        typename Operand<T>::Vector a, b;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int k = 16 * step + 4 * j + i, column = chunk * CHUNK_K + k;
          a[i] = Operand<T>::of(Dtype<T>::from_float(code_at(codes, BITS, r, k) - zero)); // exact
          const bool inside = token < arg.m && column < arg.k;
          b[i] = Operand<T>::of(inside ? arg.x[token * arg.ldx + column] : Dtype<T>::from_float(0));
        }
        part = Operand<T>::mma(a, b, part);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) acc[i] += Dtype<T>::to_float(meta[row_slot(4 * j + i)]) * part[i];
    }
  }
  sums[wave][lane] = acc;
  __syncthreads();
  if (wave || token >= arg.m) return;
  for (int other = 1; other < WAVES; other++) acc += sums[other][lane];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = int(tile) * TILE_ROWS + 4 * j + i;
    if (row < arg.n) arg.y[token * arg.ldy + row] = Dtype<T>::from_float(acc[i] + (arg.bias ? Dtype<T>::to_float(arg.bias[row]) : 0.f));
  }
}

template <typename T> int matmul_with(int bits, const Args<T>& arg, cudaStream_t stream) {
  const auto kernel = bits == 2 ? amd_kernel<2, T> : bits == 3 ? amd_kernel<3, T> : bits == 4 ? amd_kernel<4, T> : amd_kernel<8, T>;
  constexpr int MOST = 65535 * TOKENS; // tokens of a grid
  for (int first = 0; first < arg.m; first += MOST) {
    Args<T> part = arg;
    part.x += first * arg.ldx, part.y += first * arg.ldy, part.m = min(MOST, arg.m - first);
    hipLaunchKernelGGL(kernel, dim3(arg.tiles, div_up(part.m, TOKENS)), dim3(WAVES * 64), 0, stream, part);
  }
  return launch_status();
}

int matmul_amd(int bits, int dtype, const void* arg, cudaStream_t stream) {
  if (dtype == 1) return matmul_with(bits, *static_cast<const Args<__nv_bfloat16>*>(arg), stream);
  return matmul_with(bits, *static_cast<const Args<__half>*>(arg), stream);
}

} // namespace qcore
#endif
