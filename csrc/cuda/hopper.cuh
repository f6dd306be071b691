// Matmul for more tokens on Hopper (sm_90a): wgmma with the weights, converted in registers, as A, and x, in
// shared memory, as B. 4 and 8 bits, fp16 and bf16.
//
// The trade-off is tile.cuh's (wide tiles, x read once for many rows); what changes is who does what. One warp only moves
// data, by tensor copies: boxes of x, of chunks, of scales. Two or three warpgroups only compute, 64 rows x ROW_BLOCKS each.
// While the tensor cores work on one chunk, a warpgroup converts the codes of the next into a second set of registers. That
// and the waiting take a warpgroup longer than 64 tokens take the tensor cores, so a third one is worth its smaller tiles.
// The conversion, 13 instructions a thread for 64 x 16 weights, is paid once per TOKENS tokens.
//
//     producer warp      | stage 0 | stage 1 | stage 2 | ...           full[s]: bytes have landed
//     warpgroups 0, 1..  |   convert 0, convert 1 + wgmma 0, ...       empty[s]: all their warps have let go
//
// A stage is one or two chunks of 64 columns: x [chunks][TOKENS][64] under the 128-byte swizzle, codes [chunks][tiles][...],
// scales [scales][tiles][...].
//
// An output tile belongs to one block, to the blocks of a cluster, which split its columns and add up through each
// other's shared memory, or (stream-K) to whatever blocks its units fall to, which add up through global memory. The last
// leaves no block idle and costs the most at the end. hopper_clocks estimates which is fastest.
#pragma once
#include <atomic>

#include "wgmma.cuh"

namespace qcore {

constexpr int HOPPER_STAGES = 8;  // at most
constexpr int MOST_SPLIT = 5;     // blocks of a cluster; larger ones leave parts of the GPU empty
constexpr int STAGED_STRIDE = 48; // a warp's outputs on their way: bytes between tokens, 32 used

// What a kernel is compiled for: WARPGROUPS compute, 64 rows x ROW_BLOCKS each, TOKENS at a time. CLOCKS: what 128 columns take,
// as measured on an H200.
template <int WARPGROUPS_, int ROW_BLOCKS_, int TOKENS_, int CLOCKS_> struct HopperShape {
  static constexpr int WARPGROUPS = WARPGROUPS_, ROW_BLOCKS = ROW_BLOCKS_, TOKENS = TOKENS_, CLOCKS = CLOCKS_;
  static constexpr int CONSUMERS = 128 * WARPGROUPS, THREADS = CONSUMERS + 128;
  static constexpr int TILES = 4 * WARPGROUPS * ROW_BLOCKS; // 16-row tiles: of warpgroup w, 4 ROW_BLOCKS from w * 4 ROW_BLOCKS
  static constexpr int SUMS = TOKENS / 2;                   // floats of d in a thread and row block
  static constexpr int X_BYTES = TOKENS * 128;              // of one chunk
  static constexpr int CHUNKS = TOKENS > 128 ? 1 : 2;       // of 64 columns, in a stage: two are waited for once
  static constexpr int PART_BYTES = ROW_BLOCKS * SUMS * CONSUMERS * 4; // all sums of a block
  // A warpgroup produces, though one of its warps does all: registers move between warpgroups only.
  static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
  static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : 160;
  static constexpr int STAGED_TOKENS = WARPGROUPS == 2 && TOKENS >= 64 ? 64 : 32;
  static constexpr int STAGED_BYTES = CONSUMERS / 32 * STAGED_TOKENS * STAGED_STRIDE;
};

struct HopperPlan {
  int stages, stage_bytes, k_stages; // of the ring; of a row's columns
  int scales;      // of a stage: 4, 2 or 1 as groups are multiples of 32, 64 or 128 columns
  int token_blocks;
  int split;       // > 1: a cluster of so many blocks shares each output tile; 1: as `work` says
  WorkSplit work;
};

struct HopperMaps {
  CUtensorMap x;      // T [m][k], boxes TOKENS x 64, 128-byte swizzle
  CUtensorMap packed; // int32 [tiles][chunks * 32 bits], boxes of one chunk of a block's tiles
  CUtensorMap meta;   // int32 [tiles][groups * 8 or 16], boxes of one group of a block's tiles
};

template <int BITS, typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    hopper_kernel(const Args<T> arg, const HopperPlan plan, const __grid_constant__ HopperMaps maps, float* workspace,
                  int* counters) {
#ifdef QC_HOPPER
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ __align__(8) uint64_t barriers[2 * HOPPER_STAGES];
  __shared__ int arrived;
  constexpr int TILES = Shape::TILES, ROW_BLOCKS = Shape::ROW_BLOCKS, TOKENS = Shape::TOKENS, SUMS = Shape::SUMS;
  constexpr int CONSUMERS = Shape::CONSUMERS, X_BYTES = Shape::X_BYTES;
  constexpr int CODES_AT = Shape::CHUNKS * X_BYTES, SCALES_AT = CODES_AT + Shape::CHUNKS * TILES * chunk_bytes(BITS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint32_t ring = shared_address(shared);
  // The shuffle keeps the address in a register; it would be made anew, at some 30 clocks, before each wait.
  const uint32_t first_barrier = __shfl_sync(~0u, shared_address(barriers), 0);
  auto full = [&](int slot) { return first_barrier + slot * 8; };
  auto empty = [&](int slot) { return first_barrier + (HOPPER_STAGES + slot) * 8; };

  // Unit u is stage u % k_stages of output tile u / k_stages; token blocks of the same rows follow each other.
  auto first_unit = [&](int block) { return plan.work.first_unit(block); };
  const int member = plan.split > 1 ? blockIdx.x % plan.split : 0;
  int64_t unit_begin, unit_end;
  int tile, k_stage; // of unit_begin
  if (plan.split > 1) {
    tile = blockIdx.x / plan.split, k_stage = member * plan.k_stages / plan.split;
    unit_begin = int64_t(tile) * plan.k_stages + k_stage;
    unit_end = unit_begin + (member + 1) * plan.k_stages / plan.split - k_stage;
  } else {
    unit_begin = first_unit(blockIdx.x), unit_end = first_unit(blockIdx.x + 1);
    tile = int(unit_begin / plan.k_stages), k_stage = int(unit_begin - int64_t(tile) * plan.k_stages);
  }

  if (warp >= CONSUMERS / 32) { // -- the producer ------------------------------------------------------------------
    if (thread == CONSUMERS) {
      for (int s = 0; s < plan.stages; s++) barrier_init(full(s), 1), barrier_init(empty(s), CONSUMERS / 32);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("bar.arrive 2, %0;" ::"n"(CONSUMERS + 128) : "memory"); // the consumers need the barriers; the producer need not wait for them
    registers_down<Shape::PRODUCER_REGISTERS>();
    if (thread == CONSUMERS) {
      int slot = 0, phase = 1, token0 = tile % plan.token_blocks * TOKENS, tile0 = tile / plan.token_blocks * TILES;
      const int bytes = SCALES_AT + TILES * plan.scales * arg.group_bytes;
      for (int left = int(unit_end - unit_begin); left > 0; left--) {
        const uint32_t stage = ring + slot * plan.stage_bytes;
        barrier_wait(empty(slot), phase); // passes at once in the first round
        barrier_arrive_expecting(full(slot), bytes);
#pragma unroll
        for (int c = 0; c < Shape::CHUNKS; c++) { // chunks past the last arrive as zeros
          const int chunk = k_stage * Shape::CHUNKS + c;
          copy_box(stage + CODES_AT + c * TILES * chunk_bytes(BITS), &maps.packed, chunk * (chunk_bytes(BITS) / 4), tile0, full(slot));
          copy_box(stage + c * X_BYTES, &maps.x, chunk * CHUNK_K, token0, full(slot));
        }
        for (int s = 0; s < plan.scales; s++) {
          const int group = min(arg.group_of(2 * Shape::CHUNKS * k_stage + s * 2 * Shape::CHUNKS / plan.scales), arg.groups - 1);
          copy_box(stage + SCALES_AT + s * TILES * arg.group_bytes, &maps.meta, group * (arg.group_bytes / 4), tile0, full(slot));
        }
        if (++slot == plan.stages) slot = 0, phase ^= 1;
        if (++k_stage == plan.k_stages) {
          k_stage = 0, tile++;
          token0 = tile % plan.token_blocks * TOKENS, tile0 = tile / plan.token_blocks * TILES;
        }
      }
    }
    if (plan.split > 1) cluster_sync(), cluster_sync();
    return;
  }
  // -- the consumers -------------------------------------------------------------------------------------------------
  asm volatile("bar.sync 2, %0;" ::"n"(CONSUMERS + 128) : "memory");
  registers_up<Shape::CONSUMER_REGISTERS>();
  const int group_of_warps = warp / 4, g = lane / 4;
  const int first_tile = group_of_warps * 4 * ROW_BLOCKS + warp % 4; // of this warp; its next lies 4 further
  const bool asym = arg.group_bytes == 64;
  float d[ROW_BLOCKS][SUMS];
  uint32_t a[2][ROW_BLOCKS][4][4]; // [even or odd chunk][row block][k-step][A operand]
  int slot = 0, phase = 0, before = 0;

  const uint32_t scale_stride = TILES * arg.group_bytes;
  auto convert_block = [&](uint32_t (&to)[4][4], const LaneWords<BITS>& words, const uint32_t (&scale)[2], const uint32_t (&zero)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Zeros<BITS, T> zeros(zero[half]);
#pragma unroll
      for (int step = 2 * half; step < 2 * half + 2; step++) {
        convert<BITS, T>(to[step], words, step, zeros);
#pragma unroll
        for (int i = 0; i < 4; i++) to[step][i] = Pair<T>::mul(to[step][i], i % 2 ? both_high(scale[half]) : both_low(scale[half]));
      }
    }
  };
  struct Held { // of one chunk and row block, for this lane
    LaneWords<BITS> words;
    uint32_t scale[2]; // of 32 columns each; those of rows g and g + 8
  } held[Shape::CHUNKS][ROW_BLOCKS];
  auto scales_of = [&](int c, int r, int half) {
    return shared + slot * plan.stage_bytes + SCALES_AT + (first_tile + 4 * r) * arg.group_bytes + 4 * g +
           (2 * c + half) * plan.scales / (2 * Shape::CHUNKS) * scale_stride;
  };
  auto read_stage = [&] {
#pragma unroll
    for (int c = 0; c < Shape::CHUNKS; c++)
#pragma unroll
      for (int r = 0; r < ROW_BLOCKS; r++) {
        held[c][r].words = lane_words<BITS>(shared + slot * plan.stage_bytes + CODES_AT + (c * TILES + first_tile + 4 * r) * chunk_bytes(BITS), lane);
#pragma unroll
        for (int half = 0; half < 2; half++) held[c][r].scale[half] = *reinterpret_cast<const uint32_t*>(scales_of(c, r, half));
      }
  };
  auto convert_chunk = [&](uint32_t (&to)[ROW_BLOCKS][4][4], int c) {
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) {
      uint32_t zero[2];
      if (asym) { // a branch of its own: else the compiler starts converting while wgmmas still read the registers, and then makes each wait
#pragma unroll
        for (int half = 0; half < 2; half++) zero[half] = *reinterpret_cast<const uint32_t*>(scales_of(c, r, half) + 32);
        convert_block(to[r], held[c][r].words, held[c][r].scale, zero);
      } else {
        zero[0] = zero[1] = symmetric_zeros<T>(BITS);
        convert_block(to[r], held[c][r].words, held[c][r].scale, zero);
      }
    }
  };
  auto let_go = [&] { // of the stage before this one, its products being done
    if (lane == 0) barrier_arrive(empty(before));
  };
  // One chunk: convert it, hand it to the tensor cores, wait for the one before. `set` is known at compile time.
  auto multiply = [&](int set, bool first) {
    const int c = set % Shape::CHUNKS; // of the stage
    if (c == 0) {
      barrier_wait(full(slot), phase);
      read_stage();
    }
    convert_chunk(a[set], c);
    const uint64_t x = matrix_descriptor(ring + slot * plan.stage_bytes + c * X_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
      for (int r = 0; r < ROW_BLOCKS; r++)
        Wgmma<T, TOKENS>::run(d[r], a[set][r][step], x + step * K_STEP_IN_DESCRIPTOR, !first || step);
    wgmma_commit();
    wgmma_wait<1>();
    if (c == 0 && !first) let_go();
    if (c == Shape::CHUNKS - 1) {
      before = slot;
      if (++slot == plan.stages) slot = 0, phase ^= 1;
    }
  };

  auto consumers_meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); };

  // A warp turns its 16 rows x some tokens in shared memory, so that a token's 16 outputs leave as one 32-byte sector.
  uint8_t* staged = shared + plan.stages * plan.stage_bytes + warp * Shape::STAGED_TOKENS * STAGED_STRIDE;
  const bool vectors = arg.ldy % 8 == 0 && reinterpret_cast<uintptr_t>(arg.y) % 16 == 0;
  // Sums of 16 tokens, the `at`-th of the staged ones: v[0..3] of the first eight, v[4..7] of the others, rows g and g + 8.
  auto stage_sums = [&](const float* v, int row0, int at) {
    const float bias = arg.bias && row0 + g < arg.n ? Dtype<T>::to_float(arg.bias[row0 + g]) : 0;
    const float bias8 = arg.bias && row0 + g + 8 < arg.n ? Dtype<T>::to_float(arg.bias[row0 + g + 8]) : 0;
    const uint32_t to = shared_address(staged) + (at + lane / 16 * 8 + lane % 8) * STAGED_STRIDE + lane / 8 % 2 * 16;
    store_matrices_transposed(to, pair_of<T>(v[0] + bias, v[1] + bias), pair_of<T>(v[2] + bias8, v[3] + bias8),
                              pair_of<T>(v[4] + bias, v[5] + bias), pair_of<T>(v[6] + bias8, v[7] + bias8));
  };
  auto write_staged = [&](int tokens, int token0, int row0) {
    __syncwarp();
#pragma unroll 1 // the code of this kernel is read once for each launch: less of it is faster
    for (int v = lane; v < tokens * 2; v += 32) {
      const int token = token0 + v / 2, row = row0 + v % 2 * 8;
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
  };
  auto write = [&](int64_t tile) {
    const int token0 = int(tile % plan.token_blocks) * TOKENS, tile0 = int(tile / plan.token_blocks) * TILES;
    constexpr int tokens = TOKENS < Shape::STAGED_TOKENS ? TOKENS : Shape::STAGED_TOKENS;
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) {
      const int row0 = (tile0 + first_tile + 4 * r) * TILE_ROWS;
#pragma unroll
      for (int part = 0; part < TOKENS; part += tokens) {
#pragma unroll
        for (int i = 0; i < tokens; i += 16) stage_sums(d[r] + (part + i) / 2, row0, i);
        write_staged(tokens, token0 + part, row0);
      }
    }
  };

  // The sums of a tile that a cluster has split: each block puts its own into its shared memory, which the ring no longer
  // needs, and adds up all blocks' sums, in their order, of every split-th 16 tokens.
  auto add_across_cluster = [&](int tile) {
    consumers_meet(); // every warpgroup's products are done with the ring
    float4* mine = reinterpret_cast<float4*>(shared) + thread;
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++)
#pragma unroll
      for (int i = 0; i < SUMS / 4; i++)
        mine[(r * SUMS / 4 + i) * CONSUMERS] = make_float4(d[r][4 * i], d[r][4 * i + 1], d[r][4 * i + 2], d[r][4 * i + 3]);
    cluster_sync();
    const int token0 = tile % plan.token_blocks * TOKENS, tile0 = tile / plan.token_blocks * TILES;
#pragma unroll 1
    for (int part = member; part < TOKENS / 16 && token0 + 16 * part < arg.m; part += plan.split)
#pragma unroll 1
      for (int r = 0; r < ROW_BLOCKS; r++) {
        float v[8] = {};
        const uint32_t from = ring + ((r * SUMS / 4 + 2 * part) * CONSUMERS + thread) * 16;
#pragma unroll 4
        for (int block = 0; block < plan.split; block++) {
          const float4 first = load_shared_of(from, block), second = load_shared_of(from + CONSUMERS * 16, block);
          v[0] += first.x, v[1] += first.y, v[2] += first.z, v[3] += first.w;
          v[4] += second.x, v[5] += second.y, v[6] += second.z, v[7] += second.w;
        }
        const int row0 = (tile0 + first_tile + 4 * r) * TILE_ROWS;
        stage_sums(v, row0, 0);
        write_staged(16, token0 + 16 * part, row0);
      }
    cluster_sync(); // nobody leaves while others read its sums
  };

  // True if this block holds the whole tile's sums afterwards (see tile.cuh).
  auto share = [&](int64_t tile) {
    const int64_t tile_begin = tile * plan.k_stages, tile_end = tile_begin + plan.k_stages;
    if (unit_begin <= tile_begin && unit_end >= tile_end) return true;
    int first = blockIdx.x, last = blockIdx.x;
    while (first_unit(first) > tile_begin) first--;
    while (first_unit(last + 1) < tile_end) last++;
    constexpr int vectors = ROW_BLOCKS * SUMS / 4;
    auto part = [&](int block) {
      const int64_t place = 2 * block + (first_unit(block) < tile_begin);
      return reinterpret_cast<float4*>(workspace) + place * vectors * CONSUMERS + thread;
    };
    auto add = [&](int block) {
      const float4* theirs = part(block);
#pragma unroll
      for (int r = 0; r < ROW_BLOCKS; r++)
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++) {
          const float4 v = __ldcg(theirs + (r * SUMS / 4 + i) * CONSUMERS);
          d[r][4 * i] += v.x, d[r][4 * i + 1] += v.y, d[r][4 * i + 2] += v.z, d[r][4 * i + 3] += v.w;
        }
    };
    if (last - first == 1) { // of two, the later one adds the other's sums to those in its registers: the order does not matter
      if (thread == 0) arrived = *static_cast<volatile int*>(counters + first), __threadfence();
      consumers_meet();
      const bool other_was_here = arrived == 1;
      consumers_meet(); // before `arrived` is written again
      if (other_was_here) {
        if (thread == 0) counters[first] = 0;
        add(blockIdx.x == first ? last : first);
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
    for (int block = first; block <= last; block++) add(block);
    return true;
  };

  for (int64_t unit = unit_begin; unit < unit_end;) {
    const int count = int(min(int64_t(plan.k_stages - k_stage), unit_end - unit)); // stages of this tile that are ours
    for (int i = 0; i < count; i += 2 / Shape::CHUNKS) {
      multiply(0, i == 0);
      if (Shape::CHUNKS == 2 || i + 1 < count) multiply(1, false);
    }
    wgmma_wait<0>();
    if (plan.split == 1) {
      let_go();
      const bool whole = share(tile);
      if (whole) write(tile);
    }
    unit += count, k_stage = 0, tile++;
  }
  if (plan.split > 1) add_across_cluster(tile - 1);
#else
  __trap(); // QC_SM90A was set for a build without sm_90a
#endif
}

// ---- launch ------------------------------------------------------------------------------------------------------

// How a shape would do a product: the cluster that a tile is split among, or these.
enum { WHOLE_TILES = 0, STREAM_K = 1 };

template <typename Shape, typename T> int64_t hopper_tiles(const Args<T>& arg) {
  return int64_t(div_up(arg.tiles, Shape::TILES)) * div_up(arg.m, Shape::TOKENS);
}

// About how many clocks a product takes; it serves to compare. `at_once`: blocks, or clusters, that run at a time. Fitted to
// times of an H200 for 7 to 117 million weights and 16 to 1024 tokens, of which it picks the fastest or one within 3 %.
template <typename Shape, typename T> int64_t hopper_clocks(const Args<T>& arg, int split, int at_once) {
  const int64_t tiles = hopper_tiles<Shape>(arg), steps = div_up(arg.chunks, 2), part_kb = Shape::PART_BYTES / 1024;
  const int64_t rounds = div_up<int64_t>(tiles, at_once);
  if (split == STREAM_K) {
    const int64_t sharers = tiles < at_once ? at_once / tiles + 2 : 2;
    return 9800 + tiles * steps * Shape::CLOCKS / at_once + 120 * part_kb + 1000 * sharers;
  }
  if (split == WHOLE_TILES) return 3800 + rounds * (steps * Shape::CLOCKS + 36 * part_kb);
  return 3800 + rounds * (div_up<int64_t>(steps, split) * Shape::CLOCKS + 2600 + 43 * part_kb);
}

// Launches the kernel; or, where `clusters` is given, says there how many clusters would run at a time, and launches nothing.
template <int BITS, typename T, typename Shape>
int launch_hopper(const Args<T>& arg, const Device& device, int split, void* workspace, cudaStream_t stream, int* clusters = nullptr) {
  constexpr int TILES = Shape::TILES, TOKENS = Shape::TOKENS;
  const auto kernel = hopper_kernel<BITS, T, Shape>;
  HopperPlan plan;
  const int64_t tiles = hopper_tiles<Shape>(arg);
  plan.split = split > 1 ? split : 1;
  plan.token_blocks = div_up(arg.m, TOKENS);
  plan.k_stages = div_up(arg.chunks, Shape::CHUNKS);
  plan.work = WorkSplit(tiles, plan.k_stages, split == WHOLE_TILES ? int(tiles) : device.sms);
  plan.scales = 2 * Shape::CHUNKS;
  while (plan.scales > 1 && (arg.groups == 1 || arg.group_of.units % (4 * Shape::CHUNKS / plan.scales) == 0)) plan.scales /= 2;
  const int used = Shape::CHUNKS * (Shape::X_BYTES + TILES * chunk_bytes(BITS)) + TILES * arg.group_bytes * plan.scales;
  plan.stage_bytes = div_up(used, 1024) * 1024; // the swizzle counts from multiples of 1024
  plan.stages = min(HOPPER_STAGES, (device.shared_bytes - 2048 - Shape::STAGED_BYTES) / plan.stage_bytes);
  if (plan.stages < 2) return QC_BAD_DEVICE;
  if (plan.split > 1 && (plan.k_stages < split || plan.stages * plan.stage_bytes < Shape::PART_BYTES)) return QC_BAD_VARIANT;
  const int bytes = plan.stages * plan.stage_bytes + Shape::STAGED_BYTES;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return QC_CUDA_ERROR + error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.split > 1 ? unsigned(tiles * plan.split) : plan.work.blocks), config.blockDim = dim3(Shape::THREADS);
  config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.split, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  config.attrs = &cluster, config.numAttrs = plan.split > 1 ? 1 : 0;
  if (clusters) {
    error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
    return error == cudaSuccess ? QC_OK : QC_CUDA_ERROR + error;
  }
  HopperMaps maps;
  const int chunk_words = chunk_bytes(BITS) / 4, group_words = arg.group_bytes / 4;
  if (int status = make_map(&maps.x, arg.x, true, arg.m, arg.k, arg.ldx * 2, TOKENS, CHUNK_K, true)) return status;
  if (int status = make_map(&maps.packed, arg.packed, false, arg.tiles, int64_t(arg.chunks) * chunk_words,
                            int64_t(arg.chunks) * chunk_words * 4, TILES, chunk_words, false)) return status;
  if (int status = make_map(&maps.meta, arg.meta, false, arg.tiles, int64_t(arg.groups) * group_words,
                            int64_t(arg.groups) * group_words * 4, TILES, group_words, false)) return status;
  error = cudaLaunchKernelEx(&config, kernel, arg, plan, maps, reinterpret_cast<float*>(static_cast<char*>(workspace) + COUNTERS_BYTES),
                             static_cast<int*>(workspace));
  return error == cudaSuccess ? QC_OK : QC_CUDA_ERROR + error;
}

// How many clusters of `split` blocks the device can run at a time, 0 if none: asked for once, so `arg` must have `split` stages and the
// answer is for every problem that has. Blocks fill a multiprocessor each, so they lie within groups of multiprocessors whose sizes differ from one GPU to the next.
template <int BITS, typename T, typename Shape> int clusters_at_once(const Args<T>& arg, const Device& device, int split) {
  static std::atomic<int> known[MAX_DEVICES][MOST_SPLIT + 1]; // plus one
  std::atomic<int>& count = known[device.id][split];
  if (const int seen = count.load(std::memory_order_relaxed)) return seen - 1;
  int found = 0;
  if (launch_hopper<BITS, T, Shape>(arg, device, split, nullptr, nullptr, &found)) cudaGetLastError(), found = 0;
  count.store(found + 1, std::memory_order_relaxed);
  return found;
}

} // namespace qcore
