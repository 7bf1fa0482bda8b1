// Checks of CUDA calls and of the pointers of a launch. All throw illada::Error, before anything is enqueued.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "illada/cuda.h"
#include "illada/error.h"

// ILLADA_CUDA_CHECK("remask", cudaGetLastError());
#define ILLADA_CUDA_CHECK(op, call)                                                  \
  do {                                                                               \
    const cudaError_t illada_status = (call);                                        \
    if (illada_status != cudaSuccess)                                                \
      ::illada::detail::fail(op, #call, ": ", cudaGetErrorName(illada_status), ", ", \
                             cudaGetErrorString(illada_status));                     \
  } while (0)

namespace illada {

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
