// PTX for which CuTe and CUTLASS have no wrapper, or none that is good enough; each comment says what is missing there.
// Addresses of shared memory are 32-bit addresses from smem_address.
#pragma once

#include <cstdint>

namespace illada::ptx {

// Returns the 32-bit address of shared memory. Same as cute::cast_smem_ptr_to_uint, without its headers.
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}
// Returns a reference to the object at such an address. CuTe's atoms take references and pointers and convert them back
// to addresses, which costs nothing.
template <typename T>
__device__ __forceinline__ T& shared_at(uint32_t smem) {
  return *static_cast<T*>(__cvta_shared_to_generic(smem));
}

// ------------------------------------------------------------------------------------------- what the compiler knows

// Keeps the compiler from moving memory accesses across it. CUTLASS's mbarriers, named barriers and fences do so
// from 4.3 on; before that, their asm has no memory clobber. CUTLASS's cluster barriers have none even in 4.7.
__device__ __forceinline__ void keep_memory_order() { asm volatile("" ::: "memory"); }

// Hides the value of x from the compiler, without changing it. Values derived from x in a loop are then computed there
// and not kept in registers around the loop. (cute::warpgroup_fence_operand would also act as keep_memory_order.)
template <typename T>
__device__ __forceinline__ void hide_value(T& x) {
  static_assert(sizeof(T) == 4);
  asm volatile("" : "+r"(x));
}
__device__ __forceinline__ void hide_value(const int32_t*& x) { asm volatile("" : "+l"(x)); }

// Reads threadIdx.x again. Values derived from it then hold no registers during a main loop that needs all of them.
__device__ __forceinline__ uint32_t reread_thread_index() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ------------------------------------------------------------------------------------ programmatic dependent launch

// Waits for the kernels before this one in the stream, if the launch may overlap them. CUTLASS's wrapper does nothing
// without CUTLASS_ENABLE_GDC_FOR_SM90 and on plain sm_90. It also lets the compiler load global memory before it.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the kernel after this one be scheduled. That kernel itself waits for the end of this one.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---------------------------------------------------------------------------------------- sm_80: hints to the L1 cache

// Loads data that is read once, without allocating it in the L1 cache. cutlass::arch::global_load has no such hint.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
// Does the same only where `valid`, without a branch. The memory may be memory that this kernel also writes.
__device__ __forceinline__ void load_streaming_if(bool valid, uint4& v, const void* address) {
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.u32 valid, %4, 0;\n"
      "@valid ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%5];\n"
      "}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "r"(uint32_t(valid)), "l"(address));
}

// ------------------------------------------------------------------------------------- sm_80: hints to the L2 cache

// Stores 16 bytes to global memory with a cache hint. cutlass::arch::global_store takes no hint.
__device__ __forceinline__ void store_global_v4_hinted(void* global, uint4 x, uint64_t hint) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w), "l"(hint)
               : "memory");
}

// ------------------------------------------------------------------------------------ sm_80: barriers of some warps

// Synchronises `threads` threads, in whole warps, and orders their accesses to shared memory. Barrier 0 is that of
// __syncthreads; ids go up to 15. CUTLASS has named barriers only from sm_90 on.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// -------------------------------------------------------------------------------------------------------- arithmetic

// Returns 2^x in one instruction. CUTLASS calls exp2f, which is this instruction only if the whole program is compiled
// with -use_fast_math.
__device__ __forceinline__ float exp2_approx(float x) {  // 2 ulp; 0 for results below 2^-126, and for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ----------------------------------------------------------------------------------------- sm_90: memory of the device

// address[0 .. 1] += {x, y}, in any order; 8-byte aligned. CUTLASS's wrapper adds single floats.
__device__ __forceinline__ void red_add_v2(float* address, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x), "f"(y) : "memory");
}
// address[0 .. 3] += {x, y, z, w}, in any order; 16-byte aligned.
__device__ __forceinline__ void red_add_v4(float* address, float x, float y, float z, float w) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y), "f"(z),
               "f"(w)
               : "memory");
}
// The same additions with a cache hint.
__device__ __forceinline__ void red_add_v2_hinted(float* address, float x, float y, uint64_t hint) {
  asm volatile("red.relaxed.gpu.global.add.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(address), "f"(x), "f"(y),
               "l"(hint)
               : "memory");
}
__device__ __forceinline__ void red_add_v4_hinted(float* address, float x, float y, float z, float w, uint64_t hint) {
  asm volatile("red.relaxed.gpu.global.add.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address), "f"(x),
               "f"(y), "f"(z), "f"(w), "l"(hint)
               : "memory");
}
// cutlass::Barrier has the next three operations only inside barriers between CTAs, with a __syncthreads.
//
// Increments *address and returns its value before that. Acquire-release: ordered after all earlier accesses of this
// thread, and those that it has observed, and before all its later accesses.
__device__ __forceinline__ uint32_t atomic_increment_acq_rel(uint32_t* address) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(address) : "memory");
  return old;
}
// red_add_release adds x to *address, ordered after all earlier accesses of this thread and those that it has observed.
// load_acquire loads *address, ordered before all later accesses of this thread.
__device__ __forceinline__ void red_add_release(uint32_t* address, uint32_t x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}
// Loads values that other CTAs have written or added, never from the L1 cache. cutlass::arch::global_load has no such
// load.
__device__ __forceinline__ float4 load_relaxed_v4(const float* address) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

// ------------------------------------------------------------------------------------------------- sm_90: mbarrier

// Blocks until the phase of this parity has ended. CUTLASS's wait passes a time limit to the hardware, which costs a
// second instruction and more registers. A wait with CUTLASS's try_wait would need a loop that is visible to the
// compiler. With either of them the attention forward spills and is up to 4% slower.
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
// Arrives for the threads that pass true, on the barrier of this CTA, or on the barrier at the same address in CTA
// `cta` of the cluster. CUTLASS uses a branch, which ends a basic block: the attention forward then spills.
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
__device__ __forceinline__ void mbarrier_arrive_if(bool arrives, uint32_t barrier, uint32_t cta) {
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

// ------------------------------------------------------------------------------------------------- sm_90: clusters

// Loads eight bytes from the same address in the shared memory of CTA `cta` of the cluster. CuTe has the address
// (set_block_rank) and the store, but not the load.
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

// ------------------------------------------------------------------------------------------------------ sm_90: TMA

// Store a box of a five-dimensional tensor map from shared memory to global memory, or add it to the values there. The
// operation is part of the thread's next bulk group. CuTe's stores and reductions have no cache hint.
__device__ __forceinline__ void tma_store_5d(const void* map, uint64_t hint, uint32_t smem, int32_t x0, int32_t x1,
                                             int32_t x2, int32_t x3, int32_t x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%1, %2, %3, %4, %5}], [%6], "
      "%7;" ::"l"(map),
      "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(smem), "l"(hint)
      : "memory");
}
__device__ __forceinline__ void tma_reduce_add_5d(const void* map, uint64_t hint, uint32_t smem, int32_t x0, int32_t x1,
                                                  int32_t x2, int32_t x3, int32_t x4) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group.L2::cache_hint [%0, {%1, %2, %3, %4, "
      "%5}], [%6], %7;" ::"l"(map),
      "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(smem), "l"(hint)
      : "memory");
}
// Waits until all but the last kPending bulk groups of the thread have written their data. CuTe's tma_store_wait waits
// only until they have read it.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_written() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---------------------------------------------------------------------------------------------------- sm_90a: wgmma

// Keeps the registers of operand `a` reserved until the products that read them have ended. Call it after the wait for
// these products. The compiler believes that the registers are free once the product is issued, unless something may
// read them later. Here that is a store that never happens: `never` is false, and the compiler must not know that.
// (cute::warpgroup_fence_operand leaves no instruction, so ptxas does not see it.)
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

// Makes the compiler compute x and y here, while the products are in flight. Call it before a wait; the compiler tends
// to move the computation behind the wait. It uses a store that never happens, as above.
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

}  // namespace illada::ptx
