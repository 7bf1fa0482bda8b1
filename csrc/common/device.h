// Device properties that the host side of a launch needs, and the launch itself.
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

// Families of kernels. kSm80 runs on compute capability 8.0 and newer, kSm90 (wgmma and TMA, built for sm_90a) on 9.0
// alone.
enum class Arch { kSm80, kSm90 };

struct Device {
  int index = 0;
  std::string name;            // "NVIDIA H100 80GB HBM3"
  int compute_capability = 0;  // 10 * major + minor
  int sm_count = 0;
  int sm_smem_bytes = 0;        // shared memory of an SM, for all its CTAs
  int reserved_smem_bytes = 0;  // shared memory reserved per CTA, in addition to what it asks for
};

// Returns a device's properties. They are read once per process. Thread-safe.
const Device& device(const char* op, int index);

// Returns the newest family of kernels that was built and runs on a device.
Arch arch_of(const Device& device);

// Makes a device current for a scope. It costs nothing if the device is already current.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Prepares a kernel, once per kernel and device. It checks that there is code for this GPU and lets the kernel use
// `smem_bytes` of shared memory. Throws NotSupported, naming kernel and GPU, if there is no code. Returns the compute
// capability that the code was compiled for, which may be older than the GPU's (PTX for 80 on 90). From 90 on, a kernel
// may use clusters and itself waits for the kernel before it.
int prepare_kernel(const char* op, const void* kernel, const Device& device, int smem_bytes);
// Returns the number of CTAs of the kernel that an SM holds at a time. Asks the runtime once per kernel and device.
int resident_ctas(const char* op, const void* kernel, const Device& device, int threads, int smem_bytes);

// Grid, block and attributes of a launch.
struct LaunchShape {
  dim3 grid, block;
  int smem_bytes = 0;
  int cluster = 1;  // CTAs per cluster, along x
  // True: the kernel begins with wait_for_previous_kernel, so that its launch may overlap the end of the kernel before
  // it (sm_90 and newer).
  bool dependent = false;
  // True: all CTAs run at the same time, or the launch fails. CTAs may then wait for each other.
  bool cooperative = false;
};

// Throws std::logic_error if there would be no CTA or no thread. An empty grid is always a mistake of this library, not
// of its caller. CUDA's error for it names neither the launch nor the reason.
void check_launch_shape(const char* op, const LaunchShape& shape);

// Throws a CudaError that says what was launched.
[[noreturn]] void fail_launch(const char* op, const LaunchShape& shape, cudaError_t status);

// Enqueues zeros for `bytes` of device memory. The caller holds a DeviceGuard.
void fill_zeros(const char* op, const CudaLaunch& launch, void* data, int64_t bytes);

// Launches kernel<<<...>>>(arguments..., DependentLaunch) with the checks above. The caller holds a DeviceGuard.
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
