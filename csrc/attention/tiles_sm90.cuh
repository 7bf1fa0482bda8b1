// Tiles of the attention kernels of sm_90a: 16-bit rows in shared memory, filled by TMA and read by wgmma.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cute/arch/copy_sm90.hpp>

#include "attention/launch.h"
#include "common/barrier_sm90.cuh"
#include "common/l2_policy.h"
#include "common/ptx.cuh"
#include "common/ragged.h"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace illada::attention {
namespace {

constexpr int kRowBytes = 128;  // bytes of a row of a slice, 64 columns

// A tile consists of slices of 64 columns: rows of 128 bytes in the 128-byte swizzle.
template <int kRows, int kColumns>
struct alignas(1024) Tile {
  static constexpr int kSlices = kColumns / 64, kSliceBytes = kRows * kRowBytes;
  char slice[kSlices][kSliceBytes];
};

// Loads a box of a tensor map from tensor_map_ragged (common/ragged.h), to the same address in every CTA of a cluster
// of kCluster CTAs. One thread calls it. `hint`: hint to the L2 cache.
template <int kCluster>
__device__ __forceinline__ void load_box(void* target, const CUtensorMap* map, Barrier& barrier, uint64_t hint,
                                         int column, int head, int row, int end) {
  constexpr int32_t kTokens = kRaggedTokens;
  if constexpr (kCluster > 1) {
    cute::SM90_TMA_LOAD_MULTICAST_5D::copy(map, barrier.value(), (1 << kCluster) - 1, hint, target, column, head, row,
                                           kTokens, end);
  } else {
    cute::SM90_TMA_LOAD_5D::copy(map, barrier.value(), hint, target, column, head, row, kTokens, end);
  }
}

// Loads the tile from row `row` on of the sequence start .. start + count - 1, with a tensor map from
// tensor_map_ragged. Elements behind the end of the sequence read as 0. One thread calls it.
template <typename AnyTile>
__device__ __forceinline__ void load_tile(AnyTile& target, const CUtensorMap* map, Barrier& barrier, int head,
                                          int start, int count, int row, uint64_t hint) {
#pragma unroll
  for (int slice = 0; slice < AnyTile::kSlices; ++slice)
    load_box<1>(target.slice[slice], map, barrier, hint, 64 * slice, head, kRaggedTokens - count + row, start + count);
}

// Computes d = a b^T of rows of two tiles, over all columns. a, b: descriptors of their first rows (gmma_descriptor_k).
template <typename T, typename TileA, typename TileB, int kRowsB>
__device__ __forceinline__ void multiply_rows(float (&d)[kRowsB / 2], uint64_t a, uint64_t b) {
#pragma unroll
  for (int i = 0; i < TileA::kSlices * 4; ++i)
    warpgroup_mma_ss<T, kRowsB>(d, a + i / 4 * (TileA::kSliceBytes / 16) + i % 4 * 2,
                                b + i / 4 * (TileB::kSliceBytes / 16) + i % 4 * 2, i > 0);
}

// Stores four 8 x 8 matrices to shared memory. Lane l has the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  cute::SM90_U32x4_STSM_N::copy(r0, r1, r2, r3, ptx::shared_at<cute::uint128_t>(smem));
}

// ------------------------------------------------------------------------------------------------------------ launches

// Bytes of shared memory that a kernel asks for. Each kernel aligns its shared memory itself, because the swizzle
// counts from multiples of 1024 bytes. (Every kernel repeats two lines for that. Moved into a function, they made the
// backward kernel that uses the most registers spill.)
template <typename Shared>
constexpr int shared_bytes() {
  constexpr int kBytes = int(sizeof(Shared)) + 1024;
  static_assert(kBytes <= 227 * 1024);
  return kBytes;
}

// Tensor maps of queries (out, their gradients) and of keys (values), in boxes of 64 columns x heads of a group x
// tokens. A pack without queries or keys is never read. But an empty map cannot be encoded, so the map then has another
// valid address.
template <typename Params>
CUtensorMap ragged_map(const char* op, const Params& p, const PackedView& x, int64_t tokens, int heads, int box_heads,
                       int box_tokens) {
  const void* const anything = p.shape.total_q ? p.q.data : p.k.data;
  return tensor_map_ragged(op,
                           {tokens ? x.data : anything, p.dtype, tokens ? tokens : 1, heads, p.shape.head_dim,
                            x.token_stride, x.head_stride},
                           box_heads, box_tokens);
}
template <typename Params>
CUtensorMap queries_map(const char* op, const Params& p, const PackedView& x, int box_tokens) {
  return ragged_map(op, p, x, p.shape.total_q, p.shape.num_heads, group_of(p.shape), box_tokens);
}
template <typename Params>
CUtensorMap keys_map(const char* op, const Params& p, const PackedView& x, int box_tokens) {
  return ragged_map(op, p, x, p.shape.total_k, p.shape.num_kv_heads, 1, box_tokens);
}

}  // namespace
}  // namespace illada::attention
