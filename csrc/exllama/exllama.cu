// Decode in the manner of ExLlama: half2 arithmetic on the ordinary cores, no tensor cores; a thread reads 16 bytes, eight columns of
// four neighbouring outputs, and multiplies them with values of x that all threads of a warp share.
//
//   grid    (128 outputs, a share of the columns, up to 8 tokens)
//   block   8 warps, each with UNITs of 32 columns of its own; x lies in shared memory, gathered by perm on the way there
//
// THE CONVERSION. A code q in the low nibble of a half word under the exponent of 64 reads 64 + q / 16, in the second nibble under that
// of 4 it reads 4 + q / 16; less the zero in the same form that is (q - zero) / 16, exactly. The sixteenth keeps sums of eight products
// within float16 while |x| <= 8188: they are taken in half2, eight columns to each half of a pair, then added in float32.
//
// THE ORDER. Warps, then blocks of one tile of outputs, add their sums in a fixed order: the block that arrives last does it.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "qcore_exllama.h"

namespace {

constexpr int TILE = 128, UNIT = 32, WARPS = 8, THREADS = 32 * WARPS, MOST_TOKENS = 8;
constexpr int SHARED_X = 64; // units of a warp times tokens: 32 KiB of x
constexpr int64_t MAX_N = 1 << 24, MAX_K = 1 << 20, MAX_M = 1 << 16;

struct Layer {
  const uint4* packed;
  const uint2 *scales, *zeros; // four outputs each
  const int32_t* perm;
  int n, tiles, columns, k, units, group_units;
};

struct Product {
  Layer layer;
  const __half* x;
  __half* y;
  int64_t ldx, ldy;
  float* partial;
  int32_t* arrived;
  int m, warp_units;
};

template <typename I> __host__ __device__ constexpr I div_up(I a, I b) { return (a + b - 1) / b; }

__device__ inline __half2 as_half2(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }

// (w & mask) | exponent in one instruction
__device__ inline __half2 place(uint32_t w, uint32_t mask, uint32_t exponent) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(w), "r"(mask), "r"(exponent));
  return as_half2(d);
}

__device__ inline void unpack(uint32_t w, __half2 low, __half2 high, __half2 (&v)[4]) {
  const uint32_t up = w >> 8;
  v[0] = __hsub2(place(w, 0x000f000f, 0x54005400), low);
  v[1] = __hsub2(place(w, 0x00f000f0, 0x44004400), high);
  v[2] = __hsub2(place(up, 0x000f000f, 0x54005400), low);
  v[3] = __hsub2(place(up, 0x00f000f0, 0x44004400), high);
}

__device__ inline void four_floats(uint2 v, float (&f)[4]) {
  const float2 a = __half22float2(as_half2(v.x)), b = __half22float2(as_half2(v.y));
  f[0] = a.x, f[1] = a.y, f[2] = b.x, f[3] = b.y;
}

// The scales and zeros of a group for a thread's four outputs.
struct Grid {
  float scale[4];
  __half2 low[4], high[4];
  __device__ void read(const Layer& layer, int group, int column) {
    const int at = (group * layer.tiles * TILE + column) / 4;
    four_floats(__ldg(layer.scales + at), scale);
    float zero[4] = {8.f, 8.f, 8.f, 8.f};
    if (layer.zeros) four_floats(__ldg(layer.zeros + at), zero);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      scale[j] *= 16.f;
      low[j] = __float2half2_rn(64.f + zero[j] / 16.f);
      high[j] = __float2half2_rn(4.f + zero[j] / 16.f);
    }
  }
};

// x of a block's columns in packed order -> shared [M][span]
template <int M> __device__ void gather(const Product& p, __half* xs, int span) {
  const int first = blockIdx.y * span, row0 = blockIdx.z * M;
  for (int i = threadIdx.x; i < M * span; i += THREADS) {
    const int row = row0 + i / span, c = first + i % span;
    int column = c < p.layer.k && row < p.m ? c : -1;
    if (column >= 0 && p.layer.perm) column = p.layer.perm[c];
    xs[i] = column >= 0 && column < p.layer.columns ? p.x[row * p.ldx + column] : __half(0.f);
  }
}

// sum[token][output] over one unit, in sixteenths
template <int M>
__device__ inline void multiply(const uint4 (&words)[4], const __half* xs, int span, const Grid& grid, float (&sum)[M][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    __half2 acc[M][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint4 q = words[2 * half + r];
      const uint32_t word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        __half2 v[4];
        unpack(word[j], grid.low[j], grid.high[j], v);
#pragma unroll
        for (int t = 0; t < M; t++) {
          const uint4 x = *reinterpret_cast<const uint4*>(xs + t * span + 8 * (2 * half + r));
          if (r == 0) acc[t][j] = __hmul2(v[0], as_half2(x.x));
          else acc[t][j] = __hfma2(v[0], as_half2(x.x), acc[t][j]);
          acc[t][j] = __hfma2(v[1], as_half2(x.y), acc[t][j]);
          acc[t][j] = __hfma2(v[2], as_half2(x.z), acc[t][j]);
          acc[t][j] = __hfma2(v[3], as_half2(x.w), acc[t][j]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < M; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 both = __half22float2(acc[t][j]);
        sum[t][j] += both.x + both.y;
      }
  }
}

__device__ inline void load_unit(const Layer& layer, int unit, int column, uint4 (&words)[4]) {
  const uint4* at = layer.packed + (int64_t(unit) * 4 * layer.tiles * TILE + column) / 4;
#pragma unroll
  for (int r = 0; r < 4; r++) words[r] = __ldcs(at + r * (layer.tiles * TILE / 4));
}

template <int M> __device__ void write_row(const Product& p, int token, int column, float value) {
  const int row = blockIdx.z * M + token;
  if (row < p.m && column < p.layer.n) p.y[row * p.ldy + column] = __float2half_rn(value);
}

// Leave the block's sums in `partial`; the last block of the tile adds them all, in order, and writes y.
template <int M> __device__ void combine(const Product& p, const float (&mine)[M], int first_column) {
  __shared__ bool last;
  const int split = gridDim.y, width = p.layer.tiles * TILE, column = first_column + threadIdx.x;
  float* base = p.partial + int64_t(blockIdx.z) * split * M * width;
  if (threadIdx.x < TILE) {
#pragma unroll
    for (int t = 0; t < M; t++) __stcg(base + (int64_t(blockIdx.y) * M + t) * width + column, mine[t]);
  }
  __threadfence();
  __syncthreads();
  int32_t* counter = p.arrived + blockIdx.z * p.layer.tiles + blockIdx.x;
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == split - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  if (threadIdx.x >= TILE) return;
#pragma unroll
  for (int t = 0; t < M; t++) {
    float value = 0.f;
    for (int s = 0; s < split; s++) value += __ldcg(base + (int64_t(s) * M + t) * width + column);
    write_row<M>(p, t, column, value);
  }
}

template <int M> __global__ void __launch_bounds__(THREADS, M <= 2 ? 4 - M : 1) matmul(const Product p) {
  extern __shared__ uint4 shared[];
  __half* xs = reinterpret_cast<__half*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, span = WARPS * p.warp_units * UNIT;
  const int column = blockIdx.x * TILE + 4 * lane, first = (blockIdx.y * WARPS + warp) * p.warp_units;
  const int last = min(first + p.warp_units, p.layer.units);
  uint4 words[4], next[4];
  if (first < last) load_unit(p.layer, first, column, next); // on its way while x is fetched
  gather<M>(p, xs, span);
  __syncthreads();

  float total[M][4] = {};
  Grid grid;
  for (int unit = first, group = -1; unit < last; unit++) {
#pragma unroll
    for (int r = 0; r < 4; r++) words[r] = next[r];
    if (unit + 1 < last) load_unit(p.layer, unit + 1, column, next);
    if (unit / p.layer.group_units != group) grid.read(p.layer, group = unit / p.layer.group_units, column);
    float sum[M][4] = {};
    multiply<M>(words, xs + (warp * p.warp_units + unit - first) * UNIT, span, grid, sum);
#pragma unroll
    for (int t = 0; t < M; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) total[t][j] = fmaf(grid.scale[j], sum[t][j], total[t][j]);
  }

  __syncthreads(); // x is no longer needed
  float* sums = reinterpret_cast<float*>(shared); // [warp][token][output]
#pragma unroll
  for (int t = 0; t < M; t++)
    *reinterpret_cast<float4*>(sums + (warp * M + t) * TILE + 4 * lane) = make_float4(total[t][0], total[t][1], total[t][2], total[t][3]);
  __syncthreads();
  float mine[M] = {};
  if (threadIdx.x < TILE) {
#pragma unroll
    for (int t = 0; t < M; t++)
      for (int w = 0; w < WARPS; w++) mine[t] += sums[(w * M + t) * TILE + threadIdx.x];
  }
  if (gridDim.y > 1) {
    combine<M>(p, mine, blockIdx.x * TILE);
  } else if (threadIdx.x < TILE) {
#pragma unroll
    for (int t = 0; t < M; t++) write_row<M>(p, t, blockIdx.x * TILE + threadIdx.x, mine[t]);
  }
}

__global__ void pack_words(Layer layer, const uint8_t* codes, uint32_t* packed) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= layer.tiles * TILE) return;
  for (int row = blockIdx.y; row < 4 * layer.units; row += gridDim.y) {
    uint32_t word = 0;
    for (int i = 0; i < 8; i++) {
      const int c = 8 * row + i;
      int from = c < layer.k && column < layer.n ? c : -1;
      if (from >= 0 && layer.perm) from = layer.perm[c];
      if (from >= 0 && from < layer.columns)
        word |= uint32_t(codes[int64_t(column) * layer.columns + from] & 15) << 4 * (i / 2 + 4 * (i % 2));
    }
    packed[int64_t(row) * layer.tiles * TILE + column] = word;
  }
}

__global__ void dequantize(Layer layer, __half* w, int64_t ldw) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x, width = layer.tiles * TILE;
  if (column >= layer.n) return;
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(layer.packed);
  const __half *scales = reinterpret_cast<const __half*>(layer.scales), *zeros = reinterpret_cast<const __half*>(layer.zeros);
  for (int row = blockIdx.y; row < 4 * layer.units; row += gridDim.y) {
    const int group = row / 4 / layer.group_units;
    const uint32_t word = packed[int64_t(row) * width + column];
    const float scale = __half2float(scales[int64_t(group) * width + column]);
    const float zero = zeros ? __half2float(zeros[int64_t(group) * width + column]) : 8.f;
    for (int i = 0; i < 8 && 8 * row + i < layer.k; i++) {
      const int to = layer.perm ? layer.perm[8 * row + i] : 8 * row + i;
      const float code = float(word >> 4 * (i / 2 + 4 * (i % 2)) & 15);
      if (to >= 0 && to < layer.columns) w[to * ldw + column] = __float2half_rn(scale * (code - zero));
    }
  }
}

// ---- checks and launches -----------------------------------------------------------------------------------------

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int make_layer(int64_t n, int64_t columns, int64_t k, int64_t group_size, const void* packed, const void* scales,
               const void* zeros, const int32_t* perm, Layer& layer) {
  if (n < 1 || n > MAX_N || k < 1 || k > MAX_K || columns < 1 || columns > MAX_K || (!perm && k != columns)) return QC_BAD_ARGUMENT;
  if (group_size != -1 && (group_size < UNIT || group_size % UNIT)) return QC_BAD_ARGUMENT;
  if (!packed) return QC_BAD_ARGUMENT;
  if (!aligned(packed) || !aligned(scales) || !aligned(zeros)) return QC_BAD_ALIGNMENT;
  layer.packed = static_cast<const uint4*>(packed);
  layer.scales = static_cast<const uint2*>(scales), layer.zeros = static_cast<const uint2*>(zeros);
  layer.perm = perm;
  layer.n = int(n), layer.tiles = int(div_up<int64_t>(n, TILE)), layer.columns = int(columns), layer.k = int(k);
  layer.units = int(div_up<int64_t>(k, UNIT));
  layer.group_units = group_size == -1 ? layer.units : int(group_size / UNIT);
  const int64_t groups = div_up(layer.units, layer.group_units);
  return groups * layer.tiles * TILE > int64_t(1) << 31 ? QC_BAD_ARGUMENT : QC_OK;
}

int tokens_of(int64_t m) { return m == 1 ? 1 : m == 2 ? 2 : m <= 4 ? 4 : MOST_TOKENS; }

// Units of 32 columns that a warp takes: so many that four blocks run on each multiprocessor at once.
int choose_split(int64_t m, int tiles, int units, int& warp_units, int& split) {
  int device, sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return QC_CUDA_ERROR + error;
  const int tokens = tokens_of(m), rows = int(div_up<int64_t>(m, tokens));
  const int wanted = max(1, 4 * sms / (tiles * rows));
  warp_units = min(max(1, div_up(units, wanted * WARPS)), SHARED_X / tokens);
  split = div_up(units, warp_units * WARPS);
  return QC_OK;
}

int64_t partial_floats(int64_t m, int tiles, int split) {
  return split == 1 ? 0 : div_up<int64_t>(m, tokens_of(m)) * tokens_of(m) * split * tiles * TILE;
}

template <int M> int launch(const Product& p, int split, cudaStream_t stream) {
  const dim3 grid(p.layer.tiles, split, div_up(p.m, M));
  const int x_bytes = M * WARPS * p.warp_units * UNIT * 2, sum_bytes = WARPS * M * TILE * 4;
  if (grid.y > 65535 || grid.z > 65535) return QC_BAD_ARGUMENT;
  matmul<M><<<grid, THREADS, max(x_bytes, sum_bytes), stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? QC_OK : QC_CUDA_ERROR + error;
}

} // namespace

extern "C" {

int qc_abi_version(void) { return QC_EXLLAMA_ABI; }

const char* qc_error_string(int code) {
  switch (code) {
    case QC_OK: return "no error";
    case QC_BAD_ARGUMENT: return "an argument is out of range or a pointer is null";
    case QC_BAD_ALIGNMENT: return "packed, scales, zeros and partial must be 16-byte aligned";
    case QC_BAD_DEVICE: return "the device is older than sm_80";
    case QC_SMALL_WORKSPACE: return "partial or arrived is smaller than these sizes need";
  }
  return code > QC_CUDA_ERROR ? cudaGetErrorString(static_cast<cudaError_t>(code - QC_CUDA_ERROR)) : "unknown code";
}

int64_t qc_exl_partial(int64_t m, int64_t n, int64_t k) {
  if (m < 1 || m > MAX_M || n < 1 || n > MAX_N || k < 1 || k > MAX_K) return -QC_BAD_ARGUMENT;
  int warp_units, split;
  const int tiles = int(div_up<int64_t>(n, TILE)), wrong = choose_split(m, tiles, int(div_up<int64_t>(k, UNIT)), warp_units, split);
  return wrong ? -wrong : partial_floats(m, tiles, split);
}

int qc_exl_pack(int64_t n, int64_t columns, int64_t k, const uint8_t* codes, const int32_t* perm, void* packed, void* stream) {
  Layer layer;
  const int wrong = make_layer(n, columns, k, -1, packed, nullptr, nullptr, perm, layer);
  if (wrong || !codes) return wrong ? wrong : QC_BAD_ARGUMENT;
  const dim3 grid(div_up(layer.tiles * TILE, 256), min(4 * layer.units, 4096));
  pack_words<<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(layer, codes, static_cast<uint32_t*>(packed));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? QC_OK : QC_CUDA_ERROR + error;
}

int qc_exl_dequantize(int64_t n, int64_t columns, int64_t k, int64_t group_size, const void* packed, const void* scales,
                      const void* zeros, const int32_t* perm, void* w, int64_t ldw, void* stream) {
  Layer layer;
  const int wrong = make_layer(n, columns, k, group_size, packed, scales, zeros, perm, layer);
  if (wrong || !scales || !w || ldw < n) return wrong ? wrong : QC_BAD_ARGUMENT;
  const dim3 grid(div_up(layer.n, 256), min(4 * layer.units, 4096));
  dequantize<<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(layer, static_cast<__half*>(w), ldw);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? QC_OK : QC_CUDA_ERROR + error;
}

int qc_exl_matmul(int64_t m, int64_t n, int64_t columns, int64_t k, int64_t group_size, const void* x, int64_t ldx,
                  const void* packed, const void* scales, const void* zeros, const int32_t* perm, void* y, int64_t ldy,
                  float* partial, int64_t partial_size, int32_t* arrived, int64_t counters, void* stream) {
  Product p;
  int wrong = make_layer(n, columns, k, group_size, packed, scales, zeros, perm, p.layer);
  if (wrong) return wrong;
  if (m < 0 || m > MAX_M) return QC_BAD_ARGUMENT;
  if (m == 0) return QC_OK;
  if (!x || !y || !scales || (m > 1 && (ldx < columns || ldy < n))) return QC_BAD_ARGUMENT;
  int split;
  if ((wrong = choose_split(m, p.layer.tiles, p.layer.units, p.warp_units, split))) return wrong;
  const int tokens = tokens_of(m);
  if (split > 1) {
    if (!partial || !arrived) return QC_BAD_ARGUMENT;
    if (!aligned(partial)) return QC_BAD_ALIGNMENT;
    if (partial_size < partial_floats(m, p.layer.tiles, split) || counters < p.layer.tiles * div_up<int64_t>(m, tokens))
      return QC_SMALL_WORKSPACE;
  }
  p.x = static_cast<const __half*>(x), p.y = static_cast<__half*>(y);
  p.ldx = ldx, p.ldy = ldy, p.partial = partial, p.arrived = arrived, p.m = int(m);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (tokens) {
    case 1: return launch<1>(p, split, s);
    case 2: return launch<2>(p, split, s);
    case 4: return launch<4>(p, split, s);
    default: return launch<8>(p, split, s);
  }
}

} // extern "C"
