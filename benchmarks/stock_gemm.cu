// CUTLASS's own kernel for a GEMM with the operands of the fused head's logits, d [M, N] = a [M, K] . b [N, K]^T in
// bfloat16, and without our epilogue: what `python -m benchmarks.stock_gemm` predicts beside our kernel. Compiled for
// each schedule: KERNEL_SCHEDULE and EPILOGUE_SCHEDULE are CUTLASS's names of it, TILE_M and TILE_N the tile of a CTA.
//
//   stock_gemm M N K
#include <cuda_runtime.h>

#include <cutlass/gemm/gemm.h>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>
#include <cstdio>
#include <cstdlib>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

namespace {

using Schedule = cutlass::gemm::KERNEL_SCHEDULE;
using EpilogueSchedule = cutlass::epilogue::EPILOGUE_SCHEDULE;
using Tile = cute::Shape<cute::Int<TILE_M>, cute::Int<TILE_N>, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
using Element = cutlass::bfloat16_t;
using Epilogue =
    cutlass::epilogue::collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
                                                     cutlass::epilogue::collective::EpilogueTileAuto, float, float,
                                                     void, cutlass::layout::RowMajor, 8, Element,
                                                     cutlass::layout::RowMajor, 8, EpilogueSchedule>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8, Element,
    cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(Epilogue::SharedStorage))>, Schedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

__global__ __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor) void illada_stock_gemm(
    const __grid_constant__ Kernel::Params params) {
  extern __shared__ __align__(1024) char raw_shared[];
  Kernel()(params, raw_shared);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

Element* zeros(size_t rows, size_t columns) {
  void* found = nullptr;
  check(cudaMalloc(&found, rows * columns * sizeof(Element)), "cudaMalloc");
  check(cudaMemset(found, 0, rows * columns * sizeof(Element)), "cudaMemset");
  return static_cast<Element*>(found);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s M N K\n", argv[0]);
    return 2;
  }
  const int m = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]);
  const cutlass::KernelHardwareInfo device = cutlass::KernelHardwareInfo::make_kernel_hardware_info<Kernel>(0);
  const Kernel::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                    {m, n, k, 1},
                                    {zeros(m, k), {k, cute::_1{}, 0}, zeros(n, k), {k, cute::_1{}, 0}},
                                    {{1.0f, 0.0f}, nullptr, {}, zeros(m, n), {n, cute::_1{}, 0}},
                                    device};
  if (!Kernel::can_implement(arguments)) {
    std::fprintf(stderr, "CUTLASS's kernel takes no %d x %d x %d\n", m, n, k);
    return 1;
  }
  const Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  check(cudaFuncSetAttribute(illada_stock_gemm, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize),
        "cudaFuncSetAttribute");
  void* kernel_arguments[] = {const_cast<Kernel::Params*>(&params)};
  cutlass::ClusterLauncher::launch(Kernel::get_grid_shape(params), {2, 1, 1}, Kernel::get_block_shape(),
                                   Kernel::SharedStorageSize, nullptr, reinterpret_cast<void*>(illada_stock_gemm),
                                   kernel_arguments);
  check(cudaDeviceSynchronize(), "the kernel");
  return 0;
}
