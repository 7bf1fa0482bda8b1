// GEMMs on CUTLASS's warp-specialised main loops. A CTA computes d [128, 256] = a [128, K] . b [K, 256] with 16-bit
// elements and sums in fp32. CUTLASS provides the layouts of shared memory, the pipeline of TMA loads, the copies and
// the products. Our kernels choose the tiles and the steps of K and process the products.
//
// A CTA has one producer warp and two consumer warpgroups (cooperative: 64 rows of the tile each). The two CTAs of a
// cluster have neighbouring tiles of a and share b. Each loads half of b for both (multicast).
//
//   producer warp:        for each tile: load(m, n, step, steps); at the end: load_tail()
//   consumer warpgroups:  for each tile, in the same order: multiply(d, steps), then the kernel's epilogue on d
#pragma once

// The builder and the main loop that it picks here. collective_builder.hpp includes the main loops of all architectures
// and takes longer to compile.
#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>

#include "common/gemm_builder.cuh"
#include "common/registers_sm90.cuh"
#include "common/tensor_map.h"

namespace illada {

// Roles of a CTA; the layer between `Mainloop` (a CollectiveMma) and a kernel. The kernel walks over tiles. For each
// tile it calls `load` in the producer warp and `multiply` in the consumers, in the same order.
template <typename Mainloop_>
class Gemm {
 public:
  using Mainloop = Mainloop_;
  using Params = typename Mainloop::Params;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using TiledMma = typename Mainloop::TiledMma;
  using TileShape = typename Mainloop::TileShape;
  static constexpr int kTileM = cute::size<0>(TileShape{}), kTileN = cute::size<1>(TileShape{}),
                       kTileK = cute::size<2>(TileShape{});
  static constexpr int kConsumers = cute::size(TiledMma{}) / 128, kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerWarp = 4 * kConsumers;
  using Registers = RegisterSplit<kConsumers, 40, 232>;

  // Must be at the beginning of dynamic shared memory, which the kernel declares with __align__(1024). Its address is
  // then known at compile time and takes no registers.
  struct alignas(1024) Storage {
    typename Mainloop::TensorStorage tensors;
    typename Mainloop::PipelineStorage pipeline;
  };
  // The swizzle counts from multiples of 1024 bytes.
  static_assert(sizeof(Mainloop::TensorStorage::smem_A) % 1024 == 0 && offsetof(Storage, tensors) == 0);
  static constexpr int kSmemBytes = int(sizeof(Storage));
  static_assert(kSmemBytes <= 227 * 1024);

  // All threads of the CTA construct it, before anything else. `cluster`: the CTAs that share b, (2, 1, 1); or (1, 1,
  // 1) where the kernel has its own producer. `expects_bytes`: each load fills a whole stage, as Mainloop's loads do.
  template <typename Cluster>
  __device__ __forceinline__ Gemm(const Params& params, Storage& storage, Cluster cluster, bool expects_bytes = true)
      : params_(params), storage_(storage), pipeline_(storage.pipeline, pipeline_params(expects_bytes), cluster) {
    if (threadIdx.x == 0) Mainloop::prefetch_tma_descriptors(params);
    if (cute::size(cluster) > 1) {
      cute::cluster_sync();
    } else {
      __syncthreads();
    }
  }

  static __device__ __forceinline__ bool is_producer() { return int(threadIdx.x) >= 32 * kProducerWarp; }
  static __device__ __forceinline__ bool is_producer_warp() { return int(threadIdx.x) / 32 == kProducerWarp; }

  // Loads the rows of a from m * kTileM on and the columns of b from n * kTileN on. It loads `steps` steps of K,
  // numbered *step, *++step, ... The producer warp calls it. Elements outside of the tensor maps are 0.
  template <typename Steps>
  __device__ __forceinline__ void load(int m, int n, Steps step, int steps) {
    const auto sizes = cute::make_shape(0, 0, 0, 1);  // TMA knows them
    Mainloop().load(params_, pipeline_, producer_state(), Mainloop().load_init(sizes, params_),
                    cute::make_coord(m, n, cute::_, 0), step, steps, int(threadIdx.x) % 32,
                    cute::block_rank_in_cluster(), storage_.tensors);
    done_ += uint32_t(steps);
  }
  // Waits so that the CTA does not exit while its neighbour may still arrive at its barriers. The producer warp calls
  // it last.
  __device__ __forceinline__ void load_tail() { Mainloop().load_tail(pipeline_, producer_state()); }

  // Computes d in wgmma's accumulator layout, from at least one step. The consumers call it. d[4 j + 2 i + e] of thread
  // t is (row t / 32 * 16 + t % 32 / 4 + 8 i, column 8 j + t % 4 * 2 + e).
  __device__ __forceinline__ void multiply(float (&d)[kTileN / 2], int steps) {
    auto sums = cute::make_tensor(cute::make_rmem_ptr(&d[0]),
                                  cute::partition_shape_C(TiledMma{}, cute::take<0, 2>(TileShape{})));
    static_assert(cute::cosize_v<decltype(sums.layout())> == kTileN / 2 && cute::size(sums) == kTileN / 2);
    Mainloop().mma(pipeline_, consumer_state(), sums, steps, int(threadIdx.x), storage_.tensors, params_);
    Mainloop().mma_tail(pipeline_, consumer_state(), steps);
    cute::warpgroup_fence_operand(sums);  // the sums are not used before the wait in the tail
    done_ += uint32_t(steps);
  }
  // Releases the stages without a product, where the warpgroup has no work. A warp releases a stage for a CTA of the
  // cluster on behalf of the other three warps. These must have seen the stage by then: a late warp could miss two
  // phases of it. In `multiply`, as in all of CUTLASS's clusters, the products ensure that: wgmma begins when all four
  // warps have come.
  __device__ __forceinline__ void skip(int steps) {
    const uint32_t barrier = 1 + threadIdx.x / 128;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ++done_) {
      pipeline_.consumer_wait(consumer_state());
      __syncwarp();  // each lane waited on its own, and the barrier is for whole warps
      cutlass::arch::NamedBarrier::sync(128, barrier);
      pipeline_.consumer_release(consumer_state());
    }
  }

 protected:
  static __device__ __forceinline__ typename Pipeline::Params pipeline_params(bool expects_bytes) {
    typename Pipeline::Params params;
    params.transaction_bytes = Mainloop::TmaTransactionBytes;
    params.role = is_producer() ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    params.is_leader = is_producer() && expects_bytes;  // `load` elects one thread that expects the bytes
    params.num_consumers = 128 * kConsumers;
    return params;
  }

  using State = typename Pipeline::PipelineState;
  __device__ __forceinline__ State consumer_state() const {
    return {int(done_ % State::Stages), done_ / State::Stages & 1, done_};
  }
  __device__ __forceinline__ State producer_state() const {  // all stages are free at first
    return {int(done_ % State::Stages), ~(done_ / State::Stages) & 1, done_};
  }

  const Params& params_;
  Storage& storage_;
  Pipeline pipeline_;
  uint32_t done_ = 0;  // steps of K so far; live in the epilogues, where a state would take two registers
};

// Number of 128-byte rows of a TMA copy's box.
template <typename Copy>
constexpr int box_rows() {
  using Traits = typename Copy::Traits;
  constexpr int kRows = int(decltype(cute::size(typename Traits::RefLayout{}))::value) / (8 * 128);
  return kRows / cute::max(int(decltype(cute::size<0>(typename Copy::TiledLayout_TV{}))::value), 1);
}

// Returns a main loop's parameters, with tensor maps from the cache. CUTLASS's to_underlying_arguments would encode
// them again. a and b are row-major: [rows, K] where K is contiguous, else [K, rows].
template <typename Mainloop>
typename Mainloop::Params mainloop_params(const char* op, const MatrixView& a, const MatrixView& b) {
  typename Mainloop::Params params{};
  using Params = typename Mainloop::Params;
  params.tma_load_a.tma_desc_ = tensor_map_k128(op, a, box_rows<typename Params::TMA_A>());
  params.tma_load_b.tma_desc_ = tensor_map_k128(op, b, box_rows<typename Params::TMA_B>());
  return params;
}

}  // namespace illada
