// Rows of a gradient on their way from a warpgroup's accumulators to memory.
#pragma once

#include <cstdint>

#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {

// This lane's part of two rows of `x`, as wgmma leaves them, times `scale` in 16 bits to `row` and `row + stride`, of
// which the first `count` are wanted; rows are contiguous and 16-byte aligned. Four lanes to a row exchange words until
// each has 16 bytes of it.
template <typename T, int kColumns>
__device__ __forceinline__ void write_gradient(const float (&x)[kColumns / 2], float scale, T* row, int64_t stride,
                                               int count) {
  const int quad = int(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) w[b] = pack2<T>(x[4 * (j + b) + 2 * i] * scale, x[4 * (j + b) + 2 * i + 1] * scale);
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {  // transposes 2 x 2 words
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          if (b & bit) continue;
          const bool upper = quad & bit;
          const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? w[b] : w[b | bit], bit);
          (upper ? w[b] : w[b | bit]) = got;
        }
      }
      if (i < count) *reinterpret_cast<uint4*>(row + i * stride + 8 * (j + quad)) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

// The same rows unscaled onto sums in fp32, in any order.
template <int kColumns>
__device__ __forceinline__ void add_gradient(const float (&x)[kColumns / 2], float* row, int64_t stride, int count) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i >= count) continue;
    float* const target = row + i * stride + int(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) ptx::red_add_v2(target + 8 * j, x[4 * j + 2 * i], x[4 * j + 2 * i + 1]);
  }
}

}  // namespace illada::attention
