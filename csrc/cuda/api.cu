// The C ABI: every argument is checked here, before any launch; then a kernel is chosen.
#include <atomic>

#include "common.cuh"

using namespace qcore;

namespace {

constexpr int64_t MAX_N = 1 << 24, MAX_K = 1 << 20, MAX_M = 1 << 24; // products of tiles and chunks stay in 32 bits
constexpr int DECODE_TOKENS = 32; // the most that decode kernels are compiled for
// Up to so many tokens decode is the fastest (README.md: measured); of a large weight wgmma is from half as many on, and of a
// small one, where there is no wgmma, decode is up to DECODE_TOKENS.
constexpr int DECODE_AUTO = 16;
constexpr int64_t LARGE_WEIGHT = 1 << 27;
#ifdef QC_SM90A
constexpr bool WITH_SM90A = true;
#else
constexpr bool WITH_SM90A = false;
#endif
constexpr int64_t SUMS_PER_BLOCK = 256 * 128; // the largest output tile of tile_ and hopper_instances.cuh

int read_device(Device& device) {
  static std::atomic<uint64_t> known[MAX_DEVICES]; // sms | major << 16 | shared bytes << 32; 0: not asked yet
  int id;
  cudaError_t error = cudaGetDevice(&id);
  if (error != cudaSuccess) return QC_CUDA_ERROR + error;
  if (id >= MAX_DEVICES) return QC_BAD_DEVICE;
  uint64_t v = known[id].load(std::memory_order_relaxed);
  if (!v) {
    int sms, shared_bytes, major;
    if ((error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, id)) != cudaSuccess ||
        (error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id)) != cudaSuccess ||
        (error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id)) != cudaSuccess)
      return QC_CUDA_ERROR + error;
    v = uint64_t(sms) | uint64_t(major) << 16 | uint64_t(shared_bytes) << 32;
    known[id].store(v, std::memory_order_relaxed);
  }
  device.id = id, device.sms = v & 0xFFFF, device.major = v >> 16 & 0xFFFF, device.shared_bytes = int(v >> 32);
  return device.major < 8 ? QC_BAD_DEVICE : QC_OK;
}

bool bits_ok(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int check_weight(int bits, int dtype, int64_t n, int64_t k, int64_t group_size, const void* packed, const void* meta) {
  if (!bits_ok(bits)) return QC_BAD_BITS;
  if (dtype != 0 && dtype != 1) return QC_BAD_DTYPE;
  if (n < 1 || n > MAX_N || k < 1 || k > MAX_K) return QC_BAD_SHAPE;
  if (group_size != -1 && (group_size < 1 || group_size % GROUP_UNIT)) return QC_BAD_GROUP;
  if (!packed || !meta) return QC_NULL_POINTER;
  if (!aligned(packed) || !aligned(meta)) return QC_BAD_ALIGNMENT;
  return QC_OK;
}

template <typename T>
Args<T> make_args(int64_t m, int64_t n, int64_t k, int64_t group_size, int asym, const void* x, int64_t ldx,
                  const void* packed, const void* meta, const void* bias, void* y, int64_t ldy) {
  Args<T> arg;
  arg.x = static_cast<const T*>(x), arg.bias = static_cast<const T*>(bias), arg.y = static_cast<T*>(y);
  arg.packed = static_cast<const uint8_t*>(packed), arg.meta = static_cast<const uint8_t*>(meta);
  arg.ldx = ldx, arg.ldy = ldy;
  arg.m = int(m), arg.n = int(n), arg.k = int(k);
  arg.tiles = div_up(arg.n, TILE_ROWS), arg.chunks = div_up(arg.k, CHUNK_K);
  arg.groups = group_size < 0 ? 1 : int(div_up(k, group_size));
  arg.group_bytes = asym ? 64 : 32;
  arg.scales_per_chunk = group_size > 0 && group_size % CHUNK_K && group_size < k ? 2 : 1;
  arg.group_of = GroupOf(group_size, k);
  return arg;
}

int check_matmul(int64_t m, int64_t n, int64_t k, const void* x, int64_t ldx, const void* y, int64_t ldy) {
  if (m < 0 || m > MAX_M) return QC_BAD_SHAPE;
  if (m == 0) return QC_OK;
  if (!x || !y) return QC_NULL_POINTER;
  if (ldx < k || ldy < n) return QC_BAD_STRIDE;
  if (!aligned(x) || ldx % 8 || reinterpret_cast<uintptr_t>(y) % 2) return QC_BAD_ALIGNMENT;
  return QC_OK;
}

#ifndef QC_AMD
int decode(int bits, int dtype, const void* arg, const Device& device, int flags, int row_tiles, int warps, cudaStream_t s) {
  switch (bits) {
    case 2: return matmul_decode<2>(dtype, arg, device, flags, row_tiles, warps, s);
    case 3: return matmul_decode<3>(dtype, arg, device, flags, row_tiles, warps, s);
    case 4: return matmul_decode<4>(dtype, arg, device, flags, row_tiles, warps, s);
    default: return matmul_decode<8>(dtype, arg, device, flags, row_tiles, warps, s);
  }
}
#endif

} // namespace

extern "C" {

int qc_abi_version(void) { return QC_CUDA_ABI; }

const char* qc_error_string(int code) {
  switch (code) {
    case QC_OK: return "no error";
    case QC_BAD_BITS: return "bits must be 2, 3, 4 or 8 (4 or 8 for more than 32 tokens)";
    case QC_BAD_DTYPE: return "dtype must be 0 (float16) or 1 (bfloat16)";
    case QC_BAD_SHAPE: return "sizes out of range: 0 <= m <= 2^24, 1 <= n <= 2^24, 1 <= k <= 2^20";
    case QC_BAD_GROUP: return "group_size must be -1 or a positive multiple of 32";
    case QC_BAD_ALIGNMENT: return "x, packed, meta and workspace must be 16-byte aligned, and ldx a multiple of 8";
    case QC_NULL_POINTER: return "a pointer that is needed is null";
    case QC_SMALL_WORKSPACE: return "the workspace is smaller than qc_workspace_bytes()";
    case QC_BAD_DEVICE: return "the device is older than sm_80 or has too little shared memory for this problem";
    case QC_BAD_STRIDE: return "a row stride is shorter than its row";
    case QC_BAD_VARIANT: return "the kernel asked for is not compiled or does not serve this m";
  }
  return code > QC_CUDA_ERROR ? cudaGetErrorString(static_cast<cudaError_t>(code - QC_CUDA_ERROR)) : "unknown code";
}

int64_t qc_packed_bytes(int bits, int64_t n, int64_t k) {
  if (!bits_ok(bits) || n < 1 || n > MAX_N || k < 1 || k > MAX_K) return -1;
  return div_up<int64_t>(n, TILE_ROWS) * div_up<int64_t>(k, CHUNK_K) * chunk_bytes(bits);
}

int64_t qc_meta_bytes(int64_t n, int64_t groups, int asym) {
  if (n < 1 || n > MAX_N || groups < 1 || groups > MAX_K) return -1;
  return div_up<int64_t>(n, TILE_ROWS) * groups * (asym ? 64 : 32);
}

int64_t qc_workspace_bytes(void) {
  Device device;
  if (read_device(device)) return -1;
  return 4096 + int64_t(device.sms) * 2 * SUMS_PER_BLOCK * 4;
}

int qc_repack(int bits, int64_t n, int64_t k_codes, int64_t k, const uint8_t* codes, const int32_t* perm, void* packed,
              void* stream) {
  if (!bits_ok(bits)) return QC_BAD_BITS;
  if (n < 1 || n > MAX_N || k < 1 || k > MAX_K || k_codes < 1 || k_codes > MAX_K || (!perm && k != k_codes)) return QC_BAD_SHAPE;
  if (!codes || !packed) return QC_NULL_POINTER;
  if (!aligned(packed)) return QC_BAD_ALIGNMENT;
  return repack(bits, n, k_codes, k, codes, perm, packed, static_cast<cudaStream_t>(stream));
}

int qc_unpack(int bits, int64_t n, int64_t k_codes, int64_t k, const void* packed, const int32_t* perm, uint8_t* codes,
              void* stream) {
  if (!bits_ok(bits)) return QC_BAD_BITS;
  if (n < 1 || n > MAX_N || k < 1 || k > MAX_K || k_codes < 1 || k_codes > MAX_K || (!perm && k != k_codes)) return QC_BAD_SHAPE;
  if (!codes || !packed) return QC_NULL_POINTER;
  if (!aligned(packed)) return QC_BAD_ALIGNMENT;
  return unpack(bits, n, k_codes, k, packed, perm, codes, static_cast<cudaStream_t>(stream));
}

int qc_pack_meta(int bits, int dtype, int64_t n, int64_t groups, const void* scales, const int32_t* zeros, void* meta,
                 void* stream) {
  if (!bits_ok(bits)) return QC_BAD_BITS;
  if (dtype != 0 && dtype != 1) return QC_BAD_DTYPE;
  if (n < 1 || n > MAX_N || groups < 1 || groups > MAX_K) return QC_BAD_SHAPE;
  if (!scales || !meta) return QC_NULL_POINTER;
  if (!aligned(meta)) return QC_BAD_ALIGNMENT;
  return pack_meta(dtype, n, groups, scales, zeros, meta, static_cast<cudaStream_t>(stream));
}

int qc_dequantize(int bits, int dtype, int64_t n, int64_t k_out, int64_t k, int64_t group_size, int asym,
                  const void* packed, const void* meta, const int32_t* perm, void* w, int64_t ldw, void* stream) {
  if (int status = check_weight(bits, dtype, n, k, group_size, packed, meta)) return status;
  if (k_out < 1 || k_out > MAX_K || (!perm && k_out != k)) return QC_BAD_SHAPE;
  if (!w) return QC_NULL_POINTER;
  if (ldw < k_out) return QC_BAD_STRIDE;
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == 1)
    return dequantize(bits, make_args<__nv_bfloat16>(0, n, k, group_size, asym, 0, 0, packed, meta, 0, 0, 0), k_out, perm, w, ldw, s);
  return dequantize(bits, make_args<__half>(0, n, k, group_size, asym, 0, 0, packed, meta, 0, 0, 0), k_out, perm, w, ldw, s);
}

int qc_gather(int dtype, int64_t m, int64_t k_in, int64_t k_out, const void* x, int64_t ldx, const int32_t* perm,
              void* out, void* stream) {
  if (dtype != 0 && dtype != 1) return QC_BAD_DTYPE;
  if (m < 0 || m > MAX_M || k_in < 1 || k_in > MAX_K || k_out < 1 || k_out > MAX_K || k_out % 8) return QC_BAD_SHAPE;
  if (m == 0) return QC_OK;
  if (!x || !out) return QC_NULL_POINTER;
  if (ldx < k_in) return QC_BAD_STRIDE;
  if (!aligned(out)) return QC_BAD_ALIGNMENT;
  return gather(m, k_in, k_out, x, ldx, perm, out, static_cast<cudaStream_t>(stream));
}

/* Benchmarks and tests only: qc_matmul with its choices given; 0 leaves one to the launcher. */
int qc_matmul_tuned(int bits, int dtype, int64_t m, int64_t n, int64_t k, int64_t group_size, int asym, const void* x,
                    int64_t ldx, const void* packed, const void* meta, const void* bias, void* y, int64_t ldy,
                    void* workspace, int64_t workspace_bytes, int kernel, int flags, int row_tiles, int warps,
                    void* stream) {
  if (int status = check_weight(bits, dtype, n, k, group_size, packed, meta)) return status;
  if (int status = check_matmul(m, n, k, x, ldx, y, ldy)) return status;
  if (m == 0) return QC_OK;
  Device device;
  if (int status = read_device(device)) return status;
  const bool hopper = device.major == 9 && WITH_SM90A;
#ifdef QC_AMD
  if (kernel == QC_AUTO) kernel = QC_DECODE; // the one there is
#endif
  if (kernel == QC_AUTO) {
    int most = DECODE_AUTO;
    if (hopper && n * k >= LARGE_WEIGHT) most = DECODE_AUTO / 2;
    if (!hopper && n * k <= SMALL_WEIGHT) most = DECODE_TOKENS;
    kernel = bits < 4 || m <= most ? QC_DECODE : hopper ? QC_WGMMA : QC_TILE;
  }
  const auto s = static_cast<cudaStream_t>(stream);
  const auto half_args = make_args<__half>(m, n, k, group_size, asym, x, ldx, packed, meta, bias, y, ldy);
  const auto bf16_args = make_args<__nv_bfloat16>(m, n, k, group_size, asym, x, ldx, packed, meta, bias, y, ldy);
  const void* arg = dtype == 1 ? static_cast<const void*>(&bf16_args) : &half_args;
#ifdef QC_AMD
  return kernel != QC_DECODE ? QC_BAD_VARIANT : matmul_amd(bits, dtype, arg, s);
#else
  if (kernel == QC_DECODE)
    return m > DECODE_TOKENS ? QC_BAD_VARIANT : decode(bits, dtype, arg, device, flags, row_tiles, warps, s);
  if (kernel != QC_TILE && kernel != QC_WGMMA) return QC_BAD_VARIANT;
  if (bits < 4) return QC_BAD_BITS;
  if (!workspace) return QC_NULL_POINTER;
  if (!aligned(workspace)) return QC_BAD_ALIGNMENT;
  if (workspace_bytes < qc_workspace_bytes()) return QC_SMALL_WORKSPACE;
  if (kernel == QC_WGMMA) {
    if (!hopper) return QC_BAD_VARIANT;
    return bits == 4 ? matmul_hopper<4>(dtype, arg, device, row_tiles, workspace, s)
                     : matmul_hopper<8>(dtype, arg, device, row_tiles, workspace, s);
  }
  return bits == 4 ? matmul_tile<4>(dtype, arg, device, row_tiles, workspace, s)
                   : matmul_tile<8>(dtype, arg, device, row_tiles, workspace, s);
#endif
}

int qc_matmul(int bits, int dtype, int64_t m, int64_t n, int64_t k, int64_t group_size, int asym, const void* x,
              int64_t ldx, const void* packed, const void* meta, const void* bias, void* y, int64_t ldy,
              void* workspace, int64_t workspace_bytes, int kernel, int flags, void* stream) {
  return qc_matmul_tuned(bits, dtype, m, n, k, group_size, asym, x, ldx, packed, meta, bias, y, ldy, workspace,
                         workspace_bytes, kernel, flags, 0, 0, stream);
}

int qc_matmul_reference(int bits, int dtype, int64_t m, int64_t n, int64_t k, int64_t group_size, int asym,
                        const void* x, int64_t ldx, const void* packed, const void* meta, const void* bias, void* y,
                        int64_t ldy, void* stream) {
  if (int status = check_weight(bits, dtype, n, k, group_size, packed, meta)) return status;
  if (int status = check_matmul(m, n, k, x, ldx, y, ldy)) return status;
  if (m == 0) return QC_OK;
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == 1)
    return reference(bits, make_args<__nv_bfloat16>(m, n, k, group_size, asym, x, ldx, packed, meta, bias, y, ldy), s);
  return reference(bits, make_args<__half>(m, n, k, group_size, asym, x, ldx, packed, meta, bias, y, ldy), s);
}

} // extern "C"
