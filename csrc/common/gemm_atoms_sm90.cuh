// The atoms of common/gemm_sm90.cuh, by addresses in shared memory.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "common/ptx.cuh"
#include "common/wgmma.cuh"

namespace illada {

enum class Major { kK, kMN };

}  // namespace illada

namespace illada::ptx {

using Mbarrier = cutlass::arch::ClusterTransactionBarrier;

__device__ __forceinline__ uint32_t cluster_cta_rank() { return cute::block_rank_in_cluster(); }
__device__ __forceinline__ void cluster_sync() {
  keep_memory_order();
  cute::cluster_sync();
  keep_memory_order();
}
__device__ __forceinline__ void prefetch_tensormap(const void* map) {
  cute::prefetch_tma_descriptor(static_cast<const cute::TmaDescriptor*>(map));
}
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  Mbarrier::init(&shared_at<uint64_t>(barrier), arrivals);
}
__device__ __forceinline__ void fence_mbarrier_init() {
  cutlass::arch::fence_barrier_init();
  keep_memory_order();
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  keep_memory_order();
  Mbarrier::arrive_and_expect_tx(&shared_at<uint64_t>(barrier), bytes);
}
__device__ __forceinline__ void mbarrier_arrive_cluster_if(bool arrives, uint32_t barrier, uint32_t cta) {
  keep_memory_order();
  Mbarrier::arrive(&shared_at<uint64_t>(barrier), cta, arrives);
}
__device__ __forceinline__ void tma_load_2d(uint32_t smem, const void* map, uint32_t barrier, int32_t x, int32_t y) {
  cute::SM90_TMA_LOAD_2D::copy(map, &shared_at<uint64_t>(barrier), uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                               &shared_at<uint64_t>(smem), x, y);
}
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t smem, const void* map, uint32_t barrier, int32_t x,
                                                      int32_t y, uint16_t cta_mask) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(map, &shared_at<uint64_t>(barrier), cta_mask,
                                         uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), &shared_at<uint64_t>(smem),
                                         x, y);
}
__device__ __forceinline__ void wgmma_fence() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }
template <int kPending, int... kSizes>
__device__ __forceinline__ void wgmma_wait(float (&... d)[kSizes]) {
  warpgroup_wait<kPending>(d...);
}
template <typename T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ __forceinline__ void wgmma_k16(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr GmmaMajor kA = kMajorA == Major::kK ? GmmaMajor::K : GmmaMajor::MN;
  constexpr GmmaMajor kB = kMajorB == Major::kK ? GmmaMajor::K : GmmaMajor::MN;
  warpgroup_mma_ss<T, kN, kA, kB>(d, a, b, accumulate);
}
__device__ __forceinline__ uint64_t wgmma_descriptor_k128(uint32_t smem) { return gmma_descriptor_k(smem); }
__device__ __forceinline__ uint64_t wgmma_descriptor_mn128(uint32_t smem, uint32_t leading) {
  return gmma_descriptor_mn(smem, leading);
}

}  // namespace illada::ptx
