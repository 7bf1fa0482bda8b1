// Stores wgmma's accumulators to memory by TMA. A warp has 16 rows of a tile of d [64, 256] (wgmma.cuh). It writes them
// in boxes of 128 bytes x 16 rows, through its own two buffers in shared memory. The writes run while the tensor cores
// continue. Rows are written in whole lines, and elements outside of the tensor map are left out.
#pragma once

#include <cutlass/arch/memory.h>
#include <cute/arch/copy_sm90.hpp>

#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada {

// Store of one warp. Out: float or a 16-bit type. The tensor map is tensor_map_k128 of the target, with boxes of kRows
// rows.
template <typename Out>
class TileStoreSm90 {
 public:
  static constexpr int kRows = 16, kColumns = 128 / int(sizeof(Out)), kBufferBytes = 128 * kRows;
  static constexpr int kBytes = 2 * kBufferBytes;  // shared memory per warp, 1024-byte aligned

  __device__ __forceinline__ explicit TileStoreSm90(uint32_t smem) : smem_(smem) {}

  // Stores box `kBox` of d to the rows from y on and the columns from x + kBox * kColumns on. With `add`, it adds the
  // box to the values there. Whole warps call it, box after box in order.
  template <int kBox>
  __device__ __forceinline__ void store_box(const float (&d)[128], const void* map, int x, int y, bool add) {
    cute::tma_store_wait<1>();  // for the lane that stores: its store before the last one has left this buffer
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

  // Writes box `box` of d to a buffer. TMA must not be reading the buffer; it may read it afterwards.
  template <int kValues>
  static __device__ __forceinline__ void fill_box(const float (&d)[kValues], int box, uint32_t buffer) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) put(d, buffer, box, half, lane);
    cute::tma_store_fence();
    __syncwarp();
  }

  // Stores all of d.
  template <int kBox = 0>
  __device__ __forceinline__ void store(const float (&d)[128], const void* map, int x, int y, bool add) {
    store_box<kBox>(d, map, x, y, add);
    if constexpr (kBox + 1 < 256 / kColumns) store<kBox + 1>(d, map, x, y, add);
  }

  // Waits until all stores are written. Call it before the CTA ends.
  __device__ __forceinline__ void finish() const { ptx::tma_store_wait_written<0>(); }

 private:
  // Writes the lane's part of row lane / 4 + 8 * half in the 128-byte swizzle: 16-byte chunk i of row r is at i ^ r.
  template <int kValues>
  static __device__ __forceinline__ void put(const float (&d)[kValues], uint32_t buffer, int box, int half, int lane) {
    const uint32_t r = uint32_t(lane) / 4, row = buffer + (r + 8 * uint32_t(half)) * 128;
    if constexpr (sizeof(Out) == 2) {  // four lanes write one chunk; eight rows write eight different chunks
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int at = 4 * (box * 8 + j) + 2 * half;
        const uint32_t two = pack2<Out>(d[at], d[at + 1]);
        cutlass::arch::shared_store<4>(row + ((uint32_t(j) ^ r) * 16 + uint32_t(lane) % 4 * 4), &two);
      }
    } else {
      // Four lanes write two chunks. The writes of the 16 lanes of half a warp must not conflict in a bank. The swizzle
      // moves rows 2 and 3 of four to other banks. Odd rows are two groups of columns ahead, which moves them as well.
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
