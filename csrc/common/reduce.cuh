// Reductions over the lanes of a warp. All 32 lanes take part.
#pragma once

#include <cstdint>

namespace illada {

constexpr unsigned kFullWarp = 0xffffffffu;

template <int kWidth = 32, typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  static_assert(kWidth <= 32 && (kWidth & (kWidth - 1)) == 0, "lanes are exchanged in pairs, fours, eights, ...");
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return fmaxf(a, b); });
}

// Converts floats to integers with the same order (except NaN), for atomicMax and redux. -0 sorts below +0.
__device__ __forceinline__ int32_t ordered(float value) {
  const int32_t bits = __float_as_int(value);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int32_t bits) {
  return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff));
}

}  // namespace illada
