// As much of HIP as csrc/cuda/amd.cu and layout.cu take, on the host: a thread for each of a block's, one block after the other.
// The matrix instruction does what AMD's guide to the CDNA instruction set says of v_mfma_f32_16x16x16: lane 16 j + r gives row r of A and
// column r of B at k = 4 j .. 4 j + 3, and holds rows 4 j .. 4 j + 3 of column r of D.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <memory>
#include <stdint.h>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __builtin_amdgcn_fence(...)
#define __builtin_amdgcn_wave_barrier()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using hipStream_t = void*;
enum hipError_t { hipSuccess };
enum hipDeviceAttribute_t { hipDeviceAttributeMultiprocessorCount, hipDeviceAttributeMaxSharedMemoryPerBlock, hipDeviceAttributeComputeCapabilityMajor };
inline hipError_t hipGetDevice(int* id) { return *id = 0, hipSuccess; }
inline hipError_t hipGetLastError() { return hipSuccess; }
inline const char* hipGetErrorString(hipError_t) { return ""; }
inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t, int) { return *value = 64, hipSuccess; }

using std::max, std::min;
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; i++) v |= uint32_t(both >> 8 * (s >> 4 * i & 7) & 0xFF) << 8 * i;
  return v;
}
inline uint32_t __float_as_uint(float v) { return __builtin_bit_cast(uint32_t, v); }
inline float __uint_as_float(uint32_t v) { return __builtin_bit_cast(float, v); }

// ---- a block ------------------------------------------------------------------------------------------------------------

inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> wave_barriers; // of 64 threads
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename Kernel, typename... Args>
void hipLaunchKernelGGL(Kernel kernel, dim3 grid, dim3 block, size_t, hipStream_t, Args... args) {
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      block_barrier = std::make_unique<std::barrier<>>(block.x);
      wave_barriers.clear();
      for (unsigned first = 0; first < block.x; first += 64) wave_barriers.push_back(std::make_unique<std::barrier<>>(min(64u, block.x - first)));
      std::vector<std::thread> threads;
      for (unsigned t = 0; t < block.x; t++)
        threads.emplace_back([=] {
          threadIdx = dim3(t, 0, 0), blockIdx = dim3(x, y, 0), blockDim = block, gridDim = grid;
          kernel(args...);
          block_barrier->arrive_and_drop();
        });
      for (auto& thread : threads) thread.join();
    }
}

template <typename Vector, typename Sum, typename ToFloat> Sum mfma_16x16x16(Vector a, Vector b, Sum d, ToFloat to_float) {
  static float A[4][16][16], B[4][16][16]; // of up to four waves: [row][k], [k][column]
  const int wave = threadIdx.x / 64, lane = threadIdx.x % 64, r = lane % 16, j = lane / 16;
  for (int i = 0; i < 4; i++) A[wave][r][4 * j + i] = to_float(a[i]), B[wave][4 * j + i][r] = to_float(b[i]);
  wave_barriers[wave]->arrive_and_wait();
  for (int v = 0; v < 4; v++)
    for (int k = 0; k < 16; k++) d[v] += A[wave][4 * j + v][k] * B[wave][k][r];
  wave_barriers[wave]->arrive_and_wait();
  return d;
}
#define __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, d, ...) mfma_16x16x16(a, b, d, [](_Float16 v) { return float(v); })
#define __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, d, ...) \
  mfma_16x16x16(a, b, d, [](short v) { return __builtin_bit_cast(float, uint32_t(uint16_t(v)) << 16); })
