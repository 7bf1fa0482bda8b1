// What the two backward kernels of sm_80 share: sizes, arguments, shared memory, copies and products of a warp.
#pragma once

#include <cutlass/fast_math.h>

#include <cstdint>
#include <cute/arch/copy_sm80.hpp>

#include "attention/launch.h"
#include "attention/tiles_sm80.cuh"
#include "attention/traits.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada::attention {
namespace {

template <int kHeadDim>
struct BackwardTiles {
  using Tr = Traits<Arch::kSm80, kHeadDim>;
  static constexpr int kSlices = Tr::kBackwardSlices;  // warps that share rows; each has a slice of the columns
  static constexpr int kColumns = kHeadDim / kSlices;  // columns of a warp
  static_assert(kSlices == 1 || kColumns % 64 == 0, "a slice begins with a whole group of 8 chunks (RowLayout)");
  static constexpr int kTeams = 4;  // teams of kSlices warps; each has rows of its own
  static constexpr int kWarps = kTeams * kSlices, kThreads = 32 * kWarps;
  static constexpr int kItemRows = Tr::kForwardBlocks * kBlockRows;  // rows of an item of `queries`
  static constexpr int kBlocks = Tr::kBackwardBlocks;                // blocks of 16 rows per warp
  static constexpr int kTeamRows = 16 * kBlocks, kOwn = kTeams * kTeamRows;
  static constexpr int kTile = kOwn / 2;  // rows of a step of the ring
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr uint32_t kTileBytes = kTile * kRowBytes, kStageBytes = 2 * kTileBytes;

  // Offset in a row of the columns of a thread's warp, in bytes.
  static __device__ __forceinline__ uint32_t slice_bytes(uint32_t thread) {
    return kSlices == 1 ? 0 : thread / 32 % kSlices * (kColumns * 2);
  }
};

// Threads of a CTA, and CTAs per SM, of each kernel.
template <int kHeadDim>
constexpr int kCtaThreads = BackwardTiles<kHeadDim>::kThreads;
template <int kHeadDim>
constexpr int kKeysCtas = 2 / BackwardTiles<kHeadDim>::kSlices;
template <int kHeadDim>
constexpr int kQueriesCtas = Traits<Arch::kSm80, kHeadDim>::kQueriesCtas;

// Sums over the columns of one slice, for the other warp of a team. Consecutive steps use different buffers, so that
// one barrier per step is enough: a warp that writes a buffer again has passed the barrier of the step between, and
// the other warp has then read it.
template <int kWarps, int kSlices>
struct SliceSums {
  float4 sums[2][kWarps][4][32];  // [step % 2][warp][4 floats of s, s, dp, dp][lane]
};
template <int kWarps>
struct SliceSums<kWarps, 1> {};

template <int kHeadDim>
struct BackwardStorage : SliceSums<BackwardTiles<kHeadDim>::kWarps, BackwardTiles<kHeadDim>::kSlices> {
  using Tiles = BackwardTiles<kHeadDim>;
  alignas(128) char stage[2][Tiles::kStageBytes];  // a tile of q and one of dout, or one of k and one of v
  alignas(16) RowStatistics rows[2][Tiles::kTile];
  WorkItem item;  // this CTA's part of the item; read again where it is needed
};

struct BackwardArguments {
  const int32_t* plan;
  int64_t first_backward_row;
  const void *q, *dout, *k, *v;
  int64_t q_token_bytes, q_head_bytes, dout_token_bytes, dout_head_bytes;
  int64_t k_token_bytes, k_head_bytes, v_token_bytes, v_head_bytes;
  const RowStatistics* rows;
  void *dq, *dk, *dv;
  int32_t total_q, num_heads, num_kv_heads;
  cutlass::FastDivmod group;
  int32_t own_tokens;               // tokens of a CTA of `queries`
  int32_t walk_tokens, walk_heads;  // tokens and heads from a row to the row Copier::kRows further
  float scale, scale_log2;          // softmax_scale, and softmax_scale times log2(e)
};

// Walk over every Copier::kRows-th row of an item: the row's place in the pack.
struct RowWalk {
  int token, head;  // token of the item, head of the group
  __device__ __forceinline__ RowWalk(int row, const cutlass::FastDivmod& group) { group(token, head, row); }
  __device__ __forceinline__ void advance(const BackwardArguments& a) {
    token += a.walk_tokens;
    head += a.walk_heads;
    if (head >= a.group) {
      head -= a.group;
      ++token;
    }
  }
};

// Copies the next kRows rows (tokens x heads) to a tile. Beyond the item's `tokens`, it copies the last token's rows
// again.
template <int kHeadDim, int kThreads>
__device__ __forceinline__ void copy_row(const Copier<kHeadDim, kThreads>& copier, uint32_t target, const char* source,
                                         int64_t token_bytes, int64_t head_bytes, const RowWalk& at, int tokens) {
  copier.chunks(target + copier.target,
                source + min(at.token, tokens - 1) * token_bytes + at.head * head_bytes + copier.column, true);
}

// Loads a warp's own rows as A operands. `tile` includes the offset of the lane.
template <int kHeadDim, int kBlocks, int kSteps>
__device__ __forceinline__ void load_operand(uint32_t (&a)[kBlocks][kSteps][4], uint32_t tile) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      ldmatrix(a[m][step], RowLayout<kHeadDim * 2>::right_of(tile, step) + m * 16 * kHeadDim * 2);
  }
}

// Computes s = a . x^T and t = b . y^T, with 16 rows of each of two tiles. Addresses include the lane's offset.
template <typename T, int kHeadDim, int kBlocks, int kSteps>
__device__ __forceinline__ void multiply_pair(float (&s)[kBlocks][8], float (&t)[kBlocks][8],
                                              const uint32_t (&a)[kBlocks][kSteps][4],
                                              const uint32_t (&b)[kBlocks][kSteps][4], uint32_t x, uint32_t y) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < 8; ++j) s[m][j] = t[m][j] = 0;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t u[4], w[4];
    ldmatrix(u, RowLayout<kHeadDim * 2>::right_of(x, step));
    ldmatrix(w, RowLayout<kHeadDim * 2>::right_of(y, step));
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      mma<T>(&s[m][0], a[m][step], u[0], u[1]);
      mma<T>(&t[m][0], b[m][step], w[0], w[1]);
      mma<T>(&s[m][4], a[m][step], u[2], u[3]);
      mma<T>(&t[m][4], b[m][step], w[2], w[3]);
    }
  }
}

// Computes sum += p . x, with 16 rows of a tile.
template <typename T, int kHeadDim, int kBlocks, int kSums>
__device__ __forceinline__ void add_product(float (&sum)[kBlocks][kSums], const uint32_t (&p)[kBlocks][4], uint32_t x) {
#pragma unroll
  for (int n = 0; n < kSums / 8; ++n) {
    uint32_t w[4];
    ldmatrix_trans(w, RowLayout<kHeadDim * 2>::right_of(x, n));
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      mma<T>(&sum[m][8 * n], p[m], w[0], w[1]);
      mma<T>(&sum[m][8 * n + 4], p[m], w[2], w[3]);
    }
  }
}

// Adds the sums of the team's other warp, whose slice has the other columns. `step` counts the loop's steps.
template <int kHeadDim, int kBlocks>
__device__ __forceinline__ void add_other_slice(float (&s)[kBlocks][8], float (&dp)[kBlocks][8],
                                                BackwardStorage<kHeadDim>& shared, int step, uint32_t thread) {
  if constexpr (BackwardTiles<kHeadDim>::kSlices > 1) {
    static_assert(kBlocks == 1 && BackwardTiles<kHeadDim>::kSlices == 2);
    const int warp = int(thread / 32), lane = int(thread % 32);
    auto& sums = shared.sums[step % 2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[warp][i][lane] = make_float4(s[0][4 * i], s[0][4 * i + 1], s[0][4 * i + 2], s[0][4 * i + 3]);
      sums[warp][2 + i][lane] = make_float4(dp[0][4 * i], dp[0][4 * i + 1], dp[0][4 * i + 2], dp[0][4 * i + 3]);
    }
    ptx::barrier_sync(1 + warp / 2, 64);  // of the team; barrier 0 is that of __syncthreads
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 x = sums[warp ^ 1][i][lane], y = sums[warp ^ 1][2 + i][lane];
      s[0][4 * i] += x.x;
      s[0][4 * i + 1] += x.y;
      s[0][4 * i + 2] += x.z;
      s[0][4 * i + 3] += x.w;
      dp[0][4 * i] += y.x;
      dp[0][4 * i + 1] += y.y;
      dp[0][4 * i + 2] += y.z;
      dp[0][4 * i + 3] += y.w;
    }
  }
}

// Address of the rows of a thread's team in stage 0, in the layout of the A operand.
template <int kHeadDim>
__device__ __forceinline__ uint32_t own_rows(uint32_t ring, uint32_t thread) {
  using Tiles = BackwardTiles<kHeadDim>;
  return ring + thread / 32 / Tiles::kSlices * (Tiles::kTeamRows * Tiles::kRowBytes) + Tiles::slice_bytes(thread) +
         Fragments<Tiles::kRowBytes>(thread).columns;
}

// Loads the CTA's own operands from the two stages to registers, and starts the copies of the first tile into stage 0
// as soon as x has left it. `start_tile`: starts these copies, if there is a tile.
template <int kHeadDim, int kBlocks, int kSteps, typename StartTile>
__device__ __forceinline__ void load_own_operands(uint32_t (&x)[kBlocks][kSteps][4], uint32_t (&y)[kBlocks][kSteps][4],
                                                  uint32_t ring, uint32_t thread, const StartTile& start_tile) {
  const uint32_t own = own_rows<kHeadDim>(ring, thread);
  cute::cp_async_wait<1>();  // x; y may still be on its way
  __syncthreads();
  load_operand<kHeadDim>(x, own);
  __syncthreads();  // x has left stage 0 in all warps
  start_tile();
  cute::cp_async_fence();    // even without a tile, so that the next wait means y in any case
  cute::cp_async_wait<1>();  // y; the first tile may still be on its way
  __syncthreads();
  load_operand<kHeadDim>(y, own + BackwardTiles<kHeadDim>::kStageBytes);
}

template <int kBlocks, int kSums>
__device__ __forceinline__ void clear(float (&sum)[kBlocks][kSums]) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) sum[m][j] = 0;
  }
}

}  // namespace
}  // namespace illada::attention
