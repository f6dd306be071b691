// What common.cuh takes from CUDA and PTX, for hipcc: names of the runtime, bfloat16, pairs of half-precision numbers. On AMD GPUs
// layout.cu and api.cu are compiled as they stand, and amd.cu multiplies; the kernels made of NVIDIA's instructions are left out.
// Compiled and inspected for gfx90a (tests); it has not run on hardware.
#pragma once
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#include <stdint.h>

using cudaStream_t = hipStream_t;
using cudaError_t = hipError_t;
constexpr hipError_t cudaSuccess = hipSuccess;
constexpr auto cudaDevAttrMultiProcessorCount = hipDeviceAttributeMultiprocessorCount;
constexpr auto cudaDevAttrMaxSharedMemoryPerBlockOptin = hipDeviceAttributeMaxSharedMemoryPerBlock;
constexpr auto cudaDevAttrComputeCapabilityMajor = hipDeviceAttributeComputeCapabilityMajor; // 9 is gfx9
inline cudaError_t cudaGetDevice(int* id) { return hipGetDevice(id); }
inline cudaError_t cudaGetLastError() { return hipGetLastError(); }
inline const char* cudaGetErrorString(cudaError_t error) { return hipGetErrorString(error); }
inline cudaError_t cudaDeviceGetAttribute(int* value, hipDeviceAttribute_t which, int id) { return hipDeviceGetAttribute(value, which, id); }

struct __nv_bfloat16 { uint16_t bits; };
__host__ __device__ inline float __bfloat162float(__nv_bfloat16 v) { return __builtin_bit_cast(float, uint32_t(v.bits) << 16); }
__host__ __device__ inline __nv_bfloat16 __float2bfloat16_rn(float v) { // to the nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return {uint16_t(bits >> 16 | 0x40)}; // not a number
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// Lanes of a wavefront run in step; the compiler must not move memory accesses across.
__device__ inline void __syncwarp() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

namespace qcore {

__device__ inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

template <typename T> __device__ inline uint32_t pair_of(float low, float high);
template <> __device__ inline uint32_t pair_of<__half>(float low, float high) {
  return __half_as_ushort(__float2half_rn(low)) | uint32_t(__half_as_ushort(__float2half_rn(high))) << 16;
}
template <> __device__ inline uint32_t pair_of<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}

// Two numbers in a register, each result rounded once.
template <typename T> struct Pair;
template <> struct Pair<__half> {
  static __device__ __half2 of(uint32_t v) { return __builtin_bit_cast(__half2, v); }
  static __device__ uint32_t bits(__half2 v) { return __builtin_bit_cast(uint32_t, v); }
  static __device__ uint32_t sub(uint32_t a, uint32_t b) { return bits(__hsub2(of(a), of(b))); }
  static __device__ uint32_t add(uint32_t a, uint32_t b) { return bits(__hadd2(of(a), of(b))); }
  static __device__ uint32_t mul(uint32_t a, uint32_t b) { return bits(__hmul2(of(a), of(b))); }
  static __device__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return bits(__hfma2(of(a), of(b), of(c))); }
};
template <> struct Pair<__nv_bfloat16> {
  static __device__ float low(uint32_t v) { return __builtin_bit_cast(float, v << 16); }
  static __device__ float high(uint32_t v) { return __builtin_bit_cast(float, v & 0xFFFF0000); }
  static __device__ uint32_t sub(uint32_t a, uint32_t b) { return pair_of<__nv_bfloat16>(low(a) - low(b), high(a) - high(b)); }
  static __device__ uint32_t add(uint32_t a, uint32_t b) { return pair_of<__nv_bfloat16>(low(a) + low(b), high(a) + high(b)); }
  static __device__ uint32_t mul(uint32_t a, uint32_t b) { return pair_of<__nv_bfloat16>(low(a) * low(b), high(a) * high(b)); }
};

} // namespace qcore
