// The main loop of GEMMs on sm_90a: d [128, 256] = a [128, K] . b [K, 256], 16-bit elements, sums in fp32.
//
// A CTA has one producer warp, which fills a ring of stages (64 of K each) by TMA, and two warpgroups, which multiply
// 64 rows each (wgmma m64n256k16). Two CTAs of a cluster, whose tiles of a are neighbours, share b: each loads half of
// it for both. What becomes of the products is the kernel's own: it walks over tiles, calls `load` in the producer and
// `multiply` in the consumers for each of them, in the same order.
//
//   full[s]   the TMA bytes of stage s have landed                         -> consumers
//   empty[s]  all eight warps (of both CTAs of a cluster) have read it     -> producer
//
// Each warp arrives at empty[s] for itself, after it has seen full[s]. A warp that others arrive for would hold nothing
// back: full[s] could end two more phases before that warp looks, and it would then wait for a third one.
//
// The warpgroups are half a step apart, no more: both wait for the same stages. So what they do with a tile's products
// is hidden from neither, and should be short.
#pragma once

#include <cuda.h>

#include "common/ptx.cuh"
#include "common/registers_sm90.cuh"
#include "common/ring.cuh"
#include "common/wgmma.cuh"

namespace illada {

// kMajorA, kMajorB: which dimension of a and b is contiguous in memory. kBoxB: rows (or columns) of b that one TMA box
// brings; the boxes of an operand that is contiguous along M or N have 64 of them.
template <typename T, Major kMajorA, Major kMajorB, int kBoxB>
class GemmSm90 {
 public:
  static constexpr int kTileM = 128, kTileN = 256, kTileK = 64, kStages = 4;
  static constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1), kProducerThread = 128 * kConsumers;
  using Registers = RegisterSplit<kConsumers, 40, 232>;
  static constexpr int kBoxA = kMajorA == Major::kK ? kTileM : 64, kBoxesB = kTileN / kBoxB;
  static_assert(kMajorB == Major::kK || kBoxB == 64);

  struct Storage {
    struct alignas(1024) Stage {
      char a[kTileM * kTileK * 2];
      char b[kTileN * kTileK * 2];
    } stage[kStages];
    uint64_t full[kStages], empty[kStages];
  };
  static constexpr int kSmemBytes = int(sizeof(Storage)) + 1024;  // it is aligned by hand
  static_assert(kSmemBytes <= 227 * 1024);

  // By all threads of the CTA, before anything else. `cluster`: CTAs that share b, 1 or 2, along x of the grid.
  __device__ __forceinline__ GemmSm90(char* raw_shared, const void* a_map, const void* b_map, int cluster)
      : a_map_(a_map), b_map_(b_map), cluster_(cluster), rank_(cluster > 1 ? int(ptx::cluster_cta_rank()) : 0) {
    storage_ = (ptx::smem_address(raw_shared) + 1023) / 1024 * 1024;
    if (threadIdx.x == 0) {
      ptx::prefetch_tensormap(a_map);
      ptx::prefetch_tensormap(b_map);
      for (int s = 0; s < kStages; ++s) {
        ptx::mbarrier_init(full(s), 1);
        ptx::mbarrier_init(empty(s), uint32_t(4 * kConsumers * cluster));
      }
      ptx::fence_mbarrier_init();
    }
    if (cluster > 1) {
      ptx::cluster_sync();
    } else {
      __syncthreads();
    }
  }

  // By all threads, last: no CTA leaves while its neighbour may still write into it or arrive at its barriers.
  __device__ __forceinline__ void finish() const {
    __syncwarp();  // the barrier is for whole warps, and one lane of the producer comes late
    if (cluster_ > 1) ptx::cluster_sync();
  }

  __device__ __forceinline__ int rank() const { return rank_; }
  // Where shared memory of the kernel's own may begin, 1024-byte aligned; it asks for kSmemBytes and as much more.
  __device__ __forceinline__ uint32_t end_of_storage() const { return storage_ + uint32_t(sizeof(Storage)); }

  // By the producer's thread: a from row a_first, b from row b_first and of it `boxes_b` boxes, for those of `k_tiles`
  // steps of K from step k_first that are wanted. What lies outside of the maps is 0. Without `shares_b` the CTAs of a
  // cluster load different b, of any number of boxes (none as well), but as many steps.
  __device__ __forceinline__ void load(int a_first, int b_first, int k_first, int k_tiles, int boxes_b = kBoxesB,
                                       bool shares_b = true) {
    load(a_first, b_first, k_first, k_tiles, boxes_b, [](int) { return true; }, shares_b);
  }
  template <typename Wanted>
  __device__ __forceinline__ void load(int a_first, int b_first, int k_first, int k_tiles, int boxes_b, Wanted wanted,
                                       bool shares_b = true) {
    const bool multicasts = cluster_ > 1 && shares_b;
    for (int k = k_first; k < k_first + k_tiles; ++k) {
      if (!wanted(k)) continue;
      ptx::mbarrier_wait(empty(ring_.stage), ring_.parity ^ 1);
      const uint32_t barrier = full(ring_.stage);
      ptx::mbarrier_arrive_expect_tx(barrier, uint32_t((kTileM + boxes_b * kBoxB) * kTileK * 2));
#pragma unroll
      for (int i = 0; i < kTileM / kBoxA; ++i) {
        const int at = a_first + i * kBoxA, x = kMajorA == Major::kK ? k * kTileK : at;
        ptx::tma_load_2d(a_of(ring_.stage) + uint32_t(i * kBoxA * kTileK * 2), a_map_, barrier, x,
                         kMajorA == Major::kK ? at : k * kTileK);
      }
      for (int i = multicasts ? rank_ : 0; i < boxes_b; i += multicasts ? cluster_ : 1) {
        const uint32_t target = b_of(ring_.stage) + uint32_t(i * kBoxB * kTileK * 2);
        const int at = b_first + i * kBoxB, x = kMajorB == Major::kK ? k * kTileK : at;
        const int y = kMajorB == Major::kK ? at : k * kTileK;
        if (multicasts) {
          ptx::tma_load_2d_multicast(target, b_map_, barrier, x, y, 3);
        } else {
          ptx::tma_load_2d(target, b_map_, barrier, x, y);
        }
      }
      ring_.advance();
    }
  }

  // By a warpgroup, on the rows 64 * warpgroup of the tile: d, in wgmma's layout (wgmma.cuh). At least one step.
  __device__ __forceinline__ void multiply(float (&d)[kTileN / 2], int warpgroup, int k_tiles) {
#pragma unroll 1
    for (int k = 0; k < k_tiles; ++k, ring_.advance()) {
      ptx::mbarrier_wait(full(ring_.stage), ring_.parity);
      // Steps of 16: 32 bytes on in a row of K, 16 rows of 128 bytes on where M or N is contiguous.
      constexpr uint64_t kStepA = kMajorA == Major::kK ? 2 : 128, kStepB = kMajorB == Major::kK ? 2 : 128;
      const uint64_t a = descriptor<kMajorA>(a_of(ring_.stage) + uint32_t(warpgroup * 64 * kTileK * 2));
      const uint64_t b = descriptor<kMajorB>(b_of(ring_.stage));
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileK / 16; ++step)
        ptx::wgmma_k16<T, kTileN, kMajorA, kMajorB>(d, a + uint64_t(step) * kStepA, b + uint64_t(step) * kStepB,
                                                    k > 0 || step > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the stage before this one has been read
      release((ring_.stage + kStages - 1) % kStages, k > 0);
    }
    ptx::wgmma_wait<0>(d);
    release((ring_.stage + kStages - 1) % kStages, true);
  }

  // The same without a product, where the warpgroup has nothing to do.
  __device__ __forceinline__ void skip(int k_tiles) {
#pragma unroll 1
    for (int k = 0; k < k_tiles; ++k, ring_.advance()) {
      ptx::mbarrier_wait(full(ring_.stage), ring_.parity);
      __syncwarp();  // the lane that arrives does so for all
      release(ring_.stage, true);
    }
  }

 private:
  __device__ __forceinline__ uint32_t a_of(int stage) const {
    return storage_ + uint32_t(stage * int(sizeof(typename Storage::Stage)));
  }
  __device__ __forceinline__ uint32_t b_of(int stage) const { return a_of(stage) + kTileM * kTileK * 2; }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return storage_ + uint32_t(offsetof(Storage, full)) + uint32_t(8 * stage);
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return storage_ + uint32_t(offsetof(Storage, empty)) + uint32_t(8 * stage);
  }
  template <Major kMajor>
  static __device__ __forceinline__ uint64_t descriptor(uint32_t smem) {
    if constexpr (kMajor == Major::kK) {
      return ptx::wgmma_descriptor_k128(smem);
    } else {
      return ptx::wgmma_descriptor_mn128(smem, 64 * kTileK * 2);
    }
  }
  // One lane of each warp for each CTA of the cluster, which may be just this one.
  __device__ __forceinline__ void release(int stage, bool really) const {
    const int cta = int(threadIdx.x) % 32;
    ptx::mbarrier_arrive_cluster_if(really && cta < cluster_, empty(stage), uint32_t(cta));
  }

  const void *a_map_, *b_map_;
  int cluster_, rank_;
  uint32_t storage_;
  Ring<kStages> ring_;
};

}  // namespace illada
