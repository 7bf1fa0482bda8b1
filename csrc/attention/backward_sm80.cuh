// Attention backward on sm_80 and on GPUs without a specialised kernel. One file per head dim includes this file. There
// are two kernels. Neither uses atomics, so that every sum has a fixed order:
//
//   keys      A CTA has 64 keys (128 at D 64) of a backward item. It walks over all rows (tokens x heads of the
//             group) of their sequence and computes dk and dv with 4 products.
//   queries   A CTA has 64 or 128 rows of a forward item. It walks over all keys and computes dq with 3 products.
//
// The two kernels mirror each other:
//
//   load the CTA's own operands (keys: k and v; queries: q and dout) to registers, 16 or 32 rows per warp or team
//   for each tile of the other two operands, 32 or 64 rows:
//     wait for the tile (one barrier) and start the copies of the next one (cp.async, ring of two stages)
//     for each step of 16 rows of the tile:
//       s and dp; p and ds from them
//       keys: dv += p^T dout, dk += ds^T q      queries: dq += ds k
//   store the sums
//
// The own operands and the sums stay in registers. The accumulators of s and dp have the layout of the A operands p and
// ds of the next products. Only the tiles are therefore ever in shared memory. A stage is as large as an operand, and
// the CTA's own operands arrive through the stages.
//
// n keys and m rows take 14 n m D flop. 4 of these 14 compute s and dp a second time, which is the price of a fixed
// order. The kernels read and write 6 T H D + 8 Tk G D bytes of memory, each element once. They are bound by the tensor
// cores, and at D 128 equally by shared memory: 512 bytes of ldmatrix take 4 cycles of it and feed 4 cycles of products
// (8 at D 64, where a warp has twice as many rows). While one CTA computes exponentials, others compute products. An SM
// holds two CTAs, or three of `queries` at D 128. Tiles come from the L2 cache at 8 to 21 bytes per cycle and SM.
//
// Registers limit the tiles: a lane of `keys` holds 128 registers of sums and 64 of operands. Values that are cheap to
// compute again (all that follow from the thread index and the item) are not kept over a step.
//
// D 96 has the tiles of D 128, with 96 registers of sums and 48 of operands. At D 256 these would be 256 and 128, so a
// team of two warps shares 16 rows: each warp has 128 columns of the operands and the sums (a slice). s and dp are sums
// over all columns. The two warps therefore exchange the sums over their slices, in fp32, at every step of 16 rows:
//
//   warp 0   s, dp of columns 0-127   | write buffer i % 2 | team's barrier | add the other's | dv, dk 0-127
//   warp 1   s, dp of columns 128-255 | write buffer i % 2 | team's barrier | add the other's | dv, dk 128-255
//
// a + b and b + a are the same bits, so both warps continue with the same p and ds. Beside 16 KB of ldmatrix per step
// (`queries`: 12 KB), a warp writes and reads 2 KB each. Shared memory is 97 KB: 64 for the ring, 32 for these sums. An
// SM holds one CTA of eight warps. `queries` does the same with dq.
#pragma once

#include <cutlass/fast_math.h>

#include <cmath>
#include <cute/arch/copy_sm80.hpp>

#include "attention/accumulator_rows.cuh"
#include "attention/launch.h"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm80.cuh"
#include "attention/traits.h"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada::attention {
namespace {

template <int kHeadDim>
struct BackwardTiles {
  using Tr = Traits<Arch::kSm80, kHeadDim>;
  static constexpr int kSlices = Tr::kBackwardSlices;  // warps that share rows; each has a slice of the columns
  static constexpr int kColumns = kHeadDim / kSlices;  // columns of a warp
  static constexpr int kTeams = 4;                     // teams of kSlices warps; each has rows of its own
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
    ptx::barrier_sync(1 + warp / 2, 64);
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

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kCtaThreads<kHeadDim>, kKeysCtas<kHeadDim>) void illada_attention_backward_keys_sm80(
    const __grid_constant__ BackwardArguments a, const __grid_constant__ DependentLaunch launch) {
  using Tiles = BackwardTiles<kHeadDim>;
  constexpr int kBlocks = Tiles::kBlocks, kOwn = Tiles::kOwn, kTile = Tiles::kTile, kRowBytes = Tiles::kRowBytes;
  constexpr int kThreads = Tiles::kThreads, kSlices = Tiles::kSlices, kColumns = Tiles::kColumns;
  constexpr int kParts = kBackwardKeys / kOwn;  // CTAs per item
  extern __shared__ __align__(1024) char raw_shared[];
  BackwardStorage<kHeadDim>& shared = *reinterpret_cast<BackwardStorage<kHeadDim>*>(raw_shared);
  wait_for_previous_kernel(launch);
  const int index = int(blockIdx.x / kParts);
  if (index >= plan_header(a.plan).backward_items) return;
  WorkItem part = backward_items(a.plan, a.first_backward_row)[index];
  const int first_key = int(blockIdx.x % kParts) * kOwn;
  part.k_start += first_key;
  part.k_count = min(part.k_count - first_key, kOwn);
  if (part.k_count <= 0) return;
  const WorkItem& item = shared.item;
  if (threadIdx.x == 0) shared.item = part;
  __syncthreads();

  const uint32_t ring = ptx::smem_address(shared.stage);
  const auto load_keys = [&](int stage, const void* source, int64_t token_bytes, int64_t head_bytes) {
    Copier<kHeadDim, kThreads>(threadIdx.x)
        .template keys<kOwn, true>(
            ring + stage * Tiles::kStageBytes,
            static_cast<const char*>(source) + item.k_start * token_bytes + item.kv_head * head_bytes, token_bytes, 0,
            item.k_count);
    cute::cp_async_fence();
  };
  load_keys(0, a.k, a.k_token_bytes, a.k_head_bytes);
  load_keys(1, a.v, a.v_token_bytes, a.v_head_bytes);

  const auto load_tile = [&](int tile) {  // loads q, dout and the statistics
    const uint32_t thread = ptx::reread_thread_index();
    const Copier<kHeadDim, kThreads> copier(thread);
    RowWalk walk(tile * kTile + copier.row, a.group);
    const int q_start = item.q_start, tokens = item.q_count, kv_head = item.kv_head;
    const char* const q =
        static_cast<const char*>(a.q) + q_start * a.q_token_bytes + kv_head * a.group * a.q_head_bytes;
    const char* const dout =
        static_cast<const char*>(a.dout) + q_start * a.dout_token_bytes + kv_head * a.group * a.dout_head_bytes;
    uint32_t target = ring + (tile & 1) * Tiles::kStageBytes;
#pragma unroll
    for (int i = 0; i < kTile / copier.kRows; ++i) {
      copy_row(copier, target, q, a.q_token_bytes, a.q_head_bytes, walk, tokens);
      copy_row(copier, target + Tiles::kTileBytes, dout, a.dout_token_bytes, a.dout_head_bytes, walk, tokens);
      walk.advance(a);
      target += copier.kRows * kRowBytes;
    }
    if (thread < kTile) {
      const int row = tile * kTile + int(thread), rows = tokens * a.group;
      const RowStatistics* const first = a.rows + (int64_t(kv_head) * a.total_q + q_start) * a.group;
      RowStatistics& target = shared.rows[tile & 1][thread];
      row < rows ? cute::SM80_CP_ASYNC_CACHEALWAYS<RowStatistics>::copy(first[row], target)
                 : void(target = RowStatistics{INFINITY, 0});
    }
  };

  uint32_t k[kBlocks][kColumns / 16][4], v[kBlocks][kColumns / 16][4];
  const uint32_t own = ring + threadIdx.x / 32 / kSlices * (Tiles::kTeamRows * kRowBytes) +
                       Tiles::slice_bytes(threadIdx.x) + Fragments<kRowBytes>(threadIdx.x).columns;
  cute::cp_async_wait<1>();
  __syncthreads();
  load_operand<kHeadDim>(k, own);
  __syncthreads();
  if (item.q_count > 0) load_tile(0);
  cute::cp_async_fence();
  cute::cp_async_wait<1>();
  __syncthreads();
  load_operand<kHeadDim>(v, own + Tiles::kStageBytes);

  float dk[kBlocks][kColumns / 2], dv[kBlocks][kColumns / 2];
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) dk[m][j] = dv[m][j] = 0;
  }
  // No mask is needed. Rows behind the item's last row repeat the last token with probabilities of 0. Keys behind its
  // last key have separate sums, which are never stored. The number of rows is read again, because there is no register
  // to keep it in.
#pragma unroll 1
  for (int row = 0; row < item.q_count * a.group; row += 16) {
    if (row % kTile == 0) {
      cute::cp_async_wait<0>();
      __syncthreads();
      if (row + kTile < item.q_count * a.group) load_tile(row / kTile + 1);
    }
    const uint32_t thread = ptx::reread_thread_index();
    const Fragments<kRowBytes> at(thread);
    const int stage = row / kTile % 2;
    const uint32_t q_rows = ring + stage * Tiles::kStageBytes + row % kTile * kRowBytes + Tiles::slice_bytes(thread);
    const uint32_t dout_rows = q_rows + Tiles::kTileBytes;
    float s[kBlocks][8], dp[kBlocks][8];
    multiply_pair<T, kHeadDim>(s, dp, k, v, q_rows + at.rows, dout_rows + at.rows);
    add_other_slice<kHeadDim>(s, dp, shared, row / 16, thread);
    uint32_t p[kBlocks][4], ds[kBlocks][4];
    const auto statistics = [&](int n) {  // statistics of two neighbouring rows
      return *reinterpret_cast<const float4*>(&shared.rows[stage][row % kTile + 8 * n + thread % 4 * 2]);
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
    add_product<T, kHeadDim>(dv, p, dout_rows + at.columns);
    add_product<T, kHeadDim>(dk, ds, q_rows + at.columns);
  }
  const int thread = int(ptx::reread_thread_index()), lane = thread % 32;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = thread / 32 / kSlices * Tiles::kTeamRows + lane / 4 + m * 16 + i * 8;
      const int64_t place =
          (int64_t(item.k_start + key) * a.num_kv_heads + item.kv_head) * kHeadDim + Tiles::slice_bytes(thread) / 2;
      store_row<T, kColumns>(static_cast<T*>(a.dk) + place, dk[m], i, a.scale, key < item.k_count, lane);
      store_row<T, kColumns>(static_cast<T*>(a.dv) + place, dv[m], i, 1.0f, key < item.k_count, lane);
    }
  }
}

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kCtaThreads<kHeadDim>, kQueriesCtas<kHeadDim>) void illada_attention_backward_queries_sm80(
    const __grid_constant__ BackwardArguments a, const __grid_constant__ DependentLaunch launch) {
  using Tiles = BackwardTiles<kHeadDim>;
  constexpr int kBlocks = Tiles::kBlocks, kOwn = Tiles::kOwn, kTile = Tiles::kTile, kRowBytes = Tiles::kRowBytes;
  constexpr int kThreads = Tiles::kThreads, kSlices = Tiles::kSlices, kColumns = Tiles::kColumns;
  constexpr int kParts = Tiles::kItemRows / kOwn;  // CTAs per item
  constexpr int kSteps = Tiles::Tr::kQueriesSteps;
  static_assert(kTile % (16 * kSteps) == 0);
  extern __shared__ __align__(1024) char raw_shared[];
  BackwardStorage<kHeadDim>& shared = *reinterpret_cast<BackwardStorage<kHeadDim>*>(raw_shared);
  wait_for_previous_kernel(launch);
  const int index = int(blockIdx.x / kParts), items = plan_header(a.plan).forward_items;
  if (index >= items) return;
  WorkItem part = forward_items(a.plan)[index];
  const int first_token = int(blockIdx.x % kParts) * a.own_tokens;
  part.q_start += first_token;
  part.q_count = min(part.q_count - first_token, a.own_tokens);
  if (part.split != 0 || part.q_count <= 0) return;
  // dq sums over all keys, but the plan may split them. The key splits of a tile are neighbours in the list.
  const WorkItem& last = forward_items(a.plan)[min(index + part.splits, items) - 1];
  part.k_count = last.k_start + last.k_count - part.k_start;
  const WorkItem& item = shared.item;
  if (threadIdx.x == 0) shared.item = part;
  __syncthreads();

  const uint32_t ring = ptx::smem_address(shared.stage);
  const auto load_rows = [&](int stage, const void* source, int64_t token_bytes, int64_t head_bytes) {
    const Copier<kHeadDim, kThreads> copier(threadIdx.x);
    const char* const first =
        static_cast<const char*>(source) + item.q_start * token_bytes + item.kv_head * a.group * head_bytes;
    uint32_t target = ring + stage * Tiles::kStageBytes;
    RowWalk walk(copier.row, a.group);
#pragma unroll 4
    for (int i = 0; i < kOwn / copier.kRows; ++i) {
      copy_row(copier, target, first, token_bytes, head_bytes, walk, item.q_count);
      walk.advance(a);
      target += copier.kRows * kRowBytes;
    }
    cute::cp_async_fence();
  };
  load_rows(0, a.q, a.q_token_bytes, a.q_head_bytes);
  load_rows(1, a.dout, a.dout_token_bytes, a.dout_head_bytes);

  const auto row_of = [&](int thread, int m, int i) {  // index in the CTA's rows
    return thread / 32 / kSlices * Tiles::kTeamRows + thread % 32 / 4 + m * 16 + i * 8;
  };
  RowStatistics statistics[kBlocks][2];
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of(int(threadIdx.x), m, i);
      const int64_t first = (int64_t(item.kv_head) * a.total_q + item.q_start) * a.group;
      statistics[m][i] = row < item.q_count * a.group ? a.rows[first + row] : RowStatistics{0, 0};
    }
  }
  bool far = false;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) far = far || is_far(statistics[m][0].offset) || is_far(statistics[m][1].offset);
  far = __any_sync(kFullWarp, far);
  const auto load_tile = [&](int tile) {
    const Copier<kHeadDim, kThreads> copier(ptx::reread_thread_index());
    const uint32_t target = ring + (tile & 1) * Tiles::kStageBytes;
    const int first = tile * kTile, keys = item.k_count - first;
    const char* const k =
        static_cast<const char*>(a.k) + item.k_start * a.k_token_bytes + item.kv_head * a.k_head_bytes;
    const char* const v =
        static_cast<const char*>(a.v) + item.k_start * a.v_token_bytes + item.kv_head * a.v_head_bytes;
    copier.template keys<kTile, true>(target, k, a.k_token_bytes, first, keys);
    copier.template keys<kTile, true>(target + Tiles::kTileBytes, v, a.v_token_bytes, first, keys);
  };

  uint32_t q[kBlocks][kColumns / 16][4], dout[kBlocks][kColumns / 16][4];
  const uint32_t own = ring + threadIdx.x / 32 / kSlices * (Tiles::kTeamRows * kRowBytes) +
                       Tiles::slice_bytes(threadIdx.x) + Fragments<kRowBytes>(threadIdx.x).columns;
  cute::cp_async_wait<1>();
  __syncthreads();
  load_operand<kHeadDim>(q, own);
  __syncthreads();
  if (item.k_count > 0) load_tile(0);
  cute::cp_async_fence();
  cute::cp_async_wait<1>();
  __syncthreads();
  load_operand<kHeadDim>(dout, own + Tiles::kStageBytes);

  float dq[kBlocks][kColumns / 2];
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) dq[m][j] = 0;
  }
  const int keys = item.k_count;
#pragma unroll 1
  for (int first = 0; first < keys; first += 16 * kSteps) {
    if (first % kTile == 0) {
      cute::cp_async_wait<0>();
      __syncthreads();
      if (first + kTile < keys) load_tile(first / kTile + 1);
    }
    const uint32_t thread = ptx::reread_thread_index();
    const Fragments<kRowBytes> at(thread);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int left = keys - first - step * 16;
      const uint32_t k_rows = ring + first / kTile % 2 * Tiles::kStageBytes + (first % kTile + step * 16) * kRowBytes +
                              Tiles::slice_bytes(thread);
      float s[kBlocks][8], dp[kBlocks][8];
      multiply_pair<T, kHeadDim>(s, dp, q, dout, k_rows + at.rows, k_rows + Tiles::kTileBytes + at.rows);
      add_other_slice<kHeadDim>(s, dp, shared, first / 16 + step, thread);
      uint32_t ds[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        // Beside very small scores, a padding score of 0 would be infinitely large.
        if (left < 16) mask_scores(s[m], left);
        exponentiate(s[m], a.scale, a.scale_log2, far, [&](int j) { return statistics[m][j / 2 % 2].offset; });
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const float c = statistics[m][j / 2 % 2].c;
          ds[m][j / 2] = pack2<T>(s[m][j] * (dp[m][j] - c), s[m][j + 1] * (dp[m][j + 1] - c));
        }
      }
      add_product<T, kHeadDim>(dq, ds, k_rows + at.columns);
    }
  }
  const int thread = int(ptx::reread_thread_index());
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int token, head;
      a.group(token, head, row_of(thread, m, i));
      const int64_t row = int64_t(item.q_start + token) * a.num_heads + item.kv_head * a.group + head;
      store_row<T, kColumns>(static_cast<T*>(a.dq) + row * kHeadDim + Tiles::slice_bytes(thread) / 2, dq[m], i, a.scale,
                             token < item.q_count, thread % 32);
    }
  }
}

template <typename T, int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling) {
  constexpr const char* kOp = "varlen_attention_backward";
  using Tiles = BackwardTiles<kHeadDim>;
  const PackShape& s = p.shape;
  BackwardArguments a{};
  a.plan = p.plan;
  a.first_backward_row = first_backward_row(s);
  a.q = p.q.data;
  a.dout = p.dout.data;
  a.k = p.k.data;
  a.v = p.v.data;
  a.q_token_bytes = p.q.token_stride * 2;
  a.q_head_bytes = p.q.head_stride * 2;
  a.dout_token_bytes = p.dout.token_stride * 2;
  a.dout_head_bytes = p.dout.head_stride * 2;
  a.k_token_bytes = p.k.token_stride * 2;
  a.k_head_bytes = p.k.head_stride * 2;
  a.v_token_bytes = p.v.token_stride * 2;
  a.v_head_bytes = p.v.head_stride * 2;
  a.rows = scratch_of(p, {}).rows;
  a.dq = p.dq;
  a.dk = p.dk;
  a.dv = p.dv;
  a.total_q = int32_t(s.total_q);
  a.num_heads = s.num_heads;
  a.num_kv_heads = s.num_kv_heads;
  a.group = group_of(s);
  a.own_tokens = tiling.item_tokens() * Tiles::kOwn / Tiles::kItemRows;
  a.walk_tokens = Copier<kHeadDim, Tiles::kThreads>::kRows / a.group;
  a.walk_heads = Copier<kHeadDim, Tiles::kThreads>::kRows % a.group;
  a.scale = p.softmax_scale;
  a.scale_log2 = p.softmax_scale * float(M_LOG2E);
  // Items are sorted by length, so CTAs start in that order. CTAs without an item exit at once.
  const auto launch = [&](auto kernel, int64_t items, int item_rows) {
    LaunchShape shape;
    shape.grid = dim3(unsigned(items * (item_rows / Tiles::kOwn)));
    shape.block = dim3(Tiles::kThreads);
    shape.smem_bytes = int(sizeof(BackwardStorage<kHeadDim>));
    shape.dependent = true;
    launch_kernel(kOp, device, p.launch.stream, shape, kernel, a);
  };
  launch(illada_attention_backward_keys_sm80<T, kHeadDim>, max_backward_items(s), kBackwardKeys);
  launch(illada_attention_backward_queries_sm80<T, kHeadDim>, max_forward_items(s), Tiles::kItemRows);
}

}  // namespace

template <int kHeadDim>
void launch_backward_sm80(const BackwardParams& p, const Device& device, const Tiling& tiling) {
  p.dtype == DType::kBFloat16 ? launch_backward<BFloat16, kHeadDim>(p, device, tiling)
                              : launch_backward<Half, kHeadDim>(p, device, tiling);
}

}  // namespace illada::attention
