// GEMM of the fused head on sm_90a. CUTLASS provides the products and the pipeline; the producer is ours.
#pragma once

#include "common/gemm_mainloop.cuh"
#include "sampling/launch.h"

namespace illada::sampling {

// GEMM with a producer of our own on CUTLASS's pipeline and layouts. CUTLASS's `load` brings whole tiles of b for a
// cluster size that is known at compile time. That does not fit here, for three reasons:
//   - A range of ids may end after any slice.
//   - Few rows have no cluster.
//   - The two CTAs of a cluster may both have the odd last row tile, each with different ids.
// `slice_map`: tensor map with boxes of one slice of ids.
template <typename T>
class HeadGemm : public Gemm<GemmMainloop<cutlass::arch::Sm90, T, KMajor, KMajor>> {
 public:
  using Base = Gemm<GemmMainloop<cutlass::arch::Sm90, T, KMajor, KMajor>>;

  __device__ __forceinline__ HeadGemm(const typename Base::Params& params, const CUtensorMap& slice_map,
                                      typename Base::Storage& storage, int cluster)
      : Base(params, storage, shape_of(cluster), false),
        slice_map_(slice_map),
        cluster_(cluster),
        rank_(cluster > 1 ? int(cute::block_rank_in_cluster()) : 0) {}

  __device__ __forceinline__ int rank() const { return rank_; }

  // Loads all tiles of K of a row tile and of `slices` slices of ids. One thread of the producer calls it. If the
  // cluster shares the ids (`shares_ids`), each CTA loads one half for both CTAs, in one box where the tile is whole.
  // Otherwise the CTAs have different ids and any number of slices (possibly none), but the same number of tiles of K.
  __device__ __forceinline__ void load(int row, int id, int k_tiles, int slices, bool shares_ids) {
    constexpr int kSlice = HeadPlan::kSliceIds, kRowBytes = Base::kTileK * int(sizeof(T));
    constexpr uint64_t kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    constexpr int kHalf = Base::kTileN / 2;
    static_assert(box_rows<typename Base::Params::TMA_B>() == kHalf);
    const bool multicasts = cluster_ > 1 && shares_ids, whole = multicasts && slices == HeadPlan::kTileSlices;
    // Boxes begin at multiples of eight rows, where the swizzle does not change addresses.
    const auto a = cute::get_nonswizzle_portion(typename Base::Mainloop::SmemLayoutA{});
    const auto b = cute::get_nonswizzle_portion(typename Base::Mainloop::SmemLayoutB{});
    auto& tensors = this->storage_.tensors;
    const auto* a_map = this->params_.tma_load_a.get_tma_descriptor();
    const auto* b_map = this->params_.tma_load_b.get_tma_descriptor();
    for (int k = 0; k < k_tiles; ++k, ++this->done_) {
      const auto state = this->producer_state();
      const int stage = state.index();
      this->pipeline_.producer_acquire(state);
      uint64_t* const barrier = this->pipeline_.producer_get_barrier(state);
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
          barrier, uint32_t((Base::kTileM + slices * kSlice) * kRowBytes));
      cute::SM90_TMA_LOAD_2D::copy(a_map, barrier, kHint, tensors.smem_A.data() + a(0, 0, stage), k * Base::kTileK,
                                   row);
      const auto load_b = [&](const CUtensorMap* map, int first) {
        void* const target = tensors.smem_B.data() + b(first, 0, stage);
        if (multicasts) {
          cute::SM90_TMA_LOAD_MULTICAST_2D::copy(map, barrier, uint16_t(3), kHint, target, k * Base::kTileK,
                                                 id + first);
        } else {
          cute::SM90_TMA_LOAD_2D::copy(map, barrier, kHint, target, k * Base::kTileK, id + first);
        }
      };
      if (whole) {
        load_b(b_map, rank_ * kHalf);
      } else {
        for (int i = multicasts ? rank_ : 0; i < slices; i += multicasts ? cluster_ : 1)
          load_b(&slice_map_, i * kSlice);
      }
    }
  }
  __device__ __forceinline__ void load_tail() { this->pipeline_.producer_tail(this->producer_state()); }

 private:
  static __device__ __forceinline__ auto shape_of(int cluster) {
    return cute::make_shape(cluster, cute::_1{}, cute::_1{});
  }
  const CUtensorMap& slice_map_;
  int cluster_, rank_;
};

}  // namespace illada::sampling
