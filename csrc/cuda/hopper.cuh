// Matmul for more tokens (m > 16) on Hopper (sm_90a): wgmma with the weights, converted in registers, as A, and x, in
// shared memory, as B. 4 and 8 bits, fp16 and bf16.
//
// The trade-off is tile.cuh's (wide tiles, stream-K, parts added in a fixed order); what changes is who does what. One
// warp only moves data, by tensor copies: a box of x, a box of chunks, a box of scales. Two warpgroups only compute, 64 rows x
// ROW_BLOCKS each; while the tensor cores work on one stage, a warpgroup converts the codes of the next into a second
// set of registers. The conversion, 13 instructions a thread for 64 x 16 weights, is paid once per TOKENS tokens.
//
//     producer warp     | stage 0 | stage 1 | stage 2 | ...           full[s]: bytes have landed
//     warpgroup 0, 1    |   convert 0, convert 1 + wgmma 0, ...       empty[s]: 8 warps have let go
//
// A stage: x [TOKENS][64] under the 128-byte swizzle, chunks [tiles][...], scales [scales_per_chunk][tiles][...].
#pragma once
#include "wgmma.cuh"

namespace qcore {

// A warpgroup produces, though one of its warps does all: registers move between warpgroups only. 168 each at launch
// become 40 and 232: two warpgroups of 64 x 256 sums and two sets of operands want 220.
constexpr int CONSUMERS = 256, HOPPER_THREADS = CONSUMERS + 128;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int HOPPER_STAGES = 8; // at most
constexpr int STAGED_TOKENS = 64, STAGED_STRIDE = 48; // a warp's outputs on their way: bytes between tokens, 32 used

struct HopperPlan {
  int stages, stage_bytes;
  int row_blocks, token_blocks;
  WorkSplit work;
};

struct HopperMaps {
  CUtensorMap x;      // T [m][k], boxes TOKENS x 64, 128-byte swizzle
  CUtensorMap packed; // int32 [tiles][chunks * 32 bits], boxes of one chunk of a block's tiles
  CUtensorMap meta;   // int32 [tiles][groups * 8 or 16], boxes of one group of a block's tiles
};

template <int BITS, typename T, int ROW_BLOCKS, int TOKENS>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    hopper_kernel(const Args<T> arg, const HopperPlan plan, const __grid_constant__ HopperMaps maps, float* workspace,
                  int* counters) {
#ifdef QC_HOPPER
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ __align__(8) uint64_t barriers[2 * HOPPER_STAGES];
  __shared__ int arrived;
  constexpr int TILES = 8 * ROW_BLOCKS; // 16-row tiles of a block: of warpgroup w, 4 ROW_BLOCKS from w * 4 ROW_BLOCKS
  constexpr int SUMS = TOKENS / 2;      // floats of d in a thread
  constexpr int x_bytes = TOKENS * 128;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int scale_bytes = arg.group_bytes * arg.scales_per_chunk;
  const uint32_t ring = shared_address(shared);
  auto full = [&](int slot) { return shared_address(barriers + slot); };
  auto empty = [&](int slot) { return shared_address(barriers + HOPPER_STAGES + slot); };

  // Unit u is chunk u % chunks of output tile u / chunks; token blocks of the same rows follow each other.
  auto first_unit = [&](int block) { return plan.work.first_unit(block); };
  const int64_t unit_begin = first_unit(blockIdx.x), unit_end = first_unit(blockIdx.x + 1);

  if (thread == 0) {
    prefetch_map(&maps.x), prefetch_map(&maps.packed), prefetch_map(&maps.meta);
    for (int s = 0; s < plan.stages; s++) barrier_init(full(s), 1), barrier_init(empty(s), CONSUMERS / 32);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp >= CONSUMERS / 32) { // -- the producer ------------------------------------------------------------------
    registers_down<PRODUCER_REGISTERS>();
    const int64_t produced_end = warp == CONSUMERS / 32 ? unit_end : unit_begin;
    if (produced_end > unit_begin && lane == 0) {
      int tile = int(unit_begin / arg.chunks), chunk = int(unit_begin % arg.chunks), slot = 0, phase = 1;
      int token0 = tile % plan.token_blocks * TOKENS, tile0 = tile / plan.token_blocks * TILES;
      const int bytes = x_bytes + TILES * (chunk_bytes(BITS) + scale_bytes);
      for (int left = int(produced_end - unit_begin); left > 0; left--) {
        const uint32_t stage = ring + slot * plan.stage_bytes;
        barrier_wait(empty(slot), phase); // passes at once in the first round
        barrier_arrive_expecting(full(slot), bytes);
        copy_box(stage, &maps.x, chunk * CHUNK_K, token0, full(slot));
        copy_box(stage + x_bytes, &maps.packed, chunk * (chunk_bytes(BITS) / 4), tile0, full(slot));
        for (int s = 0; s < arg.scales_per_chunk; s++) {
          const int group = min(arg.group_of(chunk * 2 + s), arg.groups - 1);
          copy_box(stage + x_bytes + TILES * (chunk_bytes(BITS) + s * arg.group_bytes), &maps.meta,
                   group * (arg.group_bytes / 4), tile0, full(slot));
        }
        if (++slot == plan.stages) slot = 0, phase ^= 1;
        if (++chunk == arg.chunks) {
          chunk = 0, tile++;
          token0 = tile % plan.token_blocks * TOKENS, tile0 = tile / plan.token_blocks * TILES;
        }
      }
    }
  } else { // -- the consumers ---------------------------------------------------------------------------------------
  registers_up<CONSUMER_REGISTERS>();
  const int group_of_warps = warp / 4, g = lane / 4;
  const int first_tile = group_of_warps * 4 * ROW_BLOCKS + warp % 4; // of this warp; its next lies 4 further
  float d[ROW_BLOCKS][SUMS];
  uint32_t a[2][ROW_BLOCKS][4][4]; // [set][row block][k-step][A operand]
  int slot = 0, phase = 0, before = 0;

  auto convert_stage = [&](uint32_t (&to)[ROW_BLOCKS][4][4]) {
    const uint8_t* stage = shared + slot * plan.stage_bytes + x_bytes;
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) {
      const int tile = first_tile + 4 * r;
      const LaneWords<BITS> words = lane_words<BITS>(stage + tile * chunk_bytes(BITS), lane);
      const uint8_t* scales = stage + TILES * chunk_bytes(BITS) + tile * arg.group_bytes + 4 * g;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint8_t* group = scales + (half < arg.scales_per_chunk ? half : 0) * TILES * arg.group_bytes;
        const uint32_t scale = *reinterpret_cast<const uint32_t*>(group);
        const uint32_t zero = arg.group_bytes == 64 ? *reinterpret_cast<const uint32_t*>(group + 32) : symmetric_zeros<T>(BITS);
        const Zeros<BITS, T> zeros(zero);
#pragma unroll
        for (int step = 2 * half; step < 2 * half + 2; step++) {
          convert<BITS, T>(to[r][step], words, step, zeros);
#pragma unroll
          for (int i = 0; i < 4; i++) to[r][step][i] = Pair<T>::mul(to[r][step][i], i % 2 ? both_high(scale) : both_low(scale));
        }
      }
    }
  };
  // One stage: convert it, hand it to the tensor cores, wait for the stage before and let go of that.
  auto multiply = [&](uint32_t (&set)[ROW_BLOCKS][4][4], bool first) {
    barrier_wait(full(slot), phase);
    convert_stage(set);
    const uint64_t x = matrix_descriptor(ring + slot * plan.stage_bytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
      for (int r = 0; r < ROW_BLOCKS; r++)
        Wgmma<T, TOKENS>::run(d[r], set[r][step], x + step * K_STEP_IN_DESCRIPTOR, !first || step);
    wgmma_commit();
    wgmma_wait<1>();
    if (!first && lane == 0) barrier_arrive(empty(before));
    before = slot;
    if (++slot == plan.stages) slot = 0, phase ^= 1;
  };

  auto consumers_meet = [] { asm volatile("bar.sync 1, 256;" ::: "memory"); };

  // True if this block holds the whole tile's sums afterwards (see tile.cuh).
  auto share = [&](int64_t tile) {
    const int64_t tile_begin = tile * arg.chunks, tile_end = tile_begin + arg.chunks;
    if (unit_begin <= tile_begin && unit_end >= tile_end) return true;
    int first = blockIdx.x, last = blockIdx.x;
    while (first_unit(first) > tile_begin) first--;
    while (first_unit(last + 1) < tile_end) last++;
    constexpr int vectors = ROW_BLOCKS * SUMS / 4;
    auto part = [&](int block) {
      const int64_t place = 2 * block + (first_unit(block) < tile_begin);
      return reinterpret_cast<float4*>(workspace) + place * vectors * CONSUMERS + thread;
    };
    if (last - first == 1) { // of two, the later one adds the other's sums to those in its registers: the order does not matter
      if (thread == 0) arrived = *static_cast<volatile int*>(counters + first), __threadfence();
      consumers_meet();
      const bool other_was_here = arrived == 1;
      consumers_meet(); // before `arrived` is written again
      if (other_was_here) {
        if (thread == 0) counters[first] = 0;
        const float4* theirs = part(blockIdx.x == first ? last : first);
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++)
#pragma unroll
          for (int i = 0; i < SUMS / 4; i++) {
            const float4 v = __ldcg(theirs + (r * SUMS / 4 + i) * CONSUMERS);
            d[r][4 * i] += v.x, d[r][4 * i + 1] += v.y, d[r][4 * i + 2] += v.z, d[r][4 * i + 3] += v.w;
          }
        return true;
      }
    }
    float4* mine = part(blockIdx.x);
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++)
#pragma unroll
      for (int i = 0; i < SUMS / 4; i++)
        __stcg(mine + (r * SUMS / 4 + i) * CONSUMERS, make_float4(d[r][4 * i], d[r][4 * i + 1], d[r][4 * i + 2], d[r][4 * i + 3]));
    __threadfence();
    consumers_meet();
    if (thread == 0) {
      arrived = atomicAdd(counters + first, 1);
      if (arrived == last - first) counters[first] = 0;
    }
    consumers_meet();
    const bool mine_to_finish = arrived == last - first;
    consumers_meet(); // before `arrived` is written again
    if (!mine_to_finish) return false;
    __threadfence();
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) d[r][i] = 0;
    for (int block = first; block <= last; block++) {
      const float4* theirs = part(block);
#pragma unroll
      for (int r = 0; r < ROW_BLOCKS; r++)
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++) {
          const float4 v = __ldcg(theirs + (r * SUMS / 4 + i) * CONSUMERS);
          d[r][4 * i] += v.x, d[r][4 * i + 1] += v.y, d[r][4 * i + 2] += v.z, d[r][4 * i + 3] += v.w;
        }
    }
    return true;
  };

  // A warp turns its 16 rows x 64 tokens in shared memory, so that a token's 16 outputs leave as one 32-byte sector.
  uint8_t* staged = shared + plan.stages * plan.stage_bytes + warp * STAGED_TOKENS * STAGED_STRIDE;
  const bool vectors = arg.ldy % 8 == 0 && reinterpret_cast<uintptr_t>(arg.y) % 16 == 0;
  auto write = [&](int64_t tile) {
    const int token0 = int(tile % plan.token_blocks) * TOKENS, tile0 = int(tile / plan.token_blocks) * TILES;
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) {
      const int row0 = (tile0 + first_tile + 4 * r) * TILE_ROWS;
      const float bias = arg.bias && row0 + g < arg.n ? Dtype<T>::to_float(arg.bias[row0 + g]) : 0;
      const float bias8 = arg.bias && row0 + g + 8 < arg.n ? Dtype<T>::to_float(arg.bias[row0 + g + 8]) : 0;
#pragma unroll
      for (int part = 0; part < TOKENS; part += STAGED_TOKENS) {
        constexpr int tokens = TOKENS < STAGED_TOKENS ? TOKENS : STAGED_TOKENS;
#pragma unroll
        for (int i = 0; i < tokens / 8; i += 2) { // matrices: rows 0..7 and 8..15 of two blocks of eight tokens
          const float* v = d[r] + (part / 8 + i) * 4;
          const uint32_t at = shared_address(staged) + (i * 8 + lane / 16 * 8 + lane % 8) * STAGED_STRIDE + lane / 8 % 2 * 16;
          store_matrices_transposed(at, pair_of<T>(v[0] + bias, v[1] + bias), pair_of<T>(v[2] + bias8, v[3] + bias8),
                                    pair_of<T>(v[4] + bias, v[5] + bias), pair_of<T>(v[6] + bias8, v[7] + bias8));
        }
        __syncwarp();
#pragma unroll 1 // the code of this kernel is read once for each launch: less of it is faster
        for (int v = lane; v < tokens * 2; v += 32) {
          const int token = token0 + part + v / 2, row = row0 + v % 2 * 8;
          if (token < arg.m && row < arg.n) {
            const T* from = reinterpret_cast<const T*>(staged + v / 2 * STAGED_STRIDE + v % 2 * 16);
            T* to = arg.y + token * arg.ldy + row;
            if (vectors && row + 8 <= arg.n) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            else
#pragma unroll 1
              for (int j = 0; j < 8 && row + j < arg.n; j++) to[j] = from[j];
          }
        }
        __syncwarp();
      }
    }
  };

  int64_t tile = unit_begin / arg.chunks;
  int chunk = int(unit_begin % arg.chunks);
  for (int64_t unit = unit_begin; unit < unit_end;) {
    const int count = int(min(int64_t(arg.chunks - chunk), unit_end - unit)); // stages of this tile that are ours
    for (int i = 0; i < count; i += 2) { // two, so that the sets are named at compile time
      multiply(a[0], i == 0);
      if (i + 1 < count) multiply(a[1], false);
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty(before));
    if (share(tile)) write(tile);
    unit += count, chunk = 0, tile++;
  }
  } // the consumers
#else
  __trap(); // QC_SM90A was set for a build without sm_90a
#endif
}

// ---- launch ------------------------------------------------------------------------------------------------------

template <int BITS, typename T, int ROW_BLOCKS, int TOKENS>
int launch_hopper(const Args<T>& arg, const Device& device, void* workspace, cudaStream_t stream) {
  const auto kernel = hopper_kernel<BITS, T, ROW_BLOCKS, TOKENS>;
  HopperPlan plan;
  plan.row_blocks = div_up(arg.tiles, 8 * ROW_BLOCKS), plan.token_blocks = div_up(arg.m, TOKENS);
  plan.work = WorkSplit(int64_t(plan.row_blocks) * plan.token_blocks, arg.chunks, device.sms);
  const int used = TOKENS * 128 + 8 * ROW_BLOCKS * (chunk_bytes(BITS) + arg.group_bytes * arg.scales_per_chunk);
  plan.stage_bytes = div_up(used, 1024) * 1024; // the swizzle counts from multiples of 1024
  const int staged = 8 * STAGED_TOKENS * STAGED_STRIDE;
  plan.stages = min(HOPPER_STAGES, (device.shared_bytes - 2048 - staged) / plan.stage_bytes);
  if (plan.stages < 2) return QC_BAD_DEVICE;
  HopperMaps maps;
  const int tiles = 8 * ROW_BLOCKS, chunk_words = chunk_bytes(BITS) / 4, group_words = arg.group_bytes / 4;
  if (int status = make_map(&maps.x, arg.x, true, arg.m, arg.k, arg.ldx * 2, TOKENS, CHUNK_K, true)) return status;
  if (int status = make_map(&maps.packed, arg.packed, false, arg.tiles, int64_t(arg.chunks) * chunk_words,
                            int64_t(arg.chunks) * chunk_words * 4, tiles, chunk_words, false)) return status;
  if (int status = make_map(&maps.meta, arg.meta, false, arg.tiles, int64_t(arg.groups) * group_words,
                            int64_t(arg.groups) * group_words * 4, tiles, group_words, false)) return status;
  const int bytes = plan.stages * plan.stage_bytes + staged;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return QC_CUDA_ERROR + error;
  kernel<<<plan.work.blocks, HOPPER_THREADS, bytes, stream>>>(arg, plan, maps, reinterpret_cast<float*>(static_cast<char*>(workspace) + COUNTERS_BYTES),
                                                    static_cast<int*>(workspace));
  return launch_status();
}

} // namespace qcore
