// From the accumulators of wgmma to memory by TMA: a warp has 16 rows of a tile of d [64, 256] (wgmma.cuh), and writes
// them in boxes of 128 bytes x 16 rows through two buffers of its own in shared memory. The writes run while the
// tensor cores have gone on, rows are written in whole lines, and what lies outside of the tensor map is left out.
#pragma once

#include <cutlass/arch/memory.h>
#include <cute/arch/copy_sm90.hpp>

#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada {

// Out: float, or a 16-bit type. The map: tensor_map_k128 of the target, of boxes of kRows rows.
template <typename Out>
class TileStoreSm90 {
 public:
  static constexpr int kRows = 16, kColumns = 128 / int(sizeof(Out)), kBufferBytes = 128 * kRows;
  static constexpr int kBytes = 2 * kBufferBytes;  // of shared memory for a warp, 1024-byte aligned

  __device__ __forceinline__ explicit TileStoreSm90(uint32_t smem) : smem_(smem) {}

  // Box `kBox` of d to the rows from y on, columns from x + kBox * kColumns on; or added to what is there. By whole
  // warps, and boxes in turn.
  template <int kBox>
  __device__ __forceinline__ void store_box(const float (&d)[128], const void* map, int x, int y, bool add) {
    cute::tma_store_wait<1>();  // of the lane that stores: its store before the last has left this buffer
    __syncwarp();
    const uint32_t buffer = smem_ + uint32_t(kBox % 2 * kBufferBytes);
    fill_box(d, kBox, buffer);
    if (threadIdx.x % 32 == 0) {
      if (add) {
        cute::SM90_TMA_REDUCE_ADD_2D::copy(map, &ptx::shared_at<char>(buffer), x + kBox * kColumns, y);
      } else {
        cute::SM90_TMA_STORE_2D::copy(map, &ptx::shared_at<char>(buffer), x + kBox * kColumns, y);
      }
    }
    cute::tma_store_arrive();
  }

  // Box `box` of d into a buffer that nobody reads; afterwards TMA may read it.
  template <int kValues>
  static __device__ __forceinline__ void fill_box(const float (&d)[kValues], int box, uint32_t buffer) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) put(d, buffer, box, half, lane);
    cute::tma_store_fence();
    __syncwarp();
  }

  // All of d.
  template <int kBox = 0>
  __device__ __forceinline__ void store(const float (&d)[128], const void* map, int x, int y, bool add) {
    store_box<kBox>(d, map, x, y, add);
    if constexpr (kBox + 1 < 256 / kColumns) store<kBox + 1>(d, map, x, y, add);
  }

  // Before the CTA ends.
  __device__ __forceinline__ void finish() const { ptx::tma_store_wait_written<0>(); }

 private:
  // The lane's part of row lane / 4 + 8 * half, where the 128-byte swizzle wants it: 16-byte chunk i of row r at i ^ r.
  template <int kValues>
  static __device__ __forceinline__ void put(const float (&d)[kValues], uint32_t buffer, int box, int half, int lane) {
    const uint32_t r = uint32_t(lane) / 4, row = buffer + (r + 8 * uint32_t(half)) * 128;
    if constexpr (sizeof(Out) == 2) {  // four lanes write a chunk, eight rows eight different ones
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int at = 4 * (box * 8 + j) + 2 * half;
        const uint32_t two = pack2<Out>(d[at], d[at + 1]);
        cutlass::arch::shared_store<4>(row + ((uint32_t(j) ^ r) * 16 + uint32_t(lane) % 4 * 4), &two);
      }
    } else {
      // Four lanes write two chunks, and what the 16 lanes of half a warp write must not meet in a bank: rows 2 and 3
      // of four are put elsewhere by the swizzle, the odd ones by being two groups of columns ahead.
      const bool odd = r % 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int even_at = 4 * (box * 4 + j) + 2 * half, odd_at = 4 * (box * 4 + (j ^ 2)) + 2 * half;
        const uint32_t group = uint32_t(j) ^ (odd ? 2u : 0u), chunk = group * 2 + uint32_t(lane) % 4 / 2;
        const uint2 two = make_uint2(__float_as_uint(odd ? d[odd_at] : d[even_at]),
                                     __float_as_uint(odd ? d[odd_at + 1] : d[even_at + 1]));
        cutlass::arch::shared_store<8>(row + ((chunk ^ r) * 16 + uint32_t(lane) % 2 * 8), &two);
      }
    }
  }

  uint32_t smem_;
};

}  // namespace illada
