// The queries kernel of the sm_80 backward (backward_sm80.cuh): dq of 64 or 128 rows.
#pragma once

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
struct QueriesLoader {
  using Tiles = BackwardTiles<kHeadDim>;
  using TileCopier = Copier<kHeadDim, Tiles::kThreads>;

  const BackwardArguments& a;
  const WorkItem& item;
  const uint32_t ring;  // address of the stages

  // Starts the copies of the CTA's own rows of q or dout, in a group of their own.
  __device__ __forceinline__ void start_rows(int stage, const void* source, int64_t token_bytes,
                                             int64_t head_bytes) const {
    const TileCopier copier(threadIdx.x);
    const char* const first =
        static_cast<const char*>(source) + item.q_start * token_bytes + item.kv_head * a.group * head_bytes;
    uint32_t target = ring + stage * Tiles::kStageBytes;
    RowWalk walk(copier.row, a.group);
#pragma unroll 4
    for (int i = 0; i < Tiles::kOwn / copier.kRows; ++i) {
      copy_row(copier, target, first, token_bytes, head_bytes, walk, item.q_count);
      walk.advance(a);
      target += copier.kRows * Tiles::kRowBytes;
    }
    cute::cp_async_fence();
  }

  // Starts the copies of k and v of a tile.
  __device__ __forceinline__ void start_tile(int tile) const {
    const TileCopier copier(ptx::reread_thread_index());
    const uint32_t target = ring + (tile & 1) * Tiles::kStageBytes;
    const int first = tile * Tiles::kTile, keys = item.k_count - first;
    const char* const k =
        static_cast<const char*>(a.k) + item.k_start * a.k_token_bytes + item.kv_head * a.k_head_bytes;
    const char* const v =
        static_cast<const char*>(a.v) + item.k_start * a.v_token_bytes + item.kv_head * a.v_head_bytes;
    copier.template keys<Tiles::kTile, true>(target, k, a.k_token_bytes, first, keys);
    copier.template keys<Tiles::kTile, true>(target + Tiles::kTileBytes, v, a.v_token_bytes, first, keys);
  }
};

// Index of a lane's row in the CTA's rows.
template <int kHeadDim>
__device__ __forceinline__ int row_of(int thread, int m, int i) {
  using Tiles = BackwardTiles<kHeadDim>;
  return thread / 32 / Tiles::kSlices * Tiles::kTeamRows + thread % 32 / 4 + m * 16 + i * 8;
}

// Loads the statistics of a lane's rows, which stay in registers. Returns whether any row of the warp is far (is_far).
template <int kHeadDim, int kBlocks>
__device__ __forceinline__ bool load_statistics(RowStatistics (&rows)[kBlocks][2], const BackwardArguments& a,
                                                const WorkItem& item) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of<kHeadDim>(int(threadIdx.x), m, i);
      const int64_t first = (int64_t(item.kv_head) * a.total_q + item.q_start) * a.group;
      // Behind the item's last row: dq is never stored there, and 0 is not far.
      rows[m][i] = row < item.q_count * a.group ? a.rows[first + row] : RowStatistics{0, 0};
    }
  }
  bool far = false;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) far = far || is_far(rows[m][0].offset) || is_far(rows[m][1].offset);
  return __any_sync(kFullWarp, far);
}

// Converts the scores s and the products dp of 16 keys to ds, [rows, keys]. Only `left` of the keys exist. `rows`,
// `far`: from load_statistics. (A struct of both changes the order of the branches on sm_100 and sm_120.)
template <typename T, int kBlocks>
__device__ __forceinline__ void weigh_keys(float (&s)[kBlocks][8], const float (&dp)[kBlocks][8],
                                           uint32_t (&ds)[kBlocks][4], const RowStatistics (&rows)[kBlocks][2],
                                           bool far, const BackwardArguments& a, int left) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    // Beside very small scores, a padding score of 0 would be infinitely large.
    if (left < 16) mask_scores(s[m], left);
    exponentiate(s[m], a.scale, a.scale_log2, far, [&](int j) { return rows[m][j / 2 % 2].offset; });
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float c = rows[m][j / 2 % 2].c;
      ds[m][j / 2] = pack2<T>(s[m][j] * (dp[m][j] - c), s[m][j + 1] * (dp[m][j + 1] - c));
    }
  }
}

// Stores dq of the CTA's rows.
template <typename T, int kHeadDim, int kBlocks, int kSums>
__device__ __forceinline__ void store_queries(const BackwardArguments& a, const WorkItem& item,
                                              const float (&dq)[kBlocks][kSums]) {
  using Tiles = BackwardTiles<kHeadDim>;
  const int thread = int(ptx::reread_thread_index());
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int token, head;
      a.group(token, head, row_of<kHeadDim>(thread, m, i));
      const int64_t row = int64_t(item.q_start + token) * a.num_heads + item.kv_head * a.group + head;
      store_row<T, Tiles::kColumns>(static_cast<T*>(a.dq) + row * kHeadDim + Tiles::slice_bytes(thread) / 2, dq[m], i,
                                    a.scale, token < item.q_count, thread % 32);
    }
  }
}

// Finds this CTA's rows and writes them to shared memory as an item of their own. Returns false if there are none.
template <int kHeadDim>
__device__ __forceinline__ bool open_queries(const BackwardArguments& a, BackwardStorage<kHeadDim>& shared) {
  using Tiles = BackwardTiles<kHeadDim>;
  constexpr int kParts = Tiles::kItemRows / Tiles::kOwn;  // CTAs per item
  const int index = int(blockIdx.x / kParts), items = plan_header(a.plan).forward_items;
  if (index >= items) return false;
  WorkItem part = forward_items(a.plan)[index];
  const int first_token = int(blockIdx.x % kParts) * a.own_tokens;
  part.q_start += first_token;
  part.q_count = min(part.q_count - first_token, a.own_tokens);
  if (part.split != 0 || part.q_count <= 0) return false;  // for all threads: none waits at the barrier below
  // dq sums over all keys, but the plan may split them: the CTA of the first split takes the keys of all. The key
  // splits of a tile are neighbours in the list.
  const WorkItem& last = forward_items(a.plan)[min(index + part.splits, items) - 1];
  part.k_count = last.k_start + last.k_count - part.k_start;
  if (threadIdx.x == 0) shared.item = part;
  __syncthreads();
  return true;
}

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kCtaThreads<kHeadDim>, kQueriesCtas<kHeadDim>) void illada_attention_backward_queries_sm80(
    const __grid_constant__ BackwardArguments a, const __grid_constant__ DependentLaunch launch) {
  using Tiles = BackwardTiles<kHeadDim>;
  constexpr int kBlocks = Tiles::kBlocks, kTile = Tiles::kTile, kColumns = Tiles::kColumns;
  constexpr int kSteps = Tiles::Tr::kQueriesSteps;
  static_assert(kTile % (16 * kSteps) == 0);
  extern __shared__ __align__(1024) char raw_shared[];
  BackwardStorage<kHeadDim>& shared = *reinterpret_cast<BackwardStorage<kHeadDim>*>(raw_shared);
  wait_for_previous_kernel(launch);
  if (!open_queries(a, shared)) return;
  const WorkItem& item = shared.item;

  const QueriesLoader<kHeadDim> loader{a, item, ptx::smem_address(shared.stage)};
  loader.start_rows(0, a.q, a.q_token_bytes, a.q_head_bytes);
  loader.start_rows(1, a.dout, a.dout_token_bytes, a.dout_head_bytes);
  RowStatistics statistics[kBlocks][2];
  const bool far = load_statistics<kHeadDim>(statistics, a, item);
  uint32_t q[kBlocks][kColumns / 16][4], dout[kBlocks][kColumns / 16][4];
  load_own_operands<kHeadDim>(q, dout, loader.ring, threadIdx.x, [&] {
    if (item.k_count > 0) loader.start_tile(0);
  });

  float dq[kBlocks][kColumns / 2];
  clear(dq);
  const int keys = item.k_count;
#pragma unroll 1
  for (int first = 0; first < keys; first += 16 * kSteps) {
    if (first % kTile == 0) {
      cute::cp_async_wait<0>();  // as in the keys kernel
      __syncthreads();
      if (first + kTile < keys) loader.start_tile(first / kTile + 1);
    }
    const uint32_t thread = ptx::reread_thread_index();
    const Fragments<Tiles::kRowBytes> at(thread);
#pragma unroll  // where registers allow more than one step: products of one run beside the exponentials of another
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t k_rows = loader.ring + first / kTile % 2 * Tiles::kStageBytes +
                              (first % kTile + step * 16) * Tiles::kRowBytes + Tiles::slice_bytes(thread);
      float s[kBlocks][8], dp[kBlocks][8];
      multiply_pair<T, kHeadDim>(s, dp, q, dout, k_rows + at.rows, k_rows + Tiles::kTileBytes + at.rows);
      add_other_slice<kHeadDim>(s, dp, shared, first / 16 + step, thread);
      uint32_t ds[kBlocks][4];
      weigh_keys<T>(s, dp, ds, statistics, far, a, keys - first - step * 16);
      add_product<T, kHeadDim>(dq, ds, k_rows + at.columns);
    }
  }
  store_queries<T, kHeadDim>(a, item, dq);
}

}  // namespace
}  // namespace illada::attention
