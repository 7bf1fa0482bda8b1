// Between launch.cpp, which validates and chooses, and the .cu files, which launch.
#pragma once

#include "attention/plan.h"
#include "common/device.h"

namespace illada::attention {

void launch_plan(const PlanParams& params, const Device& device, const Tiling& tiling);

// What each forward kernel works on at a time: blocks of query rows of a CTA, keys of a step.
constexpr int forward_blocks_sm80() { return 2; }
constexpr int forward_key_tile_sm80(int head_dim) { return head_dim == 128 ? 32 : 48; }
constexpr int forward_blocks_sm90(int head_dim) { return head_dim == 128 ? 2 : 3; }
constexpr int forward_key_tile_sm90(int head_dim) { return head_dim == 128 ? 128 : 96; }

// Walks over the forward items of the plan. One function per (arch, head dim), each in a file of its own.
void launch_forward_d64_sm80(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d128_sm80(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d64_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);
void launch_forward_d128_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling);

// Where tiling.may_split: merges the pieces that the forward left in the workspace into out and lse.
void launch_combine(const ForwardParams& params, const Device& device);

}  // namespace illada::attention
