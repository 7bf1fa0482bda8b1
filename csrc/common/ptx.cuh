// Thin wrappers of PTX instructions, named after them. Addresses of shared memory are the 32-bit ones of smem_address.
// Everything from mbarrier on needs sm_90; wgmma needs sm_90a.
#pragma once

#include <cstdint>

#include "common/l2_policy.h"
#include "common/ragged.h"

namespace illada::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// ------------------------------------------------------------------------------------ programmatic dependent launch

// Waits for the kernels before this one in the stream, where the launch was allowed to overlap them.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel after this one may be scheduled (it waits for the end of this one by itself).
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// -------------------------------------------------------------------------------------------------- sm_80: cp.async

// CuTe's copies and waits clobber no memory. Where a thread reads without a barrier what it has copied itself, or
// copies over what it has read, this keeps the compiler from changing the order.
__device__ __forceinline__ void keep_memory_order() { asm volatile("" ::: "memory"); }

// Of the kernels of sm_90: 16 bytes from global to shared memory; zeros where `valid` is false.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// The same of 4 bytes.
__device__ __forceinline__ void cp_async_4(uint32_t smem, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(global), "r"(valid ? 4 : 0) : "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------------------------------ shared memory by address

// What lies at an address, for CuTe's copies, which take references and find the address again.
template <typename T>
__device__ __forceinline__ T& shared_at(uint32_t smem) {
  return *static_cast<T*>(__cvta_shared_to_generic(smem));
}

__device__ __forceinline__ void store_shared(uint32_t smem, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared_v2(uint32_t smem, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(smem), "f"(x), "f"(y) : "memory");
}

// ------------------------------------------------------------------------------------- sm_80: hints to the L2 cache

// 16 bytes to global memory.
__device__ __forceinline__ void store_global_v4_hinted(void* global, uint4 x, L2Policy policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w), "l"(uint64_t(policy))
               : "memory");
}

// -------------------------------------------------------------------------------------------------------- arithmetic

__device__ __forceinline__ float exp2_approx(float x) {  // 2 ulp; 0 for results below 2^-126, and for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --------------------------------------------------------------------------------------------- sm_90: reductions in L2

// address[0 .. 1] += {x, y}, in any order; 8-byte aligned.
__device__ __forceinline__ void red_add_v2(float* address, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x), "f"(y) : "memory");
}
// address[0 .. 3] += {x, y, z, w}, in any order; 16-byte aligned.
__device__ __forceinline__ void red_add_v4(float* address, float x, float y, float z, float w) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y), "f"(z),
               "f"(w)
               : "memory");
}
// The same with a cache policy of the L2 cache.
__device__ __forceinline__ void red_add_v2_hinted(float* address, float x, float y, L2Policy policy) {
  asm volatile("red.relaxed.gpu.global.add.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(address), "f"(x), "f"(y),
               "l"(uint64_t(policy))
               : "memory");
}
__device__ __forceinline__ void red_add_v4_hinted(float* address, float x, float y, float z, float w, L2Policy policy) {
  asm volatile("red.relaxed.gpu.global.add.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address), "f"(x),
               "f"(y), "f"(z), "f"(w), "l"(uint64_t(policy))
               : "memory");
}
// ++*address, what it was before: after all that this thread knows to be done, before all that it does next.
__device__ __forceinline__ uint32_t atomic_increment_acq_rel(uint32_t* address) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(address) : "memory");
  return old;
}
// *address += x after all that this thread knows to be done; and what it is, before all that the thread does next.
__device__ __forceinline__ void red_add_release(uint32_t* address, uint32_t x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}
__device__ __forceinline__ void sleep_some(uint32_t nanoseconds) {
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds) : "memory");
}
// What other CTAs have written or added: never from the L1 cache.
__device__ __forceinline__ float4 load_relaxed_v4(const float* address) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

// ----------------------------------------------------------------------------------------- sm_80: ldmatrix, mma.sync

// Four 8 x 8 matrices to shared memory: lane l has the address of row l % 8 of matrix l / 8. sm_90.
__device__ __forceinline__ void stmatrix_x4(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// --------------------------------------------------------------------------------------------------- sm_90: mbarrier

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the cluster and to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Once all cp.async of this thread so far have arrived; one of the barrier's arrivals.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// By those threads that say so.
__device__ __forceinline__ void mbarrier_arrive_if(bool arrives, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.u32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(uint32_t(arrives))
      : "memory");
}
// By those threads that say so, on the same barrier in some CTA of the cluster (which may be this one).
__device__ __forceinline__ void mbarrier_arrive_cluster_if(bool arrives, uint32_t barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      ".reg .b32 remote;\n"
      "setp.ne.u32 arrives, %2, 0;\n"
      "@arrives mapa.shared::cluster.u32 remote, %0, %1;\n"
      "@arrives mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(cta), "r"(uint32_t(arrives))
      : "memory");
}
// Blocks until the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ------------------------------------------------------------------------------------------- barriers of some warps

// Barrier `id` (1 .. 15; 0 is __syncthreads) of `threads` threads, in whole warps: waits, or only says to be there.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ------------------------------------------------------------------------------------------------- sm_90: clusters

__device__ __forceinline__ uint32_t cluster_cta_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Eight bytes at the same place in the shared memory of some CTA of the cluster.
__device__ __forceinline__ float2 load_cluster(uint32_t smem, uint32_t cta) {
  float2 v;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [remote];\n"
      "}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(smem), "r"(cta)
      : "memory");
  return v;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ------------------------------------------------------------------------------------------------------ sm_90: TMA

// `map` is the address of a CUtensorMap in kernel parameter or global memory.
__device__ __forceinline__ void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box at (x, y), x the contiguous dimension; `barrier` counts its bytes.
__device__ __forceinline__ void tma_load_2d(uint32_t smem, const void* map, uint32_t barrier, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
// The same into the same place of every CTA in `cta_mask`, each of whose barriers counts the bytes.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t smem, const void* map, uint32_t barrier, int32_t x,
                                                      int32_t y, uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(cta_mask)
      : "memory");
}
// The box at (x, y), as far as it is inside of the map, from shared memory, by those threads that say so; part of the
// thread's next bulk group. Or added to what is there.
__device__ __forceinline__ void tma_store_2d_if(bool stores, const void* map, uint32_t smem, int32_t x, int32_t y) {
  asm volatile(
      "{\n"
      ".reg .pred stores;\n"
      "setp.ne.u32 stores, %4, 0;\n"
      "@stores cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
      "}" ::"l"(map),
      "r"(x), "r"(y), "r"(smem), "r"(uint32_t(stores))
      : "memory");
}
__device__ __forceinline__ void tma_reduce_add_2d_if(bool adds, const void* map, uint32_t smem, int32_t x, int32_t y) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.u32 adds, %4, 0;\n"
      "@adds cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];\n"
      "}" ::"l"(map),
      "r"(x), "r"(y), "r"(smem), "r"(uint32_t(adds))
      : "memory");
}
// Boxes of a map of tensor_map_ragged, at (x, head, row, end): common/ragged.h says where a token is. `policy`: of the
// L2 cache. Loads: to one CTA, or into the same place of every CTA in `cta_mask`.
__device__ __forceinline__ void tma_load_ragged(uint32_t smem, const void* map, uint32_t barrier, int32_t x,
                                                int32_t head, int32_t row, int32_t end, L2Policy policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(smem),
      "l"(map), "r"(x), "r"(head), "r"(row), "r"(kRaggedTokens), "r"(end), "r"(barrier), "l"(uint64_t(policy))
      : "memory");
}
__device__ __forceinline__ void tma_load_ragged_multicast(uint32_t smem, const void* map, uint32_t barrier, int32_t x,
                                                          int32_t head, int32_t row, int32_t end, uint16_t cta_mask,
                                                          L2Policy policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;" ::"r"(smem),
      "l"(map), "r"(x), "r"(head), "r"(row), "r"(kRaggedTokens), "r"(end), "r"(barrier), "h"(cta_mask),
      "l"(uint64_t(policy))
      : "memory");
}
// Stored, or added to what is there, by those threads that say so; part of the thread's next bulk group.
__device__ __forceinline__ void tma_store_ragged_if(bool stores, const void* map, uint32_t smem, int32_t x,
                                                    int32_t head, int32_t row, int32_t end, L2Policy policy) {
  asm volatile(
      "{\n"
      ".reg .pred stores;\n"
      "setp.ne.u32 stores, %7, 0;\n"
      "@stores cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%1, %2, %3, %4, %5}], "
      "[%6], %8;\n"
      "}" ::"l"(map),
      "r"(x), "r"(head), "r"(row), "r"(kRaggedTokens), "r"(end), "r"(smem), "r"(uint32_t(stores)), "l"(uint64_t(policy))
      : "memory");
}
__device__ __forceinline__ void tma_reduce_add_ragged_if(bool adds, const void* map, uint32_t smem, int32_t x,
                                                         int32_t head, int32_t row, int32_t end, L2Policy policy) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.u32 adds, %7, 0;\n"
      "@adds cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group.L2::cache_hint [%0, {%1, %2, %3, "
      "%4, %5}], [%6], %8;\n"
      "}" ::"l"(map),
      "r"(x), "r"(head), "r"(row), "r"(kRaggedTokens), "r"(end), "r"(smem), "r"(uint32_t(adds)), "l"(uint64_t(policy))
      : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The thread's bulk groups have read what they store, all but the last kPending; or have written it.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// What ordinary stores wrote to shared memory becomes visible to TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------- sm_90a: wgmma

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The same, and the accumulators `d` are those of products that have ended: the compiler moves no arithmetic on them to
// before the wait, of which it would otherwise know nothing.
template <int kSize>
__device__ __forceinline__ void wgmma_keep_behind_wait(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kPending, int... kSizes>
__device__ __forceinline__ void wgmma_wait(float (&... d)[kSizes]) {
  wgmma_wait<kPending>();
  (wgmma_keep_behind_wait(d), ...);
}

// After the wait for products that read `a` from registers: until here the compiler may use them for nothing else. It
// believes that they are free when the product is issued, unless something may read them later: a store that is never
// carried out, because `never` is false, of which the compiler must know nothing.
template <int kSteps>
__device__ __forceinline__ void wgmma_keep_operand(const uint32_t (&a)[kSteps][4], bool never, uint32_t smem) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    asm volatile(
        "{\n"
        ".reg .pred never;\n"
        "setp.ne.u32 never, %4, 0;\n"
        "@never st.shared.v4.b32 [%5], {%0, %1, %2, %3};\n"
        "}" ::"r"(a[i][0]),
        "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(uint32_t(never)), "r"(smem));
}

// Before a wait: what x and y are computed from is computed here, beside the products in flight, and not after the
// wait, where the compiler likes to move it. A store that is never carried out, as above.
__device__ __forceinline__ void wgmma_compute_before_wait(float x, float y, bool never, uint32_t smem) {
  asm volatile(
      "{\n"
      ".reg .pred never;\n"
      "setp.ne.u32 never, %2, 0;\n"
      "@never st.shared.v2.f32 [%3], {%0, %1};\n"
      "}" ::"f"(x),
      "f"(y), "r"(uint32_t(never)), "r"(smem)
      : "memory");
}

// Descriptor of a K-major operand in the 128-byte swizzle, as TMA writes it: rows of 128 bytes (64 elements of 16
// bits), groups of 8 rows 1024 bytes apart. The tile starts at a multiple of 1024; the 16 elements of step k start at
// smem + 32 k.
__device__ __forceinline__ uint64_t wgmma_descriptor_k128(uint32_t smem) {
  constexpr uint64_t kStride = uint64_t(1024 >> 4) << 32, kLeading = uint64_t(1) << 16, kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | kStride | kLeading | uint64_t((smem & 0x3ffff) >> 4);
}

// Descriptor of an operand whose M or N is contiguous, in the 128-byte swizzle: rows of 128 bytes are 64 elements of M
// or N for one k, groups of 8 k are 1024 bytes apart, the next 64 elements of M or N `leading` bytes apart. The 16 k of
// step s start at smem + 2048 s.
__device__ __forceinline__ uint64_t wgmma_descriptor_mn128(uint32_t smem, uint32_t leading) {
  constexpr uint64_t kStride = uint64_t(1024 >> 4) << 32, kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | kStride | uint64_t(leading >> 4) << 16 | uint64_t((smem & 0x3ffff) >> 4);
}

// Registers of a warpgroup move between kernels' roles; a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace illada::ptx
