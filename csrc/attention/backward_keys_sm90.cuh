// dk and dv on sm_90a, and, fused with them, dq.
//
// CTAs walk over the backward items of the plan: 128 keys of a key-value head, against all rows (tokens x heads of the
// group) of their sequence, some at a time. Two consumer warpgroups have 64 keys each and keep dk and dv of them in
// registers to the end. With the transposed scores s^T = k q^T and dp^T = v do^T, whose rows are keys, p^T and ds^T
// are operands straight from registers:
//
//   dv += p^T do,   dk += ds^T q,   dq = ds k over all 128 keys: ds goes through shared memory, and each warpgroup
//   multiplies half of dq (columns for D 128, rows for D 64) and adds it to fp32 sums in L2.
//
//   k_full, k_empty [2]   keys of the item and the item itself; one ahead
//   v_full, v_empty       values
//   q_full [s]            queries and statistics of the rows are there (TMA, and 32 lanes with cp.async)
//   dout_full [s]         gradients of the rows
//   rows_empty [s]        both warpgroups have read all of the stage
//   ds_full [2]           both warpgroups have written ds
//   ds_empty [2]          both warpgroups have multiplied ds
//   job_full, job_empty   sums that are complete
//   all_added             the consumers have added all their dq
//   last_jobs_full        sums that turned out to be complete then, in the place of the statistics
//   turn_full, added [s]  in order, for each warpgroup: dq of two steps before may be added; dq of the step before is
//   last_turns            in order: it is this CTA's turn to add the last two dq
//   turns                 named barriers: a warpgroup queues its products of a step in one go
//
// A warpgroup's turn is dq of the step before (whose ds the other warpgroup has written long ago), dv and dk of this
// step, s^T and dp^T of the next one. Its dq leaves between the products of dv and dk. Exponentials, ds and, at the end
// of an item, dk and dv on their way to memory run beside the other warpgroup's turn.
//
// Rows of dq are complete when all tiles of keys of the sequence have added to them. Each CTA counts its own additions
// in global memory, once they are done and after a fence; the last one to do so turns the sums into dq. Warp 1 counts,
// for it sees steps end; warps 2 and 3 convert. Nobody waits for another CTA.
//
// Or in order, so that every run gives the same bits: to the same rows tile k of a sequence's keys adds after tiles
// 0 .. k-1, once the counter says k. The warpgroups have halves of dq and of the counters of their own, because one has
// its turn half a step after the other one. Thread 0 of the producers waits for the counter: turn_full of step n, which
// a warpgroup looks at before its turn of step n-1, says that dq of step n-2 may be added, which happens in that turn.
// Warp 1 reports every half of a step once it is added. The last tile is always the last one to add, and would convert
// everything; so warps 2 and 3 wait for the sums that are their CTA's own. Of pieces, each has rows of its own; dk and
// dv are sums of at most two of them, which have no order.
//
// That ends, because whoever waits to add does so for items before its own, as `next_keys` counts them. Say that all
// items before item i are added and reported some day. A CTA goes through its items in this order, so it comes to i;
// what it does for the steps up to n-3, reports included, needs nothing that thread 0 does after it began to wait for
// dq of step n-2: the rows of step n-1 and the keys of their item are under way by then. (Warp 1 must not wait for a
// turn: the report of an item's last steps comes in the middle of the next item, which may be behind others that wait
// for these very steps.) So the steps of i get their turns, for which they need items before i alone, and are added and
// reported. All of this with all CTAs of the grid there from the beginning: a cooperative launch. Warps 2 and 3 wait
// for items behind their own, but nobody waits for them.
//
// An item has two steps at least (the second one may have no rows): its keys are still read in the first step of the
// next item, so that the keys after those can only come in the second one.
//
// A step of 64 rows at D 128 is 5 * 2 * 64 * 128 * 128 flop, 2560 clocks of the tensor cores; it reads 304 KiB of
// shared memory and fills 33 (2700 clocks), reads 33 KiB of the L2 cache and adds 32 KiB there.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "attention/accumulator_rows.cuh"
#include "attention/launch.h"
#include "attention/tiles_sm90.cuh"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/ring.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace illada::attention {
namespace {

constexpr int kIncomplete = -2;  // first_slot of an item whose sums are never complete
// Of the steps for which warp 1 has filled a stage, all but the last 4 have added their dq: a stage is free when both
// warpgroups have left it, 3 steps after it was filled, and before they leave it they add dq of the step before.
constexpr int kUnadded = 4;
// Of the `tiles` CTAs that add to the same sums, each calls every `tiles`-th of them its own, and of those it does not
// yet report so many. So it is the last one to report them and has its share of conversions, even where others are
// slower; whoever is slower would convert everything and become slower still.
constexpr int kHeldBack = 4, kFirstHeld = 8;

// Rows of one step whose sums are complete: of the heads of a group, from row `first` of dq on. No rows: the end.
struct SumsJob {
  int32_t first, rows;
};

template <int kHeadDim>
struct KeysShared {
  static constexpr int kRows = kHeadDim == 128 ? 64 : 128;
  static constexpr int kSlices = kHeadDim / 64, kStages = 3, kThreads = 384, kJobs = 4;
  using KeyTile = Tile<kBackwardKeys, kHeadDim>;
  using RowTile = Tile<kRows, kHeadDim>;
  using ScoreTile = Tile<kBackwardKeys, kRows>;
  KeyTile k[2], v;
  RowTile q[kStages], dout[kStages];
  ScoreTile ds[2];
  alignas(16) float lse_log2[kStages][kRows], c[kStages][kRows];
  uint64_t k_full[2], k_empty[2], v_full, v_empty, q_full[kStages], dout_full[kStages], rows_empty[kStages], ds_full[2],
      ds_empty[2], job_full[kJobs], job_empty[kJobs], all_added, last_jobs_full, last_turns, turn_full[2][kStages],
      added[2][kStages];
  WorkItem item[2];
  SumsJob job[kJobs];
  int begun[2];        // in order: rounds and items whose loads have begun
  int2 turn[kStages];  // in order: where the sums of a step are counted, and the CTA's place in the order
  __device__ __forceinline__ SumsJob* last_jobs() { return reinterpret_cast<SumsJob*>(lse_log2); }  // when all is over
};

struct KeysArguments {
  const int32_t* plan;
  int64_t first_item;  // row of the plan
  const RowStatistics* rows;
  uint32_t* arrivals;
  float *dq_sums, *dk_sums, *dv_sums;
  void *dq, *dk, *dv;
  int32_t pieces;  // of an item of the plan; more than one: dk and dv are summed up as dq is
  int32_t total_q, total_k, num_heads, num_kv_heads, group, tile_tokens;
  int32_t skipped;    // elements between the group's heads of one token and the next, (H - H / G) D
  int32_t waste_row;  // of dq_sums: rows that nobody looks at
  uint32_t group_reciprocal;
  float scale, scale_log2;  // softmax_scale, and times log2(e)
};

// The next item of a CTA, from `round` on, which becomes its round: a piece of one of the plan, if packs are so small
// that items are cut into ranges of queries. k_count 0: there is none that has queries.
//
// In order, the tiles of a sequence come after each other, each with all its heads: the CTAs that wait for each other
// are then few. And always forth: back and forth, the one that has waited longest in a round would be the one that all
// wait for in the next.
template <bool kOrdered>
__device__ __forceinline__ WorkItem next_keys(const KeysArguments& a, int& round) {
  const int items = plan_header(a.plan).backward_items * a.pieces, grid = int(gridDim.x);
  for (;; ++round) {
    const int index = kOrdered ? round * grid + int(blockIdx.x) : back_and_forth(round, int(blockIdx.x), grid);
    if (index >= items) return {};
    const int pieces = kOrdered ? 2 : a.pieces;  // in order there are one or two, and few registers for divisions
    int number = kOrdered ? index >> (a.pieces - 1) : index / pieces;
    const int piece = index - number * a.pieces;
    const WorkItem* const list = backward_items(a.plan, a.first_item);
    bool is_whole = true;
    if (kOrdered) {
      const int tiles = list[number].pieces, first = number - list[number].kv_head * tiles - list[number].piece;
      // Lengths that overlap may have more tiles than the plan has room for: where some are missing, list order it is,
      // and no sums are waited for that may never be complete.
      is_whole = first + tiles * a.num_kv_heads <= plan_header(a.plan).backward_items;
      const uint32_t place = uint32_t(number - first), tile = place / uint32_t(a.num_kv_heads);
      if (is_whole) number = first + int(place - tile * a.num_kv_heads) * tiles + int(tile);
    }
    WorkItem item = list[number];
    if (item.q_count == 0) return {};
    if (!is_whole) item.first_slot = kIncomplete;
    if (a.pieces == 1) return item;
    const int tiles = (item.q_count + a.tile_tokens - 1) / a.tile_tokens;
    const int first = tiles * piece / pieces * a.tile_tokens, end = tiles * (piece + 1) / pieces * a.tile_tokens;
    item.q_start += first;
    item.q_count = min(end, item.q_count) - first;
    if (item.q_count > 0) return item;
  }
}

// dq from sums that are complete, by warp `part` of `parts`, kUnroll loads at a time.
template <typename T, int kHeadDim, int kUnroll>
__device__ __forceinline__ void write_queries(const KeysArguments& a, const SumsJob& job, int part, int parts) {
  constexpr int kLanes = kHeadDim / 4, kRows = 32 / kLanes;  // lanes of a row; rows of a load
  const int lane = int(threadIdx.x) % 32, start = job.first * kHeadDim + lane % kLanes * 4;
  const auto offset = [&](int row) {  // in dq and its sums
    return start + int(row * a.group_reciprocal >> 16) * a.skipped + row * kHeadDim;
  };
#pragma unroll 1
  for (int row = part * kRows + lane / kLanes; row < job.rows; row += kUnroll * parts * kRows) {
    // The producers' registers hold four loads and little beside: what follows is kept in this order.
    float4 x[kUnroll];
    uint2 words[kUnroll];
    asm volatile("" : "+r"(row));
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      x[i] = ptx::load_relaxed_v4(a.dq_sums + offset(min(row + i * parts * kRows, job.rows - 1)));
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      words[i] = make_uint2(pack2<T>(x[i].x * a.scale, x[i].y * a.scale), pack2<T>(x[i].z * a.scale, x[i].w * a.scale));
      asm volatile("" : "+r"(words[i].x), "+r"(words[i].y), "+r"(row));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (row + i * parts * kRows < job.rows)
        *reinterpret_cast<uint2*>(static_cast<T*>(a.dq) + offset(row + i * parts * kRows)) = words[i];
  }
}

// In order, a counter has 16 bits for each warpgroup. Until `count` tiles have added to a warpgroup's half of the sums
// that are counted there.
template <int kHalf, int kNanoseconds>
__device__ __forceinline__ void wait_for_tiles(const uint32_t* arrivals, uint32_t count) {
  while ((ptx::load_acquire(arrivals) >> 16 * kHalf & 0xffff) < count) ptx::sleep_some(kNanoseconds);
}

template <typename T, int kHeadDim, bool kFused, bool kOrdered>
__global__ __launch_bounds__(KeysShared<kHeadDim>::kThreads,
                             1) void illada_attention_backward_keys_sm90(const __grid_constant__ CUtensorMap q_map,
                                                                         const __grid_constant__ CUtensorMap dout_map,
                                                                         const __grid_constant__ CUtensorMap k_map,
                                                                         const __grid_constant__ CUtensorMap v_map,
                                                                         const __grid_constant__ KeysArguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = KeysShared<kHeadDim>;
  static_assert(kFused || !kOrdered);
  static_assert(kUnadded == Shared::kStages + 1 && kUnadded < kFirstHeld && kFirstHeld + kHeldBack < 32);
  static_assert(sizeof(SumsJob) * (kUnadded + kHeldBack + 1) <= sizeof(Shared::lse_log2));  // last_jobs
  constexpr int kRows = Shared::kRows, kSlices = Shared::kSlices, kStages = Shared::kStages, kJobs = Shared::kJobs;
  constexpr uint32_t kKeyBytes = sizeof(typename Shared::KeyTile), kTileBytes = sizeof(typename Shared::RowTile);
  constexpr uint32_t kScoreBytes = sizeof(typename Shared::ScoreTile), kScoreSlice = kBackwardKeys * kRowBytes;
  extern __shared__ char raw_shared[];
  const uint32_t shared_start = ptx::smem_address(raw_shared), aligned_start = (shared_start + 1023) / 1024 * 1024;
  Shared& shared = *reinterpret_cast<Shared*>(raw_shared + (aligned_start - shared_start));
  const auto at = [&](size_t offset) { return aligned_start + uint32_t(offset); };
  const uint32_t k_full = at(offsetof(Shared, k_full)), k_empty = at(offsetof(Shared, k_empty));
  const uint32_t v_full = at(offsetof(Shared, v_full)), v_empty = at(offsetof(Shared, v_empty));
  const uint32_t q_full = at(offsetof(Shared, q_full)), dout_full = at(offsetof(Shared, dout_full));
  const uint32_t rows_empty = at(offsetof(Shared, rows_empty)), ds_full = at(offsetof(Shared, ds_full));
  const uint32_t ds_empty = at(offsetof(Shared, ds_empty));
  const uint32_t all_added = at(offsetof(Shared, all_added)), last_jobs_full = at(offsetof(Shared, last_jobs_full));
  const uint32_t last_turns = at(offsetof(Shared, last_turns));
  const auto turn_full = [&](int warpgroup) { return at(offsetof(Shared, turn_full)) + 8 * kStages * warpgroup; };
  const auto added = [&](int warpgroup) { return at(offsetof(Shared, added)) + 8 * kStages * warpgroup; };
  const uint32_t job_full = at(offsetof(Shared, job_full)), job_empty = at(offsetof(Shared, job_empty));

  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&q_map);
    ptx::prefetch_tensormap(&dout_map);
    ptx::prefetch_tensormap(&k_map);
    ptx::prefetch_tensormap(&v_map);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(k_full + 8 * i, 1);
      ptx::mbarrier_init(k_empty + 8 * i, 8);
      ptx::mbarrier_init(ds_full + 8 * i, 8);
      ptx::mbarrier_init(ds_empty + 8 * i, 2);
    }
    ptx::mbarrier_init(all_added, 8);
    ptx::mbarrier_init(last_jobs_full, 32);
    if (kOrdered) ptx::mbarrier_init(last_turns, 1);
    ptx::mbarrier_init(v_full, 1);
    ptx::mbarrier_init(v_empty, 2);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(q_full + 8 * s, 1 + 32);
      ptx::mbarrier_init(dout_full + 8 * s, 1);
      ptx::mbarrier_init(rows_empty + 8 * s, 8);
      for (int i = 0; kOrdered && i < 2; ++i) {
        ptx::mbarrier_init(turn_full(i) + 8 * s, 1);
        ptx::mbarrier_init(added(i) + 8 * s, 4);
      }
    }
    for (int i = 0; i < kJobs; ++i) {
      ptx::mbarrier_init(job_full + 8 * i, 1);
      ptx::mbarrier_init(job_empty + 8 * i, 1);
    }
    ptx::fence_mbarrier_init();
  }
  {  // Rows of a tile that no token has are never loaded, but they are summed over: zeros.
    const int loaded = a.tile_tokens * a.group, missing = kRows - loaded;
    for (int i = int(threadIdx.x); i < missing * 8 * kSlices * kStages; i += Shared::kThreads) {
      const int row = loaded + i / 8 % missing, slice = i / 8 / missing % kSlices, stage = i / 8 / missing / kSlices;
      const int offset = row * kRowBytes + i % 8 * 16;
      *reinterpret_cast<uint4*>(shared.q[stage].slice[slice] + offset) = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(shared.dout[stage].slice[slice] + offset) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  if (threadIdx.x >= 256) {  // ------------------------------------------------------------------------- producers
    ptx::setmaxnreg_decrease<32>();
    const int warp = __shfl_sync(kFullWarp, int(threadIdx.x) / 32 - 8, 0);
    if (threadIdx.x == 256) {  // tiles
      Ring<kStages> ring;
      const auto load_keys = [&](const CUtensorMap* map, uint32_t tile, uint32_t barrier, const WorkItem& item) {
        ptx::mbarrier_arrive_expect_tx(barrier, kKeyBytes);
        load_tile<typename Shared::KeyTile>(tile, map, barrier, item.kv_head, a.total_k, item.k_start, item.k_count, 0);
      };
      const auto load_rows = [&](const CUtensorMap* map, uint32_t tile, uint32_t barrier, const WorkItem& item,
                                 int token) {
        ptx::mbarrier_arrive_expect_tx(barrier, uint32_t(kSlices * a.tile_tokens * a.group * kRowBytes));
        load_tile<typename Shared::RowTile>(tile, map, barrier, item.kv_head * a.group, a.total_q, item.q_start,
                                            item.q_count, token);
      };
      const auto wait_for_turn = [&](auto half) {  // to add dq of two steps before
        const int2 turn = shared.turn[ring.stage == kStages - 1 ? 0 : ring.stage + 1];
        if (turn.y) wait_for_tiles<decltype(half)::value, 40>(a.arrivals + turn.x, uint32_t(turn.y));
      };
      const auto first = std::integral_constant<int, 0>{};
      const auto second = std::integral_constant<int, 1>{};
      static_assert(kStages == 3);
      if (kOrdered)
        for (int s = 0; s < kStages; ++s) shared.turn[s] = {};
      int here[2] = {};
      int& round = kOrdered ? shared.begun[0] : here[0];  // in order, registers are few
      int& number = kOrdered ? shared.begun[1] : here[1];
      round = number = 0;
      for (;; ++number, ++round) {
        const WorkItem item = next_keys<kOrdered>(a, round);
        if (item.k_count == 0) break;
        const int buffer = number % 2;
        ptx::mbarrier_wait(k_empty + 8 * buffer, uint32_t(number / 2 % 2 ^ 1));
        shared.item[buffer] = item;
        load_keys(&k_map, at(offsetof(Shared, k)) + buffer * kKeyBytes, k_full + 8 * buffer, item);
        const auto kept = [&]() -> WorkItem { return kOrdered ? shared.item[buffer] : item; };
        for (int token = 0; token < max(kept().q_count, a.tile_tokens + 1); token += a.tile_tokens) {
          ptx::mbarrier_wait(rows_empty + 8 * ring.stage, ring.parity ^ 1);
          load_rows(&q_map, at(offsetof(Shared, q)) + ring.stage * kTileBytes, q_full + 8 * ring.stage, kept(), token);
          if (token == 0) {
            ptx::mbarrier_wait(v_empty, uint32_t(number % 2 ^ 1));
            load_keys(&v_map, at(offsetof(Shared, v)), v_full, kept());
          }
          load_rows(&dout_map, at(offsetof(Shared, dout)) + ring.stage * kTileBytes, dout_full + 8 * ring.stage, kept(),
                    token);
          if (kOrdered) {
            const WorkItem own = kept();
            shared.turn[ring.stage] = {(own.q_start + token) * a.num_kv_heads + own.kv_head,
                                       token < own.q_count ? own.piece : 0};
            wait_for_turn(first);
            ptx::mbarrier_arrive(turn_full(0) + 8 * ring.stage);
            wait_for_turn(second);
            ptx::mbarrier_arrive(turn_full(1) + 8 * ring.stage);
          }
          ring.advance();
        }
      }
      ptx::mbarrier_wait(k_empty + 8 * (number % 2), uint32_t(number / 2 % 2 ^ 1));
      shared.item[number % 2] = WorkItem{};  // an item without queries: the end
      ptx::mbarrier_arrive(k_full + 8 * (number % 2));
      if (kOrdered) {
#pragma unroll 1
        for (int i = 0; i < 2; ++i, ring.advance()) {
          wait_for_turn(first);
          wait_for_turn(second);
        }
        ptx::mbarrier_arrive(last_turns);
      }
    } else if (warp == 1) {  // statistics
      Ring<kStages> ring;
      const int lane = int(threadIdx.x) % 32;
      // Steps whose sums this CTA has not yet reported, one a lane: the last ones, the very last in lane 0, and from
      // lane kFirstHeld on those held back. Where they are counted, how many rows they have (negative: they are this
      // CTA's own), how many tiles of keys add to them.
      int32_t place = 0, rows = 0, tiles = 0;
      int jobs = 0;
      const auto report = [&](bool reports) {  // by those lanes; is it the last report?
        return reports && ptx::atomic_increment_acq_rel(a.arrivals + place) + 1 == uint32_t(tiles);
      };
      const auto own_job = [&] { return SumsJob{place * a.group, abs(rows)}; };
      const auto push_job = [&](int number, const SumsJob& job) {
        const int slot = number % kJobs;
        ptx::mbarrier_wait(job_empty + 8 * slot, uint32_t(number / kJobs % 2 ^ 1));
        shared.job[slot] = job;
        ptx::mbarrier_arrive(job_full + 8 * slot);
      };
      const auto count_step = [&](int32_t its_place, int32_t its_rows, int32_t its_tiles) {
        if (kOrdered) {
          const int32_t old_place = __shfl_sync(kFullWarp, place, lane - 1);
          const int32_t old_rows = __shfl_sync(kFullWarp, rows, lane - 1);
          place = lane ? old_place : its_place;
          rows = lane ? old_rows : its_rows;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_wait(added(i) + 8 * ring.stage, ring.parity ^ 1);
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
        const bool complete = report(lane == kUnadded ? rows > 0 : holds && lane == kFirstHeld + kHeldBack && rows < 0);
        const uint32_t all = __ballot_sync(kFullWarp, complete);
        if (complete) push_job(jobs + (lane > kUnadded && all >> kUnadded & 1), own_job());
        __syncwarp();
        jobs += __popc(all);
      };
      int round = 0;
      for (WorkItem item = next_keys<kOrdered>(a, round); item.k_count > 0;
           ++round, item = next_keys<kOrdered>(a, round)) {
        const int tile_rows = a.tile_tokens * a.group;
        const RowStatistics* source = a.rows + (int64_t(item.kv_head) * a.total_q + item.q_start) * a.group;
        int its_place = item.q_start * a.num_kv_heads + item.kv_head, until_own = item.piece;
        int count = item.q_count * a.group;
        for (const int last = min(0, count - tile_rows - 1); count > last; count -= tile_rows) {
          if (kOrdered) {
            count_step(its_place, max(min(tile_rows, count), 0), 0);
            its_place += a.tile_tokens * a.num_kv_heads;
          }
          ptx::mbarrier_wait(rows_empty + 8 * ring.stage, ring.parity ^ 1);
#pragma unroll
          for (int i = 0; i < kRows / 32; ++i) {
            const int row = 32 * i + lane;
            const bool valid = row < min(tile_rows, count);
            const RowStatistics* const from = valid ? source + row : a.rows;
            const uint32_t target = uint32_t(ring.stage * kRows + row) * 4;
            ptx::cp_async_4(at(offsetof(Shared, lse_log2)) + target, &from->lse_log2, valid);
            ptx::cp_async_4(at(offsetof(Shared, c)) + target, &from->c, valid);
          }
          ptx::cp_async_mbarrier_arrive(q_full + 8 * ring.stage);
          ring.advance();
          source += tile_rows;
          if (kFused && !kOrdered) {
            const int its_rows = max(min(tile_rows, count), 0);
            count_step(its_place, until_own ? its_rows : -its_rows, item.pieces);
            its_place += a.tile_tokens * a.num_kv_heads;
            until_own = (until_own ? until_own : item.pieces) - 1;
          }
        }
      }
      if (kOrdered) {  // the last four, two of them at once
        for (int i = 0; i < 2; ++i, ring.advance()) count_step(0, 0, 0);
        if (__any_sync(kFullWarp, lane < kUnadded && rows)) ptx::mbarrier_wait(all_added, 0);
        if (lane < kUnadded && rows) ptx::red_add_release(a.arrivals + place, 1u + (1u << 16));
      }
      if (kFused && !kOrdered && lane < 2) push_job(jobs + lane, {});
      if (kFused && !kOrdered && __shfl_sync(kFullWarp, tiles, 0) > 0) {  // there was a step
        // All that is left, at once; the consumers convert it, because they have nothing else to do and many registers.
        ptx::mbarrier_wait(all_added, 0);
        const bool complete =
            report(lane < kUnadded ? rows != 0 : lane >= kFirstHeld && lane < kFirstHeld + kHeldBack && rows < 0);
        const uint32_t all = __ballot_sync(kFullWarp, complete);
        if (complete) shared.last_jobs()[__popc(all & ((1u << lane) - 1))] = own_job();
        if (lane == 0) shared.last_jobs()[__popc(all)] = {};
        ptx::mbarrier_arrive(last_jobs_full);
      }
    } else if (kOrdered && warp > 1) {  // dq from the CTA's own sums: each warp has every other block
      int number = warp;
      for (int round = 0, block = 0;; ++block) {
        const WorkItem item = next_keys<kOrdered>(a, round);  // again and again, for there are no registers to keep it
        if (item.k_count == 0) break;
        const int token = (block * item.pieces + item.piece) * a.tile_tokens;
        if (token >= item.q_count || item.first_slot == kIncomplete) {
          ++round;
          block = -1;
          continue;
        }
        if (++number & 1) continue;
        const int place = (item.q_start + token) * a.num_kv_heads + item.kv_head;
        wait_for_tiles<0, 500>(a.arrivals + place, uint32_t(item.pieces));
        wait_for_tiles<1, 500>(a.arrivals + place, uint32_t(item.pieces));
        const int count = min(item.q_count - token, a.tile_tokens) * a.group;
        write_queries<T, kHeadDim, 4>(a, {place * a.group, count}, 0, 1);
      }
    } else if (kFused && warp > 1) {  // dq from sums that are complete: each warp has every other job
      const int lane = int(threadIdx.x) % 32;
      for (int number = warp - 2;; number += 2) {
        const int slot = number % kJobs;
        ptx::mbarrier_wait(job_full + 8 * slot, uint32_t(number / kJobs % 2));
        const SumsJob job = shared.job[slot];
        __syncwarp();
        ptx::mbarrier_arrive_if(lane == 0, job_empty + 8 * slot);
        if (job.rows == 0) break;
        write_queries<T, kHeadDim, 4>(a, job, 0, 1);
      }
    }
  } else {  // ------------------------------------------------------------------------------------------- consumers
    ptx::setmaxnreg_increase<240>();
    const int warpgroup = __shfl_sync(kFullWarp, int(threadIdx.x) / 128, 0), thread = int(threadIdx.x) % 128;
    const int own_turn = 1 + warpgroup, next_turn = 2 - warpgroup;
    const int lane = thread % 32, warp_row = thread / 32 * 16;  // of a warp in its warpgroup's 64 rows
    // Of dq, a warpgroup has 64 columns of 64 rows, or all columns of the second 64 rows.
    const int half = warpgroup * (kHeadDim == 128 ? 0 : 64), column = warpgroup * (kHeadDim == 128 ? 64 : 0);
    // Lower words of descriptors; the upper ones are all the same.
    const uint32_t start = aligned_start / 16, rows_kind = 1 << 16;
    const auto columns_kind = [](uint32_t leading) { return leading / 16 << 16; };
    constexpr uint32_t kFirstKey = 64 * kRowBytes / 16;  // of the second warpgroup
    const uint32_t k_rows = start + rows_kind + uint32_t(offsetof(Shared, k) / 16) + warpgroup * kFirstKey;
    const uint32_t v_rows = start + rows_kind + uint32_t(offsetof(Shared, v) / 16) + warpgroup * kFirstKey;
    const uint32_t q_rows = start + rows_kind + uint32_t(offsetof(Shared, q) / 16);
    const uint32_t dout_rows = start + rows_kind + uint32_t(offsetof(Shared, dout) / 16);
    const uint32_t q_columns = start + columns_kind(kRows * kRowBytes) + uint32_t(offsetof(Shared, q) / 16);
    const uint32_t dout_columns = start + columns_kind(kRows * kRowBytes) + uint32_t(offsetof(Shared, dout) / 16);
    const uint32_t ds_columns = start + uint32_t(offsetof(Shared, ds) / 16) + half / 64 * (kScoreSlice / 16);
    const uint32_t k_columns = start + uint32_t(offsetof(Shared, k) / 16) + column / 64 * (kScoreSlice / 16);
    const auto descriptor = [](uint32_t low) { return ptx::wgmma_descriptor_k128(0) >> 32 << 32 | low; };
    const uint32_t ds_target = at(offsetof(Shared, ds)) + uint32_t((warpgroup * 64 + warp_row + lane % 16) * kRowBytes);
    Ring<kStages> ring;  // of the step whose s is next
    float dk[kHeadDim / 2], dv[kHeadDim / 2], s[kRows / 2], dp[kRows / 2], dq[32];
    uint32_t p[kRows / 16][4], ds[kRows / 16][4];
    int round = 0, step = 0;  // items and steps that were begun
    int tokens = 0;           // of the item that are not yet in dp
    // Of the step before: the first row of its sums, and where this lane's two rows are; those that there are not go
    // where nobody looks.
    int32_t dq_first = 0;
    float* dq_row;
    int32_t dq_second;
    int keys = 0;  // from this lane's first key to the item's end

    const auto multiply_k = [&] {  // s = k q^T
      const uint64_t x = descriptor(k_rows + uint32_t((round - 1) % 2) * (kKeyBytes / 16));
      const uint64_t y = descriptor(q_rows + uint32_t(ring.stage) * (kTileBytes / 16));
      multiply_rows<T, typename Shared::KeyTile, typename Shared::RowTile, kRows>(s, x, y);
      ptx::wgmma_commit();
    };
    const auto multiply_v = [&](int stage, bool hand_over) {  // dp = v do^T
      // The compiler must not know that x is the same in every step: it would keep each of its sums in a register.
      const uint64_t x = descriptor(v_rows + uint32_t(stage) * uint32_t(a.waste_row < 0));
      const uint64_t y = descriptor(dout_rows + uint32_t(stage) * (kTileBytes / 16));
      multiply_rows<T, typename Shared::KeyTile, typename Shared::RowTile, kRows>(dp, x, y);
      if (hand_over) ptx::named_barrier_arrive(next_turn, 256);
      ptx::wgmma_commit();
    };
    const auto multiply_ds = [&](int number, int key_buffer) {  // dq = ds k of a step
      const uint64_t x = descriptor(ds_columns + uint32_t(number & 1) * (kScoreBytes / 16));
      const uint64_t y = descriptor(k_columns + uint32_t(key_buffer) * (kKeyBytes / 16));
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kBackwardKeys / 16; ++i)
        ptx::wgmma_k16<T, 64, Major::kMN, Major::kMN>(dq, x + i * kRowBytes, y + i * kRowBytes, i > 0);
      ptx::wgmma_commit();
    };
    const auto open_item = [&] {
      ptx::mbarrier_wait(k_full + 8 * (round % 2), uint32_t(round / 2 % 2));
      tokens = __shfl_sync(kFullWarp, shared.item[round % 2].q_count, 0);
      ++round;
      return tokens > 0;
    };
    const auto open_keys = [&] {
      keys = shared.item[(round - 1) % 2].k_count - (warpgroup * 64 + warp_row + lane / 4);
    };
    const auto add_dq = [&](int first, int number) {  // some of 16 pairs, of the step before
#pragma unroll
      for (int n = first; n < min(first + number, 16); ++n) {
        const int i = n / 8, j = n % 8;
        ptx::red_add_v2(dq_row + (i ? dq_second : 0) + 8 * j, dq[4 * j + 2 * i], dq[4 * j + 2 * i + 1]);
      }
    };
    const auto open_sums = [&](int count, bool fresh, int key_buffer) {  // of this step
      if (fresh) {
        const WorkItem& item = shared.item[key_buffer];
        dq_first = item.q_start * a.num_heads + item.kv_head * a.group;
      } else {
        dq_first += a.tile_tokens * a.num_heads;
      }
      int target[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = half + warp_row + lane / 4 + 8 * i, token = int(row * a.group_reciprocal >> 16);
        const bool valid = token < min(count, a.tile_tokens);
        target[i] = valid ? dq_first + token * a.num_heads + row - token * a.group : a.waste_row + row;
      }
      dq_row = a.dq_sums + int64_t(target[0]) * kHeadDim + column + lane % 4 * 2;
      dq_second = (target[1] - target[0]) * kHeadDim;
    };

    // p^T from s^T, relative to the rows' own sums; columns of this lane: 8 j + lane % 4 * 2 + {0, 1}.
    const auto of_columns = [&](const float (&rows)[kRows], int j) {
      return *reinterpret_cast<const float2*>(&rows[8 * j + lane % 4 * 2]);
    };
    const auto weigh = [&](int stage) {
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const float2 lse = of_columns(shared.lse_log2[stage], j);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[4 * j + i] = ptx::exp2_approx(fmaf(s[4 * j + i], a.scale_log2, -(i % 2 ? lse.y : lse.x)));
      }
    };
    const auto differentiate = [&](int stage) {  // p and ds in 16 bits
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const float2 c = of_columns(shared.c[stage], j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float x = s[4 * j + 2 * i], y = s[4 * j + 2 * i + 1];
          p[j / 2][j % 2 * 2 + i] = pack2<T>(x, y);
          ds[j / 2][j % 2 * 2 + i] = pack2<T>(x * (dp[4 * j + 2 * i] - c.x), y * (dp[4 * j + 2 * i + 1] - c.y));
        }
      }
    };
    const auto share_ds = [&] {
      const int buffer = step % 2;
      ptx::mbarrier_wait(ds_empty + 8 * buffer, uint32_t(step / 2 + buffer + 1) % 2);
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {  // 16 keys x 16 rows; no key of anybody else has a part in dq
        const uint32_t mask[2] = {keys > 0 ? 0xffffffffu : 0, keys > 8 ? 0xffffffffu : 0};
        const uint32_t target = ds_target + buffer * kScoreBytes + i / 4 * kScoreSlice;
        ptx::stmatrix_x4(target + uint32_t(((i % 4 * 2 + lane / 16) ^ lane % 8) * 16), ds[i][0] & mask[0],
                         ds[i][1] & mask[1], ds[i][2] & mask[0], ds[i][3] & mask[1]);
      }
      ptx::fence_proxy_async();
      __syncwarp();
      ptx::mbarrier_arrive_if(lane == 0, ds_full + 8 * buffer);
    };
    const auto write_keys = [&](const WorkItem& item) {
      const int key = warpgroup * 64 + warp_row + lane / 4;
      const int64_t stride = int64_t(a.num_kv_heads) * kHeadDim;
      const int64_t offset = (item.k_start + key) * stride + item.kv_head * kHeadDim;
      const auto is_real = [&](int i) { return key + 8 * i < item.k_count; };
      if (kFused && a.pieces > 1) {
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
    };

    if (open_item()) {
      int stage = 0;                    // of the step whose ds is next
      bool fresh = true;                // is it the first step of its item,
      bool is_last = false;             // the last one?
      int count = 0;                    // its tokens
      const auto wait_for_rows = [&] {  // before a turn, so that no time of it is lost
        ptx::mbarrier_wait(q_full + 8 * ring.stage, ring.parity);
        ptx::mbarrier_wait(dout_full + 8 * ring.stage, ring.parity);
        ptx::mbarrier_wait(v_full, uint32_t(round - 1) % 2);
      };
      const auto multiply_q = [&] {
        stage = ring.stage;
        ptx::wgmma_fence();
        multiply_k();
      };
      const auto multiply_dout = [&](bool hand_over) {
        ptx::wgmma_fence();
        multiply_v(stage, hand_over);
        ring.advance();
      };
      const auto finish_scores = [&] {
        ptx::wgmma_wait<1>();
        weigh(stage);
        if (fresh) open_keys();
        count = max(min(tokens, a.tile_tokens), 0);
        tokens -= a.tile_tokens;
        is_last = tokens <= 0 && !fresh;
        ptx::wgmma_wait<0>();
        ptx::mbarrier_arrive_if(thread == 0 && is_last, v_empty);
      };
      open_sums(0, true, 0);
      if (warpgroup == 1) ptx::named_barrier_arrive(next_turn, 256);
      // dv, dk of the step whose ds is there; what dq there is leaves meanwhile, in the gaps between the products.
      const auto multiply_gradients = [&](bool accumulate, bool adds) {
        constexpr int kSteps = kRows / 16, kFirst = kHeadDim == 128 ? 1 : 6;  // steps until dq is there
        const uint64_t of_dv = descriptor(dout_columns + uint32_t(stage) * (kTileBytes / 16)),
                       of_dk = descriptor(q_columns + uint32_t(stage) * (kTileBytes / 16));
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          if (i < kSteps) {
            ptx::wgmma_k16_rs<T, kHeadDim>(dv, p[i % kSteps], of_dv + i % kSteps * kRowBytes, accumulate || i > 0);
          } else {
            ptx::wgmma_k16_rs<T, kHeadDim>(dk, ds[i % kSteps], of_dk + i % kSteps * kRowBytes,
                                           accumulate || i > kSteps);
          }
          if (!kFused || !adds) continue;
          if (i == kFirst - 1) {
            ptx::wgmma_commit();
            ptx::wgmma_wait<1>();
            ptx::mbarrier_arrive_if(thread == 0, ds_empty + 8 * ((step - 1) & 1));
          } else if (i >= kFirst) {
            constexpr int kEach = (16 + 2 * kSteps - kFirst - 1) / (2 * kSteps - kFirst);
            __syncwarp();
            add_dq((i - kFirst) * kEach, kEach);
          }
        }
        ptx::wgmma_commit();
      };
      wait_for_rows();
      multiply_q();
      multiply_dout(false);
      finish_scores();
      while (true) {
        // p^T is in s, in fp32, and dp^T in dp; nothing is under way.
        const int key_buffer = (round - 1) % 2, old_stage = stage;
        differentiate(stage);
        if (kFused) share_ds();
        const bool ends_item = is_last, begins_item = fresh;
        if (ends_item && !open_item()) break;

        wait_for_rows();
        if (kFused) ptx::mbarrier_wait(ds_full + 8 * ((step - 1) & 1), uint32_t((step - 1) >> 1 & 1));
        if (kOrdered) ptx::mbarrier_wait(turn_full(warpgroup) + 8 * ring.stage, ring.parity);
        ptx::named_barrier_sync(own_turn, 256);
        if (kFused) multiply_ds(step - 1, key_buffer ^ int(begins_item && step > 0));
        multiply_gradients(!begins_item, true);
        if (kFused) open_sums(count, begins_item, key_buffer);
        __syncwarp();
        ptx::mbarrier_arrive_if(lane == 0 && begins_item && step > 0, k_empty + 8 * (key_buffer ^ 1));
        if (kOrdered) ptx::mbarrier_arrive_if(lane == 0, added(warpgroup) + 8 * old_stage);
        multiply_q();
        ptx::wgmma_wait<1>();
        ptx::wgmma_keep_operand(p, a.total_q < 0, ds_target);
        ptx::wgmma_keep_operand(ds, a.total_q < 0, ds_target);
        multiply_dout(true);
        ptx::mbarrier_arrive_if(lane == 0, rows_empty + 8 * old_stage);
        fresh = ends_item;
        finish_scores();
        if (ends_item) write_keys(shared.item[key_buffer]);
        ++step;
      }
      if (warpgroup == 0) ptx::named_barrier_sync(own_turn, 256);
      const int key_buffer = round % 2;
      multiply_gradients(!fresh, false);
      ptx::wgmma_wait<0>();
      if (kFused) {
        ptx::mbarrier_wait(ds_full + 8 * ((step - 1) & 1), uint32_t((step - 1) >> 1 & 1));
        multiply_ds(step - 1, key_buffer ^ int(fresh && step > 0));
        ptx::wgmma_wait<0>();
        ptx::mbarrier_arrive_if(thread == 0, ds_empty + 8 * ((step - 1) & 1));
        if (kOrdered) ptx::mbarrier_wait(last_turns, 0);
        add_dq(0, 16);
        open_sums(count, fresh, key_buffer);
        ptx::mbarrier_wait(ds_full + 8 * (step & 1), uint32_t(step >> 1 & 1));
        multiply_ds(step, key_buffer);
        ptx::wgmma_wait<0>();
        add_dq(0, 16);
        if (kOrdered) {
          __syncwarp();
          ptx::mbarrier_arrive_if(lane == 0, all_added);
        }
      }
      write_keys(shared.item[key_buffer]);
      if (kFused && !kOrdered) {  // here and not before the keys leave, where it would cost registers in the loop
        __syncwarp();
        ptx::mbarrier_arrive_if(lane == 0, all_added);
        ptx::mbarrier_wait(last_jobs_full, 0);
        for (const SumsJob* job = shared.last_jobs(); job->rows; ++job)
          write_queries<T, kHeadDim, 8>(a, *job, int(threadIdx.x) / 32, 8);
      }
    }
    // Keys that no query sees; where items are cut, their sums are zeros that the last pass turns into gradients.
    const int items = a.pieces == 1 ? plan_header(a.plan).backward_items : 0;
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
#endif
}

template <typename T, int kHeadDim, bool kFused, bool kOrdered>
void launch_backward_keys(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  constexpr const char* kOp = "varlen_attention_backward";
  using Shared = KeysShared<kHeadDim>;
  const PackShape& s = p.shape;
  const int group = s.num_heads / s.num_kv_heads, tile_tokens = Shared::kRows / group;
  const CUtensorMap q_map = queries_map(kOp, p, p.q, tile_tokens);
  const CUtensorMap dout_map = queries_map(kOp, p, p.dout, tile_tokens);
  const CUtensorMap k_map = keys_map(kOp, p, p.k, kBackwardKeys);
  const CUtensorMap v_map = keys_map(kOp, p, p.v, kBackwardKeys);
  const BackwardScratch scratch = scratch_of(p, method);
  KeysArguments a{};
  a.plan = p.plan;
  a.first_item = first_backward_row(s);
  a.rows = scratch.rows;
  a.arrivals = scratch.arrivals;
  a.dq_sums = scratch.dq;
  a.dk_sums = scratch.dk;
  a.dv_sums = scratch.dv;
  a.pieces = method.pieces;
  a.dq = p.dq;
  a.dk = p.dk;
  a.dv = p.dv;
  a.total_q = int32_t(s.total_q);
  a.total_k = int32_t(s.total_k);
  a.num_heads = s.num_heads;
  a.num_kv_heads = s.num_kv_heads;
  a.group = group;
  a.tile_tokens = tile_tokens;
  a.skipped = (s.num_heads - group) * kHeadDim;
  a.waste_row = int32_t(s.total_q * s.num_heads);
  a.group_reciprocal = group_reciprocal(group);
  a.scale = p.softmax_scale;
  a.scale_log2 = p.softmax_scale * float(M_LOG2E);
  LaunchShape shape;
  shape.grid = dim3(unsigned(std::min<int64_t>(device.sm_count, max_backward_items(s) * method.pieces)));
  shape.block = dim3(Shared::kThreads);
  shape.smem_bytes = shared_bytes<Shared>();
  // Together the two may not be: the order costs the overlap with the end of the first pass.
  shape.dependent = !kOrdered;
  shape.cooperative = kOrdered;
  launch_kernel(kOp, device, p.launch.stream, shape, illada_attention_backward_keys_sm90<T, kHeadDim, kFused, kOrdered>,
                q_map, dout_map, k_map, v_map, a);
}

}  // namespace
}  // namespace illada::attention
