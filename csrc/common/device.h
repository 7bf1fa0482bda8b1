// What the host side of a launch needs to know of a device, and the launch itself.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/dependent_launch.h"
#include "common/driver_calls.h"
#include "common/variants.h"

namespace illada {

struct Device {
  int index = 0;
  std::string name;            // "NVIDIA H100 80GB HBM3"
  int compute_capability = 0;  // 10 * major + minor
  int sm_count = 0;
  int sm_smem_bytes = 0;        // shared memory of a multiprocessor, for all its CTAs
  int reserved_smem_bytes = 0;  // of each CTA, beside what it asks for
};

// Properties of a device, read once a process; thread-safe.
const Device& device(const char* op, int index);

// Makes a device current for a scope; costs nothing where it is already.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Once a kernel and device: is there code for this GPU (else NotSupported, naming both), and may it use `smem_bytes`?
// The compute capability that its code was compiled for, which may be older than the GPU's (PTX for 80 on 90): from 90
// on it may use clusters, and waits for the kernel before it by itself.
int prepare_kernel(const char* op, const void* kernel, const Device& device, int smem_bytes);
// How many CTAs of the kernel an SM holds at a time, asked of the runtime once a kernel and device.
int resident_ctas(const char* op, const void* kernel, const Device& device, int threads, int smem_bytes);

struct LaunchShape {
  dim3 grid, block;
  int smem_bytes = 0;
  int cluster = 1;  // CTAs of a cluster, along x
  // The kernel begins with wait_for_previous_kernel: its launch may overlap the end of the kernel before it (sm_90+).
  bool dependent = false;
  // All CTAs at a time, or an error: they may wait for each other.
  bool cooperative = false;
};

// Throws std::logic_error where there would be no CTA or no thread: an empty grid is a mistake of the library, whoever
// called it, and CUDA's error for it says neither which launch nor why.
void check_launch_shape(const char* op, const LaunchShape& shape);

// Throws CudaError that says what was launched.
[[noreturn]] void fail_launch(const char* op, const LaunchShape& shape, cudaError_t status);

// Zeros in `bytes` of device memory, enqueued as a launch is. The caller holds a DeviceGuard.
void fill_zeros(const char* op, const CudaLaunch& launch, void* data, int64_t bytes);

// kernel<<<...>>>(arguments..., DependentLaunch) with the checks above. The caller holds a DeviceGuard.
template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* op, const Device& device, void* stream, const LaunchShape& shape,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  check_launch_shape(op, shape);
  const int code = prepare_kernel(op, reinterpret_cast<const void*>(kernel), device, shape.smem_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = size_t(shape.smem_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {unsigned(shape.cluster), 1, 1};
    ++count;
  }
  const auto overlap = variant<ProgrammaticLaunch>();
  if (shape.dependent && code >= 90 && overlap != ProgrammaticLaunch::kOff) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  count_call(DriverCall::kLaunch);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...,
                                                DependentLaunch{overlap == ProgrammaticLaunch::kEarly});
  if (status != cudaSuccess) fail_launch(op, shape, status);
}

}  // namespace illada
