// Tile sizes and other compile-time choices of the attention kernels, for each arch and head dim, and the dispatch over
// them. CONTRIBUTING.md has the recipe for a head dim, and what the loops demand of it.
#pragma once

#include <string>
#include <utility>

#include "attention/plan.h"
#include "common/device.h"

namespace illada::attention {

// Constants of the kernels of an arch for a head dim. Only what is built has a specialisation.
template <Arch kArch, int kHeadDim>
struct Traits;

// ------------------------------------------------------------------------------------------------------------- sm_80

// Tile of an instance of the forward.
struct ForwardTileSm80 {
  int warps, keys;  // warps per CTA; keys per step
};

// kForwardTiles: the first tile is for an SM that has shared memory for eight warps of it (two CTAs of four, or one of
// eight), the last tile for other SMs.
template <int kHeadDim_>
struct TraitsSm80 {
  static constexpr Arch kArch = Arch::kSm80;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kForwardBlocks = 2;   // forward: blocks of kBlockRows query rows per CTA
  static constexpr int kBackwardSlices = 1;  // backward: warps that share rows; each has a slice of the columns
};

template <>
struct Traits<Arch::kSm80, 64> : TraitsSm80<64> {
  static constexpr ForwardTileSm80 kForwardTiles[] = {{4, 48}};
  static constexpr int forward_early(int, bool) { return 2; }  // forward: kEarly, for a number of warps and sm_100
  static constexpr int kBackwardBlocks = 2;                    // backward: blocks of 16 own rows per warp
  static constexpr int kQueriesSteps = 4;                      // dq: steps of 16 keys side by side
  static constexpr int kQueriesCtas = 2;                       // dq: CTAs per SM
};

template <>
struct Traits<Arch::kSm80, 96> : TraitsSm80<96> {
  static constexpr ForwardTileSm80 kForwardTiles[] = {{4, 32}};  // two CTAs fit 100 KB
  static constexpr int forward_early(int, bool) { return 2; }
  static constexpr int kBackwardBlocks = 1;
  static constexpr int kQueriesSteps = 1;
  static constexpr int kQueriesCtas = 3;
};

template <>
struct Traits<Arch::kSm80, 128> : TraitsSm80<128> {
  // Two CTAs of four warps take 133 KB. Where an SM has 100 KB (8.6, 8.9, 12.0), one CTA of eight warps keeps as many
  // warps at work: each has half the rows and the CTA twice the keys.
  static constexpr ForwardTileSm80 kForwardTiles[] = {{4, 32}, {8, 64}};
  static constexpr int forward_early(int warps, bool is_sm100) { return is_sm100 && warps == 4 ? 7 : 2; }
  static constexpr int kBackwardBlocks = 1;
  static constexpr int kQueriesSteps = 1;  // registers allow no more
  static constexpr int kQueriesCtas = 3;
};

template <>
struct Traits<Arch::kSm80, 256> : TraitsSm80<256> {
  // A warp has registers for the output of 16 rows. The tiles take 131 KB and, where an SM has 100 KB, 98 KB.
  static constexpr ForwardTileSm80 kForwardTiles[] = {{8, 32}, {8, 16}};
  static constexpr int forward_early(int, bool) { return 2; }
  static constexpr int kBackwardBlocks = 1;
  static constexpr int kBackwardSlices = 2;  // a warp has registers for the sums and operands of 128 columns
  static constexpr int kQueriesSteps = 1;
  static constexpr int kQueriesCtas = 1;
};

// Shared memory of a tile of the sm_80 forward in bytes, without the few bytes for work items.
template <typename Tr>
constexpr int forward_smem_sm80(ForwardTileSm80 tile) {
  return (Tr::kForwardBlocks * kBlockRows + 4 * tile.keys) * Tr::kHeadDim * 2;
}

// ------------------------------------------------------------------------------------------------------------ sm_90a

// Tile of an instance of the forward.
struct ForwardTile {
  int keys, value_stages;  // keys per step; stages of values in shared memory
};

template <int kHeadDim_>
struct TraitsSm90 {
  static constexpr Arch kArch = Arch::kSm90;
  static constexpr int kHeadDim = kHeadDim_;
};

template <>
struct Traits<Arch::kSm90, 64> : TraitsSm90<64> {
  static constexpr int kForwardBlocks = 3;     // forward: blocks per CTA, one for each consumer warpgroup
  static constexpr int kForwardKeyStages = 4;  // forward: stages of keys
  using ForwardChoice = AttentionForwardD64;   // variant that chooses one of kForwardTiles
  static constexpr ForwardTile kForwardTiles[] = {{96, 4}, {128, 4}};
  static constexpr int forward_producer_registers(int keys) { return keys == 96 ? 56 : 32; }
  static constexpr int forward_consumer_registers(int keys) { return keys == 96 ? 152 : 160; }
  static constexpr int kBackwardRows = 128;  // backward for dk and dv: rows per step
  // dq of a step: true, a warpgroup has half of the columns; false, half of the rows.
  static constexpr bool kHalvesColumnsOfDq = false;
  static constexpr int kStepsUntilDq = 6;  // products of dk and dv that are issued until dq is complete
};

template <>
struct Traits<Arch::kSm90, 128> : TraitsSm90<128> {
  static constexpr int kForwardBlocks = 2;
  static constexpr int kForwardKeyStages = 2;
  using ForwardChoice = AttentionForwardD128;
  static constexpr ForwardTile kForwardTiles[] = {{128, 3}, {128, 2}, {176, 2}};
  static constexpr int forward_producer_registers(int) { return 40; }
  static constexpr int forward_consumer_registers(int) { return 232; }
  static constexpr int kBackwardRows = 64;
  static constexpr bool kHalvesColumnsOfDq = true;
  static constexpr int kStepsUntilDq = 1;
};

// ---------------------------------------------------------------------------------------------------------- dispatch

// Head dims that an arch has kernels for.
template <Arch kArch>
constexpr auto head_dims() {
  if constexpr (kArch == Arch::kSm80)
    return std::integer_sequence<int, 64, 96, 128, 256>();
  else
    return std::integer_sequence<int, 64, 128>();
}

namespace head_dim_detail {

template <Arch kArch, typename F, int kHeadDim, int... kRest>
auto dispatch_head_dim(const char* op, int head_dim, const F& f, std::integer_sequence<int, kHeadDim, kRest...>) {
  using Tr = Traits<kArch, kHeadDim>;
  static_assert(kMinBlocks <= Tr::kForwardBlocks && Tr::kForwardBlocks <= kMaxBlocks);
  if constexpr (sizeof...(kRest) > 0) {
    if (head_dim != kHeadDim) return dispatch_head_dim<kArch>(op, head_dim, f, std::integer_sequence<int, kRest...>());
  }
  if (head_dim != kHeadDim) detail::fail<NotSupported>(op, "no kernel was built for head dim ", head_dim);
  return f(Tr());
}

template <int... kHeadDims>
constexpr bool contains(int head_dim, std::integer_sequence<int, kHeadDims...>) {
  return ((head_dim == kHeadDims) || ...);
}

}  // namespace head_dim_detail

template <Arch kArch>
constexpr bool has_head_dim(int head_dim) {
  return head_dim_detail::contains(head_dim, head_dims<kArch>());
}

// Returns f(Traits<kArch, head_dim>()). Throws NotSupported for a head dim that is not built.
template <Arch kArch, typename F>
auto dispatch_head_dim(const char* op, int head_dim, const F& f) {
  return head_dim_detail::dispatch_head_dim<kArch>(op, head_dim, f, head_dims<kArch>());
}

}  // namespace illada::attention
