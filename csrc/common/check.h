// Checks of CUDA calls (they throw CudaError) and of the pointers of a launch (Error), before anything is enqueued.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "illada/cuda.h"
#include "illada/error.h"

// ILLADA_CUDA_CHECK("remask", cudaSetDevice(index), "using device ", index);
// The op, the call and, in words, what it was for. The thread's last error is cleared: it is told here, and not by
// whoever asks CUDA next. An error that sticks, such as a fault in an earlier kernel, stays with the context.
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

// A region of device memory that a launch reads or writes. A null pointer with bytes > 0 is an error unless optional.
struct Region {
  const char* name;
  const void* data;
  int64_t bytes;
  bool optional = false;
};

// Every region is memory of launch.device; no output shares a byte with another output or with an input. CUDA is asked
// about a region once, and about none where launch.pointers_checked says that the caller knows, or during capture.
void check_regions(const char* op, const CudaLaunch& launch, const std::vector<Region>& inputs,
                   const std::vector<Region>& outputs);

}  // namespace illada
