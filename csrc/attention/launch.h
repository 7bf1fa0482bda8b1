// Interface between launch.cpp, which validates the params and chooses a kernel, and the .cu files, which launch it.
#pragma once

#include "attention/plan.h"
#include "common/device.h"

namespace illada::attention {

// Launches the kernel that writes the plan.
void launch_plan(const PlanParams& params, const Device& device, const Tiling& tiling);

// Launch the forward, which walks over the forward items of the plan. Each is instantiated in files of its own, for the
// head dims of Traits and, on sm_90a, for the tiles.
template <int kHeadDim>
void launch_forward_sm80(const ForwardParams& params, const Device& device, const Tiling& tiling);
template <int kHeadDim, int kKeys, int kValueStages>
void launch_forward_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);

// Merges the key splits that the forward left in the workspace into out and lse. Called where tiling.may_split.
void launch_combine(const ForwardParams& params, const Device& device);

// ---------------------------------------------------------------------------------------------------------- backward

// Instructions with which the CTAs of all key tiles sum dq in fp32 (dq_accumulation_add_sm90.cuh). Kept: with a hint to
// keep the sums in L2.
enum class DqAccumulation { kNone, kRed2, kRed2Kept, kRed4, kRed4Kept, kBulk };

// Method of a backward, chosen from the pack's sizes and the variants in common/variants.h.
struct BackwardMethod {
  // True: the CTAs of all key tiles sum dq in fp32 (5 products). False: a separate kernel computes dq in a fixed order
  // (7 products).
  bool fused = false;
  DqAccumulation accumulation = DqAccumulation::kNone;  // kNone unless fused
  bool staggered = false;                               // true: key tiles begin at different rows
  int report_every = 1;                                 // steps between two reports of sums: 1, 2 or 4
  // Only if fused. True: every run gives the same bits. Key tiles then add to dq in their order, and dk and dv are sums
  // of at most two query splits.
  bool ordered = false;
  // Query splits: number of CTAs that share one key tile's queries (more than 1 when there are fewer items than SMs);
  // only if fused.
  int query_splits = 1;
};

// Statistics of a query and head that the backward needs.
struct alignas(8) RowStatistics {
  float offset;  // form of lse, see offset_of in probabilities.cuh
  float c;       // do . out - dlse
};

constexpr int kWasteRows = 128;      // rows of sums that are written and never read
constexpr int kMaxOrdered = 0xffff;  // most key tiles that a counter of arrivals can distinguish

// Layout of the workspace.
struct BackwardScratch {
  RowStatistics* rows;  // [G, T, H / G]; rows of a tile (tokens x heads of a group) are neighbours
  uint32_t* arrivals;   // fused: [T, G], at a tile's first token: number of key tiles that have added to its sums;
                        // ordered: 16 bits of it for each warpgroup's half of dq
  float* dq;            // fused: [T, H, D], sums of ds k, then kWasteRows rows that are never read
  float *dk, *dv;       // query_splits > 1: [Tk, G, D], sums of ds^T q and p^T do
};
BackwardScratch scratch_of(const BackwardParams& params, const BackwardMethod& method);

// First launch: computes the rows' statistics. It writes zeros to all sums and counters, to dk and dv if some keys
// are unused, and, if fused, to dq of queries without keys.
void launch_backward_preprocess(const BackwardParams& params, const Device& device, const BackwardMethod& method);
// Second launch: computes dk and dv over the backward items of the plan, and dq. If fused, dq goes through scratch.dq;
// otherwise it is computed over the forward items.
template <int kHeadDim>
void launch_backward_sm80(const BackwardParams& params, const Device& device, const Tiling& tiling);
template <int kHeadDim>
void launch_backward_sm90(const BackwardParams& params, const Device& device, const Tiling& tiling,
                          const BackwardMethod& method);
// Second launch for sums that are added in another way than kRed2: computes dk, dv and dq.
template <int kHeadDim>
void launch_backward_sums_sm90(const BackwardParams& params, const Device& device, const BackwardMethod& method);
// Last launch, if query_splits > 1: converts the sums to dk and dv.
void launch_backward_finish(const BackwardParams& params, const Device& device, const BackwardMethod& method);

}  // namespace illada::attention
