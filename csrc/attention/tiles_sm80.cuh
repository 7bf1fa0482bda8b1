// Tiles of the attention kernels of sm_80: 16-bit rows in shared memory, filled by cp.async and read by ldmatrix.
//
// The 16-byte chunks of a row change places (RowLayout), so that neither the copies nor the reads of 8 rows, in either
// direction, have bank conflicts. Head dims are multiples of 32.
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

// Order of the 16-byte chunks in a row of a tile: chunk c of row r is at place c ^ (r % 8 / kOrderRows). The chunks of
// a group change places among themselves. The 32 banks of shared memory are 128 bytes wide.
//
//   D a multiple of 64   All rows begin at the same bank. A group has 8 chunks, and 8 rows have 8 orders.
//   D an odd 32 n        Odd rows begin 64 bytes further in the banks than even rows. A group has 4 chunks, which two
//                        neighbouring rows have in the same order: 4 rows have 4 orders in each half of the banks.
template <int kRowBytes>
struct RowLayout {
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kPower = kChunks & -kChunks;  // largest power of 2 that divides kChunks
  static constexpr int kGroup = kPower < 8 ? kPower : 8;
  static constexpr int kOrderRows = 8 / kGroup;   // neighbouring rows that have the same order
  static constexpr int kGroupSteps = kGroup / 2;  // steps of 16 columns in a group
  static_assert(kRowBytes % 16 == 0 && kGroup >= 4, "head dims are multiples of 32");

  // Returns the address 16 * step columns right of an address in the first 16 columns. Tiles are aligned to 128 bytes.
  static __device__ __forceinline__ uint32_t right_of(uint32_t address, int step) {
    return (address ^ (step % kGroupSteps * 32)) + step / kGroupSteps * (kGroup * 16);
  }
};

// Copies of tiles by the threads of a CTA, kRows rows at a time. kLanes threads share a row. Each copies every
// kLanes-th chunk of it, kLaneChunks in all.
template <int kHeadDim, int kThreads>
struct Copier {
  static constexpr int kRowBytes = kHeadDim * 2;
  using Layout = RowLayout<kRowBytes>;
  static constexpr int kLanes = Layout::kPower < 16 ? Layout::kPower : 16, kLaneChunks = Layout::kChunks / kLanes;
  static constexpr int kRows = kThreads / kLanes;
  static_assert(kLanes % Layout::kGroup == 0);  // a thread's chunks have the same place in their groups
  static_assert(kRows % 8 == 0);                // and keep it in its next row
  int row, column;                              // place of the first chunk; the column is in bytes
  uint32_t target;                              // byte offset of the first chunk in any tile

  __device__ __forceinline__ explicit Copier(uint32_t thread) {
    row = int(thread / kLanes);
    column = int(thread % kLanes * 16);
    target = thread / kLanes * kRowBytes + (thread % kLanes ^ thread / kLanes % 8 / Layout::kOrderRows) * 16;
  }
  // Copies the thread's chunks of a row, or zeros. Both addresses are those of the thread's first chunk.
  __device__ __forceinline__ void chunks(uint32_t to, const char* source, bool valid) const {
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j) cp_async_16(to + j * kLanes * 16, source + j * kLanes * 16, valid);
  }
  // Copies the rows of `source` from `first` on. The tile's rows from `rows` on become zeros. The memory there may hold
  // anything, and 0 * NaN is NaN.
  template <int kTile, bool kPartial>
  __device__ __forceinline__ void keys(uint32_t tile, const char* source, int64_t stride, int first, int rows) const {
    static_assert(kTile % kRows == 0);  // else the last rows would not be copied
    source += (first + row) * stride + column;
#pragma unroll
    for (int i = 0; i < kTile / kRows; ++i) {
      const int next = kPartial ? min(i * kRows, rows - 1 - row) : i * kRows;
      chunks(tile + target + i * kRows * kRowBytes, source + next * stride, !kPartial || row + i * kRows < rows);
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
    using Layout = RowLayout<kRowBytes>;
    const uint32_t row = thread % 8;
    columns = thread % 16 * kRowBytes + (thread / 16 % 2 ^ row / Layout::kOrderRows) * 16;
    rows = (thread / 16 % 2 * 8 + row) * kRowBytes + (thread / 8 % 2 ^ row / Layout::kOrderRows) * 16;
  }
};

}  // namespace
}  // namespace illada::attention
