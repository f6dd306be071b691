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
// way while a pass ends, where warps add up their sums through shared memory. With act-order x is put in packed order once,
// before all else, and stages hold weights alone.
//
// Instructions count: of the 4.7 us of a 4096 x 4096 product 1.4 pass before its reads are under way, 2 while they arrive. Hence one copy of
// each piece of code, and addresses that run along.
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
  int scatters;   // x lies in shared memory whole, put there in the order of perm
};

__host__ __device__ inline int decode_stage_bytes(int bits, int pass_tiles, int group_bytes, int scales_per_chunk) {
  return pass_tiles * (chunk_bytes(bits) + group_bytes * scales_per_chunk);
}
__host__ __device__ inline int decode_sum_bytes(int m, int pass_tiles, int warps) {
  return div_up(warps * pass_tiles * m * SUM_STRIDE * 4, 128) * 128; // what follows begins a row of banks
}
// A row of x that is there whole: 16 bytes past a multiple of 128, so that ldmatrix's eight rows hit all banks.
__host__ __device__ inline int whole_row_bytes(int chunks) { return chunks * CHUNK_K * 2 + 16; }

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
                                      int second_scale, int asym, int tiles, int lane) {
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
  for (int r = 0; r < ROW_TILES; r += 2) { // two at a time: their instructions interleave
    if (r >= tiles) break;
    const int second = r + 1 < tiles ? r + 1 : r; // an odd last one has itself for company
    LaneWords<BITS> words[2] = {lane_words<BITS>(chunks + r * chunk_stride, lane), lane_words<BITS>(chunks + second * chunk_stride, lane)};
#pragma unroll
    for (int s = 0; s < SCALES; s++) {
      const uint8_t* at[2] = {scales + r * scale_stride + s * second_scale, scales + second * scale_stride + s * second_scale};
      float part[2][TOKEN_TILES][4];
#pragma unroll
      for (int q = 0; q < 2; q++)
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) part[q][i][j] = start[s][i][j];
#pragma unroll
      for (int step = s * 4 / SCALES; step < (s + 1) * 4 / SCALES; step++)
#pragma unroll
        for (int q = 0; q < 2; q++) {
          uint32_t a[4];
          convert_raw<BITS, T>(a, words[q], step);
#pragma unroll
          for (int i = 0; i < TOKEN_TILES; i++) mma<T>(part[q][i], a, b[i][step / 2][step % 2 * 2], b[i][step / 2][step % 2 * 2 + 1]);
        }
      asm("" : "+r"(asym)); // or the compiler makes two copies of all of this, and code is read from memory too
      if (asym) {
#pragma unroll
        for (int q = 0; q < 2; q++) {
          const uint32_t zero = *reinterpret_cast<const uint32_t*>(at[q] + 32);
          const float z_g = low_float<T>(zero), z_g8 = R::factor8 * high_float<T>(zero);
#pragma unroll
          for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) part[q][i][j] -= z_g * x_unit[s][i][j], part[q][i][2 + j] -= z_g8 * x_unit[s][i][j];
        }
      }
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const uint32_t scale = *reinterpret_cast<const uint32_t*>(at[q]);
        const float s_g = low_float<T>(scale), s_g8 = high_float<T>(scale);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
          acc[r + q][i][0] += s_g * part[q][i][0], acc[r + q][i][1] += s_g * part[q][i][1];
          acc[r + q][i][2] += s_g8 * part[q][i][2], acc[r + q][i][3] += s_g8 * part[q][i][3];
        }
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

// x [m, columns] goes to shared memory [m][whole_row_bytes] in packed order: a thread reads eight neighbouring columns and where they go
// (reading in packed order instead would take a request for every two bytes), before any weights, which would be ahead in the queue.
template <typename T, int THREADS> __device__ inline void scatter_all_x(uint8_t* to, const Args<T>& arg) {
  const int row_bytes = whole_row_bytes(arg.chunks);
  for (int at = threadIdx.x * 16; at < arg.m * row_bytes; at += THREADS * 16) *reinterpret_cast<uint4*>(to + at) = make_uint4(0, 0, 0, 0);
  __syncthreads(); // padding is zero
  for (int first = threadIdx.x * 8; first < arg.columns; first += THREADS * 8) {
    int place[8];
#pragma unroll
    for (int j = 0; j < 8; j++) place[j] = first + j < arg.columns ? arg.places[first + j] : -1;
    for (int row = 0; row < arg.m; row++) {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(arg.x) + row * arg.ldx + first;
      uint16_t* x_row = reinterpret_cast<uint16_t*>(to + row * row_bytes);
      uint16_t v[8];
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = first + j < arg.columns ? x[j] : 0;
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (place[j] >= 0 && place[j] < arg.k) x_row[place[j]] = v[j];
    }
  }
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
  const int x_bytes = plan.scatters ? 0 : arg.m * CHUNK_K * 2; // of x in a stage
  uint8_t* x_whole = shared + WARPS * plan.stages * plan.stage_bytes + decode_sum_bytes(arg.m, plan.pass_tiles, WARPS);
  const int scale_bytes = arg.group_bytes * SCALES; // of one tile in one stage
  const int scales_offset = x_bytes + plan.pass_tiles * chunk_bytes(BITS);

  // -- fetch: start the copies of one stage. What it needs runs along in registers: it is a good part of a short product ----
  int fetch_chunk = chunk_begin, fetch_tiles = min(plan.pass_tiles, tile_end - tile_begin);
  int fetch_tile = steps ? tile_begin : tile_end; // at tile_end there is nothing left
  uint32_t fetch_to = ring;
  const uint32_t ring_end = ring + plan.stages * plan.stage_bytes;
  const int64_t tile_stride = int64_t(arg.chunks) * chunk_bytes(BITS);
  const uint8_t* w_gl = arg.packed + tile_begin * tile_stride + int64_t(chunk_begin) * chunk_bytes(BITS) + lane * LANE_VECTOR<BITS>;
  const int w_at = x_bytes + lane * LANE_VECTOR<BITS>;
  // A lane copies 16 bytes of scales: `meta_part` of slot `meta_slot` of tile `meta_tile`, then of tiles further on.
  const int part_shift = arg.group_bytes == 64 ? 2 : 1, tile_shift = part_shift + SCALES - 1;
  const int meta_tile = lane >> tile_shift, meta_slot = lane >> part_shift & (SCALES - 1);
  const int64_t meta_stride = int64_t(arg.groups) * arg.group_bytes; // between tiles
  const uint8_t* meta_gl = arg.meta + (tile_begin + meta_tile) * meta_stride + (lane & ((1 << part_shift) - 1)) * 16;
  const int meta_at = scales_offset + lane * 16;
  // Row r of x lies at 128 r; its 16-byte units are permuted by xor with r, so that ldmatrix's eight rows hit all
  // banks. A lane copies unit lane % 8 of rows lane / 8, + 4, + 8 ...
  const T* x_gl = arg.x + (lane / 8) * arg.ldx + lane % 8 * 8 + chunk_begin * CHUNK_K;
  int x_left = (arg.k - lane % 8 * 8 - chunk_begin * CHUNK_K) * 2; // bytes of the row from there on
  const int x_at = lane / 8 * 128 + (lane % 8 ^ lane / 8) * 16;

  auto fetch = [&] {
    if (fetch_tile < tile_end) {
      if (!plan.scatters) {
        const T* from = x_gl;
#pragma unroll
        for (int i = 0; i < TOKEN_TILES * 2; i++) {
          const uint32_t to = fetch_to + i * 512 + (x_at ^ i % 2 * 64);
          if (lane / 8 + 4 * i < arg.m) {
            if (x_left >= 16) copy16(to, from);
            else copy16_or_zero(to, x_left > 0 ? from : arg.x, max(0, x_left)); // the end of the row, and padding
          }
          from += 4 * arg.ldx;
        }
      }
      const uint8_t* from = w_gl;
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        if (r < fetch_tiles) copy_chunk<BITS>(fetch_to + w_at + r * chunk_bytes(BITS), from, lane);
        from += tile_stride;
      }
      const int group = min(arg.group_of(fetch_chunk * 2 + meta_slot), arg.groups - 1);
#pragma unroll
      for (int i = 0; i < div_up(ROW_TILES * 4 * SCALES, 32); i++) {
        const int ahead = i << (5 - tile_shift);
        if (meta_tile + ahead < fetch_tiles)
          copy16(fetch_to + meta_at + i * 512, meta_gl + ahead * meta_stride + group * arg.group_bytes);
      }
      fetch_to += plan.stage_bytes;
      if (fetch_to == ring_end) fetch_to = ring;
      fetch_chunk += WARPS, w_gl += WARPS * chunk_bytes(BITS), x_gl += WARPS * CHUNK_K, x_left -= WARPS * CHUNK_K * 2;
      if (fetch_chunk >= chunk_end) { // the next pass
        const int back = fetch_chunk - chunk_begin;
        w_gl += plan.pass_tiles * tile_stride - int64_t(back) * chunk_bytes(BITS);
        x_gl -= back * CHUNK_K, x_left += back * CHUNK_K * 2;
        meta_gl += plan.pass_tiles * meta_stride;
        fetch_chunk = chunk_begin, fetch_tile += plan.pass_tiles;
        fetch_tiles = min(plan.pass_tiles, tile_end - fetch_tile);
      }
    }
    copies_commit(); // also an empty one: the count of commits is the clock of the ring
  };

  // -- multiply: one stage into the sums -----------------------------------------------------------------------------
  float acc[ROW_TILES][TOKEN_TILES][4];
  uint32_t x_row[TOKEN_TILES]; // of ldmatrix: the lane's row; tokens past m repeat the last, are never written
#pragma unroll
  for (int i = 0; i < TOKEN_TILES; i++) x_row[i] = min(i * 8 + lane % 8, arg.m - 1);

  auto multiply = [&](int at, int chunk, int tiles) { // at: of the stage in the ring
    const uint32_t x = plan.scatters ? shared_address(x_whole) + chunk * CHUNK_K * 2 : ring + at;
    const int x_stride = plan.scatters ? whole_row_bytes(arg.chunks) : CHUNK_K * 2;
    const uint8_t* stage_ptr = ring_ptr + at;
    uint32_t b[TOKEN_TILES][2][4]; // [token tile][32 columns][B of two k-steps]
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        load_matrices(b[i][half], x + x_row[i] * x_stride + (((half * 4 + lane / 8) ^ (plan.scatters ? 0 : x_row[i] % 8)) * 16));
    multiply_chunk<BITS, T, TOKEN_TILES, ROW_TILES, FINE>(acc, b, stage_ptr + x_bytes, chunk_bytes(BITS), stage_ptr + scales_offset,
                                                          scale_bytes, arg.group_bytes, arg.group_bytes == 64, tiles, lane);
  };

  // -- the whole: stages - 1 fetches ahead, then one for each stage multiplied ---------------------------------------
  if (plan.scatters) {
    scatter_all_x<T, WARPS * 32>(x_whole, arg);
    __syncthreads();
  }
  clear_sums(acc);
  int at = 0, left = steps, tile = tile_begin;
  for (int step = 1 - plan.stages; tile < tile_end; step++) {
    if (step >= 0) copies_wait_but(plan.stages - 2);
    __syncwarp(); // the other lanes' copies are there too, and they have read the slot that is filled next
    fetch();
    if (step < 0) continue;
    const int tiles = min(plan.pass_tiles, tile_end - tile);
    if (steps) {
      multiply(at, chunk_begin + (steps - left) * WARPS, tiles);
      at += plan.stage_bytes;
      if (at == plan.stages * plan.stage_bytes) at = 0;
    }
    if (--left <= 0) { // the pass has ended
      reduce_warps<BITS, T, TOKEN_TILES, ROW_TILES, WARPS>(acc, sums, arg, plan.pass_tiles, tile, tiles);
      clear_sums(acc);
      left = steps, tile += plan.pass_tiles;
    }
  }
}

// ---- launch ------------------------------------------------------------------------------------------------------

template <int BITS, typename T, int TOKEN_TILES, int ROW_TILES, int WARPS>
int launch_decode(const Args<T>& arg, const Device& device, cudaStream_t stream) {
  const auto kernel = arg.scales_per_chunk == 2 ? decode_kernel<BITS, T, TOKEN_TILES, ROW_TILES, WARPS, true>
                                                : decode_kernel<BITS, T, TOKEN_TILES, ROW_TILES, WARPS, false>;
  const int blocks = min(arg.tiles, device.sms);
  const int most_tiles = div_up(arg.tiles, blocks), steps = div_up(arg.chunks, WARPS);
  DecodePlan plan;
  plan.block_tiles = arg.tiles / blocks, plan.longer_blocks = arg.tiles % blocks;
  plan.scatters = arg.places != nullptr;
  const int x_bytes = plan.scatters ? 0 : arg.m * CHUNK_K * 2, x_whole = plan.scatters ? arg.m * whole_row_bytes(arg.chunks) : 0;
  int passes = div_up(most_tiles, ROW_TILES), bytes;
  for (;; passes++) { // fewer tiles a pass until the ring fits
    plan.pass_tiles = div_up(most_tiles, passes);
    if (passes > 1 && plan.pass_tiles % 2 && plan.pass_tiles > 1 && plan.pass_tiles < ROW_TILES) plan.pass_tiles++; // they are multiplied in twos
    plan.stage_bytes = x_bytes + decode_stage_bytes(BITS, plan.pass_tiles, arg.group_bytes, arg.scales_per_chunk);
    const int fixed = decode_sum_bytes(arg.m, plan.pass_tiles, WARPS) + x_whole, ring_bytes = WARPS * plan.stage_bytes;
    plan.stages = min(max(steps * passes + 1, FEWEST_STAGES), min(MOST_STAGES, (device.shared_bytes - fixed) / ring_bytes));
    bytes = ring_bytes * plan.stages + fixed;
    if (plan.stages >= FEWEST_STAGES) break;
    if (passes > most_tiles) return QC_BAD_DEVICE;
  }
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  if (error != cudaSuccess) return QC_CUDA_ERROR + error;

  kernel<<<blocks, WARPS * 32, bytes, stream>>>(arg, plan);
  return launch_status();
}

} // namespace qcore
