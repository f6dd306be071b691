// What every kernel here shares: the packed layout, the conversion of codes, and the PTX it takes.
//
// THE LAYOUT. W[N, K] is cut into tiles of 16 rows and chunks of 64 columns; N and K are padded up to that. One
// chunk is what one warp turns into the A operands of four mma.m16n8k16 (weights are A, tokens are B, so that a
// batch of 1 fills an eighth of the instruction instead of a sixteenth). packed = [tile][chunk][128 * bits bytes].
//
//        k  0 1   2 3   4 5   6 7   8 9  ..  14 15          a k-step (16 columns) of a tile: lane 4 g + t holds
//  row g   [a0 of t=0][t=1][t=2][t=3][a2 of t=0] ..         the pairs a0 .. a3, two neighbouring columns each
//  row g+8 [a1 of t=0][t=1][t=2][t=3][a3 of t=0] ..
//
// A lane's share of a chunk is 4 k-steps x 4 pairs. Pair P = 4 * kstep + i lies in a word with the pair's first code
// in the low half-word and its second in the high one, at the same place, so one mask-and-or makes a half2:
//
//   4 bits   word P/4, bit 4 (P%4)                 chunk = 32 lanes x 16 bytes
//   8 bits   word P/2, bit 8 (P%2)                 chunk = 2 x (32 lanes x 16 bytes)
//   2 bits   word P/8, bit 2 (P%8)                 chunk = 32 lanes x 8 bytes
//   3 bits   the low two as for 2 bits, then a plane of high bits: one word, bit P: 32 x 8 bytes, 32 x 4 bytes
//
// META = [tile][group][16 scales] and, if asym, 16 zeros after the scales, each 2 bytes; row g beside row g + 8, so
// one 4-byte read serves a lane. A zero is stored as a number of dtype T, which holds every integer up to 256.
#pragma once
#ifdef __HIP__ // hipcc
#define QC_AMD
#include "amd.cuh"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <stdint.h>

#include "qcore_cuda.h"

namespace qcore {

constexpr int TILE_ROWS = 16;  // M of mma.m16n8k16
constexpr int CHUNK_K = 64;    // the fewest columns that give a 4-bit lane its 16 bytes
constexpr int64_t SMALL_WEIGHT = 4096 * 4096; // up to it kernels are chosen differently
constexpr int GROUP_UNIT = 32; // a scale is looked up once per 32 columns: group_size is a multiple of it

template <typename I> __host__ __device__ constexpr I div_up(I a, I b) { return (a + b - 1) / b; }

__host__ __device__ constexpr int chunk_bytes(int bits) { return 128 * bits; }

// ---- where a code lies -------------------------------------------------------------------------------------------

struct CodePlace {
  int word;  // 4-byte word inside the chunk
  int shift; // bit inside the word
};

// The place of `plane_bits` bits of the code at (row, k) of a chunk; 0 <= row < 16, 0 <= k < 64.
__host__ __device__ inline CodePlace code_place(int plane_bits, int row, int k) {
  const int kk = k % 16, lane = 4 * (row % 8) + (kk % 8) / 2;
  const int pair = 4 * (k / 16) + row / 8 + 2 * (kk / 8);
  const int per_word = 16 / plane_bits, word = pair / per_word, words = plane_bits; // words a lane holds
  const int vec = words < 4 ? words : 4;                                            // that lie side by side
  return {(word / vec) * 32 * vec + lane * vec + word % vec, plane_bits * (pair % per_word) + 16 * (kk % 2)};
}

__device__ inline int code_at(const uint32_t* chunk, int bits, int row, int k) {
  const int low = bits == 3 ? 2 : bits;
  CodePlace p = code_place(low, row, k);
  int code = chunk[p.word] >> p.shift & ((1 << low) - 1);
  if (bits == 3) {
    p = code_place(1, row, k);
    code |= (chunk[64 + p.word] >> p.shift & 1) << 2;
  }
  return code;
}

// ---- dtypes ------------------------------------------------------------------------------------------------------

template <typename T> struct Dtype;
template <> struct Dtype<__half> {
  static constexpr uint32_t magic = 0x6400;   // 1024: ten low mantissa bits hold an integer
  static constexpr int base = 1024;
  static constexpr uint32_t magic2 = 0x64006400;
  static __device__ float to_float(__half v) { return __half2float(v); }
  static __device__ __half from_float(float v) { return __float2half_rn(v); }
};
template <> struct Dtype<__nv_bfloat16> {
  static constexpr uint32_t magic = 0x4300;   // 128: seven
  static constexpr int base = 128;
  static constexpr uint32_t magic2 = 0x43004300;
  static __device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }
};

template <typename T> __device__ inline float low_float(uint32_t pair) {
  return Dtype<T>::to_float(*reinterpret_cast<const T*>(&pair));
}
template <typename T> __device__ inline float high_float(uint32_t pair) { return low_float<T>(pair >> 16); }

// ---- small wrappers ----------------------------------------------------------------------------------------------

#ifndef QC_AMD
// (a & b) | c in one instruction; the compiler makes two when the masks are literals.
__device__ inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <typename T> struct Pair; // two numbers in a register
template <> struct Pair<__half> {
  static __device__ uint32_t sub(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ uint32_t add(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ uint32_t mul(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};
template <> struct Pair<__nv_bfloat16> { // sm_80 has fma alone; 0x3F80 is 1, 0xBF80 is -1, 0x8000 is -0
  static __device__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ uint32_t sub(uint32_t a, uint32_t b) { return fma(b, 0xBF80BF80u, a); }
  static __device__ uint32_t add(uint32_t a, uint32_t b) { return fma(b, 0x3F803F80u, a); }
  static __device__ uint32_t mul(uint32_t a, uint32_t b) { return fma(a, b, 0x80008000u); }
};

template <typename T> __device__ inline uint32_t pair_of(float low, float high);
template <> __device__ inline uint32_t pair_of<__half>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <> __device__ inline uint32_t pair_of<__nv_bfloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

#endif // QC_AMD

__device__ inline uint32_t both_low(uint32_t v) { return __byte_perm(v, 0, 0x1010); }
__device__ inline uint32_t both_high(uint32_t v) { return __byte_perm(v, 0, 0x3232); }

// Where row r of 16 lies among a tile's scales: g beside g + 8.
__host__ __device__ constexpr int row_slot(int r) { return 2 * (r % 8) + r / 8; }

// The zero of a symmetric grid, 2^(bits-1), twice.
template <typename T> __device__ constexpr uint32_t symmetric_zeros(int bits) {
  return (Dtype<T>::base == 1024 ? 0x3C00 + (bits - 1) * 0x400 : 0x3F80 + (bits - 1) * 0x80) * 0x00010001u;
}

// ---- codes to numbers --------------------------------------------------------------------------------------------

// Two ways. `convert` gives code - zero, exact in T: for kernels that multiply the scale in before the product.
// `convert_raw` gives a number that is linear in the code and takes half the instructions, for kernels that are
// short of them: the zero and the offset are taken off after the product, times the sum of x (see decode.cuh).

// The two zeros a lane needs (rows g and g + 8), in the form that `convert` subtracts.
template <int BITS, typename T> struct Zeros {
  uint32_t g, g8;
  __device__ explicit Zeros(uint32_t pair) { // zeros of rows g and g + 8, as T
    if constexpr (BITS == 8 && Dtype<T>::base == 128) { // through float: 0x4B000000 is 2^23, its low byte any code
      g = __float_as_uint(8388608.f + low_float<T>(pair)), g8 = __float_as_uint(8388608.f + high_float<T>(pair));
    } else {
      g = Pair<T>::add(both_low(pair), Dtype<T>::magic2), g8 = Pair<T>::add(both_high(pair), Dtype<T>::magic2);
      // fp16, 4 bits: pairs of row g + 8 sit four bits up, so they read 1024 + 16 q and become q - z by
      // (1024 + 16 q) / 16 - (64 + z); 0x6380 is 960.
      if constexpr (BITS == 4 && Dtype<T>::base == 1024) g8 = Pair<T>::sub(0x63806380u, g8);
    }
  }
};

// What a pair reads after convert_raw: unit * (base + factor * code), factor 1 for row g and `factor8` for row g + 8.
// fp16: the bare bits are a subnormal number, which tensor cores multiply exactly: no magic at all. bf16 has too few
// exponents below for that (the products would be subnormal floats) and keeps its 128.
template <int BITS, typename T> struct Raw {
  static constexpr bool bare = Dtype<T>::base == 1024;
  static constexpr float per_unit = bare ? 16777216.f : 1.f; // 1 / unit
  static constexpr int base = bare || BITS == 8 ? 0 : 128;
  static constexpr int factor8 = BITS == 8 || (BITS == 4 && !bare) ? 1 : BITS == 4 ? 16 : 4;
};

template <int BITS> struct LaneWords { uint32_t w[BITS]; }; // a lane's share of a chunk

// The A operand of one k-step: a[0..3] = code - zero, exact in T. `kstep` is known at compile time once unrolled.
template <int BITS, typename T>
__device__ inline void convert(uint32_t (&a)[4], const LaneWords<BITS>& lane, int kstep, const Zeros<BITS, T>& z) {
  constexpr uint32_t magic = Dtype<T>::magic2;
  if constexpr (BITS == 4 && Dtype<T>::base == 1024) {
    const uint32_t low = lane.w[kstep], high = low >> 8;
    constexpr uint32_t sixteenth = 0x2C002C00;
    a[0] = Pair<T>::sub(and_or(low, 0x000F000F, magic), z.g);
    a[1] = Pair<T>::fma(and_or(low, 0x00F000F0, magic), sixteenth, z.g8);
    a[2] = Pair<T>::sub(and_or(high, 0x000F000F, magic), z.g);
    a[3] = Pair<T>::fma(and_or(high, 0x00F000F0, magic), sixteenth, z.g8);
  } else if constexpr (BITS == 8 && Dtype<T>::base == 1024) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = Pair<T>::sub(__byte_perm(lane.w[2 * kstep + i / 2], magic, i % 2 ? 0x5351 : 0x5250), i % 2 ? z.g8 : z.g);
  } else if constexpr (BITS == 8) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t word = lane.w[2 * kstep + i / 2];
      const float zero = __uint_as_float(i % 2 ? z.g8 : z.g);
      const float first = __uint_as_float(__byte_perm(word, 0x4B000000, i % 2 ? 0x7541 : 0x7540)) - zero;
      const float second = __uint_as_float(__byte_perm(word, 0x4B000000, i % 2 ? 0x7543 : 0x7542)) - zero;
      a[i] = pair_of<T>(first, second);
    }
  } else if constexpr (BITS == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = Pair<T>::sub(and_or(lane.w[kstep] >> 4 * i, 0x000F000F, magic), i % 2 ? z.g8 : z.g);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t v = and_or(lane.w[kstep / 2] >> (8 * (kstep % 2) + 2 * i), 0x00030003, magic);
      if constexpr (BITS == 3) {
        const int bit = 4 * kstep + i;
        v = and_or(bit >= 2 ? lane.w[2] >> (bit - 2) : lane.w[2] << (2 - bit), 0x00040004, v);
      }
      a[i] = Pair<T>::sub(v, i % 2 ? z.g8 : z.g);
    }
  }
}

template <int BITS, typename T>
__device__ inline void convert_raw(uint32_t (&a)[4], const LaneWords<BITS>& lane, int kstep) {
  constexpr bool bare = Raw<BITS, T>::bare;
  constexpr uint32_t magic = bare ? 0 : Dtype<T>::magic2;
  auto take = [&](uint32_t v, uint32_t mask) { return bare ? v & mask : and_or(v, mask, magic); };
  if constexpr (BITS == 8 && bare) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = __byte_perm(lane.w[2 * kstep + i / 2], 0, i % 2 ? 0x4341 : 0x4240);
  } else if constexpr (BITS == 8) {
    convert<8, T>(a, lane, kstep, Zeros<8, T>(0u));
  } else if constexpr (BITS == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = bare ? take(lane.w[kstep] >> i / 2 * 8, i % 2 ? 0x00F000F0 : 0x000F000F)
                  : take(lane.w[kstep] >> 4 * i, 0x000F000F);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) { // row g + 8 stays two bits up
      a[i] = take(lane.w[kstep / 2] >> (8 * (kstep % 2) + i / 2 * 4), i % 2 ? 0x000C000C : 0x00030003);
      if constexpr (BITS == 3) {
        const int from = 4 * kstep + i, to = i % 2 ? 4 : 2;
        a[i] = and_or(from >= to ? lane.w[2] >> (from - to) : lane.w[2] << (to - from), i % 2 ? 0x00100010 : 0x00040004, a[i]);
      }
    }
  }
}

// A lane's share of a chunk, from shared or global memory: 16-byte reads for 4 and 8 bits.
template <int BITS> __device__ inline LaneWords<BITS> lane_words(const uint8_t* chunk, int lane) {
  LaneWords<BITS> out;
  if constexpr (BITS >= 4) {
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) {
      const uint4 v = *reinterpret_cast<const uint4*>(chunk + 512 * i + 16 * lane);
      out.w[4 * i] = v.x, out.w[4 * i + 1] = v.y, out.w[4 * i + 2] = v.z, out.w[4 * i + 3] = v.w;
    }
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(chunk + 8 * lane);
    out.w[0] = v.x, out.w[1] = v.y;
    if constexpr (BITS == 3) out.w[2] = *reinterpret_cast<const uint32_t*>(chunk + 256 + 4 * lane);
  }
  return out;
}

#ifndef QC_AMD
// ---- PTX ---------------------------------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// d += a . b: a 16 rows x 16 k of weights, b 16 k x 8 tokens; d[0], d[1]: row g, tokens 2t, 2t + 1; d[2], d[3]: row g + 8.
template <typename T> __device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ inline void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 2-byte numbers; lane 8 i + r gives the address of row r of matrix i. With rows = tokens
// and 8 columns of k, two neighbouring matrices are exactly the B operand of one k-step.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address)); // volatile: stays behind its barrier
}

// Copies that a thread starts and forgets. The weights pass through L2 once: the hint asks for a whole 256-byte
// read from memory; .cg keeps them out of L1.
__device__ inline void copy16_weights(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The first `bytes` of 16 are copied, the rest is zero; with bytes == 0 nothing is read.
__device__ inline void copy16_or_zero(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void copy8(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// All but the latest `n` commits have landed; PTX wants a literal, the number of stages is known at launch.
__device__ inline void copies_wait_but(int n) {
  if (n == 4) copies_wait<4>();
  else if (n == 3) copies_wait<3>();
  else if (n == 2) copies_wait<2>();
  else if (n == 1) copies_wait<1>();
  else copies_wait<0>();
}

// One warp's copy of one chunk; `to` and `from` already point at the lane's part (LANE_VECTOR bytes a lane).
template <int BITS> constexpr int LANE_VECTOR = BITS >= 4 ? 16 : 8;
template <int BITS> __device__ inline void copy_chunk(uint32_t to, const uint8_t* from, int lane) {
  if constexpr (BITS >= 4) {
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) copy16_weights(to + 512 * i, from + 512 * i);
  } else {
    copy8(to, from);
    if constexpr (BITS == 3) copy4(to + 256 - 4 * lane, from + 256 - 4 * lane);
  }
}

// Programmatic launch (sm_90): wait for the kernel before this one, and let the one after start. Without the launch
// attribute both do nothing.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif // QC_AMD

// The start of the workspace counts, a counter a block, who has finished a shared output tile.
constexpr int COUNTERS_BYTES = 4096;

// ---- arguments ---------------------------------------------------------------------------------------------------

// Division of a column-unit index (k / 32) by group_size / 32, by multiplication.
struct GroupOf {
  uint32_t units, reciprocal;
  GroupOf() = default;
  GroupOf(int64_t group_size, int64_t k) {
    const int64_t all = div_up<int64_t>(k, CHUNK_K) * 2;
    units = group_size < 0 || group_size / GROUP_UNIT > all ? all : group_size / GROUP_UNIT;
    reciprocal = units == 1 ? 0 : (uint32_t)(((uint64_t(1) << 32) + units - 1) / units);
  }
  __device__ int operator()(uint32_t unit) const { return units == 1 ? unit : __umulhi(unit, reciprocal); }
};

// How the units of work (k_units stages each of `tiles` output tiles) fall to blocks. With about as many tiles as
// blocks: equal runs of units, wherever they end (stream-K). With few tiles: `parts` blocks to a tile, so that a block
// shares one tile only, as long as that leaves few blocks idle.
struct WorkSplit {
  int k_units, parts, blocks;
  int64_t each, longer; // units a block; so many blocks have one more
  WorkSplit() = default;
  WorkSplit(int64_t tiles, int k_units, int sms) : k_units(k_units) {
    const int64_t units = tiles * k_units, even = tiles <= sms ? sms / tiles : 0;
    parts = even * tiles * 10 >= sms * 9 && even <= k_units ? int(even) : 0;
    blocks = parts ? int(parts * tiles) : int(units < sms ? units : sms);
    each = units / blocks, longer = units % blocks;
  }
  __device__ int64_t first_unit(int block) const {
    return parts ? int64_t(block / parts) * k_units + block % parts * k_units / parts : block * each + (block < longer ? block : longer);
  }
};

template <typename T> struct Args {
  const T* x;            // [m, k], row stride ldx
  const uint8_t* packed; // [tiles][chunks][chunk_bytes]
  const uint8_t* meta;   // [tiles][groups][32 or 64 bytes]
  const T* bias;         // [n] or null
  T* y;                  // [m, n], row stride ldy
  int64_t ldx, ldy;
  int m, n, k;
  int tiles, chunks;     // of 16 rows, of 64 columns, padded
  int groups;
  int group_bytes;       // 32, or 64 if asym
  int scales_per_chunk;  // 1, or 2 where group_size is no multiple of 64
  GroupOf group_of;
};

constexpr int MAX_DEVICES = 64;

// What the launchers need to know of the current device.
struct Device { int id, sms, shared_bytes, major; };

inline int launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? QC_OK : QC_CUDA_ERROR + error;
}

// One specialization a width, in decode_<bits>.cu and tile_<bits>.cu; `arg` is the Args of `dtype`. 0 for row_tiles and
// warps leaves the choice to the launcher.
template <int BITS>
int matmul_decode(int dtype, const void* arg, const Device&, int flags, int row_tiles, int warps, cudaStream_t);
template <> int matmul_decode<2>(int, const void*, const Device&, int, int, int, cudaStream_t);
template <> int matmul_decode<3>(int, const void*, const Device&, int, int, int, cudaStream_t);
template <> int matmul_decode<4>(int, const void*, const Device&, int, int, int, cudaStream_t);
template <> int matmul_decode<8>(int, const void*, const Device&, int, int, int, cudaStream_t);
template <int BITS>
int matmul_tile(int dtype, const void* arg, const Device&, int row_tiles, void* workspace, cudaStream_t);
template <> int matmul_tile<4>(int, const void*, const Device&, int, void*, cudaStream_t);
template <> int matmul_tile<8>(int, const void*, const Device&, int, void*, cudaStream_t);

template <int BITS> int matmul_hopper(int dtype, const void* arg, const Device&, int variant, void* workspace, cudaStream_t);
template <> int matmul_hopper<4>(int, const void*, const Device&, int, void*, cudaStream_t);
template <> int matmul_hopper<8>(int, const void*, const Device&, int, void*, cudaStream_t);

#ifdef QC_AMD
int matmul_amd(int bits, int dtype, const void* arg, cudaStream_t);
#endif

// layout.cu
int repack(int bits, int64_t n, int64_t k_codes, int64_t k, const uint8_t* codes, const int32_t* perm, void* packed, cudaStream_t);
int unpack(int bits, int64_t n, int64_t k_codes, int64_t k, const void* packed, const int32_t* perm, uint8_t* codes, cudaStream_t);
int pack_meta(int dtype, int64_t n, int64_t groups, const void* scales, const int32_t* zeros, void* meta, cudaStream_t);
int gather(int64_t m, int64_t k_in, int64_t k_out, const void* x, int64_t ldx, const int32_t* perm, void* out, cudaStream_t);
template <typename T>
int dequantize(int bits, const Args<T>&, int64_t k_out, const int32_t* perm, void* w, int64_t ldw, cudaStream_t);
template <typename T> int reference(int bits, const Args<T>&, cudaStream_t);

} // namespace qcore
