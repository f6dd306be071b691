// Matmul for few tokens (m <= 32), limited by reading the weights. sm_80 and later, 2, 3, 4, 8 bits, fp16 and bf16.
//
// The trade-off: nothing crosses from one block to another. A block owns a run of 16-row tiles for the whole of K: no
// workspace, no atomics, the same bits every time. What it costs is that x is read by every block, so this kernel hands
// over when there are many tokens. (Clusters that split K and add up through distributed shared memory were slower.)
//
//     rows (tiles)          K, in chunks of 64 columns
//     block 0  [0 1 2]      w0 w1 .. w15 w0 w1 .. w15
//     block 1  [3 4 5]      each warp takes every 16th chunk, for all of its block's tiles at once, so that a piece
//       ...                 of x serves them all; with many tiles a block makes several passes over K
//
// Codes become numbers the cheap way (convert_raw): a product gives P = sum of unit (base + factor q) x, and
//     unit factor sum of (q - zero) x = P - unit (base + factor zero) X,   X = sum of x,
// per group, in float. X comes from a product with ones, once for all tiles; a symmetric grid's zero is the same for
// all tiles too, so there the accumulator starts at the correction instead of at nothing. Unit and factor wait until
// the end. The cancellation costs a few of float's bits, far below the rounding of the output.
//
// Each warp has a ring of stages of its own and waits only for its own copies: no barrier inside the loop. A stage
// holds one chunk column: x [m][64], then the tiles' chunks, then the tiles' scales. The next pass's copies are under
// way while a pass ends, where warps add up their sums through shared memory.
#pragma once
#include "common.cuh"

namespace qcore {

// Sums of one 16-row tile and token take 20 floats in shared memory: lanes g + 20 * 2t hit 32 banks.
constexpr int SUM_STRIDE = 20;

constexpr int FEWEST_STAGES = 2, MOST_STAGES = 6; // of a ring: as many as fit

struct DecodePlan {
  int block_tiles, longer_blocks; // a block's tiles; so many blocks have one more
  int stages;
  int pass_tiles; // tiles a pass handles, <= ROW_TILES
  int stage_bytes;
  int overlap;    // QC_OVERLAP
};

__host__ __device__ inline int decode_stage_bytes(int bits, int m, int pass_tiles, int group_bytes, int scales_per_chunk) {
  return m * CHUNK_K * 2 + pass_tiles * (chunk_bytes(bits) + group_bytes * scales_per_chunk);
}
__host__ __device__ inline int decode_sum_bytes(int m, int pass_tiles, int warps) {
  return warps * pass_tiles * m * SUM_STRIDE * 4;
}

template <int ROW_TILES, int TOKEN_TILES> __device__ inline void clear_sums(float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[r][i][j] = 0;
}

// One warp, one chunk of columns, `tiles` tiles into acc. FINE: groups of an odd number of 32 columns, two scales a
// chunk, `second_scale` bytes apart; else one. Tile r's chunk lies r * chunk_stride further, its scales r * scale_stride.
template <int BITS, typename T, int TOKEN_TILES, int ROW_TILES, bool FINE>
__device__ inline void multiply_chunk(float (&acc)[ROW_TILES][TOKEN_TILES][4], const uint32_t (&b)[TOKEN_TILES][2][4],
                                      const uint8_t* chunks, int chunk_stride, const uint8_t* scales, int scale_stride,
                                      int second_scale, bool asym, int tiles, int lane) {
  constexpr int SCALES = FINE ? 2 : 1;
  using R = Raw<BITS, T>;
  constexpr float unit = 1.f / R::per_unit;
  const float zero_at_start = asym ? 0.f : float(1 << (BITS - 1));
  float start[SCALES][TOKEN_TILES][4]; // row g, g, g + 8, g + 8 of tokens 2t, 2t + 1
  float x_unit[SCALES][TOKEN_TILES][2];
  const uint32_t one = Dtype<T>::base == 1024 ? 0x3C003C00 : 0x3F803F80, ones[4] = {one, one, one, one};
#pragma unroll
  for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
    for (int s = 0; s < SCALES; s++) {
      float x_sum[4] = {};
#pragma unroll
      for (int step = s * 4 / SCALES; step < (s + 1) * 4 / SCALES; step++)
        mma<T>(x_sum, ones, b[i][step / 2][step % 2 * 2], b[i][step / 2][step % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        x_unit[s][i][j] = unit * x_sum[j];
        start[s][i][j] = -(R::base + zero_at_start) * x_unit[s][i][j];
        start[s][i][2 + j] = -(R::base + R::factor8 * zero_at_start) * x_unit[s][i][j];
      }
    }
  scales += lane / 4 * 4;
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    if (r % 2 == 0 && r >= tiles) break;              // two at a time: their instructions interleave
    const int tile = r % 2 && r >= tiles ? r - 1 : r; // an odd last one has itself for company
    const LaneWords<BITS> words = lane_words<BITS>(chunks + tile * chunk_stride, lane);
#pragma unroll
    for (int s = 0; s < SCALES; s++) {
      const uint8_t* at = scales + tile * scale_stride + s * second_scale;
      const uint32_t scale = *reinterpret_cast<const uint32_t*>(at);
      float part[TOKEN_TILES][4];
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) part[i][j] = start[s][i][j];
#pragma unroll
      for (int step = s * 4 / SCALES; step < (s + 1) * 4 / SCALES; step++) {
        uint32_t a[4];
        convert_raw<BITS, T>(a, words, step);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) mma<T>(part[i], a, b[i][step / 2][step % 2 * 2], b[i][step / 2][step % 2 * 2 + 1]);
      }
      const float s_g = low_float<T>(scale), s_g8 = high_float<T>(scale);
      if (asym) {
        const uint32_t zero = *reinterpret_cast<const uint32_t*>(at + 32);
        const float z_g = low_float<T>(zero), z_g8 = R::factor8 * high_float<T>(zero);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
          for (int j = 0; j < 2; j++) part[i][j] -= z_g * x_unit[s][i][j], part[i][2 + j] -= z_g8 * x_unit[s][i][j];
      }
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; i++) {
        acc[r][i][0] += s_g * part[i][0], acc[r][i][1] += s_g * part[i][1];
        acc[r][i][2] += s_g8 * part[i][2], acc[r][i][3] += s_g8 * part[i][3];
      }
    }
  }
}

// Adds up the warps' sums of a pass and writes y. pass_tiles is the stride of `sums`.
template <int BITS, typename T, int TOKEN_TILES, int ROW_TILES, int WARPS>
__device__ inline void reduce_warps(const float (&acc)[ROW_TILES][TOKEN_TILES][4], float* sums, const Args<T>& arg,
                                    int pass_tiles, int tile, int tiles) {
  using R = Raw<BITS, T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float* mine = sums + warp * pass_tiles * arg.m * SUM_STRIDE;
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int token = i * 8 + 2 * t + j % 2;
        if (r < tiles && token < arg.m)
          mine[(r * arg.m + token) * SUM_STRIDE + g + j / 2 * 8] = acc[r][i][j] * (j / 2 ? R::per_unit / R::factor8 : R::per_unit);
      }
  __syncthreads();
  constexpr int ROWS = ROW_TILES * TILE_ROWS, TOKENS_AT_ONCE = WARPS * 32 / ROWS; // a thread a row: neighbours write neighbours
  const int row = threadIdx.x % ROWS, out = tile * TILE_ROWS + row, warp_stride = pass_tiles * arg.m * SUM_STRIDE;
  if (row < tiles * TILE_ROWS && out < arg.n) {
    const float bias = arg.bias ? Dtype<T>::to_float(arg.bias[out]) : 0;
    for (int token = threadIdx.x / ROWS; token < arg.m; token += TOKENS_AT_ONCE) {
      const float* from = sums + ((row / TILE_ROWS) * arg.m + token) * SUM_STRIDE + row % TILE_ROWS;
      float v = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) v += from[w * warp_stride];
      arg.y[token * arg.ldy + out] = Dtype<T>::from_float(v + bias);
    }
  }
  __syncthreads();
}

template <int BITS, typename T, int TOKEN_TILES, int ROW_TILES, int WARPS, bool FINE>
__global__ void __launch_bounds__(WARPS * 32, 1) decode_kernel(const Args<T> arg, const DecodePlan plan) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int SCALES = FINE ? 2 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block = blockIdx.x, tile_begin = block * plan.block_tiles + min(block, plan.longer_blocks);
  const int tile_end = tile_begin + plan.block_tiles + (block < plan.longer_blocks);
  const int chunk_begin = warp, chunk_end = arg.chunks;
  const int steps = chunk_begin < chunk_end ? div_up(chunk_end - chunk_begin, WARPS) : 0; // of this warp, in a pass

  const uint32_t ring = shared_address(shared) + warp * plan.stages * plan.stage_bytes;
  const uint8_t* ring_ptr = shared + warp * plan.stages * plan.stage_bytes;
  float* sums = reinterpret_cast<float*>(shared + WARPS * plan.stages * plan.stage_bytes);
  const int x_bytes = arg.m * CHUNK_K * 2;
  const int scale_bytes = arg.group_bytes * SCALES; // of one tile in one stage
  const int scales_offset = x_bytes + plan.pass_tiles * chunk_bytes(BITS);

  // -- fetch: start the copies of one stage -----------------------------------------------------------------------
  int fetch_chunk = chunk_begin, fetch_tiles = min(plan.pass_tiles, tile_end - tile_begin);
  int fetch_tile = steps ? tile_begin : tile_end; // at tile_end there is nothing left
  uint32_t fetch_slot = 0;
  const int64_t tile_stride = int64_t(arg.chunks) * chunk_bytes(BITS);
  const uint8_t* w_gl = arg.packed + tile_begin * tile_stride + int64_t(chunk_begin) * chunk_bytes(BITS) + lane * LANE_VECTOR<BITS>;
  const uint32_t w_sh = ring + x_bytes + lane * LANE_VECTOR<BITS>;
  // A lane copies 16 bytes of scales: `meta_part` of slot `meta_slot` of tile `meta_tile`, then of tiles further on.
  const int part_shift = arg.group_bytes == 64 ? 2 : 1, tile_shift = part_shift + SCALES - 1;
  const int meta_tile = lane >> tile_shift, meta_slot = lane >> part_shift & (SCALES - 1);
  const int64_t meta_stride = int64_t(arg.groups) * arg.group_bytes; // between tiles
  const uint8_t* meta_gl = arg.meta + (tile_begin + meta_tile) * meta_stride + (lane & ((1 << part_shift) - 1)) * 16;
  const uint32_t meta_sh = ring + scales_offset + lane * 16;
  // Row r of x lies at 128 r; its 16-byte units are permuted by xor with r, so that ldmatrix's eight rows hit all
  // banks. A lane copies unit lane % 8 of rows lane / 8, + 4, + 8 ...
  const T* x_gl = arg.x + (lane / 8) * arg.ldx + lane % 8 * 8;
  const uint32_t x_sh = ring + lane / 8 * 128, x_unit = (lane % 8 ^ lane / 8) * 16;

  auto fetch_weights = [&](uint32_t slot_offset) {
    const uint8_t* from = w_gl;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      if (r < fetch_tiles) copy_chunk<BITS>(w_sh + slot_offset + r * chunk_bytes(BITS), from, lane);
      from += tile_stride;
    }
    const int group = min(arg.group_of(fetch_chunk * 2 + meta_slot), arg.groups - 1);
#pragma unroll
    for (int i = 0; i < div_up(ROW_TILES * 4 * SCALES, 32); i++) {
      const int ahead = i << (5 - tile_shift);
      if (meta_tile + ahead < fetch_tiles)
        copy16(meta_sh + slot_offset + i * 512, meta_gl + ahead * meta_stride + group * arg.group_bytes);
    }
  };
  auto fetch_x = [&](uint32_t slot_offset, int chunk) {
    const int bytes = max(0, min(16, (arg.k - chunk * CHUNK_K - lane % 8 * 8) * 2));
    const T* from = bytes ? x_gl + chunk * CHUNK_K : arg.x;
#pragma unroll
    for (int i = 0; i < TOKEN_TILES * 2; i++)
      if (lane / 8 + 4 * i < arg.m)
        copy16_or_zero(x_sh + slot_offset + i * 512 + (i % 2 ? x_unit ^ 64 : x_unit), bytes ? from + i * 4 * arg.ldx : from, bytes);
  };
  auto fetch_advance = [&] {
    fetch_slot = fetch_slot + 1 == plan.stages ? 0 : fetch_slot + 1;
    fetch_chunk += WARPS, w_gl += WARPS * chunk_bytes(BITS);
    if (fetch_chunk >= chunk_end) { // the next pass
      w_gl += plan.pass_tiles * tile_stride - int64_t(fetch_chunk - chunk_begin) * chunk_bytes(BITS);
      meta_gl += plan.pass_tiles * meta_stride;
      fetch_chunk = chunk_begin, fetch_tile += plan.pass_tiles;
      fetch_tiles = min(plan.pass_tiles, tile_end - fetch_tile);
    }
  };
  auto fetch = [&] {
    if (fetch_tile < tile_end) {
      fetch_x(fetch_slot * plan.stage_bytes, fetch_chunk);
      fetch_weights(fetch_slot * plan.stage_bytes);
      fetch_advance();
    }
    copies_commit(); // also an empty one: the count of commits is the clock of the ring
  };

  // -- multiply: one stage into the sums -----------------------------------------------------------------------------
  float acc[ROW_TILES][TOKEN_TILES][4];
  uint32_t x_row[TOKEN_TILES]; // of ldmatrix: the lane's row; tokens past m repeat the last, are never written
#pragma unroll
  for (int i = 0; i < TOKEN_TILES; i++) x_row[i] = min(i * 8 + lane % 8, arg.m - 1);

  auto multiply = [&](int slot, int tiles) {
    const uint32_t stage = ring + slot * plan.stage_bytes;
    const uint8_t* stage_ptr = ring_ptr + slot * plan.stage_bytes;
    uint32_t b[TOKEN_TILES][2][4]; // [token tile][32 columns][B of two k-steps]
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        load_matrices(b[i][half], stage + x_row[i] * 128 + (((half * 4 + lane / 8) ^ x_row[i] % 8) * 16));
    multiply_chunk<BITS, T, TOKEN_TILES, ROW_TILES, FINE>(acc, b, stage_ptr + x_bytes, chunk_bytes(BITS), stage_ptr + scales_offset,
                                                          scale_bytes, arg.group_bytes, arg.group_bytes == 64, tiles, lane);
  };

  // -- the whole ----------------------------------------------------------------------------------------------------
  if (plan.overlap) { // weights first, all of the ring; x once the kernel before has written it
    int first = 0;
    for (; first < plan.stages - 1 && fetch_tile < tile_end; first++) {
      fetch_weights(fetch_slot * plan.stage_bytes);
      fetch_advance();
    }
    wait_for_previous_kernel();
    let_next_kernel_start(); // not before: what starts now may count on all but this kernel having ended
    int chunk = chunk_begin;
    for (int s = 0; s < plan.stages - 1; s++) {
      if (s < first) fetch_x(s * plan.stage_bytes, chunk);
      chunk = chunk + WARPS < chunk_end ? chunk + WARPS : chunk_begin;
      copies_commit();
    }
  } else {
    for (int s = 0; s < plan.stages - 1; s++) fetch();
  }

  int slot = 0;
  for (int tile = tile_begin; tile < tile_end; tile += plan.pass_tiles) {
    const int tiles = min(plan.pass_tiles, tile_end - tile);
clear_sums(acc);
    for (int s = 0; s < steps; s++) {
      copies_wait_but(plan.stages - 2);
      __syncwarp(); // the other lanes' copies are there too, and they have read the slot that is filled next
      fetch();
      multiply(slot, tiles);
      slot = slot + 1 == plan.stages ? 0 : slot + 1;
    }
    if (plan.overlap) wait_for_previous_kernel(); // y may be what it reads
    reduce_warps<BITS, T, TOKEN_TILES, ROW_TILES, WARPS>(acc, sums, arg, plan.pass_tiles, tile, tiles);
  }
}

// ---- launch ------------------------------------------------------------------------------------------------------

template <int BITS, typename T, int TOKEN_TILES, int ROW_TILES, int WARPS>
int launch_decode(const Args<T>& arg, const Device& device, int flags, cudaStream_t stream) {
  const auto kernel = arg.scales_per_chunk == 2 ? decode_kernel<BITS, T, TOKEN_TILES, ROW_TILES, WARPS, true>
                                                : decode_kernel<BITS, T, TOKEN_TILES, ROW_TILES, WARPS, false>;
  const int blocks = min(arg.tiles, device.sms);
  const int most_tiles = div_up(arg.tiles, blocks), steps = div_up(arg.chunks, WARPS);
  DecodePlan plan;
  plan.block_tiles = arg.tiles / blocks, plan.longer_blocks = arg.tiles % blocks;
  plan.overlap = (flags & QC_OVERLAP) && device.major >= 9;
  int passes = div_up(most_tiles, ROW_TILES), bytes;
  for (;; passes++) { // fewer tiles a pass until the ring fits
    plan.pass_tiles = div_up(most_tiles, passes);
    if (passes > 1 && plan.pass_tiles % 2 && plan.pass_tiles > 1 && plan.pass_tiles < ROW_TILES) plan.pass_tiles++; // they are multiplied in twos
    plan.stage_bytes = decode_stage_bytes(BITS, arg.m, plan.pass_tiles, arg.group_bytes, arg.scales_per_chunk);
    const int sum_bytes = decode_sum_bytes(arg.m, plan.pass_tiles, WARPS), ring_bytes = WARPS * plan.stage_bytes;
    plan.stages = min(max(steps * passes + 1, FEWEST_STAGES), min(MOST_STAGES, (device.shared_bytes - sum_bytes) / ring_bytes));
    bytes = ring_bytes * plan.stages + sum_bytes;
    if (plan.stages >= FEWEST_STAGES) break;
    if (passes > most_tiles) return QC_BAD_DEVICE;
  }
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  if (error != cudaSuccess) return QC_CUDA_ERROR + error;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(WARPS * 32);
  config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap, config.numAttrs = plan.overlap ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, arg, plan);
  return error == cudaSuccess ? QC_OK : QC_CUDA_ERROR + error;
}

} // namespace qcore
