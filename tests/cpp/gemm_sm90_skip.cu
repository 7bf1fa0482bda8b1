// The GEMM of common/gemm_sm90.cuh while one warp of the warpgroup that skips its rows comes late: see
// tests/cuda/test_cpp.py. Prints what a sum of 512 ones is, with and without a cluster.
#include <cuda_runtime.h>

#include <cstdio>

#include "common/device.h"
#include "common/gemm_sm90.cuh"
#include "common/tensor_map.h"
#include "illada/illada.h"

illada::BuildInfo illada::build_info() { return {}; }  // named by an error message that does not come up here

namespace {

using illada::BFloat16;
using Gemm = illada::GemmSm90<BFloat16, illada::Major::kK, illada::Major::kK, 64>;
// Each stage is filled twice, and not a third time: who has missed both phases waits for ever.
constexpr int kSteps = 2 * Gemm::kStages, kColumns = kSteps * Gemm::kTileK;
constexpr long long kLate = 200000000;  // clocks

__global__ __launch_bounds__(Gemm::kThreads,
                             1) void multiply_with_a_late_warp(const __grid_constant__ CUtensorMap a_map,
                                                               const __grid_constant__ CUtensorMap b_map, int cluster,
                                                               float* sums, illada::DependentLaunch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw_shared[];
  Gemm gemm(raw_shared, &a_map, &b_map, cluster);
  if (threadIdx.x >= Gemm::kProducerThread) {
    Gemm::Registers::as_producer();
    if (threadIdx.x == Gemm::kProducerThread) gemm.load(0, 0, 0, kSteps);
  } else {
    Gemm::Registers::as_consumer();
    if (threadIdx.x < 128) {
      float d[Gemm::kTileN / 2];
      gemm.multiply(d, 0, kSteps);
      if (threadIdx.x == 0) sums[blockIdx.x] = d[0];
    } else {
      const long long start = clock64();
      while (threadIdx.x / 32 == 7 && clock64() - start < kLate) {
      }
      gemm.skip(kSteps);
    }
  }
  gemm.finish();
#endif
}

void run(int cluster, const uint16_t* ones, float* sums) {
  const auto map = [&](int rows, int box_rows) {
    return illada::tensor_map_k128("test", {ones, illada::DType::kBFloat16, rows, kColumns, kColumns}, box_rows);
  };
  illada::LaunchShape shape;
  shape.grid = dim3(unsigned(cluster));
  shape.block = dim3(Gemm::kThreads);
  shape.smem_bytes = Gemm::kSmemBytes;
  shape.cluster = cluster;
  illada::launch_kernel("test", illada::device("test", 0), nullptr, shape, multiply_with_a_late_warp,
                        map(Gemm::kTileM, Gemm::kTileM), map(Gemm::kTileN, 64), cluster, sums);
  ILLADA_CUDA_CHECK("test", cudaDeviceSynchronize());
  float on_host[2];
  ILLADA_CUDA_CHECK("test", cudaMemcpy(on_host, sums, size_t(4 * cluster), cudaMemcpyDeviceToHost));
  for (int i = 0; i < cluster; ++i) std::printf("%g\n", double(on_host[i]));
}

}  // namespace

int main() {
  constexpr int kOnes = Gemm::kTileN * kColumns;
  static uint16_t on_host[kOnes];
  for (uint16_t& x : on_host) x = 0x3f80;
  uint16_t* ones;
  float* sums;
  ILLADA_CUDA_CHECK("test", cudaMalloc(&ones, sizeof(on_host)));
  ILLADA_CUDA_CHECK("test", cudaMalloc(&sums, 8));
  ILLADA_CUDA_CHECK("test", cudaMemcpy(ones, on_host, sizeof(on_host), cudaMemcpyHostToDevice));
  run(1, ones, sums);
  run(2, ones, sums);
}
