// Where dq is summed, in which order, and why it cannot deadlock. This is the one place that proves it.
//
// dq of a row is a sum over all key tiles of its sequence. Where the keys kernel (backward_keys_sm90.cuh) computes dq,
// its CTAs add to fp32 sums in L2. Otherwise (DqAccumulation::kNone) the queries kernel sums dq in registers.
// This file counts what was added, and converts. The consumers add, by DqAdder (dq_accumulation_add_sm90.cuh). The
// first pass (backward_preprocess.cu) writes zeros to the sums and the counters. Warp numbers count the producers.
//
// A row of dq is complete when all key tiles of the sequence have added to it. There are two modes.
//
// Any order. No CTA waits for another CTA.
//   1. Each CTA reports its own additions in a counter in global memory, once they are done and after a fence. Warp 1
//      reports, because it sees steps end.
//   2. The CTA that reports last converts the sums to dq. Warps 2 and 3 convert; at the end, the consumers convert
//      what the CTA's last reports complete.
//
// Ordered (deterministic=True), so that every run gives the same bits. To the same rows, tile k of a sequence's keys
// adds after tiles 0 .. k-1, once the counter has reached k.
//   1. Each warpgroup has its own half of dq and of the counters, because one has its turn half a step after the other.
//   2. Thread 0 of the producers waits for the counter and arrives on turn_full.
//      turn_full of step n means that dq of step n-2 may be added.
//      A warpgroup waits for it before its turn of step n-1 and adds that dq in this turn.
//   3. Warp 1 reports each half of a step once it is added.
//   4. The last tile always adds last and would convert everything.
//      Warps 2 and 3 therefore wait for the sums that their own CTA must convert, and convert those.
// If items have query splits, each split has its own rows of dq. dk and dv are sums of at most two splits, for which
// the order does not matter.
//
// No wait inside a CTA can deadlock, in both modes. Each wait is for something earlier in one order of steps:
//   - A turn of step n needs the rows of step n+1. Their stage is free after both turns of step n-2 (with bulk, of
//     step n-1).
//   - Thread 0 loads keys before the rows of their item, into the buffer of two items before. The last product that
//     reads this buffer is dq, in the turn of the first step of the item between.
//     That turn needs rows of the second step. An item has two steps or more, so these rows are loaded before.
//     With one step, the rows would come after the keys that wait for this turn.
//   - Values wait for dp of the last step of the item before. It is issued in the turn of the step before that one.
//   - Warpgroup 0 has its turn of step n first, then warpgroup 1, then warpgroup 0 that of step n+1.
//   - The turn of step n multiplies ds of step n-1. Both warpgroups write it before their own turns of step n-1.
//     They write it when both have multiplied ds of step n-3, in their turns of step n-2.
//   - In any order, warp 1 waits for a free slot of a job. Warps 2 and 3 free it, and a conversion waits for nobody.
//   - At the end, warp 1 waits for all additions, and then the consumers wait for warp 1. The additions do not.
//   - In ordered mode, warp 1 also waits for additions (`added`), and a turn waits for turn_full: see below.
//
// No wait between CTAs can deadlock, in ordered mode:
//   - A CTA that waits to add waits only for items before its own, in the order of `next_keys`.
//     The proof is by induction: assume that all items before item i are eventually added and reported.
//   - A CTA takes its items in this order, so it reaches item i.
//   - Its work for the steps up to n-3, reports included, needs nothing that thread 0 does after it began to wait
//     for dq of step n-2. By then, the loads of the rows of step n-1 and of the keys of their item are in flight.
//     The turn of step n-2 adds dq of step n-3. It needs no more than these loads and turn_full of step n-1.
//   - Warp 1 waits for additions (`added`) in their order, and reports each before it waits for the next. It must not
//     wait for a counter. It reports an item's last steps in the middle of the next item, and that item may be behind
//     other items that wait for these very steps.
//   - So the steps of item i get their turns, which depend only on items before i. They are added and reported.
//   - The CTA's last two steps are reported together. They are of one item, so the argument is the same.
//   - All CTAs of the grid must run from the beginning: the launch is cooperative.
//   - Warps 2 and 3 wait for items behind their own, but no other thread waits for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cute/arch/copy_sm80.hpp>
#include <type_traits>

#include "attention/backward_keys_shared_sm90.cuh"
#include "attention/dq_accumulation_add_sm90.cuh"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

// See kUnaddedSteps; equal for all methods of adding.
constexpr int kUnadded = 4;
// Number of its own steps that a CTA holds back, and the first lane that keeps one. Of the `tiles` CTAs that add to the
// same sums, each owns every `tiles`-th step and delays the report of its own steps. It is then the last one to report
// them, and so gets its share of the conversions even where other CTAs are slower. Otherwise a slow CTA would convert
// everything and become even slower.
constexpr int kHeldBack = 4, kFirstHeld = 8;
// Most steps between two reports. Reports happen every 1, 2 or 4 steps; until then, due steps wait.
constexpr int kMaxDue = 4;

// Waits until `count` tiles have added to warpgroup kHalf's half of the sums of a counter. In ordered mode, a counter
// has 16 bits for each warpgroup.
template <int kHalf, int kNanoseconds>
__device__ __forceinline__ void wait_for_tiles(const uint32_t* arrivals, uint32_t count) {
  while ((ptx::load_acquire(arrivals) >> 16 * kHalf & 0xffff) < count) __nanosleep(kNanoseconds);
}

// ----------------------------------------------------------------------------------- statistics and reports, by warp 1

// Loads the statistics of the rows, with cp.async. This warp sees steps end, so it also reports what they have added to
// dq.
template <int kHeadDim, DqAccumulation kAccumulation, bool kOrdered>
__device__ __forceinline__ void load_statistics(const KeysArguments& a, KeysShared<kHeadDim>& shared) {
  using Shared = KeysShared<kHeadDim>;
  constexpr bool kFused = kAccumulation != DqAccumulation::kNone;
  constexpr int kRows = Shared::kRows, kJobs = Shared::kJobs, kStages = kRowStages<kAccumulation, Shared>;
  constexpr int kFirstDue = kFirstHeld + kHeldBack;  // first lane whose held-back step is due
  static_assert(kUnadded == kUnaddedSteps<kAccumulation, Shared>);
  static_assert(kUnadded + kMaxDue <= kFirstHeld && kFirstDue + kMaxDue <= 32);
  static_assert(sizeof(SumsJob) * (32 + 1) <= sizeof(Shared::offset));  // last_jobs
  auto state = producer_start<kStages>();
  const int lane = int(threadIdx.x) % 32;
  // Steps whose sums this CTA has not yet reported, one per lane. The lanes from 0 on have the latest steps, lane 0 the
  // very latest. The lanes from kFirstHeld on have the steps held back. Steps are due from lanes kUnadded and kFirstDue
  // on. place: index of their counter; rows: number of rows, negative if they are this CTA's own; tiles: number of key
  // tiles that add to them.
  int32_t place = 0, rows = 0, tiles = 0;
  int jobs = 0, unreported = 0;         // unreported: steps since the last reports
  const auto is_due = [&](int first) {  // `first`: first lane of the held-back steps that are due
    return lane < kFirstHeld ? lane >= kUnadded && lane < kUnadded + unreported && rows > 0 : lane >= first && rows < 0;
  };
  const auto report = [&](bool reports) {  // lanes that pass true report; true if theirs is the last report
    return reports && ptx::atomic_increment_acq_rel(a.arrivals + place) + 1 == uint32_t(tiles);
  };
  const auto own_job = [&] { return SumsJob{place * a.group, abs(rows)}; };
  const auto push_job = [&](int number, const SumsJob& job) {
    const int slot = number % kJobs;
    shared.job_empty[slot].wait(uint32_t(number / kJobs % 2 ^ 1));
    shared.job[slot] = job;
    shared.job_full[slot].arrive();
  };
  const auto count_step = [&](int32_t its_place, int32_t its_rows, int32_t its_tiles) {
    if (kOrdered) {  // ordered mode holds nothing back
      const int32_t old_place = __shfl_sync(kFullWarp, place, lane - 1);
      const int32_t old_rows = __shfl_sync(kFullWarp, rows, lane - 1);
      place = lane ? old_place : its_place;
      rows = lane ? old_rows : its_rows;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shared.added[i][state.index()].wait(state.phase());
        if (lane == kUnadded && rows) ptx::red_add_release(a.arrivals + place, 1u << 16 * i);
      }
      return;
    }
    const bool holds = __shfl_sync(kFullWarp, rows, kUnadded - 1) < 0;
    const auto move = [&](int32_t& value, int32_t first) {
      const int32_t moved = __shfl_sync(kFullWarp, value, lane == kFirstHeld ? kUnadded - 1 : lane - 1);
      if (holds || lane < kFirstHeld) value = lane ? moved : first;
    };
    move(place, its_place);
    move(rows, its_rows);
    move(tiles, its_tiles);
    if (++unreported < a.report_every) return;
    uint32_t complete = __ballot_sync(kFullWarp, report(is_due(kFirstDue)));
    __syncwarp();  // what a lane acquired by its report, lane 0 passes on with the job
    for (; complete; complete &= complete - 1, ++jobs) {
      const int from = __ffs(int(complete)) - 1;
      const int32_t its_first = __shfl_sync(kFullWarp, place, from), its_count = __shfl_sync(kFullWarp, rows, from);
      if (lane == 0) push_job(jobs, {its_first * a.group, abs(its_count)});
      __syncwarp();
    }
    if (lane >= kFirstDue) rows = 0;
    unreported = 0;
  };
  const int tile_rows = a.tile_tokens * a.group;
  for (int round = 0;; ++round) {
    __syncwarp();
    shared.counted_item = next_keys<kOrdered>(a, round);
    const WorkItem& item = shared.counted_item;  // read again for each step: registers are few
    __syncwarp();
    if (item.k_count == 0) break;
    KeysSteps steps(a, item, !kOrdered && a.staggered);
    int until_own = item.split - steps.tile % item.splits;  // steps until the next own step
    if (until_own < 0) until_own += item.splits;
    while (steps.left > 0) {
      const int first_row = steps.tile * tile_rows;
      const int rows_here = max(min(item.q_count * a.group - first_row, tile_rows), 0);
      const int32_t its_place = (item.q_start + steps.tile * a.tile_tokens) * a.num_kv_heads + item.kv_head;
      if (kOrdered) count_step(its_place, rows_here, 0);
      // Places in the sums of dq fit in 32 bits, and so do those of rows.
      using Index = std::conditional_t<kFused, int32_t, int64_t>;
      const RowStatistics* const source =
          a.rows + (Index(item.kv_head) * a.total_q + item.q_start) * a.group + first_row + lane;
      shared.rows_empty[state.index()].wait(state.phase());
#pragma unroll
      for (int block = 0; block < kRows / 32; ++block) {
        const int row = 32 * block + lane;
        const bool valid = row < rows_here;
        const RowStatistics* const from = valid ? source + 32 * block : a.rows;
        using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>;
        Copy::copy(from->offset, shared.offset[state.index()][row], valid);
        Copy::copy(from->c, shared.c[state.index()][row], valid);
      }
      shared.q_full[state.index()].arrive_after_cp_async();
      ++state;
      if (kFused && !kOrdered) count_step(its_place, until_own ? rows_here : -rows_here, item.splits);
      steps.advance();
      until_own = (steps.tile == 0 ? item.split + 1 : until_own ? until_own : item.splits) - 1;
    }
  }
  if (kOrdered) {  // reports the last four steps, the last two of them at once
    for (int i = 0; i < 2; ++i, ++state) count_step(0, 0, 0);
    if (__any_sync(kFullWarp, lane < kUnadded && rows)) shared.all_added.wait(0);
    if (lane < kUnadded && rows) ptx::red_add_release(a.arrivals + place, 1u + (1u << 16));
  }
  if (kFused && !kOrdered && lane < 2) push_job(jobs + lane, {});
  if (kFused && !kOrdered && __shfl_sync(kFullWarp, tiles, 0) > 0) {  // there was a step
    // Reports all that is left at once. The consumers convert it: they have no other work and many registers.
    shared.all_added.wait(0);
    const bool complete = report(lane < kUnadded ? rows != 0 : is_due(kFirstHeld));
    const uint32_t all = __ballot_sync(kFullWarp, complete);
    if (complete) shared.last_jobs()[__popc(all & ((1u << lane) - 1))] = own_job();
    if (lane == 0) shared.last_jobs()[__popc(all)] = {};
    shared.last_jobs_full.arrive();
  }
}

// --------------------------------------------------------------------------------------------------------- conversions

// Converts complete sums to dq, as warp `part` of `parts`, kUnroll loads at a time.
template <typename T, int kHeadDim, int kUnroll>
__device__ __forceinline__ void write_queries(const KeysArguments& a, const SumsJob& job, int part, int parts) {
  constexpr int kLanes = kHeadDim / 4, kRows = 32 / kLanes;  // lanes per row; rows per load
  const int lane = int(threadIdx.x) % 32, start = job.first * kHeadDim + lane % kLanes * 4;
  const auto offset = [&](int row) {  // offset in dq and its sums
    return start + int(row * a.group_reciprocal >> 16) * a.skipped + row * kHeadDim;
  };
#pragma unroll 1
  for (int row = part * kRows + lane / kLanes; row < job.rows; row += kUnroll * parts * kRows) {
    // The producers' registers hold four loads and little else, so the following code is kept in this order.
    float4 x[kUnroll];
    uint2 words[kUnroll];
    ptx::hide_value(row);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      x[i] = ptx::load_relaxed_v4(a.dq_sums + offset(min(row + i * parts * kRows, job.rows - 1)));
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      words[i] = make_uint2(pack2<T>(x[i].x * a.scale, x[i].y * a.scale), pack2<T>(x[i].z * a.scale, x[i].w * a.scale));
      ptx::hide_value(words[i].x), ptx::hide_value(words[i].y), ptx::hide_value(row);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (row + i * parts * kRows < job.rows)
        *reinterpret_cast<uint2*>(static_cast<T*>(a.dq) + offset(row + i * parts * kRows)) = words[i];
  }
}

// Converts the sums of jobs, in the mode of any order. Warps 2 and 3 call it; each takes every other job.
template <typename T, int kHeadDim>
__device__ __forceinline__ void convert_jobs(const KeysArguments& a, const KeysShared<kHeadDim>& shared, int warp) {
  constexpr int kJobs = KeysShared<kHeadDim>::kJobs;
  const int lane = int(threadIdx.x) % 32;
  for (int number = warp - 2;; number += 2) {
    const int slot = number % kJobs;
    shared.job_full[slot].wait(uint32_t(number / kJobs % 2));
    const SumsJob job = shared.job[slot];
    __syncwarp();
    shared.job_empty[slot].arrive_if(lane == 0);
    if (job.rows == 0) break;
    write_queries<T, kHeadDim, 4>(a, job, 0, 1);
  }
}

// Converts the CTA's own sums, in ordered mode. Warps 2 and 3 call it; each takes every other block.
template <typename T, int kHeadDim>
__device__ __forceinline__ void convert_own_sums(const KeysArguments& a, int warp) {
  int number = warp;
  for (int round = 0, block = 0;; ++block) {
    const WorkItem item = next_keys<true>(a, round);  // computed again each time: there are no registers to keep it
    if (item.k_count == 0) break;
    const int token = (block * item.splits + item.split) * a.tile_tokens;
    if (token >= item.q_count || item.first_slot == kIncomplete) {
      ++round;
      block = -1;
      continue;
    }
    if (++number & 1) continue;
    const int place = (item.q_start + token) * a.num_kv_heads + item.kv_head;
    wait_for_tiles<0, 500>(a.arrivals + place, uint32_t(item.splits));
    wait_for_tiles<1, 500>(a.arrivals + place, uint32_t(item.splits));
    const int count = min(item.q_count - token, a.tile_tokens) * a.group;
    write_queries<T, kHeadDim, 4>(a, {place * a.group, count}, 0, 1);
  }
}

// Converts the sums that became complete with the CTA's last reports, in the mode of any order. The consumers call it
// after they have added all their dq.
template <typename T, int kHeadDim>
__device__ __forceinline__ void convert_last_jobs(const KeysArguments& a, KeysShared<kHeadDim>& shared) {
  shared.last_jobs_full.wait(0);
  for (const SumsJob* job = shared.last_jobs(); job->rows; ++job)
    write_queries<T, kHeadDim, 8>(a, *job, int(threadIdx.x) / 32, 8);
}

}  // namespace
}  // namespace illada::attention
