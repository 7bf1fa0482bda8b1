// Barriers in shared memory and the stages that they guard, on sm_90. They wrap CUTLASS's barriers.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "common/ptx.cuh"

namespace illada {

// CUTLASS's mbarrier, across which the compiler also moves no memory access. From 4.3 on CUTLASS itself ensures that.
struct Barrier : cutlass::arch::ClusterTransactionBarrier {
  using Base = cutlass::arch::ClusterTransactionBarrier;

  // Blocks until the phase of this parity has ended.
  __device__ __forceinline__ void wait(uint32_t phase) const { ptx::mbarrier_wait(ptx::smem_address(this), phase); }
  __device__ __forceinline__ void arrive() const {
    ptx::keep_memory_order();
    Base::arrive();
  }
  // Arrives for the threads that pass true, on the barrier of this CTA or of CTA `cta` of the cluster.
  __device__ __forceinline__ void arrive_if(bool arrives) const {
    ptx::mbarrier_arrive_if(arrives, ptx::smem_address(this));
  }
  __device__ __forceinline__ void arrive_if(bool arrives, uint32_t cta) const {
    ptx::mbarrier_arrive_if(arrives, ptx::smem_address(this), cta);
  }
  __device__ __forceinline__ void arrive_and_expect_tx(uint32_t bytes) const {
    ptx::keep_memory_order();
    Base::arrive_and_expect_tx(bytes);
  }
  // Arrives once all cp.async of this thread so far have completed. Counts as one of the barrier's arrivals.
  __device__ __forceinline__ void arrive_after_cp_async() const {
    cutlass::arch::cpasync_barrier_arrive_noinc(&this->barrier_);
  }
  // Address of the barrier, for TMA.
  __device__ __forceinline__ uint64_t* value() { return &this->barrier_; }
};

// Next stage of a ring and the parity of its phase. For producers, all stages are empty at first.
template <int kStages>
using PipelineState = cutlass::PipelineState<kStages>;
template <int kStages>
__device__ __forceinline__ PipelineState<kStages> producer_start() {
  return {0, 1, 0};
}

// CUTLASS's named barriers, each for some of the warps. The compiler also moves no memory access across them. Number 0
// is the first barrier that CUTLASS does not reserve.
struct NamedBarrier : cutlass::arch::NamedBarrier {
  using Base = cutlass::arch::NamedBarrier;
  static constexpr int kCount = HardwareMaxNumNamedBarriers - ReservedNamedBarrierCount;

  static __device__ __forceinline__ void arrive(int threads, int id) {
    ptx::keep_memory_order();
    Base::arrive(uint32_t(threads), uint32_t(id));
    ptx::keep_memory_order();
  }
  static __device__ __forceinline__ void arrive_and_wait(int threads, int id) {
    ptx::keep_memory_order();
    Base::arrive_and_wait(uint32_t(threads), uint32_t(id));
    ptx::keep_memory_order();
  }
};

// Makes ordinary stores to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void fence_view_async_shared() {
  ptx::keep_memory_order();
  cutlass::arch::fence_view_async_shared();
  ptx::keep_memory_order();
}

// Synchronises the cluster. All its threads call it.
__device__ __forceinline__ void cluster_sync() {
  ptx::keep_memory_order();
  cute::cluster_sync();
  ptx::keep_memory_order();
}

}  // namespace illada
