#pragma once
#include <stdint.h>
struct __half { _Float16 v; };
struct __half2 { __half low, high; };
inline float __half2float(__half v) { return v.v; }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }
inline __half __float2half(float v) { return {_Float16(v)}; }
inline uint16_t __half_as_ushort(__half v) { return __builtin_bit_cast(uint16_t, v); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {{_Float16(a.low.v + b.low.v)}, {_Float16(a.high.v + b.high.v)}}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {{_Float16(a.low.v - b.low.v)}, {_Float16(a.high.v - b.high.v)}}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {{_Float16(a.low.v * b.low.v)}, {_Float16(a.high.v * b.high.v)}}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { // exact product and sum, rounded once: a double holds them
  return {{_Float16(double(a.low.v) * double(b.low.v) + double(c.low.v))}, {_Float16(double(a.high.v) * double(b.high.v) + double(c.high.v))}};
}
