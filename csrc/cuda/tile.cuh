// Matmul for more tokens (m > 16), on mma.sync: sm_80 and later, 4 and 8 bits, fp16 and bf16.
//
// The trade-off: a block makes a wide tile of outputs, so that x is read few times, and blocks share the K of a tile
// evenly (stream-K), so that all of them are busy; what that costs is a pass of float sums through L2 wherever a tile
// is shared. The last block to finish a shared tile adds the parts up in a fixed order: the same bits every time.
//
//     units of work, 128 columns of one output tile each:    tile 0         tile 1         tile 2
//                                                            |0 1 2 3 4 5|0 1 2 3 4 5|0 1 2 3 4 5|
//     blocks, equal runs of units:                           [ block 0  ][ block 1  ][ block 2   ]
//
// Eight warps: 4 side by side over the tile's rows x 2 over a stage's columns (64 each). A stage holds x [2][tokens][64]
// with 16-byte units permuted as in decode.cuh, the chunks [2][tiles], their scales [2][tiles].
#pragma once
#include "common.cuh"

namespace qcore {

constexpr int TILE_THREADS = 256;
constexpr int WARPS_N = 4; // over rows
constexpr int TILE_STAGES = 4; // at most; the fewest that a smaller shared memory may hold is 2

struct TilePlan {
  int stages, stage_bytes;
  int row_blocks, token_blocks;
  WorkSplit work;
};

template <int ROW_TILES, int TOKEN_TILES> struct TileShape {
  static constexpr int tiles = WARPS_N * ROW_TILES; // 16-row tiles of a block
  static constexpr int rows = tiles * TILE_ROWS, tokens = TOKEN_TILES * 8;
  static constexpr int vectors = ROW_TILES * TOKEN_TILES / 2; // float4s of sums that a thread finishes
  static constexpr int exchange_bytes = vectors * TILE_THREADS * 16;
  static constexpr int out_stride = rows + 8; // in T; the pad moves tokens to other banks
  static_assert(tokens * out_stride * 2 <= exchange_bytes, "outputs are staged where sums were exchanged");
};

template <int BITS, typename T, int ROW_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    tile_kernel(const Args<T> arg, const TilePlan plan, float* workspace, int* counters) {
  using Shape = TileShape<ROW_TILES, TOKEN_TILES>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ int arrived;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N, g = lane / 4, t = lane % 4;
  uint8_t* exchange = shared + plan.stages * plan.stage_bytes;

  const int scale_bytes = arg.group_bytes * arg.scales_per_chunk; // of a tile in a chunk
  constexpr int X_HALF = Shape::tokens * 128, W_HALF = Shape::tiles * chunk_bytes(BITS);
  constexpr int W_OFFSET = 2 * X_HALF, SCALES_OFFSET = W_OFFSET + 2 * W_HALF;

  // Unit u is stage u % k_units of output tile u / k_units; token blocks of the same rows follow each other.
  auto first_unit = [&](int block) { return plan.work.first_unit(block); };
  const int64_t unit_begin = first_unit(blockIdx.x), unit_end = first_unit(blockIdx.x + 1);

  // -- fetch ----------------------------------------------------------------------------------------------------------
  // Threads keep their places from stage to stage: 16-byte unit `x_unit` of every 16th token, `w_part` of every
  // W_APART-th tile's two chunks (which lie together), and at most one piece of scales.
  constexpr int W_VECTORS = 2 * chunk_bytes(BITS) / 16, W_APART = TILE_THREADS / W_VECTORS;
  const int x_token = thread / 16, x_half = thread / 8 % 2, x_unit = thread % 8;
  const uint32_t x_sh = shared_address(shared) + x_half * X_HALF + x_token * 128 + (x_unit ^ x_token % 8) * 16;
  const int w_tile = thread / W_VECTORS, w_part = thread % W_VECTORS, w_half = w_part / (W_VECTORS / 2);
  const uint32_t w_sh = shared_address(shared) + W_OFFSET + w_half * W_HALF + w_tile * chunk_bytes(BITS) + w_part % (W_VECTORS / 2) * 16;
  const int group_vectors = arg.group_bytes / 16, scale_vectors = scale_bytes / 16;
  const int s_half = thread / (Shape::tiles * scale_vectors), s_tile = thread / scale_vectors % Shape::tiles;
  const int s_slot = thread % scale_vectors / group_vectors, s_part = thread % group_vectors;
  const uint32_t s_sh = shared_address(shared) + SCALES_OFFSET + thread * 16;

  int64_t fetch_left = unit_end - unit_begin;
  int fetch_tile = int(unit_begin / plan.work.k_units), fetch_k = int(unit_begin % plan.work.k_units), fetch_slot = 0;
  int token0, tile0;
  auto fetch_place = [&] {
    token0 = fetch_tile % plan.token_blocks * Shape::tokens, tile0 = fetch_tile / plan.token_blocks * Shape::tiles;
  };
  fetch_place();
  auto fetch = [&] {
    if (fetch_left > 0) {
      const int offset = fetch_slot * plan.stage_bytes, chunk = fetch_k * 2;
      const int k = (chunk + x_half) * CHUNK_K + x_unit * 8, bytes = max(0, min(16, (arg.k - k) * 2));
      const T* x = arg.x + (token0 + x_token) * arg.ldx + k;
#pragma unroll
      for (int i = 0; i < Shape::tokens / 16; i++)
        if (token0 + x_token + 16 * i < arg.m)
          copy16_or_zero(x_sh + offset + i * 16 * 128, bytes ? x + i * 16 * arg.ldx : arg.x, bytes);
      const uint8_t* w = arg.packed + (int64_t(tile0 + w_tile) * arg.chunks + chunk) * chunk_bytes(BITS) + w_part * 16;
#pragma unroll
      for (int i = 0; i < Shape::tiles / W_APART; i++)
        if (tile0 + w_tile + i * W_APART < arg.tiles && chunk + w_half < arg.chunks)
          copy16_weights(w_sh + offset + i * W_APART * chunk_bytes(BITS), w + int64_t(i) * W_APART * arg.chunks * chunk_bytes(BITS));
      if (s_half < 2 && tile0 + s_tile < arg.tiles) {
        const int group = min(arg.group_of((chunk + s_half) * 2 + s_slot), arg.groups - 1);
        copy16(s_sh + offset, arg.meta + (int64_t(tile0 + s_tile) * arg.groups + group) * arg.group_bytes + s_part * 16);
      }
      fetch_slot = fetch_slot + 1 == plan.stages ? 0 : fetch_slot + 1;
      fetch_left--;
      if (++fetch_k == plan.work.k_units) fetch_k = 0, fetch_tile++, fetch_place();
    }
    copies_commit();
  };

  // -- multiply ---------------------------------------------------------------------------------------------------------
  float acc[ROW_TILES][TOKEN_TILES][4];
  auto multiply = [&](int slot) {
    const uint8_t* stage = shared + slot * plan.stage_bytes;
    const uint32_t x = shared_address(stage) + warp_k * X_HALF;
    const uint8_t* chunks = stage + W_OFFSET + warp_k * W_HALF + warp_n * ROW_TILES * chunk_bytes(BITS);
    const uint8_t* scales = stage + SCALES_OFFSET + (warp_k * Shape::tiles + warp_n * ROW_TILES) * scale_bytes;
    LaneWords<BITS> words[ROW_TILES];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) words[r] = lane_words<BITS>(chunks + r * chunk_bytes(BITS), lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t b[TOKEN_TILES][4];
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; i++)
        load_matrices(b[i], x + (i * 8 + lane % 8) * 128 + (((half * 4 + lane / 8) ^ lane % 8) * 16));
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        const uint8_t* group = scales + r * scale_bytes + (half < arg.scales_per_chunk ? half : 0) * arg.group_bytes;
        const uint32_t scale = *reinterpret_cast<const uint32_t*>(group + 4 * g);
        const uint32_t pattern = arg.group_bytes == 64 ? *reinterpret_cast<const uint32_t*>(group + 32 + 4 * g)
                                                       : symmetric_zeros<T>(BITS);
        const Zeros<BITS, T> zeros(pattern);
        const uint32_t scale_g = both_low(scale), scale_g8 = both_high(scale);
#pragma unroll
        for (int step = 0; step < 2; step++) {
          uint32_t a[4];
          convert<BITS, T>(a, words[r], half * 2 + step, zeros);
#pragma unroll
          for (int i = 0; i < 4; i++) a[i] = Pair<T>::mul(a[i], i % 2 ? scale_g8 : scale_g);
#pragma unroll
          for (int i = 0; i < TOKEN_TILES; i++) mma<T>(acc[r][i], a, b[i][2 * step], b[i][2 * step + 1]);
        }
      }
    }
  };

  // -- combine: the two halves of K. Warp (n, k) ends up with token tiles k * TOKEN_TILES / 2 onwards -------------------
  constexpr int HALF = TOKEN_TILES / 2;
  float4 sum[ROW_TILES][HALF];
  auto combine = [&] {
    float4* box = reinterpret_cast<float4*>(exchange) + warp * Shape::vectors * 32 + lane;
    const float4* other = reinterpret_cast<float4*>(exchange) + (warp ^ WARPS_N) * Shape::vectors * 32 + lane;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < HALF; i++) { // selected, not indexed, by warp_k: registers have no address
        const float4 v = warp_k ? make_float4(acc[r][i][0], acc[r][i][1], acc[r][i][2], acc[r][i][3])
                                : make_float4(acc[r][HALF + i][0], acc[r][HALF + i][1], acc[r][HALF + i][2], acc[r][HALF + i][3]);
        box[(r * HALF + i) * 32] = v;
      }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < HALF; i++) {
        const float4 v = other[(r * HALF + i) * 32];
        sum[r][i].x = v.x + (warp_k ? acc[r][HALF + i][0] : acc[r][i][0]);
        sum[r][i].y = v.y + (warp_k ? acc[r][HALF + i][1] : acc[r][i][1]);
        sum[r][i].z = v.z + (warp_k ? acc[r][HALF + i][2] : acc[r][i][2]);
        sum[r][i].w = v.w + (warp_k ? acc[r][HALF + i][3] : acc[r][i][3]);
      }
  };

  // -- share: true if this block holds the whole tile's sums afterwards -------------------------------------------------
  auto share = [&](int64_t tile) {
    const int64_t tile_begin = tile * plan.work.k_units, tile_end = tile_begin + plan.work.k_units;
    if (unit_begin <= tile_begin && unit_end >= tile_end) return true;
    int first = blockIdx.x, last = blockIdx.x; // the blocks that share the tile
    while (first_unit(first) > tile_begin) first--;
    while (first_unit(last + 1) < tile_end) last++;
    auto part = [&](int block) { // a block shares at most its first tile and its last
      const int slot = 2 * block + (first_unit(block) < tile_begin);
      return reinterpret_cast<float4*>(workspace) + int64_t(slot) * Shape::vectors * TILE_THREADS + thread;
    };
    float4* mine = part(blockIdx.x);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < HALF; i++) __stcg(mine + (r * HALF + i) * TILE_THREADS, sum[r][i]);
    __threadfence();
    __syncthreads();
    if (thread == 0) {
      arrived = atomicAdd(counters + first, 1);
      if (arrived == last - first) counters[first] = 0; // for the next launch
    }
    __syncthreads();
    if (arrived != last - first) return false;
    __threadfence();
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < HALF; i++) sum[r][i] = make_float4(0, 0, 0, 0);
    for (int block = first; block <= last; block++) {
      const float4* theirs = part(block);
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int i = 0; i < HALF; i++) {
          const float4 v = __ldcg(theirs + (r * HALF + i) * TILE_THREADS);
          sum[r][i].x += v.x, sum[r][i].y += v.y, sum[r][i].z += v.z, sum[r][i].w += v.w;
        }
    }
    return true;
  };

  // -- write: sums to T, turned in shared memory so that a token's outputs leave in 16-byte pieces ----------------------
  auto write = [&](int64_t tile) {
    const int token0 = int(tile % plan.token_blocks) * Shape::tokens, row0 = int(tile / plan.token_blocks) * Shape::rows;
    T* staged = reinterpret_cast<T*>(exchange);
    __syncthreads(); // the exchange has been read
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      const int row = (warp_n * ROW_TILES + r) * TILE_ROWS + g;
      const float bias = arg.bias && row0 + row < arg.n ? Dtype<T>::to_float(arg.bias[row0 + row]) : 0;
      const float bias8 = arg.bias && row0 + row + 8 < arg.n ? Dtype<T>::to_float(arg.bias[row0 + row + 8]) : 0;
#pragma unroll
      for (int i = 0; i < HALF; i++) {
        T* at = staged + ((warp_k * HALF + i) * 8 + 2 * t) * Shape::out_stride + row;
        at[0] = Dtype<T>::from_float(sum[r][i].x + bias);
        at[Shape::out_stride] = Dtype<T>::from_float(sum[r][i].y + bias);
        at[8] = Dtype<T>::from_float(sum[r][i].z + bias8);
        at[Shape::out_stride + 8] = Dtype<T>::from_float(sum[r][i].w + bias8);
      }
    }
    __syncthreads();
    const bool vectors = arg.ldy % 8 == 0 && reinterpret_cast<uintptr_t>(arg.y) % 16 == 0;
    constexpr int per_token = Shape::rows / 8;
    for (int v = thread; v < Shape::tokens * per_token; v += TILE_THREADS) {
      const int token = v / per_token, row = v % per_token * 8;
      if (token0 + token >= arg.m || row0 + row >= arg.n) continue;
      const T* from = staged + token * Shape::out_stride + row;
      T* to = arg.y + (token0 + token) * arg.ldy + row0 + row;
      if (vectors && row0 + row + 8 <= arg.n) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        for (int j = 0; j < 8 && row0 + row + j < arg.n; j++) to[j] = from[j];
    }
    __syncthreads();
  };

  // -- the whole ----------------------------------------------------------------------------------------------------------
  auto clear = [&] {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[r][i][j] = 0;
  };
  for (int s = 0; s < plan.stages - 1; s++) fetch();
  clear();
  int slot = 0, k_unit = int(unit_begin % plan.work.k_units);
  int64_t tile = unit_begin / plan.work.k_units;
  for (int64_t unit = unit_begin; unit < unit_end; unit++) {
    copies_wait_but(plan.stages - 2);
    __syncthreads();
    fetch();
    if (k_unit * 2 + warp_k < arg.chunks) multiply(slot);
    slot = slot + 1 == plan.stages ? 0 : slot + 1;
    if (++k_unit == plan.work.k_units || unit + 1 == unit_end) {
      combine();
      if (share(tile)) write(tile);
      else __syncthreads(); // `arrived` and the exchange may be written again
      clear();
      k_unit = 0, tile++;
    }
  }
}

// ---- launch ------------------------------------------------------------------------------------------------------

template <int BITS, typename T, int ROW_TILES, int TOKEN_TILES>
int launch_tile(const Args<T>& arg, const Device& device, void* workspace, cudaStream_t stream) {
  using Shape = TileShape<ROW_TILES, TOKEN_TILES>;
  const auto kernel = tile_kernel<BITS, T, ROW_TILES, TOKEN_TILES>;
  TilePlan plan;
  plan.row_blocks = div_up(arg.tiles, Shape::tiles), plan.token_blocks = div_up(arg.m, Shape::tokens);
  plan.work = WorkSplit(int64_t(plan.row_blocks) * plan.token_blocks, div_up(arg.chunks, 2), device.sms);
  plan.stage_bytes = 2 * (Shape::tokens * 128 + Shape::tiles * (chunk_bytes(BITS) + arg.group_bytes * arg.scales_per_chunk));
  plan.stages = min(TILE_STAGES, (device.shared_bytes - 1024 - Shape::exchange_bytes) / plan.stage_bytes);
  if (plan.stages < 2) return QC_BAD_DEVICE;
  const int bytes = plan.stages * plan.stage_bytes + Shape::exchange_bytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return QC_CUDA_ERROR + error;
  kernel<<<plan.work.blocks, TILE_THREADS, bytes, stream>>>(arg, plan, reinterpret_cast<float*>(static_cast<char*>(workspace) + COUNTERS_BYTES),
                                                  static_cast<int*>(workspace));
  return launch_status();
}

} // namespace qcore
