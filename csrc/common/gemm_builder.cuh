// Arguments of CUTLASS's builder for our GEMMs. Another architecture is another Arch here.
#pragma once

#include <cutlass/arch/mma.h>
#include <cstdint>
#include <cute/layout.hpp>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>

#include "common/dtype.cuh"

namespace illada {

// Strides of an operand [M or N, K, 1] as the builder takes them, named by the contiguous dimension. There is only one
// matrix. Its constant stride of 0 keeps the third coordinate out of the tensor maps.
using KMajor = cute::Stride<int64_t, cute::_1, cute::_0>;
using MnMajor = cute::Stride<cute::_1, int64_t, cute::_0>;

// GEMM settings that differ between architectures.
template <typename Arch>
struct GemmSchedule;
template <>
struct GemmSchedule<cutlass::arch::Sm90> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Stages = cutlass::gemm::collective::StageCount<4>;
};

// Used only by a compile check (tests/cpp/weight_grad_sm100.cu). No kernel for it is shipped.
template <>
struct GemmSchedule<cutlass::arch::Sm100> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized2SmSm100;
  using Tile = cute::Shape<cute::_256, cute::_256, cute::_64>;  // tile of two CTAs
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Stages = cutlass::gemm::collective::StageCount<4>;
};

template <typename Arch, typename T, typename LayoutA, typename LayoutB, typename Schedule = GemmSchedule<Arch>>
using GemmMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    Arch, cutlass::arch::OpClassTensorOp, CutlassElement<T>, LayoutA, 8, CutlassElement<T>, LayoutB, 8, float,
    typename Schedule::Tile, typename Schedule::Cluster, typename Schedule::Stages,
    typename Schedule::Mainloop>::CollectiveOp;

}  // namespace illada
