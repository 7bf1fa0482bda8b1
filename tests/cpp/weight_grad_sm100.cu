// The weight's gradient of the fused head's loss for sm_100a, probabilities^T . hidden's rows in float32: the builder's
// arguments are those of the kernels for sm_90a but for the architecture (common/gemm_builder.cuh). CUTLASS's kernel is
// around it: rows known on the device, filter_eps and the addition to a gradient are not. Compiled only: see
// tests/builds/test_gemm_sm100.py.
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "common/gemm_builder.cuh"

namespace {

using Arch = cutlass::arch::Sm100;
using Schedule = illada::GemmSchedule<Arch>;
using Mainloop = illada::GemmMainloop<Arch, illada::BFloat16, illada::MnMajor, illada::MnMajor>;
using Epilogue =
    cutlass::epilogue::collective::CollectiveBuilder<Arch, cutlass::arch::OpClassTensorOp, Schedule::Tile,
                                                     Schedule::Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
                                                     float, float, void, illada::KMajor, 4, float, illada::KMajor, 4,
                                                     cutlass::epilogue::TmaWarpSpecialized2Sm>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

}  // namespace

__global__ __launch_bounds__(Kernel::MaxThreadsPerBlock,
                             1) void illada_weight_grad_sm100(const __grid_constant__ Kernel::Params params) {
  extern __shared__ __align__(1024) char raw_shared[];
  Kernel()(params, raw_shared);
}
