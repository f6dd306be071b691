// Products of csrc/cuda/amd.cu on the host against double sums; the layout is written by what common.cuh says of it.
#include "amd.cu"

#include <cstdio>
#include <cstdlib>

using namespace qcore;

static double uniform() { return std::rand() / double(RAND_MAX); }

template <int BITS, typename T> static void check(int m, int n, int k, int group_size, bool asym, bool bias) {
  const int tiles = div_up(n, TILE_ROWS), chunks = div_up(k, CHUNK_K), groups = group_size < 0 ? 1 : div_up(k, group_size);
  const int ldx = div_up(k, 8) * 8 + 8, ldy = n + 3, values = asym ? 32 : 16;
  std::vector<uint32_t> packed(tiles * chunks * chunk_bytes(BITS) / 4);
  std::vector<T> meta(tiles * groups * values), x(m * ldx), y(m * ldy, Dtype<T>::from_float(77)), b(n);
  std::vector<int> codes(n * k);
  for (int row = 0; row < n; row++)
    for (int column = 0; column < k; column++) {
      const int code = codes[row * k + column] = std::rand() % (1 << BITS), low = BITS == 3 ? 2 : BITS;
      uint32_t* chunk = packed.data() + (row / 16 * chunks + column / 64) * chunk_bytes(BITS) / 4;
      CodePlace at = code_place(low, row % 16, column % 64);
      chunk[at.word] |= uint32_t(code & ((1 << low) - 1)) << at.shift;
      if (BITS == 3) at = code_place(1, row % 16, column % 64), chunk[64 + at.word] |= uint32_t(code >> 2) << at.shift;
    }
  for (auto& v : meta) v = Dtype<T>::from_float(0);
  auto slot = [&](int row, int group) { return meta.data() + (row / 16 * groups + group) * values + row_slot(row % 16); };
  for (int row = 0; row < n; row++)
    for (int group = 0; group < groups; group++) {
      *slot(row, group) = Dtype<T>::from_float(0.01 + 0.02 * uniform());
      if (asym) slot(row, group)[16] = Dtype<T>::from_float(std::rand() % ((1 << BITS) + 1));
    }
  for (auto& v : x) v = Dtype<T>::from_float(2 * uniform() - 1);
  for (auto& v : b) v = Dtype<T>::from_float(uniform());
  Args<T> arg = {};
  arg.x = x.data(), arg.y = y.data(), arg.bias = bias ? b.data() : nullptr, arg.ldx = ldx, arg.ldy = ldy;
  arg.packed = reinterpret_cast<uint8_t*>(packed.data()), arg.meta = reinterpret_cast<uint8_t*>(meta.data());
  arg.m = m, arg.n = n, arg.k = k, arg.tiles = tiles, arg.chunks = chunks, arg.groups = groups;
  arg.group_bytes = 2 * values, arg.group_of = GroupOf(group_size, k);
  matmul_amd(BITS, sizeof(T) == 2 && Dtype<T>::base == 128, &arg, nullptr);
  double error = 0, size = 0;
  bool outside = false;
  for (int token = 0; token < m; token++)
    for (int row = 0; row < ldy; row++) {
      const double found = Dtype<T>::to_float(y[token * ldy + row]);
      if (row >= n) {
        outside |= found != 77;
        continue;
      }
      double sum = bias ? Dtype<T>::to_float(b[row]) : 0;
      for (int column = 0; column < k; column++) {
        const int group = group_size < 0 ? 0 : column / group_size;
        const double zero = asym ? Dtype<T>::to_float(slot(row, group)[16]) : 1 << (BITS - 1);
        sum += Dtype<T>::to_float(*slot(row, group)) * (codes[row * k + column] - zero) * Dtype<T>::to_float(x[token * ldx + column]);
      }
      error += (found - sum) * (found - sum), size += sum * sum;
    }
  error = std::sqrt(error / size);
  std::printf("%s bits %d m %d n %d k %d group %d asym %d: %.1e\n", outside || error > (Dtype<T>::base == 128 ? 4e-3 : 5e-4) ? "WRONG" : "right",
              BITS, m, n, k, group_size, asym, error);
}

template <int BITS> static void check_width() {
  check<BITS, __half>(3, 40, 96, 32, false, false);
  check<BITS, __half>(17, 33, 200, 64, true, true);
  check<BITS, __nv_bfloat16>(1, 16, 130, 128, false, true);
  check<BITS, __nv_bfloat16>(5, 20, 320, -1, true, false);
}

int main() { check_width<2>(), check_width<3>(), check_width<4>(), check_width<8>(); }
