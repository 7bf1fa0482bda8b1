// What the warps of the sm_90a forward share: arguments, shared memory with its barriers, and the order of the items.
// forward_sm90.cuh explains the kernel and draws its schedule.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/plan.h"
#include "attention/tiles_sm90.cuh"
#include "attention/traits.h"
#include "common/barrier_sm90.cuh"
#include "common/ptx.cuh"
#include "common/registers_sm90.cuh"

namespace illada::attention {
namespace {

struct ForwardArguments {
  const int32_t* plan;
  void* out;   // [T, H, D]
  float* lse;  // [H, T]
  Slots slots;
  int32_t total_q, num_heads, group;  // group: H / G, heads of a group
  int32_t tile_tokens, block_tokens;  // query tokens of a CTA, and of one of its warpgroups
  uint32_t group_reciprocal;
  float scale, scale_log2;        // softmax_scale, and softmax_scale times log2(e)
  uint64_t rows_hint, keys_hint;  // hints to the L2 cache
};

// Shared memory of a kernel instance, and its adaptations to a lack of registers or shared memory.
template <int kHeadDim_, int kKeys_, int kStagesV_>
struct SharedStorage {
  static constexpr int kHeadDim = kHeadDim_, kKeys = kKeys_, kSlices = kHeadDim / 64;
  using Tr = Traits<Arch::kSm90, kHeadDim>;
  static constexpr int kStagesK = Tr::kForwardKeyStages, kStagesV = kStagesV_;
  static constexpr int kConsumers = Tr::kForwardBlocks;
  static constexpr int kConsumerRegisters = Tr::forward_consumer_registers(kKeys);
  using Registers = RegisterSplit<kConsumers, Tr::forward_producer_registers(kKeys), kConsumerRegisters>;
  static constexpr int kThreads = Registers::kThreads;
  // Named barriers. turn(w): warpgroup w - 1 lets warpgroup w issue its products. rows(w): within warpgroup w.
  static constexpr int turn(int warpgroup) { return warpgroup; }
  static constexpr int rows(int warpgroup) { return kConsumers + warpgroup; }
  static_assert(2 * kConsumers <= NamedBarrier::kCount);
  using KeyTile = Tile<kKeys, kHeadDim>;
  using QueryTile = Tile<kBlockRows, kHeadDim>;
  // True if scores, sums, two sets of probabilities and 24 more registers are too many. The next probabilities then
  // stay in the registers of the scores, in fp32, until the product that reads the old probabilities has ended.
  static constexpr bool kPacksLate = kKeys / 2 + kHeadDim / 2 + 2 * (kKeys / 4) + 24 > kConsumerRegisters;
  // True if shared memory has room for the output rows. Otherwise they are stored from registers.
  static constexpr bool kStagesOut =
      (kStagesK + kStagesV) * sizeof(KeyTile) + 2 * kConsumers * sizeof(QueryTile) <= 225 * 1024;
  struct None {};

  QueryTile q[kConsumers];  // queries of each warpgroup
  KeyTile k[kStagesK], v[kStagesV];
  std::conditional_t<kStagesOut, QueryTile, None> out[kConsumers];
  Barrier q_full[kConsumers], q_empty[kConsumers], k_full[kStagesK], k_empty[kStagesK], v_full[kStagesV],
      v_empty[kStagesV];
  // Records of the finished item, of the current one, and of the next one, which may arrive while both are read. That
  // makes three; a ring of four needs no division.
  static constexpr int kItems = 4;
  WorkItem item[kConsumers][kItems];
  WorkItem producer_item, next_item;  // of the producer: the item that it loads, and the record of the next one
};

// Sets how many arrivals end a phase of each barrier. One thread calls it, before all threads synchronise.
template <int kCluster, typename Shared>
__device__ __forceinline__ void init_barriers(Shared& shared) {
  for (int w = 0; w < Shared::kConsumers; ++w) {
    shared.q_full[w].init(1);   // the producer, and the bytes that it announces
    shared.q_empty[w].init(1);  // one thread of the warpgroup
  }
  // A stage is filled by all CTAs of the cluster, so it is empty once the warpgroups of all of them have read it.
  for (int s = 0; s < Shared::kStagesK; ++s) {
    shared.k_full[s].init(1);
    shared.k_empty[s].init(Shared::kConsumers * kCluster);
  }
  for (int s = 0; s < Shared::kStagesV; ++s) {
    shared.v_full[s].init(1);
    shared.v_empty[s].init(Shared::kConsumers * kCluster);
  }
  cutlass::arch::fence_barrier_init();
}

// Returns the index of the cluster's item in a round. The index of the CTA and the size of the grid are hidden from the
// compiler, which would else keep values derived from them in registers from round to round.
template <int kCluster>
__device__ __forceinline__ int item_index(int round) {
  int block = int(blockIdx.x), grid = int(gridDim.x);
  ptx::hide_value(block);
  ptx::hide_value(grid);
  return serpentine_index(round, block / kCluster, grid / kCluster);
}

// Returns 1 if the kernel divides the plan's items in two, else 0. A plan that was made for pairs has items of two
// tiles. A CTA without a neighbour takes one tile at a time.
template <int kCluster>
__device__ __forceinline__ int halves_items(const int32_t* plan) {
  return kCluster == 1 ? plan_header(plan).cluster - 1 : 0;
}

// Copies an item in shared memory, one half after the other, which takes four registers instead of eight.
__device__ __forceinline__ void copy_item(WorkItem& target, const WorkItem& source) {
  reinterpret_cast<uint4*>(&target)[0] = reinterpret_cast<const uint4*>(&source)[0];
  ptx::keep_memory_order();
  reinterpret_cast<uint4*>(&target)[1] = reinterpret_cast<const uint4*>(&source)[1];
}

}  // namespace
}  // namespace illada::attention
