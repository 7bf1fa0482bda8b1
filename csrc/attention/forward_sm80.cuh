// Attention forward on sm_80 and on GPUs without a specialised kernel. One file per head dim includes this file.
//
// A CTA of four warps walks over items of the plan. A tile has 128 rows (tokens x heads of a group, 32 per warp). Its
// keys come in tiles of 32 (D 96 and 128) or 48 (D 64), the last one first. Only the last tile may be partial, so the
// loop over the others needs no mask. Where shared memory has no room for two CTAs at D 128, one CTA of eight warps
// with 16 rows each takes 64 keys at a time. At D 256 a CTA always has eight warps, and 32 or 16 keys. Scores,
// probabilities and the output stay in registers: with mma.sync m16n8k16, the accumulator of q . k has the layout of
// the A operand of p . v.
//
//   for each item:
//     s = q . k of the last tile, with a mask
//     for tile = last .. 0, in each warp, with the scores s of this tile:
//       follow     if a row has outgrown its reference (rare): move the references and rescale the output
//       barrier    V of this tile and K of the next one (tile - 1) have arrived. All warps have left the other stage.
//                  The copies of V of tile - 1 and K of tile - 2 now fill that stage (cp.async, one step ahead).
//       products   next scores = q . k, interleaved with this tile's exponentials; then output += p . v, interleaved
//                  with the maxima of the next scores
//     start the copies of Q and of the first tiles of the next item
//     store the output of this item
//
// One warp alone therefore has work for the tensor cores nearly all the time. A second warp in each quarter of the SM
// covers the rest. It belongs to a second CTA, or to the same CTA of eight warps.
//
// An item with k keys takes 512 k D flop. Cycles per SM of sm_80 for one tile of keys:
//
//                                          D 64, 48 keys   D 96, 32   D 128, 32   D 256, 32   D 256, 16
//   tensor cores                                768           768        1024        2048        1024
//   shared memory, reading the operands         512           576         768        2560        1536
//   shared memory, writing the copies            96            96         128         256         128
//   exponential units                           384           256         256         256         128
//
// The tensor cores bound all but D 256 on 8.0 and 10.0, which shared memory bounds: warps of 16 rows read each key for
// half as many rows. On 8.6, 8.9 and 12.0 the tensor cores take two or four times as long, and bound D 256 as well.
//
// Each warp reads all keys, and its queries again for every tile. Keys come from the L2 cache at 16 bytes per cycle and
// SM, a third of its throughput; each sequence comes from memory once.
//
// Registers limit the tiles. D 128 needs 128 for the output, 64 for two tiles of scores and 16 for probabilities.
// Values that are cheap to compute again (all that follow from the thread index, the item and the addresses) are not
// kept over a step. Warps of 16 rows hold half as much and read each key for half the rows. Shared memory then takes
// 2304 cycles for 64 keys of an SM, where the tensor cores of 8.6, 8.9 and 12.0 take 4096 to 8192.
#pragma once

#include <algorithm>
#include <cmath>
#include <cute/arch/copy_sm80.hpp>
#include <iterator>
#include <type_traits>
#include <utility>

#include "attention/accumulator_rows.cuh"
#include "attention/launch.h"
#include "attention/online_softmax_sm80.cuh"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm80.cuh"
#include "attention/traits.h"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

// sm_100 and related architectures, where the compiler takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr bool kIsSm100 = true;
#else
constexpr bool kIsSm100 = false;
#endif

struct KeySource {
  const char *k, *v;  // addresses of an item's first key
};

// Shared memory of a CTA. Tiles are rows of kHeadDim elements in RowLayout.
template <int kHeadDim, int kKeys>
struct SharedStorage {
  using Tr = Traits<Arch::kSm80, kHeadDim>;
  static constexpr int kTileRows = Tr::kForwardBlocks * kBlockRows;
  static constexpr int kRowBytes = kHeadDim * 2;
  alignas(128) char q[kTileRows * kRowBytes];
  struct Stage {
    char v[kKeys * kRowBytes];  // V of a tile
    char k[kKeys * kRowBytes];  // K of the tile that follows, tile - 1
  } stage[2];                   // for even and odd tiles
  WorkItem item[3];             // the item in use, the next one and the one before
  KeySource source;             // keys of the item in use
  int items, round;             // read again where they are needed
};

struct ForwardArguments {
  const int32_t* plan;
  const void *q, *k, *v;
  int64_t q_token_bytes, q_head_bytes, k_token_bytes, k_head_bytes, v_token_bytes, v_head_bytes;
  void* out;
  float* lse;
  Slots slots;
  int32_t total_q, num_heads, group;
  uint32_t group_reciprocal;  // ceil(2^16 / group): row / group == row * group_reciprocal >> 16 for rows of a tile
  float scale, scale_log2;    // softmax_scale, and softmax_scale times log2(e)
};

// Index of a CTA's item in a round.
__device__ __forceinline__ int item_index(int round) {
  return serpentine_index(round, int(blockIdx.x), int(gridDim.x));
}

// Place of a tile's row in the pack.
struct TileRow {
  int token, head;  // token of the item, head of the group
  __device__ __forceinline__ TileRow(int row, const ForwardArguments& a)
      : token(int(uint32_t(row) * a.group_reciprocal >> 16)), head(row - token * a.group) {}
};

template <typename T, int kHeadDim, int kWarps, int kKeys>
__global__ __launch_bounds__(32 * kWarps, 8 / kWarps) void illada_attention_forward_sm80(
    const __grid_constant__ ForwardArguments a, const __grid_constant__ DependentLaunch launch) {
  using Shared = SharedStorage<kHeadDim, kKeys>;
  using TileCopier = Copier<kHeadDim, 32 * kWarps>;
  constexpr int kTileRows = Shared::kTileRows, kWarpRows = kTileRows / kWarps,
                kPairs = kWarpRows / 16;  // pairs of rows per lane
  constexpr int kRowBytes = Shared::kRowBytes;
  using Layout = RowLayout<kRowBytes>;
  // Parts of a tile's exponentials (of kHeadDim / 16) that come before the barrier. Their registers are then free
  // sooner.
  constexpr int kEarly = Traits<Arch::kSm80, kHeadDim>::forward_early(kWarps, kIsSm100);
  constexpr uint32_t kTileBytes = kKeys * kRowBytes, kStageBytes = 2 * kTileBytes;
  extern __shared__ __align__(1024) char raw_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(raw_shared);
  const uint32_t q_tile = ptx::smem_address(shared.q), ring = ptx::smem_address(shared.stage);
  wait_for_previous_kernel(launch);
  const int items = reinterpret_cast<const PlanHeader*>(a.plan)->forward_items;
  if (item_index(0) >= items) return;
  if (threadIdx.x == 0) {
    shared.item[0] = forward_items(a.plan)[item_index(0)];
    shared.items = items;
  }
  __syncthreads();

  const auto stage_of = [&](int tile) { return ring + uint32_t(tile & 1) * kStageBytes; };
  // Starts the copies of V of a tile and K of the next one. In the loop they need no separate group: cp_async_wait<0>
  // waits for all copies.
  const auto load_pair = [&](const TileCopier& copier, const KeySource& source, int tile, auto is_partial, int rows) {
    const uint32_t stage = stage_of(tile);
    if (tile >= 0)
      copier.template keys<kKeys, decltype(is_partial)::value>(stage, source.v, a.v_token_bytes, tile * kKeys, rows);
    if (tile > 0)
      copier.template keys<kKeys, false>(stage + kTileBytes, source.k, a.k_token_bytes, (tile - 1) * kKeys, kKeys);
  };
  const auto open_item = [&](int round) {  // the ring and q must not be in use
    const uint32_t thread = ptx::reread_thread_index();
    const TileCopier copier(thread);
    const WorkItem& item = shared.item[round % 3];
    const int next = item_index(round + 1);
    if (thread < sizeof(WorkItem) / 16 && next < shared.items)
      cp_async_16(ptx::smem_address(&shared.item[(round + 1) % 3]) + thread * 16,
                  reinterpret_cast<const char*>(forward_items(a.plan) + next) + thread * 16, true);
    const int last = (item.k_count + kKeys - 1) / kKeys - 1, rows = item.k_count - last * kKeys;
    const KeySource source{
        static_cast<const char*>(a.k) + item.k_start * a.k_token_bytes + item.kv_head * a.k_head_bytes,
        static_cast<const char*>(a.v) + item.k_start * a.v_token_bytes + item.kv_head * a.v_head_bytes};
    if (thread == 0) shared.source = source;
    if (last >= 0) {
      const char* queries =
          static_cast<const char*>(a.q) + item.q_start * a.q_token_bytes + item.kv_head * a.group * a.q_head_bytes;
#pragma unroll 4
      for (int i = 0; i < kTileRows / copier.kRows; ++i) {
        const TileRow row(copier.row + i * copier.kRows, a);
        copier.chunks(
            q_tile + copier.target + i * copier.kRows * kRowBytes,
            queries + min(row.token, item.q_count - 1) * a.q_token_bytes + row.head * a.q_head_bytes + copier.column,
            row.token < item.q_count);
      }
      copier.template keys<kKeys, true>(stage_of(last + 1) + kTileBytes, source.k, a.k_token_bytes, last * kKeys, rows);
    }
    cute::cp_async_fence();
    load_pair(copier, source, last, std::true_type{}, rows);
    cute::cp_async_fence();
  };

  open_item(0);
  for (int round = 0; item_index(round) < shared.items;) {
    const int last = (shared.item[round % 3].k_count + kKeys - 1) / kKeys - 1;
    // Uniform in a warp. A warp without rows only copies.
    const bool has_rows =
        __shfl_sync(kFullWarp, int(threadIdx.x) / 32, 0) * kWarpRows < shared.item[round % 3].q_count * a.group;
    float s[kPairs][kKeys / 2], o[kPairs][kHeadDim / 2];
    uint32_t p[kPairs][kKeys / 16][4];
    OnlineSoftmax rows[kPairs];
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      rows[m].reset();
#pragma unroll
      for (int j = 0; j < kHeadDim / 2; ++j) o[m][j] = 0;
    }
    // Computes next = q . k, 16 columns at a time, and calls `beside` after each of these steps.
    const auto multiply_k = [&](auto& next, uint32_t k_tile, const auto& beside) {
      const uint32_t thread = ptx::reread_thread_index();
      const Fragments<kRowBytes> at(thread);
      const uint32_t q_rows = q_tile + thread / 32 * (kWarpRows * kRowBytes) + at.columns;
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
#pragma unroll
        for (int j = 0; j < kKeys / 2; ++j) next[m][j] = 0;
      }
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t q[kPairs][4];
#pragma unroll
        for (int m = 0; m < kPairs; ++m) ldmatrix(q[m], Layout::right_of(q_rows, step) + m * 16 * kRowBytes);
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t k[4];
          ldmatrix(k, Layout::right_of(k_tile + at.rows, step) + n * 16 * kRowBytes);
#pragma unroll
          for (int m = 0; m < kPairs; ++m) {
            mma<T>(&next[m][8 * n], q[m], k[0], k[1]);
            mma<T>(&next[m][8 * n + 4], q[m], k[2], k[3]);
          }
        }
        beside(step);
      }
    };
    const auto multiply_v = [&](uint32_t v_tile) {  // o += p . v
      const Fragments<kRowBytes> at(ptx::reread_thread_index());
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) {
          uint32_t v[4];
          ldmatrix_trans(v, Layout::right_of(v_tile + at.columns, n) + step * 16 * kRowBytes);
#pragma unroll
          for (int m = 0; m < kPairs; ++m) {
            mma<T>(&o[m][8 * n], p[m][step], v[0], v[1]);
            mma<T>(&o[m][8 * n + 4], p[m][step], v[2], v[3]);
          }
        }
      }
    };
    // Converts part `step` of the scores to probabilities. A part is a number of pairs, as packed values are.
    const auto weigh = [&](int step) {
      constexpr int kScorePairs = kKeys / 4, kSteps = kHeadDim / 16, kPart = kScorePairs / kSteps * 2;
      const bool even = kScorePairs % kSteps == 0;  // else parts differ by one pair
      const int first = even ? step * kPart : step * kScorePairs / kSteps * 2;
      const int last = even ? (step + 1) * kPart : (step + 1) * kScorePairs / kSteps * 2;
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
        rows[m].weigh(s[m], a.scale_log2, first, last);
#pragma unroll
        for (int j = first; j < last; j += 2) p[m][j / 8][j % 8 / 2] = pack2<T>(s[m][j], s[m][j + 1]);
      }
    };
    float growth;
    const auto measure = [&] {  // growth of s over the references
      growth = -INFINITY;
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
        float top[2];
        OnlineSoftmax::maxima(s[m], top);
        growth = fmaxf(growth, rows[m].growth(top, a.scale_log2));
      }
    };
    const auto follow = [&] {  // moves the references up to the scores, if they must move
      if (__any_sync(kFullWarp, growth > OnlineSoftmax::kSlack)) {
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          float top[2], rescale[2];
          OnlineSoftmax::maxima(s[m], top);
          rows[m].move(top, a.scale_log2, rescale);
#pragma unroll
          for (int j = 0; j < kHeadDim / 2; ++j) o[m][j] *= rescale[j / 2 % 2];
        }
      }
    };

    cute::cp_async_wait<1>();
    __syncthreads();
    if (threadIdx.x == 0) shared.round = round + 1;
    if (has_rows && last >= 0) {
      multiply_k(s, stage_of(last + 1) + kTileBytes, [](int) {});
      const int valid = shared.item[round % 3].k_count - last * kKeys;
      if (valid < kKeys) {
#pragma unroll
        for (int m = 0; m < kPairs; ++m) mask_scores(s[m], valid);
      }
      measure();
    }
    int tile = last;
#pragma unroll 1
    for (; tile > 0; --tile) {
      if (has_rows) {
        follow();
#pragma unroll
        for (int step = 0; step < kEarly; ++step) weigh(step);
      }
      cute::cp_async_wait<0>();
      __syncthreads();
      load_pair(TileCopier(ptx::reread_thread_index()), shared.source, tile - 1, std::false_type{}, kKeys);
      if (has_rows) {
        float next[kPairs][kKeys / 2];
        multiply_k(next, stage_of(tile) + kTileBytes, [&](int step) {
          if (step + kEarly < kHeadDim / 16) weigh(step + kEarly);
        });
        multiply_v(stage_of(tile));
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
#pragma unroll
          for (int j = 0; j < kKeys / 2; ++j) s[m][j] = next[m][j];
        }
        measure();
      }
    }
    if (tile == 0) {
      if (has_rows) follow();
      cute::cp_async_wait<0>();
      __syncthreads();
      if (has_rows) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) weigh(step);
        multiply_v(stage_of(0));
      }
    }
    // The next item's tiles are copied while this item's rows are stored.
    cute::cp_async_wait<0>();
    __syncthreads();
    round = shared.round;
    const WorkItem item = shared.item[(round + 2) % 3];
    if (item_index(round) < shared.items) open_item(round);
    if (has_rows) {
      const int thread = int(ptx::reread_thread_index()), lane = thread & 31, first_row = (thread >> 5) * kWarpRows;
      const bool whole = item.splits == 1;
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = warp_reduce<4>(rows[m].sum[i], [](float x, float y) { return x + y; });
          // Without keys, out is 0. If all scores are -inf, it is NaN.
          const float inverse = item.k_count == 0 ? 0 : 1 / sum, reference = rows[m].reference[i];
          const TileRow row(first_row + m * 16 + i * 8 + lane / 4, a);
          const bool is_real = row.token < item.q_count;
          const int64_t token = item.q_start + row.token;
          const int head = item.kv_head * a.group + row.head;
          if (whole) {
            store_row<T, kHeadDim>(static_cast<T*>(a.out) + (token * a.num_heads + head) * kHeadDim, o[m], i, inverse,
                                   is_real, lane);
            if (is_real && lane % 4 == 0) a.lse[int64_t(head) * a.total_q + token] = row_lse(reference, sum, a.scale);
          } else if (is_real) {
            const int64_t slot_row =
                int64_t(item.first_slot + item.split) * a.slots.rows + row.token * a.group + row.head;
            float* values = a.slots.values + slot_row * kHeadDim + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j)
              *reinterpret_cast<float2*>(values + 8 * j) = make_float2(o[m][4 * j + 2 * i], o[m][4 * j + 2 * i + 1]);
            if (lane % 4 == 0) a.slots.sums[slot_row] = {reference, sum};
          }
        }
      }
    }
  }
}

template <typename T, int kHeadDim, int kWarps, int kKeys>
void launch_forward(const ForwardParams& p, const Device& device) {
  constexpr const char* kOp = "varlen_attention";
  const PackShape& s = p.shape;
  const int group = s.num_heads / s.num_kv_heads;
  ForwardArguments a{};
  a.plan = p.plan;
  a.q = p.q.data;
  a.k = p.k.data;
  a.v = p.v.data;
  a.q_token_bytes = p.q.token_stride * 2;
  a.q_head_bytes = p.q.head_stride * 2;
  a.k_token_bytes = p.k.token_stride * 2;
  a.k_head_bytes = p.k.head_stride * 2;
  a.v_token_bytes = p.v.token_stride * 2;
  a.v_head_bytes = p.v.head_stride * 2;
  a.out = p.out;
  a.lse = p.lse;
  a.slots = slots_of(p);
  a.total_q = int32_t(s.total_q);
  a.num_heads = s.num_heads;
  a.group = group;
  a.group_reciprocal = group_reciprocal(group);
  a.scale = p.softmax_scale;
  a.scale_log2 = p.softmax_scale * float(M_LOG2E);
  using Shared = SharedStorage<kHeadDim, kKeys>;
  static_assert(int(sizeof(Shared)) <= forward_smem_sm80<typename Shared::Tr>({kWarps, kKeys}) + 1024,
                "forward_tile_sm80 counts on it");
  constexpr int kThreads = 32 * kWarps;
  const auto kernel = illada_attention_forward_sm80<T, kHeadDim, kWarps, kKeys>;
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.smem_bytes = int(sizeof(Shared));
  shape.dependent = true;
  const int resident = resident_ctas(kOp, reinterpret_cast<const void*>(kernel), device, kThreads, shape.smem_bytes);
  shape.grid = dim3(unsigned(std::min<int64_t>(int64_t(device.sm_count) * resident, max_forward_items(s))));
  launch_kernel(kOp, device, p.launch.stream, shape, kernel, a);
}

// Launches the instance that has the tile of the tiling: forward_tile_sm80 chose one of them.
template <typename Tr, size_t... kTiles>
void launch_forward_tile(const ForwardParams& p, const Device& device, const Tiling& tiling,
                         std::index_sequence<kTiles...>) {
  const auto launch = [&](auto number) {
    constexpr ForwardTileSm80 kTile = Tr::kForwardTiles[number];
    if (tiling.warps != kTile.warps || tiling.key_tile != kTile.keys) return false;
    p.dtype == DType::kBFloat16 ? launch_forward<BFloat16, Tr::kHeadDim, kTile.warps, kTile.keys>(p, device)
                                : launch_forward<Half, Tr::kHeadDim, kTile.warps, kTile.keys>(p, device);
    return true;
  };
  if (!(launch(std::integral_constant<size_t, kTiles>()) || ...))
    detail::fail("varlen_attention", "no kernel was built for ", tiling.warps, " warps and ", tiling.key_tile, " keys");
}

}  // namespace

template <int kHeadDim>
void launch_forward_sm80(const ForwardParams& p, const Device& device, const Tiling& tiling) {
  using Tr = Traits<Arch::kSm80, kHeadDim>;
  launch_forward_tile<Tr>(p, device, tiling, std::make_index_sequence<std::size(Tr::kForwardTiles)>());
}

}  // namespace illada::attention
