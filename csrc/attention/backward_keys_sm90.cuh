// The keys kernel: dk and dv on sm_90a, and dq if it is fused with them.
//
// CTAs walk over the backward items of the plan. An item is 128 keys of a key-value head, against all rows (tokens x
// heads of the group) of their sequence, some rows per step:
//
//   for each item:
//     for each step, some rows of the sequence:
//       s^T = k q^T;   p^T = exp(scale s^T - lse)
//       dp^T = v do^T; ds^T = p^T (dp^T - c)
//       dv += p^T do;  dk += ds^T q
//       if fused: dq = ds k over all 128 keys, added to fp32 sums in L2
//     store dk and dv
//
// Two consumer warpgroups have 64 keys each, and keep dk and dv of these keys in registers until the item ends. The
// rows of s^T and dp^T are keys, so p^T and ds^T are operands directly from registers. For dq, ds goes through shared
// memory, and each warpgroup multiplies half of dq: half of the columns for D 128, half of the rows for D 64.
//
// Who waits for whom (arrows: barriers, from the threads that arrive to those that wait; KeysShared describes each):
//
//   warp 8, thread 256:       k_full, v_full, q_full, dout_full, turn_full*, last_turns*
//   loads tiles          ------------------------------------------------------------>  warpgroups 0 and 1:
//   load_tiles           <------------------------------------------------------------  products; they add dq
//                             k_empty, v_empty, rows_empty                              KeysConsumer
//
//   warp 9:                   q_full, last_jobs_full                                    between the two:
//   loads statistics,    ------------------------------------------------------------>    turns 0, 1
//   counts additions     <------------------------------------------------------------    ds_full, ds_empty
//   load_statistics           rows_empty, added*, all_added                                   |
//          |                                                                                  | red (DqAdder)
//          | job_full; job_empty              counters of additions, in memory                v
//          v                            <--- one per tile of rows: "arrivals" --->      fp32 sums of dq in L2
//   warps 10 and 11:                                                                          |
//   convert dq           <--------------------------------------------------------------------+
//
//   * only in ordered mode. Only there does a thread wait for another CTA: thread 256 and warps 10 and 11, for
//   counters.
//
// Where dq is summed, in which order, and why this cannot deadlock: dq_accumulation_sm90.cuh.
//
// When they work. In a turn, a warpgroup issues the products of dq of step n - 1, dv and dk of n, s and dp of n + 1:
//
//   warpgroup 0   | p, ds of 4 |T: dq3 dv4 dk4 s5 dp5| p, ds of 5 | wait |T: dq4 dv5 dk5 s6 dp6| p, ds of 6 |
//   warpgroup 1   ... dv3 dk3 s4 dp4| p, ds of 4 | wait |T: dq3 dv4 dk4 s5 dp5| p, ds of 5 | wait |T: dq4 dv5 ...
//   dq to the sums      (0: dq3 beside dv4, dk4)      (1: dq3)            (0: dq4)
//   thread 256    | rows of step 6, when both have left step 3 | rows of 7, when both have left 4 | ...
//
//   backward_keys_shared_sm90.cuh     shared by all warps: arguments, order of items, shared memory, barriers
//   backward_keys_loads_sm90.cuh      thread 256: loads of tiles by TMA
//   dq_accumulation_sm90.cuh          warps 9 to 11: statistics, reports of additions to dq, conversions of dq
//   backward_keys_products_sm90.cuh   the consumers, which add dq to the sums
//   dq_accumulation_add_sm90.cuh      the instructions with which they add (DqAdder)
//
// A step of 64 rows at D 128 takes 5 * 2 * 64 * 128 * 128 flop, 2560 clocks of the tensor cores. It reads 304 KiB of
// shared memory and fills 33 KiB (2700 clocks). It reads 33 KiB from the L2 cache and adds 32 KiB there.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cmath>

#include "attention/backward_keys_loads_sm90.cuh"
#include "attention/backward_keys_products_sm90.cuh"
#include "attention/backward_keys_shared_sm90.cuh"
#include "attention/dq_accumulation_sm90.cuh"
#include "attention/launch.h"
#include "attention/tiles_sm90.cuh"
#include "common/dependent_launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

template <typename T, int kHeadDim, DqAccumulation kAccumulation, bool kOrdered>
__global__ __launch_bounds__(KeysShared<kHeadDim>::kThreads, 1) void illada_attention_backward_keys_sm90(
    const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map,
    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
    const __grid_constant__ CUtensorMap dq_map, const __grid_constant__ KeysArguments a,
    const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = KeysShared<kHeadDim>;
  constexpr bool kFused = kAccumulation != DqAccumulation::kNone;
  static_assert(!kOrdered || kAccumulation == DqAccumulation::kRed2);
  extern __shared__ char raw_shared[];
  const uint32_t shared_start = ptx::smem_address(raw_shared), aligned_start = (shared_start + 1023) / 1024 * 1024;
  Shared& shared = *reinterpret_cast<Shared*>(raw_shared + (aligned_start - shared_start));

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&dout_map);
    cute::prefetch_tma_descriptor(&k_map);
    cute::prefetch_tma_descriptor(&v_map);
    init_barriers<kOrdered>(shared);
  }
  clear_missing_rows(a, shared);
  __syncthreads();
  wait_for_previous_kernel(launch);

  if (threadIdx.x >= 256) {  // ------------------------------------------------------------------------- producers
    Shared::Registers::as_producer();
    const int warp = __shfl_sync(kFullWarp, int(threadIdx.x) / 32 - 8, 0);
    if (threadIdx.x == 256) {
      load_tiles<kHeadDim, kAccumulation, kOrdered>(a, shared, q_map, dout_map, k_map, v_map);
    } else if (warp == 1) {
      load_statistics<kHeadDim, kAccumulation, kOrdered>(a, shared);
    } else if (kOrdered && warp > 1) {
      convert_own_sums<T, kHeadDim>(a, warp);
    } else if (kFused && warp > 1) {
      convert_jobs<T, kHeadDim>(a, shared, warp);
    }
  } else {  // ------------------------------------------------------------------------------------------- consumers
    Shared::Registers::as_consumer();
    KeysRegisters<kHeadDim> registers;
    KeysConsumer<T, kHeadDim, kAccumulation, kOrdered>(a, shared, dq_map, registers).run();
    write_unseen_keys<kHeadDim>(a);
  }
#endif
}

template <typename T, int kHeadDim, DqAccumulation kAccumulation, bool kOrdered>
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
  CUtensorMap dq_map = q_map;  // used only with kBulk
  if (kAccumulation == DqAccumulation::kBulk)
    dq_map = tensor_map_ragged(kOp,
                               {scratch.dq, DType::kFloat32, std::max<int64_t>(s.total_q, 1), s.num_heads, kHeadDim,
                                int64_t(s.num_heads) * kHeadDim, kHeadDim},
                               std::min(group, 16), std::max(16 / group, 1));
  KeysArguments a{};
  a.plan = p.plan;
  a.first_item = first_backward_row(s);
  a.rows = scratch.rows;
  a.arrivals = scratch.arrivals;
  a.dq_sums = scratch.dq;
  a.dk_sums = scratch.dk;
  a.dv_sums = scratch.dv;
  a.query_splits = method.query_splits;
  a.staggered = method.staggered;
  const bool hints = variant<L2Hints>() == L2Hints::kOn;
  a.rows_hint = a.sums_hint = l2_policy_if(hints, L2Policy::EVICT_LAST);
  a.keys_hint = l2_policy_if(hints, L2Policy::EVICT_FIRST);
  a.report_every = method.report_every;
  a.dq = p.dq;
  a.dk = p.dk;
  a.dv = p.dv;
  a.total_q = int32_t(s.total_q);
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
  shape.grid = dim3(unsigned(std::min<int64_t>(device.sm_count, max_backward_items(s) * method.query_splits)));
  shape.block = dim3(Shared::kThreads);
  shape.smem_bytes = shared_bytes<Shared>();
  // The two attributes exclude each other. Ordered mode gives up the overlap with the end of the first pass.
  shape.dependent = !kOrdered;
  shape.cooperative = kOrdered;
  launch_kernel(kOp, device, p.launch.stream, shape,
                illada_attention_backward_keys_sm90<T, kHeadDim, kAccumulation, kOrdered>, q_map, dout_map, k_map,
                v_map, dq_map, a);
}

}  // namespace
}  // namespace illada::attention
