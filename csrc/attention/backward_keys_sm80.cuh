// The keys kernel of the sm_80 backward (backward_sm80.cuh): dk and dv of 64 keys, or of 128 at D 64.
#pragma once

#include <cmath>
#include <cute/arch/copy_sm80.hpp>

#include "attention/accumulator_rows.cuh"
#include "attention/backward_shared_sm80.cuh"
#include "attention/launch.h"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm80.cuh"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada::attention {
namespace {

// The copies of a CTA, by cp.async. All threads take part.
template <int kHeadDim>
struct KeysLoader {
  using Tiles = BackwardTiles<kHeadDim>;
  using TileCopier = Copier<kHeadDim, Tiles::kThreads>;

  const BackwardArguments& a;
  BackwardStorage<kHeadDim>& shared;
  const uint32_t ring;  // address of the stages

  // Starts the copies of the CTA's own keys or values, in a group of their own.
  __device__ __forceinline__ void start_keys(int stage, const void* source, int64_t token_bytes,
                                             int64_t head_bytes) const {
    const WorkItem& item = shared.item;
    TileCopier(threadIdx.x)
        .template keys<Tiles::kOwn, true>(
            ring + stage * Tiles::kStageBytes,
            static_cast<const char*>(source) + item.k_start * token_bytes + item.kv_head * head_bytes, token_bytes, 0,
            item.k_count);
    cute::cp_async_fence();
  }

  // Starts the copies of q, dout and the statistics of a tile.
  __device__ __forceinline__ void start_tile(int tile) const {
    const WorkItem& item = shared.item;
    const uint32_t thread = ptx::reread_thread_index();
    const TileCopier copier(thread);
    RowWalk walk(tile * Tiles::kTile + copier.row, a.group);  // one division per tile
    const int q_start = item.q_start, tokens = item.q_count, kv_head = item.kv_head;
    const char* const q =
        static_cast<const char*>(a.q) + q_start * a.q_token_bytes + kv_head * a.group * a.q_head_bytes;
    const char* const dout =
        static_cast<const char*>(a.dout) + q_start * a.dout_token_bytes + kv_head * a.group * a.dout_head_bytes;
    uint32_t target = ring + (tile & 1) * Tiles::kStageBytes;
#pragma unroll
    for (int i = 0; i < Tiles::kTile / copier.kRows; ++i) {
      copy_row(copier, target, q, a.q_token_bytes, a.q_head_bytes, walk, tokens);
      copy_row(copier, target + Tiles::kTileBytes, dout, a.dout_token_bytes, a.dout_head_bytes, walk, tokens);
      walk.advance(a);
      target += copier.kRows * Tiles::kRowBytes;
    }
    if (thread < Tiles::kTile) {
      const int row = tile * Tiles::kTile + int(thread), rows = tokens * a.group;
      const RowStatistics* const first = a.rows + (int64_t(kv_head) * a.total_q + q_start) * a.group;
      RowStatistics& target = shared.rows[tile & 1][thread];
      // Rows behind the last one get probabilities of exactly 0: they add nothing to dk and dv.
      row < rows ? cute::SM80_CP_ASYNC_CACHEALWAYS<RowStatistics>::copy(first[row], target)
                 : void(target = RowStatistics{INFINITY, 0});
    }
  }
};

// Converts the scores s and the products dp of 16 rows to p and ds, both [keys, rows]. `rows`: the statistics of their
// tile, in which they begin at `first`. (One pointer to the first of them costs up to 24 instructions on sm_120.)
template <typename T, int kBlocks, int kTile>
__device__ __forceinline__ void weigh_rows(float (&s)[kBlocks][8], const float (&dp)[kBlocks][8],
                                           uint32_t (&p)[kBlocks][4], uint32_t (&ds)[kBlocks][4],
                                           const RowStatistics (&rows)[kTile], int first, const BackwardArguments& a,
                                           uint32_t thread) {
  // Statistics of two neighbouring rows. They are read again for each use, because registers are few.
  const auto statistics = [&](int n) {
    return *reinterpret_cast<const float4*>(&rows[first + 8 * n + thread % 4 * 2]);
  };
  bool far = false;
#pragma unroll
  for (int n = 0; n < 2; ++n) far = far || is_far(statistics(n).x) || is_far(statistics(n).z);
  far = __any_sync(kFullWarp, far);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
    exponentiate(s[m], a.scale, a.scale_log2, far,
                 [&](int j) { return j % 2 ? statistics(j / 4).z : statistics(j / 4).x; });
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float4 two = statistics(n);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float *const x = &s[m][4 * n + 2 * i], *const product = &dp[m][4 * n + 2 * i];
        p[m][2 * n + i] = pack2<T>(x[0], x[1]);
        ds[m][2 * n + i] = pack2<T>(x[0] * (product[0] - two.y), x[1] * (product[1] - two.w));
      }
    }
  }
}

// Stores dk and dv of the CTA's keys.
template <typename T, int kHeadDim, int kBlocks, int kSums>
__device__ __forceinline__ void store_keys(const BackwardArguments& a, const WorkItem& item,
                                           const float (&dk)[kBlocks][kSums], const float (&dv)[kBlocks][kSums]) {
  using Tiles = BackwardTiles<kHeadDim>;
  const int thread = int(ptx::reread_thread_index()), lane = thread % 32;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = thread / 32 / Tiles::kSlices * Tiles::kTeamRows + lane / 4 + m * 16 + i * 8;
      const int64_t place =
          (int64_t(item.k_start + key) * a.num_kv_heads + item.kv_head) * kHeadDim + Tiles::slice_bytes(thread) / 2;
      store_row<T, Tiles::kColumns>(static_cast<T*>(a.dk) + place, dk[m], i, a.scale, key < item.k_count, lane);
      store_row<T, Tiles::kColumns>(static_cast<T*>(a.dv) + place, dv[m], i, 1.0f, key < item.k_count, lane);
    }
  }
}

// Finds this CTA's keys and writes them to shared memory as an item of their own. Returns false if there are none.
template <int kHeadDim>
__device__ __forceinline__ bool open_keys(const BackwardArguments& a, BackwardStorage<kHeadDim>& shared) {
  constexpr int kOwn = BackwardTiles<kHeadDim>::kOwn, kParts = kBackwardKeys / kOwn;  // CTAs per item
  const int index = int(blockIdx.x / kParts);
  if (index >= plan_header(a.plan).backward_items) return false;
  WorkItem part = backward_items(a.plan, a.first_backward_row)[index];
  const int first_key = int(blockIdx.x % kParts) * kOwn;
  part.k_start += first_key;
  part.k_count = min(part.k_count - first_key, kOwn);
  if (part.k_count <= 0) return false;  // for all threads: none waits at the barrier below
  if (threadIdx.x == 0) shared.item = part;
  __syncthreads();
  return true;
}

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kCtaThreads<kHeadDim>, kKeysCtas<kHeadDim>) void illada_attention_backward_keys_sm80(
    const __grid_constant__ BackwardArguments a, const __grid_constant__ DependentLaunch launch) {
  using Tiles = BackwardTiles<kHeadDim>;
  constexpr int kBlocks = Tiles::kBlocks, kTile = Tiles::kTile, kColumns = Tiles::kColumns;
  extern __shared__ __align__(1024) char raw_shared[];
  BackwardStorage<kHeadDim>& shared = *reinterpret_cast<BackwardStorage<kHeadDim>*>(raw_shared);
  wait_for_previous_kernel(launch);
  if (!open_keys(a, shared)) return;
  const WorkItem& item = shared.item;

  const KeysLoader<kHeadDim> loader{a, shared, ptx::smem_address(shared.stage)};
  loader.start_keys(0, a.k, a.k_token_bytes, a.k_head_bytes);
  loader.start_keys(1, a.v, a.v_token_bytes, a.v_head_bytes);
  uint32_t k[kBlocks][kColumns / 16][4], v[kBlocks][kColumns / 16][4];
  load_own_operands<kHeadDim>(k, v, loader.ring, threadIdx.x, [&] {
    if (item.q_count > 0) loader.start_tile(0);
  });

  float dk[kBlocks][kColumns / 2], dv[kBlocks][kColumns / 2];
  clear(dk);
  clear(dv);
  // No mask is needed. Rows behind the item's last row repeat the last token with probabilities of 0. Keys behind its
  // last key have separate sums, which are never stored. The number of rows is read again, because there is no register
  // to keep it in.
#pragma unroll 1  // two steps at once would need twice the registers of s, dp, p and ds
  for (int row = 0; row < item.q_count * a.group; row += 16) {
    if (row % kTile == 0) {
      cute::cp_async_wait<0>();  // the own copies of this tile; the barrier stands for those of the other threads
      __syncthreads();           // all warps have left the other stage, which the next copies overwrite
      if (row + kTile < item.q_count * a.group) loader.start_tile(row / kTile + 1);
    }
    const uint32_t thread = ptx::reread_thread_index();
    const Fragments<Tiles::kRowBytes> at(thread);
    const int stage = row / kTile % 2;
    const uint32_t q_rows =
        loader.ring + stage * Tiles::kStageBytes + row % kTile * Tiles::kRowBytes + Tiles::slice_bytes(thread);
    const uint32_t dout_rows = q_rows + Tiles::kTileBytes;
    float s[kBlocks][8], dp[kBlocks][8];
    multiply_pair<T, kHeadDim>(s, dp, k, v, q_rows + at.rows, dout_rows + at.rows);
    add_other_slice<kHeadDim>(s, dp, shared, row / 16, thread);
    uint32_t p[kBlocks][4], ds[kBlocks][4];
    weigh_rows<T>(s, dp, p, ds, shared.rows[stage], row % kTile, a, thread);
    add_product<T, kHeadDim>(dv, p, dout_rows + at.columns);
    add_product<T, kHeadDim>(dk, ds, q_rows + at.columns);
  }
  store_keys<T, kHeadDim>(a, item, dk, dv);
}

}  // namespace
}  // namespace illada::attention
