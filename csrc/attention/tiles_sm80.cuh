// Tiles of the attention kernels of sm_80: 16-bit rows in shared memory, filled by cp.async and read by ldmatrix.
//
// In row r of a tile, the 16-byte chunk c is at place c ^ (r % 8). Neither the copies nor the reads of 8 rows, in
// either direction, then have bank conflicts. A row is a multiple of eight chunks, so head dims are multiples
// of 64.
#pragma once

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada::attention {
namespace {

// The next functions call CuTe's atoms with the kernels' addresses and registers. This one copies 16 bytes to shared
// memory, or zeros where `valid` is false (`source` must be a legal address even then).
__device__ __forceinline__ void cp_async_16(uint32_t target, const char* source, bool valid) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*reinterpret_cast<const uint4*>(source),
                                                     ptx::shared_at<uint4>(target), valid);
}
// Loads four 8 x 8 matrices from shared memory, as stored or transposed.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t source) {
  cute::SM75_U32x4_LDSM_N::copy(ptx::shared_at<cute::uint128_t>(source), r[0], r[1], r[2], r[3]);
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t source) {
  cute::SM75_U16x8_LDSM_T::copy(ptx::shared_at<cute::uint128_t>(source), r[0], r[1], r[2], r[3]);
}
// Computes d [16, 8] += a [16, 16] . b [16, 8] of T. Lane l holds d[2 i + e] at (row l / 4 + 8 i, column l % 4 * 2 +
// e). a is in the layout in which ldmatrix loads its four 8 x 8 blocks (0, 0), (1, 0), (0, 1), (1, 1). b is in the
// layout in which ldmatrix loads the upper and the lower half of its transpose.
template <typename T>
__device__ __forceinline__ void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using Mma = std::conditional_t<std::is_same_v<T, BFloat16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                 cute::SM80_16x8x16_F32F16F16F32_TN>;
  Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
}

// Copies of tiles by the threads of a CTA: 16 bytes per thread, kRows rows at a time. A tile's rows are a multiple of
// kRows, else the last ones are not copied.
template <int kHeadDim, int kThreads>
struct Copier {
  static constexpr int kChunks = kHeadDim / 8, kRows = kThreads / kChunks, kRowBytes = kHeadDim * 2;
  static_assert(kHeadDim % 64 == 0);  // the swizzle stays within 8 chunks
  static_assert(kRows % 8 == 0);      // so a thread's chunk keeps its place in the row
  int row, column;                    // place of the first chunk; the column is in bytes
  uint32_t target;                    // byte offset of the first chunk in any tile

  __device__ __forceinline__ explicit Copier(uint32_t thread) {
    row = int(thread / kChunks);
    column = int(thread % kChunks * 16);
    target = thread / kChunks * kRowBytes + (thread % kChunks ^ thread / kChunks % 8) * 16;
  }
  // Copies the rows of `source` from `first` on. The tile's rows from `rows` on become zeros. The memory there may hold
  // anything, and 0 * NaN is NaN.
  template <int kTile, bool kPartial>
  __device__ __forceinline__ void keys(uint32_t tile, const char* source, int64_t stride, int first, int rows) const {
    static_assert(kTile % kRows == 0);
    source += (first + row) * stride + column;
#pragma unroll
    for (int i = 0; i < kTile / kRows; ++i) {
      const int next = kPartial ? min(i * kRows, rows - 1 - row) : i * kRows;
      cp_async_16(tile + target + i * kRows * kRowBytes, source + next * stride, !kPartial || row + i * kRows < rows);
    }
  }
};

// Offsets that a lane passes to ldmatrix in any tile, for 16 rows and 16 columns.
//   columns   Lanes 0 .. 15 address the rows of the first 8 columns, the other lanes those of the next 8.
//             It loads the A operand and, transposed, the B operand whose k are the rows.
//   rows      The two halves alternate every 8 lanes.
//             It loads the B operands whose k are the columns, for the first and the last 8 rows.
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
