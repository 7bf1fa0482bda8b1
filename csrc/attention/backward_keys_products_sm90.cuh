// Consumer warpgroups of the keys kernel (backward_keys_sm90.cuh, which draws their schedule). Each computes dk and dv
// of 64 keys, and half of dq.
//
//   s^T, dp^T of the first step; p^T
//   for each step n of all items:
//     ds^T of n from p^T and dp^T, also to shared memory
//     at the end of an item, wait for the next item and its keys
//     wait for the rows of step n + 1, for ds of step n - 1, in order for leave to add its dq, and for the own turn
//     issue, in the own turn:
//       dq = ds k of step n - 1, whose ds the other warpgroup wrote long ago
//       dv += p^T do, dk += ds^T q of step n; in the gaps between them, dq is added to the sums
//       s^T, dp^T of step n + 1; pass the turn on
//     p^T of step n + 1; at the end of an item, store dk and dv
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

// Lower words of the descriptors of the operands in shared memory, for buffer or stage 0. The upper words are all
// equal, so an operand takes one register instead of two.
template <int kHeadDim>
struct KeysOperands {
  using Shared = KeysShared<kHeadDim>;
  // Distances in units of descriptors, 16 bytes: between buffers of keys, stages of rows, and buffers of ds.
  static constexpr uint32_t kKeys = sizeof(typename Shared::KeyTile) / 16;
  static constexpr uint32_t kRows = sizeof(typename Shared::RowTile) / 16;
  static constexpr uint32_t kScores = sizeof(typename Shared::ScoreTile) / 16;

  const uint32_t k_rows, v_rows, q_rows, dout_rows;  // K-major: products over D
  const uint32_t q_columns, dout_columns;            // MN-major: products over the rows of a step
  const uint32_t ds_columns, k_columns;              // MN-major: products over keys

  // `first_row`, `first_column`: those of the warpgroup's half of dq.
  __device__ __forceinline__ KeysOperands(const Shared& shared, int warpgroup, int first_row, int first_column)
      : KeysOperands((ptx::smem_address(&shared) & 0x3ffff) / 16, warpgroup * kSecondKeys, first_row / 64 * kKeySlice,
                     first_column / 64 * kKeySlice) {}

  // Returns the whole descriptor of a lower word.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t low) { return gmma_descriptor_k(0) >> 32 << 32 | low; }

 private:
  static constexpr uint32_t kKMajor = 1 << 16, kMnMajor = Shared::kRows * kRowBytes / 16 << 16;  // leading offsets
  static constexpr uint32_t kSecondKeys = 64 * kRowBytes / 16;           // offset of the second warpgroup's first key
  static constexpr uint32_t kKeySlice = kBackwardKeys * kRowBytes / 16;  // offset of 64 columns in k, of 64 rows in ds

  __device__ __forceinline__ KeysOperands(uint32_t start, uint32_t key, uint32_t row_slice, uint32_t column_slice)
      : k_rows(start + kKMajor + uint32_t(offsetof(Shared, k) / 16) + key),
        v_rows(start + kKMajor + uint32_t(offsetof(Shared, v) / 16) + key),
        q_rows(start + kKMajor + uint32_t(offsetof(Shared, q) / 16)),
        dout_rows(start + kKMajor + uint32_t(offsetof(Shared, dout) / 16)),
        q_columns(start + kMnMajor + uint32_t(offsetof(Shared, q) / 16)),
        dout_columns(start + kMnMajor + uint32_t(offsetof(Shared, dout) / 16)),
        ds_columns(start + uint32_t(offsetof(Shared, ds) / 16) + row_slice),
        k_columns(start + uint32_t(offsetof(Shared, k) / 16) + column_slice) {}
};

// Operands and results of the products of a consumer warpgroup, in registers.
//
// They are apart from KeysConsumer, which refers to them: in one object with its other state, the compiler would keep
// that state in memory until it has unrolled the loops over these arrays, and then schedule the main loop worse.
template <int kHeadDim>
struct KeysRegisters {
  static constexpr int kRows = KeysShared<kHeadDim>::kRows;
  // Of 232 registers, dk and dv take 128 at D 128. Beside them, only two of s, dp, dq, p and ds are alive at a time.
  float dk[kHeadDim / 2], dv[kHeadDim / 2], s[kRows / 2], dp[kRows / 2], dq[32];
  uint32_t p[kRows / 16][4], ds[kRows / 16][4];  // 16 bits, operands
};

// A consumer warpgroup. All its threads call run().
template <typename T, int kHeadDim, DqAccumulation kAccumulation, bool kOrdered>
class KeysConsumer {
  using Shared = KeysShared<kHeadDim>;
  using KeyTile = typename Shared::KeyTile;
  using RowTile = typename Shared::RowTile;
  using Operands = KeysOperands<kHeadDim>;
  static constexpr bool kFused = kAccumulation != DqAccumulation::kNone;
  static constexpr int kRows = Shared::kRows, kStages = kRowStages<kAccumulation, Shared>;

  // What a turn needs of its step after the next item was opened.
  struct Step {
    int stage;       // stage of its rows
    int key_buffer;  // buffer of its item and keys
    bool begins_item, ends_item;
  };

 public:
  __device__ __forceinline__ KeysConsumer(const KeysArguments& arguments, Shared& memory, const CUtensorMap& dq_map,
                                          KeysRegisters<kHeadDim>& r)
      : a(arguments),
        shared(memory),
        warpgroup(__shfl_sync(kFullWarp, int(threadIdx.x) / 128, 0)),
        thread(int(threadIdx.x) % 128),
        lane(thread % 32),
        warp_row(thread / 32 * 16),
        // A warpgroup's half of dq: 64 columns of the 64 rows (D 128), or all columns of 64 of the 128 rows (D 64).
        dq_row(warpgroup * (Shared::Tr::kHalvesColumnsOfDq ? 0 : 64)),
        dq_column(warpgroup * (Shared::Tr::kHalvesColumnsOfDq ? 64 : 0)),
        at(memory, warpgroup, dq_row, dq_column),
        own_key(warpgroup * 64 + warp_row + lane / 4),
        ds_target(ptx::smem_address(shared.ds) + uint32_t((warpgroup * 64 + warp_row + lane % 16) * kRowBytes)),
        dk(r.dk),
        dv(r.dv),
        s(r.s),
        dp(r.dp),
        dq(r.dq),
        p(r.p),
        ds(r.ds),
        adder(a, dq_map, shared, dq_row + warp_row, dq_column) {}

  // Computes all items of the CTA.
  __device__ __forceinline__ void run() {
    if (!open_item()) return;
    if (kFused) adder.open_nowhere();
    if (warpgroup == 1) pass_turn();  // the first turn is warpgroup 0's
    wait_for_rows();
    issue_s();
    issue_dp(false);
    finish_scores();
    while (true) {
      // p^T of step n is in s, in fp32, and its dp^T in dp. No product is in flight.
      const Step now = {stage, (round - 1) % 2, is_first, is_last};
      differentiate<T, kRows>(s, dp, shared.c[stage], p, ds, lane);
      if (kFused) share_ds();
      if (now.ends_item && !open_item()) break;

      wait_for_turn();
      if (kFused) issue_dq(step - 1, keys_before(now));
      issue_dv_dk(!now.begins_item, kFused);
      leave_step_before(now);
      issue_s();
      warpgroup_wait<1>(dk, dv);
      ptx::wgmma_keep_operand(p, a.total_q < 0, ds_target);
      ptx::wgmma_keep_operand(ds, a.total_q < 0, ds_target);
      issue_dp(true);
      leave_rows(now);

      is_first = now.ends_item;
      finish_scores();
      if (now.ends_item) write_keys(now.key_buffer);
      ++step;
    }
    finish();
  }

 private:
  // ------------------------------------------------------------------------------------------------------------ waits

  // Waits for the next item and its keys. Returns false if there is none.
  __device__ __forceinline__ bool open_item() {
    shared.k_full[round % 2].wait(uint32_t(round / 2 % 2));
    const bool has_queries = __shfl_sync(kFullWarp, shared.item[round % 2].q_count, 0) > 0;
    ++round;
    return has_queries;
  }

  // Waits for all that the scores of the next step read. Called before a turn, so that the turn loses no time.
  __device__ __forceinline__ void wait_for_rows() {
    shared.q_full[state.index()].wait(state.phase());
    shared.dout_full[state.index()].wait(state.phase());
    shared.v_full.wait(uint32_t(round - 1) % 2);
  }

  // Waits for the own turn, and before that for all that its products read and for leave to add dq of step n - 1. For
  // step -1 it does not wait for ds: ds is arbitrary there, and its dq goes to rows that are never read (open_nowhere).
  __device__ __forceinline__ void wait_for_turn() {
    wait_for_rows();
    if (kFused) wait_for_ds(step - 1);
    if (kOrdered) shared.turn_full[warpgroup][state.index()].wait(state.phase());
    NamedBarrier::arrive_and_wait(256, warpgroup);
  }
  __device__ __forceinline__ void pass_turn() { NamedBarrier::arrive(256, 1 - warpgroup); }

  // Waits until both warpgroups have written ds of a step.
  __device__ __forceinline__ void wait_for_ds(int number) {
    shared.ds_full[number & 1].wait(uint32_t(number >> 1 & 1));
  }

  // --------------------------------------------------------------------------------------------------------- products

  // Issues s^T = k q^T of the next step.
  __device__ __forceinline__ void issue_s() {
    stage = state.index();
    cute::warpgroup_arrive();
    const uint64_t x = Operands::descriptor(at.k_rows + uint32_t((round - 1) % 2) * Operands::kKeys);
    const uint64_t y = Operands::descriptor(at.q_rows + uint32_t(stage) * Operands::kRows);
    multiply_rows<T, KeyTile, RowTile, kRows>(s, x, y);
    cute::warpgroup_commit_batch();
  }

  // Issues dp^T = v do^T of the same step. It ends a turn.
  __device__ __forceinline__ void issue_dp(bool passes_turn) {
    cute::warpgroup_arrive();
    // The compiler must not know that x is the same in every step. It would keep each address derived from x in a
    // register.
    const uint64_t x = Operands::descriptor(at.v_rows + uint32_t(stage) * uint32_t(a.waste_row < 0));
    const uint64_t y = Operands::descriptor(at.dout_rows + uint32_t(stage) * Operands::kRows);
    multiply_rows<T, KeyTile, RowTile, kRows>(dp, x, y);
    if (passes_turn) pass_turn();
    cute::warpgroup_commit_batch();
    ++state;
  }

  // Issues dq = ds k of step `number`, over all 128 keys.
  __device__ __forceinline__ void issue_dq(int number, int key_buffer) {
    const uint64_t x = Operands::descriptor(at.ds_columns + uint32_t(number & 1) * Operands::kScores);
    const uint64_t y = Operands::descriptor(at.k_columns + uint32_t(key_buffer) * Operands::kKeys);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kBackwardKeys / 16; ++i)
      warpgroup_mma_ss<T, 64, GmmaMajor::MN, GmmaMajor::MN>(dq, x + i * kRowBytes, y + i * kRowBytes, i > 0);
    cute::warpgroup_commit_batch();
  }

  // Issues dv += p^T do and dk += ds^T q of the step in `stage`. With `adds`, it adds the dq issued before to the sums,
  // in the gaps between these products.
  __device__ __forceinline__ void issue_dv_dk(bool accumulate, bool adds) {
    constexpr int kSteps = kRows / 16;
    const uint64_t of_dv = Operands::descriptor(at.dout_columns + uint32_t(stage) * Operands::kRows),
                   of_dk = Operands::descriptor(at.q_columns + uint32_t(stage) * Operands::kRows);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      if (i < kSteps) {
        warpgroup_mma_rs<T, kHeadDim>(dv, p[i % kSteps], of_dv + i % kSteps * kRowBytes, accumulate || i > 0);
      } else {
        warpgroup_mma_rs<T, kHeadDim>(dk, ds[i % kSteps], of_dk + i % kSteps * kRowBytes, accumulate || i > kSteps);
      }
      if (adds) add_dq_after(i);
    }
    cute::warpgroup_commit_batch();
  }

  // Adds a part of dq behind product i of dv and dk. The first products give dq time to complete.
  __device__ __forceinline__ void add_dq_after(int i) {
    constexpr int kFirst = Shared::Tr::kStepsUntilDq, kGaps = 2 * (kRows / 16) - kFirst;
    if (i < kFirst - 1) return;
    if (i == kFirst - 1) {
      cute::warpgroup_commit_batch();
      warpgroup_wait<1>(dq);
      shared.ds_empty[(step - 1) & 1].arrive_if(thread == 0);
      return;
    }
    // The additions are spread evenly over the gaps and stay there. Many additions at once delay the next product.
    const auto parts_before = [&](int gap) { return (gap * adder.kParts + kGaps - 1) / kGaps; };
    const int first = parts_before(i - kFirst);
    __syncwarp();
    adder.add(dq, first, parts_before(i - kFirst + 1) - first);
    __syncwarp();
  }

  // ------------------------------------------------------------------------------------------------ releases, scores

  // Buffer of the keys of the step before: the other one, where that step belongs to the item before.
  __device__ __forceinline__ int keys_before(const Step& now) const {
    return now.key_buffer ^ int(now.begins_item && step > 0);
  }

  // Called once dq of the step before is complete and added: frees its item's keys, if it was the item's last step, and
  // makes this step the next whose dq is added.
  __device__ __forceinline__ void leave_step_before(const Step& now) {
    if (kFused) adder.open(shared.step[now.stage]);
    __syncwarp();
    Barrier& k_empty = shared.k_empty[now.key_buffer ^ 1];
    k_empty.arrive_if(lane == 0 && now.begins_item && step > 0);
    if (kOrdered) shared.added[warpgroup][now.stage].arrive_if(lane == 0);
  }

  // Frees the rows of a step, once its dv and dk are complete.
  __device__ __forceinline__ void leave_rows(const Step& now) {
    if (kFused) adder.wait_for_previous();
    shared.rows_empty[now.stage].arrive_if(lane == 0);
  }

  // Turns s^T into p^T while dp^T is in flight, then waits for dp^T.
  __device__ __forceinline__ void finish_scores() {
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
  }

  // Copies ds^T of this step to shared memory, for dq in the next turn of each warpgroup.
  __device__ __forceinline__ void share_ds() {
    const int buffer = step % 2;
    // From this lane's first key to the item's end.
    const int keys = shared.item[(round - 1) % 2].k_count - own_key;
    shared.ds_empty[buffer].wait(uint32_t(step / 2 + buffer + 1) % 2);
    store_scores<kRows>(ds_target + buffer * uint32_t(sizeof(typename Shared::ScoreTile)), ds, keys, lane);
    fence_view_async_shared();
    __syncwarp();
    shared.ds_full[buffer].arrive_if(lane == 0);
  }

  // ---------------------------------------------------------------------------------------------------------- epilogue

  // Completes the CTA's last step, which has no turn: its dv and dk, and dq of the last two steps.
  __device__ __forceinline__ void finish() {
    if (warpgroup == 0) NamedBarrier::arrive_and_wait(256, warpgroup);  // takes the turn that warpgroup 1 passed last
    const int key_buffer = round % 2;
    issue_dv_dk(!is_first, false);
    warpgroup_wait<0>(dk, dv);
    if (kFused) {
      wait_for_ds(step - 1);
      issue_dq(step - 1, key_buffer ^ int(is_first && step > 0));
      warpgroup_wait<0>(dq);
      shared.ds_empty[(step - 1) & 1].arrive_if(thread == 0);
      if (kOrdered) shared.last_turns.wait(0);
      adder.add(dq, 0, adder.kParts);
      adder.open(shared.step[stage]);
      wait_for_ds(step);
      issue_dq(step, key_buffer);
      warpgroup_wait<0>(dq);
      adder.add(dq, 0, adder.kParts);
      adder.wait_for_all();
      if (kOrdered) report_all_added();
    }
    write_keys(key_buffer);
    if (kFused && !kOrdered) {  // not before write_keys, where it would cost registers in the loop
      report_all_added();
      convert_last_jobs<T, kHeadDim>(a, shared);
    }
  }
  __device__ __forceinline__ void report_all_added() {
    __syncwarp();
    shared.all_added.arrive_if(lane == 0);
  }

  // Stores dk and dv of the item in `key_buffer`. With query splits, adds them to sums instead.
  __device__ __forceinline__ void write_keys(int key_buffer) {
    const WorkItem& item = shared.item[key_buffer];
    const int key = own_key;
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

  // ------------------------------------------------------------------------------------------------------------- state

  const KeysArguments& a;
  Shared& shared;
  const int warpgroup;
  int thread, lane;
  const int warp_row;           // first of the warp's 16 keys in its warpgroup's 64, and of its rows of dq
  const int dq_row, dq_column;  // first row and column of the warpgroup's half of dq
  const Operands at;
  int own_key;         // the lane's first key of the item; its second one is 8 further
  uint32_t ds_target;  // address of the lane's row of ds, for store_scores

  PipelineState<kStages> state;  // stage of step n + 1
  float (&dk)[kHeadDim / 2], (&dv)[kHeadDim / 2], (&s)[kRows / 2], (&dp)[kRows / 2], (&dq)[32];
  uint32_t (&p)[kRows / 16][4], (&ds)[kRows / 16][4];
  int round = 0;                           // items opened
  int step = 0;                            // number of the step n
  DqAdder<kAccumulation, kHeadDim> adder;  // adds dq of step n - 1
  int stage = 0;                           // stage of step n, until issue_s: then that of step n + 1
  bool is_first = true, is_last = false;   // is it the first, the last step of its item?
};

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
