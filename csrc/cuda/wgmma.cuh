// Hopper's wgmma as named functions, and the mbarriers and tensor copies that feed it. sm_90a alone.
//
// d += a . b: a 64 rows x 16 k of weights in registers (warp w of the warpgroup: rows 16 w .. 16 w + 15, laid as for
// mma.m16n8k16), b 16 k x N tokens in shared memory, rows of 64 columns under the 128-byte swizzle, d[4 i + 0, 1]: row g,
// tokens 8 i + 2 t, + 1; d[4 i + 2, 3]: row g + 8.
#pragma once
#include <cuda.h>

#include "common.cuh"

namespace qcore {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QC_HOPPER 1
#endif

// Registers that ordinary instructions wrote may be read by the wgmmas that follow.
__device__ inline void wgmma_fence() {
#ifdef QC_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#ifdef QC_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int N> __device__ inline void wgmma_wait() { // all but the latest N commits are done
#ifdef QC_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// b's descriptor: address / 16; 1024 bytes between groups of eight tokens; bits 62, 63: 128-byte swizzle.
__device__ inline uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 62;
}
constexpr int K_STEP_IN_DESCRIPTOR = 32 / 16; // 16 columns are 32 bytes further

// `add` = 0 overwrites d.
template <typename T, int TOKENS> struct Wgmma;

// PTX has no arrays: d's operands by their numbers, and as they are given.
#define QC_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QC_NAMES_16 QC_NAMES_8 "," \
  "%8,%9,%10,%11,%12,%13,%14,%15"
#define QC_NAMES_32 QC_NAMES_16 "," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QC_NAMES_64 QC_NAMES_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QC_NAMES_128 QC_NAMES_64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QC_SUMS_8(i) "+f"(d[i+0]),"+f"(d[i+1]),"+f"(d[i+2]),"+f"(d[i+3]),"+f"(d[i+4]),"+f"(d[i+5]),"+f"(d[i+6]),"+f"(d[i+7])
#define QC_SUMS_16(i) QC_SUMS_8(i), QC_SUMS_8(i + 8)
#define QC_SUMS_32(i) QC_SUMS_16(i), QC_SUMS_16(i + 16)
#define QC_SUMS_64(i) QC_SUMS_32(i), QC_SUMS_32(i + 32)
#define QC_SUMS_128(i) QC_SUMS_64(i), QC_SUMS_64(i + 64)
// SUMS numbers of d a thread; A0 .. ADD are the numbers of the operands behind them.
#define QC_WGMMA_OF(TYPE, PTX_TYPE, TOKENS, SUMS, A0, A1, A2, A3, B, ADD)                                                        \
  template <> struct Wgmma<TYPE, TOKENS> {                                                                                       \
    static __device__ inline void run(float (&d)[SUMS], const uint32_t (&a)[4], uint64_t b, int add) {                           \
      QC_ON_HOPPER(asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #TOKENS          \
                                "k16.f32." PTX_TYPE "." PTX_TYPE " {" QC_NAMES_##SUMS "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, " \
                                "%" #B ", p, 1, 1, 0;}"                                                                          \
                                : QC_SUMS_##SUMS(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));)            \
    }                                                                                                                            \
  };
#define QC_WGMMA(TOKENS, SUMS, ...)                               \
  QC_WGMMA_OF(__half, "f16", TOKENS, SUMS, __VA_ARGS__)           \
  QC_WGMMA_OF(__nv_bfloat16, "bf16", TOKENS, SUMS, __VA_ARGS__)
#ifdef QC_HOPPER
#define QC_ON_HOPPER(...) __VA_ARGS__
#else
#define QC_ON_HOPPER(...)
#endif
QC_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
QC_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
QC_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
QC_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
QC_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

// A warpgroup's registers a thread, changed while it runs.
template <int N> __device__ inline void registers_down() {
#ifdef QC_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N> __device__ inline void registers_up() {
#ifdef QC_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// ---- mbarriers and tensor copies ------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
#ifdef QC_HOPPER
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
__device__ inline void barrier_arrive_expecting(uint32_t barrier, int bytes) {
#ifdef QC_HOPPER
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
// Until the phase of that parity has ended; the hardware suspends the thread for a while at each try.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
#ifdef QC_HOPPER
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;}"
      ::"r"(barrier), "r"(parity) : "memory");
#endif
}
__device__ inline void prefetch_map(const CUtensorMap* map) {
#ifdef QC_HOPPER
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}
// A box of a mapped matrix; what lies outside of the matrix arrives as zero.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
#ifdef QC_HOPPER
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
#endif
}
// Every thread of every block of the cluster meets; what each wrote before is seen by all behind.
__device__ inline void cluster_sync() {
#ifdef QC_HOPPER
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// What lies at this shared address in another block of the cluster.
__device__ inline float4 load_shared_of(uint32_t address, int block) {
  float4 v = {};
#ifdef QC_HOPPER
  asm volatile("{.reg .b32 there;\n"
               "mapa.shared::cluster.u32 there, %4, %5;\n"
               "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(block) : "memory");
#endif
  return v;
}
// Four 8 x 8 matrices written transposed: lane 8 i + r gives the address of column r of matrix i.
__device__ inline void store_matrices_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef QC_HOPPER
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#endif
}

// A map of numbers [rows][columns], row_bytes apart, as boxes. Any 2-byte numbers pass for float16 here: they are moved.
int make_map(CUtensorMap* map, const void* base, bool two_bytes, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows,
             int box_columns, bool swizzled);

} // namespace qcore
