// What the attention kernels of sm_80 share: tiles of 16-bit rows in shared memory, filled by cp.async and read by
// ldmatrix.
//
// In row r of a tile, the 16-byte chunk c stands where c ^ (r % 8) would: neither the copies nor the reads of 8 rows,
// in either direction, meet in a bank.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace illada::attention {
namespace {

// threadIdx.x, read anew: what is made of it holds no registers while the main loop runs, which needs them all.
__device__ __forceinline__ uint32_t thread_again() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// How the threads of a CTA copy tiles: a chunk of 16 bytes each, kRows rows at a time.
template <int kHeadDim, int kThreads>
struct Copier {
  static constexpr int kChunks = kHeadDim / 8, kRows = kThreads / kChunks, kRowBytes = kHeadDim * 2;
  static_assert(kRows % 8 == 0);  // a thread's chunk stays at its place
  int row, column;                // of the first chunk; the column in bytes
  uint32_t target;                // in any tile

  __device__ __forceinline__ explicit Copier(uint32_t thread) {
    row = int(thread / kChunks);
    column = int(thread % kChunks * 16);
    target = thread / kChunks * kRowBytes + (thread % kChunks ^ thread / kChunks % 8) * 16;
  }
  // Rows `first` .. of `source`. Those from `rows` of the tile on become zeros: what lies there may be anything, and
  // 0 * NaN is NaN.
  template <int kTile, bool kPartial>
  __device__ __forceinline__ void keys(uint32_t tile, const char* source, int64_t stride, int first, int rows) const {
    source += (first + row) * stride + column;
#pragma unroll
    for (int i = 0; i < kTile / kRows; ++i) {
      const int next = kPartial ? min(i * kRows, rows - 1 - row) : i * kRows;
      ptx::cp_async_16(tile + target + i * kRows * kRowBytes, source + next * stride,
                       !kPartial || row + i * kRows < rows);
    }
  }
};

// What ldmatrix takes from a lane in any tile, for 16 rows and 16 columns. `columns`: lanes 0 .. 15 have the rows of
// the first 8 columns, the others those of the next 8; the A operand, and transposed the B operand whose k are the
// rows. `rows`: every other 8 lanes; the B operands whose k are the columns, of the first and the last 8 rows.
template <int kRowBytes>
struct Fragments {
  uint32_t columns, rows;
  __device__ __forceinline__ explicit Fragments(uint32_t thread) {
    const uint32_t row = thread % 8;
    columns = thread % 16 * kRowBytes + (thread / 16 % 2 ^ row) * 16;
    rows = (thread / 16 % 2 * 8 + row) * kRowBytes + (thread / 8 % 2 ^ row) * 16;
  }
};

}  // namespace
}  // namespace illada::attention
