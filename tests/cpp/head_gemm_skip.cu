// The GEMM of sampling/head_gemm_sm90.cuh while one warp of the warpgroup that skips its rows comes late: see
// tests/cuda/test_cpp.py. Prints what a sum of 512 ones is, with and without a cluster.
#include <cuda_runtime.h>

#include <cstdio>

#include "common/device.h"
#include "illada/illada.h"
#include "sampling/head_gemm_sm90.cuh"

illada::BuildInfo illada::build_info() { return {}; }  // named by an error message that does not come up here

namespace {

using Gemm = illada::sampling::HeadGemm<illada::BFloat16>;
constexpr int kSlices = illada::sampling::HeadPlan::kTileSlices;
// Each stage is filled twice, and not a third time: who has missed both phases waits for ever.
constexpr int kSteps = 2 * Gemm::Pipeline::Stages, kColumns = kSteps * Gemm::kTileK;
constexpr long long kLate = 200000000;  // clocks

__global__ __launch_bounds__(Gemm::kThreads,
                             1) void multiply_with_a_late_warp(const __grid_constant__ Gemm::Params params,
                                                               const __grid_constant__ CUtensorMap slice_map,
                                                               int cluster, float* sums, illada::DependentLaunch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char raw_shared[];
  Gemm gemm(params, slice_map, *reinterpret_cast<Gemm::Storage*>(raw_shared), cluster);
  if (Gemm::is_producer()) {
    Gemm::Registers::as_producer();
    if (Gemm::is_producer_warp() && cute::elect_one_sync()) {
      gemm.load(0, 0, kSteps, kSlices, true);
      gemm.load_tail();
    }
  } else {
    Gemm::Registers::as_consumer();
    if (threadIdx.x < 128) {
      float d[Gemm::kTileN / 2];
      gemm.multiply(d, kSteps);
      if (threadIdx.x == 0) sums[blockIdx.x] = d[0];
    } else {
      const long long start = clock64();
      while (threadIdx.x / 32 == 7 && clock64() - start < kLate) {
      }
      gemm.skip(kSteps);
    }
  }
#endif
}

void run(int cluster, const uint16_t* ones, float* sums) {
  const auto rows = [&](int count) {
    return illada::MatrixView{ones, illada::DType::kBFloat16, count, kColumns, kColumns};
  };
  illada::LaunchShape shape;
  shape.grid = dim3(unsigned(cluster));
  shape.block = dim3(Gemm::kThreads);
  shape.smem_bytes = Gemm::kSmemBytes;
  shape.cluster = cluster;
  illada::launch_kernel("test", illada::device("test", 0), nullptr, shape, multiply_with_a_late_warp,
                        illada::mainloop_params<Gemm::Mainloop>("test", rows(Gemm::kTileM), rows(Gemm::kTileN)),
                        illada::tensor_map_k128("test", rows(Gemm::kTileN), illada::sampling::HeadPlan::kSliceIds),
                        cluster, sums);
  ILLADA_CUDA_CHECK("test", cudaDeviceSynchronize(), "waiting");
  float on_host[2];
  ILLADA_CUDA_CHECK("test", cudaMemcpy(on_host, sums, size_t(4 * cluster), cudaMemcpyDeviceToHost), "copying");
  for (int i = 0; i < cluster; ++i) std::printf("%g\n", double(on_host[i]));
}

}  // namespace

int main() {
  constexpr int kOnes = Gemm::kTileN * kColumns;
  static uint16_t on_host[kOnes];
  for (uint16_t& x : on_host) x = 0x3f80;
  uint16_t* ones;
  float* sums;
  ILLADA_CUDA_CHECK("test", cudaMalloc(&ones, sizeof(on_host)), "allocating");
  ILLADA_CUDA_CHECK("test", cudaMalloc(&sums, 8), "allocating");
  ILLADA_CUDA_CHECK("test", cudaMemcpy(ones, on_host, sizeof(on_host), cudaMemcpyHostToDevice), "copying");
  run(1, ones, sums);
  run(2, ones, sums);
}
