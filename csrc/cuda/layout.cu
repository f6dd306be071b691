// Into the packed layout and out of it (common.cuh draws it), once at load: repack, unpack, pack_meta. Dequantize, for
// prefill by a library matmul and for gradients. Gather, for act-order and for x whose rows need padding.
// And the slow, plain matmul that every fast one is checked against. Any GPU from sm_80.
//
// Trade-off: repack and unpack read single bytes, and so run at a fraction of the memory's speed; a model of 4 GB is
// re-laid in well under a second, which is less than reading it from disk.
#include "common.cuh"

namespace qcore {

constexpr int WARPS = 4;           // chunks a block handles: one warp each
constexpr int DEQUANT_STRIDE = 72; // elements between rows of the staged chunk: 64, and 8 so that rows change banks

__device__ inline int warp_of_grid() { return blockIdx.x * WARPS + threadIdx.x / 32; }

// codes [n, k_codes] uint8 -> packed; perm [k] int32 or null. One warp a chunk, one lane its own words.
template <int BITS>
__global__ void repack_kernel(int n, int64_t k_codes, int k, int chunks, int64_t work, const uint8_t* codes,
                              const int32_t* perm, uint8_t* packed) {
  const int64_t id = warp_of_grid();
  if (id >= work) return;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tile = id / chunks, chunk = id % chunks;
  uint32_t words[BITS] = {};
#pragma unroll
  for (int pair = 0; pair < 16; pair++)
#pragma unroll
    for (int second = 0; second < 2; second++) {
      const int64_t row = tile * TILE_ROWS + g + 8 * (pair % 2);
      const int column = int(chunk) * CHUNK_K + pair / 4 * 16 + 8 * (pair / 2 % 2) + 2 * t + second;
      const int from = column >= k ? -1 : perm ? perm[column] : column;
      const uint32_t code = row < n && from >= 0 && from < k_codes ? codes[row * k_codes + from] : 0;
      constexpr int low = BITS == 3 ? 2 : BITS;
      words[pair / (16 / low)] |= (code & ((1 << low) - 1)) << (low * (pair % (16 / low)) + 16 * second);
      if constexpr (BITS == 3) words[2] |= (code >> 2 & 1) << (pair + 16 * second);
    }
  uint32_t* out = reinterpret_cast<uint32_t*>(packed + id * chunk_bytes(BITS));
#pragma unroll
  for (int w = 0; w < BITS; w++) {
    if (BITS >= 4) out[w / 4 * 128 + lane * 4 + w % 4] = words[w];
    else out[w < 2 ? lane * 2 + w : 64 + lane] = words[w];
  }
}

// packed -> codes, through the same code_at that draws the layout, so that it checks repack and not itself.
__global__ void unpack_kernel(int bits, int n, int64_t k_codes, int k, int chunks, const uint8_t* packed,
                              const int32_t* perm, uint8_t* codes) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= k) return;
  const int to = perm ? perm[column] : column;
  if (to < 0 || to >= k_codes) return;
  for (int row = blockIdx.y; row < n; row += gridDim.y) {
    const int64_t id = int64_t(row / TILE_ROWS) * chunks + column / CHUNK_K;
    const uint32_t* chunk = reinterpret_cast<const uint32_t*>(packed + id * chunk_bytes(bits));
    codes[row * k_codes + to] = code_at(chunk, bits, row % TILE_ROWS, column % CHUNK_K);
  }
}

// scales [n, groups] T, zeros [n, groups] int32 or null -> meta
template <typename T>
__global__ void pack_meta_kernel(int n, int groups, int64_t work, const T* scales, const int32_t* zeros,
                                 uint16_t* meta) {
  const int64_t id = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; // [tile][group][row]
  if (id >= work) return;
  const int r = id % TILE_ROWS, group_numbers = zeros ? 32 : 16;
  const int64_t place = id / TILE_ROWS, row = place / groups * TILE_ROWS + r, group = place % groups;
  uint16_t* out = meta + place * group_numbers + row_slot(r);
  out[0] = row < n ? reinterpret_cast<const uint16_t*>(scales)[row * groups + group] : 0;
  if (zeros) reinterpret_cast<T*>(out)[16] = Dtype<T>::from_float(row < n ? zeros[row * groups + group] : 0);
}

// packed, meta -> w [n, k_out] T. One warp a chunk; without perm the 16 x 64 numbers are turned in shared memory so
// that 8 lanes write a row's 128 bytes.
template <int BITS, typename T>
__global__ void __launch_bounds__(WARPS * 32)
    dequantize_kernel(Args<T> arg, int64_t work, int64_t k_out, const int32_t* perm, T* w, int64_t ldw, bool vectors) {
  __shared__ __align__(16) uint32_t staged[WARPS][TILE_ROWS * DEQUANT_STRIDE / 2];
  const int64_t id = warp_of_grid();
  if (id >= work) return;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tile = id / arg.chunks;
  const int chunk = id % arg.chunks;
  uint32_t* mine = staged[threadIdx.x / 32];
  const LaneWords<BITS> words = lane_words<BITS>(arg.packed + id * chunk_bytes(BITS), lane);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int group = min(arg.group_of(chunk * 2 + half), arg.groups - 1);
    const uint8_t* meta = arg.meta + (tile * arg.groups + group) * arg.group_bytes;
    const uint32_t scale = *reinterpret_cast<const uint32_t*>(meta + 4 * g);
    const uint32_t pattern = arg.group_bytes == 64 ? *reinterpret_cast<const uint32_t*>(meta + 32 + 4 * g)
                                                   : symmetric_zeros<T>(BITS);
    const Zeros<BITS, T> zeros(pattern);
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t a[4];
      convert<BITS, T>(a, words, half * 2 + step, zeros);
#pragma unroll
      for (int i = 0; i < 4; i++)
        mine[(g + i % 2 * 8) * (DEQUANT_STRIDE / 2) + (half * 2 + step) * 8 + i / 2 * 4 + t] =
            Pair<T>::mul(a[i], i % 2 ? both_high(scale) : both_low(scale));
    }
  }
  __syncwarp();
  for (int v = lane; v < TILE_ROWS * 8; v += 32) {
    const int64_t row = tile * TILE_ROWS + v / 8;
    const int column = chunk * CHUNK_K + v % 8 * 8;
    if (row >= arg.n) continue;
    const uint4 eight = *reinterpret_cast<const uint4*>(mine + v / 8 * (DEQUANT_STRIDE / 2) + v % 8 * 4);
    if (vectors && column + 8 <= arg.k) {
      *reinterpret_cast<uint4*>(w + row * ldw + column) = eight;
    } else {
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int to = column + j >= arg.k ? -1 : perm ? perm[column + j] : column + j;
        const uint16_t bits = pairs[j / 2] >> 16 * (j % 2);
        if (to >= 0 && to < k_out) reinterpret_cast<uint16_t*>(w)[row * ldw + to] = bits;
      }
    }
  }
}

// out [m, k_out] = x [m, k_in] at perm; 2-byte numbers of either dtype. Eight columns a thread.
__global__ void gather_kernel(int64_t k_in, int64_t k_out, const uint16_t* x, int64_t ldx, const int32_t* perm,
                              uint16_t* out) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8, row = blockIdx.y;
  if (column >= k_out) return;
  uint16_t v[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int64_t from = perm ? perm[column + j] : column + j;
    v[j] = from >= 0 && from < k_in ? x[row * ldx + from] : 0;
  }
  uint4 eight;
  eight.x = v[0] | v[1] << 16, eight.y = v[2] | v[3] << 16, eight.z = v[4] | v[5] << 16, eight.w = v[6] | v[7] << 16;
  *reinterpret_cast<uint4*>(out + row * k_out + column) = eight;
}

template <typename T> __global__ void reference_kernel(int bits, Args<T> arg) {
  const int64_t id = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id >= int64_t(arg.m) * arg.n) return;
  const int row = id % arg.n, token = id / arg.n;
  double sum = 0;
  for (int k = 0; k < arg.k; k++) {
    const int64_t tile = row / TILE_ROWS;
    const int group = min(arg.group_of(k / GROUP_UNIT), arg.groups - 1);
    const uint16_t* meta = reinterpret_cast<const uint16_t*>(arg.meta + (tile * arg.groups + group) * arg.group_bytes) +
                           row_slot(row % TILE_ROWS);
    const int zero = arg.group_bytes == 64 ? int(low_float<T>(meta[16])) : 1 << (bits - 1);
    const uint32_t* chunk =
        reinterpret_cast<const uint32_t*>(arg.packed + (tile * arg.chunks + k / CHUNK_K) * chunk_bytes(bits));
    const int code = code_at(chunk, bits, row % TILE_ROWS, k % CHUNK_K);
    sum += double(low_float<T>(meta[0])) * (code - zero) * double(Dtype<T>::to_float(arg.x[token * arg.ldx + k]));
  }
  if (arg.bias) sum += Dtype<T>::to_float(arg.bias[row]);
  arg.y[token * arg.ldy + row] = Dtype<T>::from_float(float(sum));
}

// ---- launchers ---------------------------------------------------------------------------------------------------

int repack(int bits, int64_t n, int64_t k_codes, int64_t k, const uint8_t* codes, const int32_t* perm, void* packed,
           cudaStream_t stream) {
  const int64_t chunks = div_up<int64_t>(k, CHUNK_K), work = div_up<int64_t>(n, TILE_ROWS) * chunks;
  const auto kernel = bits == 2 ? repack_kernel<2> : bits == 3 ? repack_kernel<3> : bits == 4 ? repack_kernel<4> : repack_kernel<8>;
  kernel<<<unsigned(div_up<int64_t>(work, WARPS)), WARPS * 32, 0, stream>>>(n, k_codes, k, chunks, work, codes, perm,
                                                                           static_cast<uint8_t*>(packed));
  return launch_status();
}

int unpack(int bits, int64_t n, int64_t k_codes, int64_t k, const void* packed, const int32_t* perm, uint8_t* codes,
           cudaStream_t stream) {
  const dim3 grid(unsigned(div_up<int64_t>(k, 256)), unsigned(n < 65535 ? n : 65535));
  unpack_kernel<<<grid, 256, 0, stream>>>(bits, n, k_codes, k, div_up<int64_t>(k, CHUNK_K),
                                          static_cast<const uint8_t*>(packed), perm, codes);
  return launch_status();
}

int pack_meta(int dtype, int64_t n, int64_t groups, const void* scales, const int32_t* zeros, void* meta,
              cudaStream_t stream) {
  const int64_t work = div_up<int64_t>(n, TILE_ROWS) * TILE_ROWS * groups;
  const unsigned blocks = unsigned(div_up<int64_t>(work, 256));
  if (dtype == 0)
    pack_meta_kernel<<<blocks, 256, 0, stream>>>(n, groups, work, static_cast<const __half*>(scales), zeros,
                                                 static_cast<uint16_t*>(meta));
  else
    pack_meta_kernel<<<blocks, 256, 0, stream>>>(n, groups, work, static_cast<const __nv_bfloat16*>(scales),
                                                 zeros, static_cast<uint16_t*>(meta));
  return launch_status();
}

template <typename T>
int dequantize(int bits, const Args<T>& arg, int64_t k_out, const int32_t* perm, void* w, int64_t ldw,
               cudaStream_t stream) {
  const int64_t work = int64_t(arg.tiles) * arg.chunks;
  const bool vectors = !perm && ldw % 8 == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0;
  const auto kernel = bits == 2 ? dequantize_kernel<2, T> : bits == 3 ? dequantize_kernel<3, T>
                    : bits == 4 ? dequantize_kernel<4, T> : dequantize_kernel<8, T>;
  kernel<<<unsigned(div_up<int64_t>(work, WARPS)), WARPS * 32, 0, stream>>>(arg, work, k_out, perm, static_cast<T*>(w),
                                                                           ldw, vectors);
  return launch_status();
}
template int dequantize(int, const Args<__half>&, int64_t, const int32_t*, void*, int64_t, cudaStream_t);
template int dequantize(int, const Args<__nv_bfloat16>&, int64_t, const int32_t*, void*, int64_t, cudaStream_t);

int gather(int64_t m, int64_t k_in, int64_t k_out, const void* x, int64_t ldx, const int32_t* perm, void* out,
           cudaStream_t stream) {
  for (int64_t first = 0; first < m; first += 65535) { // a grid's y ends there
    const dim3 grid(unsigned(div_up<int64_t>(k_out / 8, 128)), unsigned(m - first < 65535 ? m - first : 65535));
    gather_kernel<<<grid, 128, 0, stream>>>(k_in, k_out, static_cast<const uint16_t*>(x) + first * ldx, ldx, perm,
                                            static_cast<uint16_t*>(out) + first * k_out);
  }
  return launch_status();
}

template <typename T> int reference(int bits, const Args<T>& arg, cudaStream_t stream) {
  const int64_t work = int64_t(arg.m) * arg.n;
  reference_kernel<T><<<unsigned(div_up<int64_t>(work, 128)), 128, 0, stream>>>(bits, arg);
  return launch_status();
}
template int reference(int, const Args<__half>&, cudaStream_t);
template int reference(int, const Args<__nv_bfloat16>&, cudaStream_t);

} // namespace qcore
