// Which shared memory a launch asks for where static and dynamic together need more than 48 KB, and neither alone: see
// tests/cuda/test_cpp.py. Then what is said of a launch that CUDA refuses.
#include <cuda_runtime.h>

#include <cstdio>

#include "common/device.h"
#include "illada/illada.h"

illada::BuildInfo illada::build_info() { return {}; }  // named by an error message that does not come up here

namespace {

constexpr int kStatic = 272, kDynamic = 48 * 1024 - kStatic / 2;

__global__ void use_both(int* out, illada::DependentLaunch) {
  __shared__ int fixed[kStatic / 4];
  extern __shared__ int rest[];
  fixed[threadIdx.x] = int(threadIdx.x);
  rest[kDynamic / 4 - 1 - threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = fixed[31 - threadIdx.x] + rest[kDynamic / 4 - 32 + threadIdx.x];
}

}  // namespace

int main() {
  int* out;
  ILLADA_CUDA_CHECK("test", cudaMalloc(&out, 128), "allocating");
  illada::LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(32);
  shape.smem_bytes = kDynamic;
  illada::launch_kernel("test", illada::device("test", 0), nullptr, shape, use_both, out);
  ILLADA_CUDA_CHECK("test", cudaDeviceSynchronize(), "waiting");
  int first = 0;
  ILLADA_CUDA_CHECK("test", cudaMemcpy(&first, out, 4, cudaMemcpyDeviceToHost), "copying");
  cudaFuncAttributes attributes{};
  ILLADA_CUDA_CHECK("test", cudaFuncGetAttributes(&attributes, use_both), "asking");
  std::printf("%d static, %d dynamic, at most %d; %d\n", int(attributes.sharedSizeBytes), kDynamic,
              attributes.maxDynamicSharedSizeBytes, first);

  shape.block = dim3(2048);
  shape.smem_bytes = 0;
  try {
    illada::launch_kernel("test", illada::device("test", 0), nullptr, shape, use_both, out);
  } catch (const illada::CudaError& error) {
    std::printf("%s; then %s\n", error.what(), cudaGetErrorName(cudaGetLastError()));
  }
}
