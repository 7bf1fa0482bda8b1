// Between launch.cpp, which validates and chooses, and the .cu files, which launch.
#pragma once

#include "attention/plan.h"
#include "common/device.h"

namespace illada::attention {

void launch_plan(const PlanParams& params, const Device& device, const Tiling& tiling);

// What each forward kernel works on at a time: blocks of query rows of a CTA, keys of a step.
constexpr int forward_blocks_sm80() { return 2; }
// Four warps, two CTAs to an SM. Of D 128 that takes 133 KB; where an SM has 100 KB (8.6, 8.9, 12.0), one CTA of eight
// warps with half the rows each and twice the keys keeps as many warps at work.
constexpr int forward_key_tile_sm80(int head_dim, int warps) { return head_dim == 64 ? 48 : warps == 8 ? 64 : 32; }
constexpr int forward_smem_sm80(int head_dim, int warps) {  // without the few bytes for items
  return (forward_blocks_sm80() * kBlockRows + 4 * forward_key_tile_sm80(head_dim, warps)) * head_dim * 2;
}
int forward_warps_sm80(int head_dim, const Device& device);
constexpr int forward_blocks_sm90(int head_dim) { return head_dim == 128 ? 2 : 3; }
int forward_key_tile_sm90(int head_dim);  // of the instance in use

// Walks over the forward items of the plan. One function per (arch, head dim) and choice.
void launch_forward_d64_sm80(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d128_sm80(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d64_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d64_192x128_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d128_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d128_128x2x2_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d128_176x2x2_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);

// Where tiling.may_split: merges the pieces that the forward left in the workspace into out and lse.
void launch_combine(const ForwardParams& params, const Device& device);

// ---------------------------------------------------------------------------------------------------------- backward

// How the CTAs of all keys sum dq up in fp32 (query_sums_add_sm90.cuh). Kept: with a hint that the sums stay in L2.
enum class QuerySums { kNone, kRed2, kRed2Kept, kRed4, kRed4Kept, kBulk };

// How a backward is carried out; the caller's sizes and the choices of common/variants.h decide.
struct BackwardMethod {
  // dq summed in fp32 by the CTAs of all keys (5 products); else by a kernel of its own (7), in a fixed order.
  bool fused = false;
  QuerySums sums = QuerySums::kNone;  // kNone if not fused
  bool staggered = false;             // tiles of keys begin at different rows
  int report_every = 1;               // steps: 1, 2 or 4
  // fused: tiles of keys add to dq in their order, and dk and dv are sums of two pieces at most, so that every run
  // gives the same bits.
  bool ordered = false;
  // Of the queries of an item of the plan, if there would be fewer items than multiprocessors; only if fused.
  int pieces = 1;
};

struct alignas(8) RowStatistics {
  float offset;  // see offset_of in row_pair.cuh
  float c;       // do . out - dlse
};

constexpr int kWasteRows = 128;
constexpr int kMostOrdered = 0xffff;  // tiles of keys that a counter of arrivals can tell apart

// The workspace.
struct BackwardScratch {
  RowStatistics* rows;  // [G, T, H / G]: rows of a tile (tokens x heads of a group) are neighbours
  uint32_t* arrivals;   // fused: [T, G], at a tile's first token: how many tiles of keys have added to its sums
  float* dq;            // fused: [T, H, D], sums of ds k, and kWasteRows more that nobody reads
  float *dk, *dv;       // pieces > 1: [Tk, G, D], sums of ds^T q and p^T do
};
BackwardScratch scratch_of(const BackwardParams& params, const BackwardMethod& method);

// First: the rows' statistics; zeros in all sums, in dk and dv if some keys are unused, in dq of queries without
// keys.
void launch_backward_rows(const BackwardParams& params, const Device& device, const BackwardMethod& method);
// Then dk and dv over the backward items of the plan, and dq, if fused by way of scratch.dq, else over the forward
// items.
void launch_backward_d64_sm80(const BackwardParams& params, const Device& device, const Tiling& tiling);
void launch_backward_d128_sm80(const BackwardParams& params, const Device& device, const Tiling& tiling);
void launch_backward_d64_sm90(const BackwardParams& params, const Device& device, const Tiling& tiling,
                              const BackwardMethod& method);
void launch_backward_d128_sm90(const BackwardParams& params, const Device& device, const Tiling& tiling,
                               const BackwardMethod& method);
// Of these, dk, dv and dq where the sums are added in another way than kRed2.
void launch_backward_sums_d64_sm90(const BackwardParams& params, const Device& device, const BackwardMethod& method);
void launch_backward_sums_d128_sm90(const BackwardParams& params, const Device& device, const BackwardMethod& method);
// Last, if pieces > 1: dk and dv from the sums.
void launch_backward_finish(const BackwardParams& params, const Device& device, const BackwardMethod& method);

}  // namespace illada::attention
