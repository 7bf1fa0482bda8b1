// Consumer warpgroups of the keys kernel (backward_keys_sm90.cuh). Each computes dk and dv of 64 keys, and half of dq.
//
//   s^T, dp^T of the first step; p^T
//   for each step of all items:
//     ds^T from p^T and dp^T, also to shared memory
//     wait for the next step's rows and for the own turn
//     issue, in the own turn:
//       dq = ds k of the step before, whose ds the other warpgroup wrote long ago
//       dv += p^T do, dk += ds^T q of this step; in the gaps between them, dq is added to the sums
//       s^T, dp^T of the next step; pass the turn on
//     p^T of the next step; at the end of an item, store dk and dv
//
// A turn (a named barrier) issues a warpgroup's products of a step together. Exponentials, ds and the stores of dk and
// dv run during the other warpgroup's turn.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention/accumulator_rows.cuh"
#include "attention/backward_keys_shared_sm90.cuh"
#include "attention/dq_accumulation_add_sm90.cuh"
#include "attention/dq_accumulation_sm90.cuh"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm90.cuh"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"

namespace illada::attention {
namespace {

// Returns true if some row of a step is far from 0. Uniform in a warp.
template <int kRows>
__device__ __forceinline__ bool has_far_rows(const float (&offsets)[kRows], int lane) {
  bool far = false;
#pragma unroll
  for (int first = 0; first < kRows; first += 64) {
    const float2 two = *reinterpret_cast<const float2*>(&offsets[first + 2 * lane]);
    far = far || is_far(two.x) || is_far(two.y);
  }
  return __any_sync(kFullWarp, far);
}

// Converts s^T of 64 keys and the kRows rows of a step to p^T, relative to the rows' own sums. Columns of this lane:
// 8 j + lane % 4 * 2 + {0, 1}.
template <int kRows>
__device__ __forceinline__ void weigh(const KeysArguments& a, float (&s)[kRows / 2], const float (&offsets)[kRows],
                                      bool far, int lane) {
  exponentiate(s, a.scale, a.scale_log2, far, [&](int j) {
    const float2 two = *reinterpret_cast<const float2*>(&offsets[j / 4 * 8 + lane % 4 * 2]);
    return j % 2 ? two.y : two.x;
  });
}

// Computes p^T and ds^T in 16 bits, as operands, from p^T and dp^T in fp32.
template <typename T, int kRows>
__device__ __forceinline__ void differentiate(const float (&s)[kRows / 2], const float (&dp)[kRows / 2],
                                              const float (&c_of_rows)[kRows], uint32_t (&p)[kRows / 16][4],
                                              uint32_t (&ds)[kRows / 16][4], int lane) {
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    const float2 c = *reinterpret_cast<const float2*>(&c_of_rows[8 * j + lane % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = s[4 * j + 2 * i], y = s[4 * j + 2 * i + 1];
      p[j / 2][j % 2 * 2 + i] = pack2<T>(x, y);
      ds[j / 2][j % 2 * 2 + i] = pack2<T>(x * (dp[4 * j + 2 * i] - c.x), y * (dp[4 * j + 2 * i + 1] - c.y));
    }
  }
}

// Stores dk and dv of an item, for this lane's keys `key` and key + 8.
template <typename T, int kHeadDim, bool kFused>
__device__ __forceinline__ void write_keys(const KeysArguments& a, const WorkItem& item,
                                           const float (&dk)[kHeadDim / 2], const float (&dv)[kHeadDim / 2], int key,
                                           int lane) {
  const int64_t stride = int64_t(a.num_kv_heads) * kHeadDim;
  const int64_t offset = (item.k_start + key) * stride + item.kv_head * kHeadDim;
  const auto is_real = [&](int i) { return key + 8 * i < item.k_count; };
  if (kFused && a.query_splits > 1) {
#pragma unroll
    for (int i = 0; i < 2; ++i) add_row<kHeadDim>(a.dv_sums + offset + 8 * i * stride, dv, i, is_real(i), lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) add_row<kHeadDim>(a.dk_sums + offset + 8 * i * stride, dk, i, is_real(i), lane);
  } else {
    T* const to_dv = static_cast<T*>(a.dv) + offset;
    T* const to_dk = static_cast<T*>(a.dk) + offset;
#pragma unroll
    for (int i = 0; i < 2; ++i) store_row<T, kHeadDim>(to_dv + 8 * i * stride, dv, i, 1.0f, is_real(i), lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) store_row<T, kHeadDim>(to_dk + 8 * i * stride, dk, i, a.scale, is_real(i), lane);
  }
}

// Stores ds^T of 16 keys to shared memory, in blocks of 16 keys x 16 rows. Only the item's keys may contribute to dq:
// `keys` keys from this lane's first key on. Keys of other sequences become 0.
template <int kRows>
__device__ __forceinline__ void store_scores(uint32_t target, const uint32_t (&ds)[kRows / 16][4], int keys, int lane) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    const uint32_t mask[2] = {keys > 0 ? 0xffffffffu : 0, keys > 8 ? 0xffffffffu : 0};
    const uint32_t block = target + i / 4 * (kBackwardKeys * kRowBytes);
    store_matrices(block + uint32_t(((i % 4 * 2 + lane / 16) ^ lane % 8) * 16), ds[i][0] & mask[0], ds[i][1] & mask[1],
                   ds[i][2] & mask[0], ds[i][3] & mask[1]);
  }
}

// Computes all items of the CTA. Both consumer warpgroups call it.
template <typename T, int kHeadDim, DqAccumulation kAccumulation, bool kOrdered>
__device__ __forceinline__ void multiply_keys(const KeysArguments& a, KeysShared<kHeadDim>& shared,
                                              const CUtensorMap& dq_map) {
  using Shared = KeysShared<kHeadDim>;
  constexpr bool kFused = kAccumulation != DqAccumulation::kNone;
  constexpr int kRows = Shared::kRows, kStages = kRowStages<kAccumulation, Shared>;
  constexpr uint32_t kKeyBytes = sizeof(typename Shared::KeyTile), kTileBytes = sizeof(typename Shared::RowTile);
  constexpr uint32_t kScoreBytes = sizeof(typename Shared::ScoreTile), kScoreSlice = kBackwardKeys * kRowBytes;
  const int warpgroup = __shfl_sync(kFullWarp, int(threadIdx.x) / 128, 0), thread = int(threadIdx.x) % 128;
  const int own_turn = warpgroup, next_turn = 1 - warpgroup;
  const int lane = thread % 32, warp_row = thread / 32 * 16;  // warp_row: the warp's first row of its warpgroup's 64
  // Of dq, a warpgroup has 64 columns of the 64 rows (D 128), or all columns of its 64 of the 128 rows (D 64).
  const int half = warpgroup * (Shared::Tr::kHalvesColumnsOfDq ? 0 : 64);
  const int column = warpgroup * (Shared::Tr::kHalvesColumnsOfDq ? 64 : 0);
  // Lower words of the descriptors; the upper words are all equal.
  const uint32_t start = (ptx::smem_address(&shared) & 0x3ffff) / 16, rows_kind = 1 << 16;
  const auto columns_kind = [](uint32_t leading) { return leading / 16 << 16; };
  constexpr uint32_t kFirstKey = 64 * kRowBytes / 16;  // offset of the second warpgroup's first key
  const uint32_t k_rows = start + rows_kind + uint32_t(offsetof(Shared, k) / 16) + warpgroup * kFirstKey;
  const uint32_t v_rows = start + rows_kind + uint32_t(offsetof(Shared, v) / 16) + warpgroup * kFirstKey;
  const uint32_t q_rows = start + rows_kind + uint32_t(offsetof(Shared, q) / 16);
  const uint32_t dout_rows = start + rows_kind + uint32_t(offsetof(Shared, dout) / 16);
  const uint32_t q_columns = start + columns_kind(kRows * kRowBytes) + uint32_t(offsetof(Shared, q) / 16);
  const uint32_t dout_columns = start + columns_kind(kRows * kRowBytes) + uint32_t(offsetof(Shared, dout) / 16);
  const uint32_t ds_columns = start + uint32_t(offsetof(Shared, ds) / 16) + half / 64 * (kScoreSlice / 16);
  const uint32_t k_columns = start + uint32_t(offsetof(Shared, k) / 16) + column / 64 * (kScoreSlice / 16);
  const auto descriptor = [](uint32_t low) { return gmma_descriptor_k(0) >> 32 << 32 | low; };
  const uint32_t ds_target =
      ptx::smem_address(shared.ds) + uint32_t((warpgroup * 64 + warp_row + lane % 16) * kRowBytes);
  PipelineState<kStages> state;  // of the step whose s is next
  float dk[kHeadDim / 2], dv[kHeadDim / 2], s[kRows / 2], dp[kRows / 2], dq[32];
  uint32_t p[kRows / 16][4], ds[kRows / 16][4];
  int round = 0, step = 0;  // items and steps that were begun
  DqAdder<kAccumulation, kHeadDim> adder(a, dq_map, shared, half + warp_row, column);  // of dq of the step before

  const auto multiply_k = [&] {  // s = k q^T
    const uint64_t x = descriptor(k_rows + uint32_t((round - 1) % 2) * (kKeyBytes / 16));
    const uint64_t y = descriptor(q_rows + uint32_t(state.index()) * (kTileBytes / 16));
    multiply_rows<T, typename Shared::KeyTile, typename Shared::RowTile, kRows>(s, x, y);
    cute::warpgroup_commit_batch();
  };
  const auto multiply_v = [&](int stage, bool hand_over) {  // dp = v do^T
    // The compiler must not know that x is the same in every step. It would keep each address derived from x in a
    // register.
    const uint64_t x = descriptor(v_rows + uint32_t(stage) * uint32_t(a.waste_row < 0));
    const uint64_t y = descriptor(dout_rows + uint32_t(stage) * (kTileBytes / 16));
    multiply_rows<T, typename Shared::KeyTile, typename Shared::RowTile, kRows>(dp, x, y);
    if (hand_over) NamedBarrier::arrive(256, next_turn);
    cute::warpgroup_commit_batch();
  };
  const auto multiply_ds = [&](int number, int key_buffer) {  // dq = ds k of a step
    const uint64_t x = descriptor(ds_columns + uint32_t(number & 1) * (kScoreBytes / 16));
    const uint64_t y = descriptor(k_columns + uint32_t(key_buffer) * (kKeyBytes / 16));
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kBackwardKeys / 16; ++i)
      warpgroup_mma_ss<T, 64, GmmaMajor::MN, GmmaMajor::MN>(dq, x + i * kRowBytes, y + i * kRowBytes, i > 0);
    cute::warpgroup_commit_batch();
  };
  const auto open_item = [&] {
    shared.k_full[round % 2].wait(uint32_t(round / 2 % 2));
    const bool has_queries = __shfl_sync(kFullWarp, shared.item[round % 2].q_count, 0) > 0;
    ++round;
    return has_queries;
  };
  const auto share_ds = [&] {
    const int buffer = step % 2;
    // From this lane's first key to the item's end.
    const int keys = shared.item[(round - 1) % 2].k_count - (warpgroup * 64 + warp_row + lane / 4);
    shared.ds_empty[buffer].wait(uint32_t(step / 2 + buffer + 1) % 2);
    store_scores<kRows>(ds_target + buffer * kScoreBytes, ds, keys, lane);
    fence_view_async_shared();
    __syncwarp();
    shared.ds_full[buffer].arrive_if(lane == 0);
  };
  if (open_item()) {
    int stage = 0;                    // of the step whose ds is next
    bool fresh = true;                // is it the first step of its item,
    bool is_last = false;             // the last one?
    const auto wait_for_rows = [&] {  // called before a turn, so that the turn loses no time
      shared.q_full[state.index()].wait(state.phase());
      shared.dout_full[state.index()].wait(state.phase());
      shared.v_full.wait(uint32_t(round - 1) % 2);
    };
    const auto multiply_q = [&] {
      stage = state.index();
      cute::warpgroup_arrive();
      multiply_k();
    };
    const auto multiply_dout = [&](bool hand_over) {
      cute::warpgroup_arrive();
      multiply_v(stage, hand_over);
      ++state;
    };
    const auto finish_scores = [&] {
      // Reads the step's properties while its products run.
      const bool far = has_far_rows(shared.offset[stage], lane);
      const bool has_padding = __shfl_sync(kFullWarp, shared.step[stage].tokens, 0) * a.group < kRows;
      warpgroup_wait<1>(s);
      // Padding rows are zeros; with a key of -inf they would give NaN.
      if (has_padding) mask_scores(s, shared.step[stage].tokens * a.group);
      weigh(a, s, shared.offset[stage], far, lane);
      is_last = __shfl_sync(kFullWarp, int(shared.step[stage].is_last), 0) != 0;
      warpgroup_wait<0>(dp);
      shared.v_empty.arrive_if(thread == 0 && is_last);
    };
    if (kFused) adder.open_nowhere();
    if (warpgroup == 1) NamedBarrier::arrive(256, next_turn);
    // Issues dv and dk of the step whose ds is complete. It adds dq to the sums in the gaps between these products.
    const auto multiply_gradients = [&](bool accumulate, bool adds) {
      constexpr int kSteps = kRows / 16, kFirst = Shared::Tr::kStepsUntilDq;
      const uint64_t of_dv = descriptor(dout_columns + uint32_t(stage) * (kTileBytes / 16)),
                     of_dk = descriptor(q_columns + uint32_t(stage) * (kTileBytes / 16));
      cute::warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        if (i < kSteps) {
          warpgroup_mma_rs<T, kHeadDim>(dv, p[i % kSteps], of_dv + i % kSteps * kRowBytes, accumulate || i > 0);
        } else {
          warpgroup_mma_rs<T, kHeadDim>(dk, ds[i % kSteps], of_dk + i % kSteps * kRowBytes, accumulate || i > kSteps);
        }
        if (!kFused || !adds) continue;
        if (i == kFirst - 1) {
          cute::warpgroup_commit_batch();
          warpgroup_wait<1>(dq);
          shared.ds_empty[(step - 1) & 1].arrive_if(thread == 0);
        } else if (i >= kFirst) {
          // The additions are spread evenly over the gaps and stay there. Many additions at once delay the next
          // product.
          constexpr int kGaps = 2 * kSteps - kFirst;
          const auto parts_before = [&](int gap) { return (gap * adder.kParts + kGaps - 1) / kGaps; };
          const int first = parts_before(i - kFirst);
          __syncwarp();
          adder.add(dq, first, parts_before(i - kFirst + 1) - first);
          __syncwarp();
        }
      }
      cute::warpgroup_commit_batch();
    };
    wait_for_rows();
    multiply_q();
    multiply_dout(false);
    finish_scores();
    while (true) {
      // p^T is in s, in fp32, and dp^T in dp. No product is in flight.
      const int key_buffer = (round - 1) % 2, old_stage = stage;
      differentiate<T, kRows>(s, dp, shared.c[stage], p, ds, lane);
      if (kFused) share_ds();
      const bool ends_item = is_last, begins_item = fresh;
      if (ends_item && !open_item()) break;

      wait_for_rows();
      if (kFused) shared.ds_full[(step - 1) & 1].wait(uint32_t((step - 1) >> 1 & 1));
      if (kOrdered) shared.turn_full[warpgroup][state.index()].wait(state.phase());
      NamedBarrier::arrive_and_wait(256, own_turn);
      if (kFused) multiply_ds(step - 1, key_buffer ^ int(begins_item && step > 0));
      multiply_gradients(!begins_item, true);
      if (kFused) adder.open(shared.step[old_stage]);
      __syncwarp();
      shared.k_empty[key_buffer ^ 1].arrive_if(lane == 0 && begins_item && step > 0);
      if (kOrdered) shared.added[warpgroup][old_stage].arrive_if(lane == 0);
      multiply_q();
      warpgroup_wait<1>(dk, dv);
      ptx::wgmma_keep_operand(p, a.total_q < 0, ds_target);
      ptx::wgmma_keep_operand(ds, a.total_q < 0, ds_target);
      multiply_dout(true);
      if (kFused) adder.wait_for_previous();
      shared.rows_empty[old_stage].arrive_if(lane == 0);
      fresh = ends_item;
      finish_scores();
      if (ends_item)
        write_keys<T, kHeadDim, kFused>(a, shared.item[key_buffer], dk, dv, warpgroup * 64 + warp_row + lane / 4, lane);
      ++step;
    }
    if (warpgroup == 0) NamedBarrier::arrive_and_wait(256, own_turn);
    const int key_buffer = round % 2;
    multiply_gradients(!fresh, false);
    warpgroup_wait<0>(dk, dv);
    if (kFused) {
      shared.ds_full[(step - 1) & 1].wait(uint32_t((step - 1) >> 1 & 1));
      multiply_ds(step - 1, key_buffer ^ int(fresh && step > 0));
      warpgroup_wait<0>(dq);
      shared.ds_empty[(step - 1) & 1].arrive_if(thread == 0);
      if (kOrdered) shared.last_turns.wait(0);
      adder.add(dq, 0, adder.kParts);
      adder.open(shared.step[stage]);
      shared.ds_full[step & 1].wait(uint32_t(step >> 1 & 1));
      multiply_ds(step, key_buffer);
      warpgroup_wait<0>(dq);
      adder.add(dq, 0, adder.kParts);
      adder.wait_for_all();
      if (kOrdered) {
        __syncwarp();
        shared.all_added.arrive_if(lane == 0);
      }
    }
    write_keys<T, kHeadDim, kFused>(a, shared.item[key_buffer], dk, dv, warpgroup * 64 + warp_row + lane / 4, lane);
    if (kFused && !kOrdered) {  // not before write_keys, where it would cost registers in the loop
      __syncwarp();
      shared.all_added.arrive_if(lane == 0);
      convert_last_jobs<T, kHeadDim>(a, shared);
    }
  }
}

// Writes zero gradients of keys that no query attends to. All consumers call it. Where items have query splits, the
// last pass writes these gradients instead, from sums that are zeros.
template <int kHeadDim>
__device__ __forceinline__ void write_unseen_keys(const KeysArguments& a) {
  const int items = a.query_splits == 1 ? plan_header(a.plan).backward_items : 0;
  for (int index = items - 1 - int(blockIdx.x); index >= 0; index -= int(gridDim.x)) {  // they are the last ones
    const WorkItem item = backward_items(a.plan, a.first_item)[index];
    if (item.q_count > 0) break;
    constexpr int kWords = kHeadDim / 8;
    for (int i = int(threadIdx.x); i < item.k_count * kWords; i += 256) {
      const int64_t offset = int64_t(item.k_start + i / kWords) * a.num_kv_heads + item.kv_head;
      static_cast<uint4*>(a.dk)[offset * kWords + i % kWords] = make_uint4(0, 0, 0, 0);
      static_cast<uint4*>(a.dv)[offset * kWords + i % kWords] = make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace
}  // namespace illada::attention
