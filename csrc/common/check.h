// Checks of CUDA calls (they throw CudaError) and of the pointers of a launch (they throw Error). The pointer checks
// run before anything is enqueued.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "illada/cuda.h"
#include "illada/error.h"

// Throws CudaError if a CUDA call fails. Arguments: the op, the call and, in words, the purpose of the call. Example:
// ILLADA_CUDA_CHECK("remask", cudaSetDevice(index), "using device ", index);
// It clears the thread's last error, so that the next query of CUDA does not report it again. A sticky error, such as a
// fault in an earlier kernel, stays with the context.
#define ILLADA_CUDA_CHECK(op, call, ...)                                                   \
  do {                                                                                     \
    const cudaError_t illada_status = (call);                                              \
    if (illada_status != cudaSuccess) ::illada::fail_cuda(op, illada_status, __VA_ARGS__); \
  } while (0)

namespace illada {

// Throws CudaError: "remask: using device 7: cudaErrorInvalidDevice (invalid device ordinal)".
template <typename... Parts>
[[noreturn]] void fail_cuda(const char* op, cudaError_t status, Parts&&... doing) {
  cudaGetLastError();
  detail::fail<CudaError>(op, std::forward<Parts>(doing)..., ": ", cudaGetErrorName(status), " (",
                          cudaGetErrorString(status), ")");
}

// Region of device memory that a launch reads or writes. A null pointer with bytes > 0 is an error unless optional.
struct Region {
  const char* name;
  const void* data;
  int64_t bytes;
  bool optional = false;
};

// Throws Error unless every region is memory of launch.device and no output shares a byte with another output or with
// an input. It asks CUDA about each region once. It does not ask CUDA where launch.pointers_checked is true, or during
// capture.
void check_regions(const char* op, const CudaLaunch& launch, const std::vector<Region>& inputs,
                   const std::vector<Region>& outputs);

}  // namespace illada
