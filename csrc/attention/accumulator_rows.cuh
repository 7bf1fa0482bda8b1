// Stores of rows from accumulators of the tensor cores to memory. In mma.sync m16n8 and wgmma m64n8, four neighbouring
// lanes share a row. A lane has two rows, lane / 4 and lane / 4 + 8, and two neighbouring columns of every 8.
#pragma once

#include <cstdint>

#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {

// Default store of 16 bytes.
struct StorePlain {
  __device__ __forceinline__ void operator()(uint4* at, const uint4& x) const { *at = x; }
};
// Stores row i (0 or 1) times `scale`, in 16 bits, to `target` (contiguous, 16-byte aligned), if the row is real. The
// lanes of a row exchange words until each has 16 bytes of it. `store`: function that stores 16 bytes.
template <typename T, int kColumns, typename Store = StorePlain>
__device__ __forceinline__ void store_row(T* target, const float (&sum)[kColumns / 2], int i, float scale, bool is_real,
                                          int lane, const Store& store = {}) {
  target += lane % 4 * 8;
#pragma unroll
  for (int j = 0; j < kColumns / 32; ++j) {
    // A lane has 2 of every 8 of the row's 32 columns. After the exchange, lane l of the four has the l-th 8 columns.
    uint32_t w[4];
#pragma unroll
    for (int n = 0; n < 4; ++n)
      w[n] = pack2<T>(sum[16 * j + 4 * n + 2 * i] * scale, sum[16 * j + 4 * n + 2 * i + 1] * scale);
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = lane & bit;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (n & bit) continue;
        const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? w[n] : w[n | bit], bit);
        (upper ? w[n] : w[n | bit]) = got;
      }
    }
    if (is_real) store(reinterpret_cast<uint4*>(target + 32 * j), make_uint4(w[0], w[1], w[2], w[3]));
  }
}

// Adds row i to sums in fp32, in any order, if the row is real.
template <int kColumns>
__device__ __forceinline__ void add_row(float* target, const float (&sum)[kColumns / 2], int i, bool is_real,
                                        int lane) {
  if (!is_real) return;
  target += lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) ptx::red_add_v2(target + 8 * j, sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]);
}

}  // namespace illada::attention
