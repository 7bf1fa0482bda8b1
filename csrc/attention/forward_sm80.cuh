// Attention forward on sm_80 and on GPUs without a specialised kernel. One file per head dim includes this file.
//
// A CTA of four warps walks over items of the plan. A tile has 128 rows (tokens x heads of a group, 32 per warp). Its
// keys come in tiles of 32 (D 96 and 128) or 48 (D 64), the last one first. Only the last tile may be partial, so the
// loop over the others needs no mask. Where shared memory has no room for two CTAs at D 128, one CTA of eight warps
// with 16 rows each takes 64 keys at a time. At D 256 a CTA always has eight warps, and 32 or 16 keys. Scores,
// probabilities and the output stay in registers: with mma.sync m16n8k16, the accumulator of q . k has the layout of
// the A operand of p . v.
//
//   start the copies of the first item: Q and K of the last tile; V of it and K of the tile before it (Loader)
//   for each item:
//     wait for Q and K; s = q . k of the last tile, with a mask (WarpRows::begin)
//     for tile = last .. 0, in each warp, with the scores s of this tile:
//       follow     if a row has outgrown its reference (rare): move the references and rescale the output
//       barrier    V of this tile and K of the next one (tile - 1) have arrived. All warps have left the other stage.
//                  The copies of V of tile - 1 and K of tile - 2 now fill that stage (cp.async, one step ahead).
//       advance    next scores = q . k, interleaved with this tile's exponentials; then output += p . v, interleaved
//                  with the maxima of the next scores (tile 0: the exponentials, then output += p . v)
//     barrier: no warp needs Q or the ring any more
//     start the copies of the next item
//     store the output of this item
//
// Schedule of an item of three tiles, for the two warps of a quarter of the SM, if they are of two CTAs.
//
//   Sj   s = q . k of tile j
//   ej   exponentials of these scores, of which a part comes before the barrier; max: maxima of the next scores
//   Oj   o += p . v of tile j
//   B    each thread waits for its own copies, then all threads of the CTA for each other (wait_for_copies)
//
//                        time ->
// copies in flight  Q K2 | V2 K1           | V1 K0           | V0              |                | Q' K' V'
// a warp   tensor cores  B [S2]            B [S1][O2]        B [S0][O1]        B      [O0]      B       B [S']
//          other units          max, e2        e2     max, e1    e1     max      e0               store
// another  tensor cores           B [S2]            B [S1][O2]        B [S0][O1]        B      [O0]      B       B [S']
//          other units                   max, e2        e2     max, e1    e1     max      e0               store
//
// One warp alone therefore has work for the tensor cores nearly all the time. The second warp covers the rest. It
// belongs to a second CTA, whose copies and barriers are its own, or to the same CTA of eight warps.
//
//   who waits                for whom                                                  where
//   all warps of a CTA       the copies that all threads started a step before         B
//   all warps of a CTA       its slowest warp: the copies overwrite what it has read   B
//   a CTA                    no other CTA                                              -
//
// The copies in the drawing are those of the first warp's CTA.
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
//   forward_shared_sm80.cuh   arguments, shared memory, order of the items
//   forward_rows_sm80.cuh     products, softmax and store of a warp; what limits the tiles
#pragma once

#include <algorithm>
#include <cmath>
#include <cute/arch/copy_sm80.hpp>
#include <iterator>
#include <type_traits>
#include <utility>

#include "attention/forward_rows_sm80.cuh"
#include "attention/forward_shared_sm80.cuh"
#include "attention/launch.h"
#include "attention/tiles_sm80.cuh"
#include "attention/traits.h"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada::attention {
namespace {

// ------------------------------------------------------------------------------------------------------------- copies

// The copies of a CTA, by cp.async: the queries of an item, its keys and values, and the record of the next item. All
// threads take part.
template <int kHeadDim, int kWarps, int kKeys>
struct Loader {
  using Shared = SharedStorage<kHeadDim, kKeys>;
  using TileCopier = Copier<kHeadDim, 32 * kWarps>;
  static constexpr uint32_t kTileBytes = kKeys * Shared::kRowBytes, kStageBytes = 2 * kTileBytes;

  const ForwardArguments& a;
  Shared& shared;
  const uint32_t q_tile, ring;  // addresses in shared memory

  __device__ __forceinline__ Loader(const ForwardArguments& a, Shared& shared)
      : a(a), shared(shared), q_tile(ptx::smem_address(shared.q)), ring(ptx::smem_address(shared.stage)) {}

  // Addresses of V of a tile, and of K of the tile before it, which is the next one. They share a stage, so that one
  // barrier frees both. K of the last tile is in the stage of the tile after it, which does not exist.
  __device__ __forceinline__ uint32_t v_of(int tile) const { return ring + uint32_t(tile & 1) * kStageBytes; }
  __device__ __forceinline__ uint32_t k_before(int tile) const { return v_of(tile) + kTileBytes; }

  // Starts the copies of V of a tile and K of the next one. In the loop they need no separate group: cp_async_wait<0>
  // waits for all copies. Only the last tile may be partial, so K here never is.
  template <bool kPartial>
  __device__ __forceinline__ void start_stage(const TileCopier& copier, const KeySource& source, int tile,
                                              int rows) const {
    const uint32_t stage = v_of(tile);  // once: the compiler would compute it again for K
    if (tile >= 0) copier.template keys<kKeys, kPartial>(stage, source.v, a.v_token_bytes, tile * kKeys, rows);
    if (tile > 0)
      copier.template keys<kKeys, false>(stage + kTileBytes, source.k, a.k_token_bytes, (tile - 1) * kKeys, kKeys);
  }

  // Starts the copies of the queries of an item. Rows without a token become zeros; their address must be legal even
  // so, hence the last token's.
  __device__ __forceinline__ void start_queries(const TileCopier& copier, const WorkItem& item) const {
    constexpr int kRows = TileCopier::kRows;
    const char* queries =
        static_cast<const char*>(a.q) + item.q_start * a.q_token_bytes + item.kv_head * a.group * a.q_head_bytes;
#pragma unroll 4
    for (int i = 0; i < Shared::kTileRows / kRows; ++i) {
      const TileRow row(copier.row + i * kRows, a);
      copier.chunks(
          q_tile + copier.target + i * kRows * Shared::kRowBytes,
          queries + min(row.token, item.q_count - 1) * a.q_token_bytes + row.head * a.q_head_bytes + copier.column,
          row.token < item.q_count);
    }
  }

  // Starts the first copies of a round's item, in two groups: Q and K of the last tile, then V of it and K of the next
  // one. The ring and q must not be in use.
  __device__ __forceinline__ void open_item(int round) const {
    const uint32_t thread = ptx::reread_thread_index();
    const TileCopier copier(thread);
    const WorkItem& item = shared.item[round % 3];
    const int next = item_index(round + 1);
    // One item ahead. It belongs to the first group; it is read after this item's last barrier.
    if (thread < sizeof(WorkItem) / 16 && next < shared.items)
      cp_async_16(ptx::smem_address(&shared.item[(round + 1) % 3]) + thread * 16,
                  reinterpret_cast<const char*>(forward_items(a.plan) + next) + thread * 16, true);
    const int last = (item.k_count + kKeys - 1) / kKeys - 1, rows = item.k_count - last * kKeys;
    const KeySource source{
        static_cast<const char*>(a.k) + item.k_start * a.k_token_bytes + item.kv_head * a.k_head_bytes,
        static_cast<const char*>(a.v) + item.k_start * a.v_token_bytes + item.kv_head * a.v_head_bytes};
    if (thread == 0) shared.source = source;  // for the loop, which keeps no addresses in registers
    if (last >= 0) {
      start_queries(copier, item);
      copier.template keys<kKeys, true>(k_before(last + 1), source.k, a.k_token_bytes, last * kKeys, rows);
    }
    cute::cp_async_fence();
    start_stage<true>(copier, source, last, rows);
    cute::cp_async_fence();
  }
};

// ------------------------------------------------------------------------------------------------------------- kernel

// Waits until at most kGroups groups of this thread's copies are in flight, then for all threads of the CTA.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  cute::cp_async_wait<kGroups>();
  __syncthreads();
}

template <typename T, int kHeadDim, int kWarps, int kKeys>
__global__ __launch_bounds__(32 * kWarps, 8 / kWarps) void illada_attention_forward_sm80(
    const __grid_constant__ ForwardArguments a, const __grid_constant__ DependentLaunch launch) {
  using Shared = SharedStorage<kHeadDim, kKeys>;
  using Copies = Loader<kHeadDim, kWarps, kKeys>;
  using Rows = WarpRows<T, kHeadDim, kWarps, kKeys>;
  extern __shared__ __align__(1024) char raw_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(raw_shared);
  const Copies copies(a, shared);
  wait_for_previous_kernel(launch);
  const int items = reinterpret_cast<const PlanHeader*>(a.plan)->forward_items;
  if (item_index(0) >= items) return;
  if (threadIdx.x == 0) {
    shared.item[0] = forward_items(a.plan)[item_index(0)];
    shared.items = items;
  }
  __syncthreads();

  copies.open_item(0);
  for (int round = 0; item_index(round) < shared.items;) {
    const int last = (shared.item[round % 3].k_count + kKeys - 1) / kKeys - 1;
    // Uniform in a warp. A warp without rows only copies.
    const bool has_rows =
        __shfl_sync(kFullWarp, int(threadIdx.x) / 32, 0) * Rows::kRows < shared.item[round % 3].q_count * a.group;
    Rows rows(a.scale_log2);

    wait_for_copies<1>();                            // Q and K of the last tile; V is still in flight
    if (threadIdx.x == 0) shared.round = round + 1;  // read again after the loop, not kept in a register
    if (has_rows && last >= 0)
      rows.begin(copies.q_tile, copies.k_before(last + 1), shared.item[round % 3].k_count - last * kKeys);
    int tile = last;
#pragma unroll 1
    for (; tile > 0; --tile) {
      if (has_rows) {
        rows.follow();
        rows.template weigh_parts<0, Rows::kEarly>();
      }
      wait_for_copies<0>();
      // All warps have left the other stage, so it may be filled. The copier is made again each time, not kept.
      copies.template start_stage<false>(typename Copies::TileCopier(ptx::reread_thread_index()), shared.source,
                                         tile - 1, kKeys);
      if (has_rows) rows.advance(copies.q_tile, copies.k_before(tile), copies.v_of(tile));
    }
    if (tile == 0) {  // not so if the item has no keys; there are no next scores to hide the exponentials behind
      if (has_rows) rows.follow();
      wait_for_copies<0>();
      if (has_rows) {
        rows.template weigh_parts<0, Rows::kColumnSteps>();
        rows.multiply_v(copies.v_of(0));
      }
    }

    // No warp needs Q or the ring any more. The next item's tiles are copied while this item's rows are stored.
    wait_for_copies<0>();
    round = shared.round;
    const WorkItem item = shared.item[(round + 2) % 3];  // of round - 1; the record of round + 1 takes another place
    if (item_index(round) < shared.items) copies.open_item(round);
    if (has_rows) rows.store(a, item);
  }
}

// ------------------------------------------------------------------------------------------------------------- launch

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
