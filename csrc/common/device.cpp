#include "common/device.h"

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>

#include "common/driver_calls.h"
#include "illada/illada.h"

namespace illada {
namespace {

// Do [a, a + a_bytes) and [b, b + b_bytes) share a byte?
bool overlap(const Region& a, const Region& b) {
  const auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
  return a.data && b.data && begin_a < begin_b + uintptr_t(b.bytes) && begin_b < begin_a + uintptr_t(a.bytes);
}

void check_region(const char* op, const Region& region, int device_index, bool ask) {
  if (region.bytes == 0 || (region.optional && !region.data)) return;
  ILLADA_CHECK(region.data, op, region.name, " must not be null");
  if (!ask) return;
  count_call(DriverCall::kQueryPointer);
  cudaPointerAttributes attributes{};
  ILLADA_CUDA_CHECK(op, cudaPointerGetAttributes(&attributes, region.data), "looking up the address of ", region.name);
  ILLADA_CHECK(attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged, op, region.name,
               " must be device memory, got a pointer to host memory");
  ILLADA_CHECK(attributes.type == cudaMemoryTypeManaged || attributes.device == device_index, op, region.name,
               " is memory of device ", attributes.device, ", but the launch is on device ", device_index);
}

bool is_capturing(const CudaLaunch& launch) {
  count_call(DriverCall::kQueryCapture);
  cudaStreamCaptureStatus status{};
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(launch.stream), &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // the default stream, while another one is captured: the launch says so
  return false;
}

}  // namespace

void check_regions(const char* op, const CudaLaunch& launch, const std::vector<Region>& inputs,
                   const std::vector<Region>& outputs) {
  const bool ask = !launch.pointers_checked && !is_capturing(launch);
  for (const Region& region : inputs) check_region(op, region, launch.device, ask);
  for (const Region& region : outputs) check_region(op, region, launch.device, ask);
  for (size_t i = 0; i < outputs.size(); ++i) {
    for (const Region& in : inputs)
      ILLADA_CHECK(!overlap(outputs[i], in), op, outputs[i].name, " overlaps ", in.name,
                   "; an output must not share memory");
    for (size_t j = i + 1; j < outputs.size(); ++j)
      ILLADA_CHECK(!overlap(outputs[i], outputs[j]), op, outputs[i].name, " overlaps ", outputs[j].name,
                   "; an output must not share memory");
  }
}

const Device& device(const char* op, int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  cudaDeviceProp properties{};
  ILLADA_CUDA_CHECK(op, cudaGetDeviceProperties(&properties, index), "reading the properties of device ", index);
  Device& entry = known[index];
  entry.index = index;
  entry.name = properties.name;
  entry.compute_capability = 10 * properties.major + properties.minor;
  entry.sm_count = properties.multiProcessorCount;
  entry.sm_smem_bytes = int(properties.sharedMemPerMultiprocessor);
  entry.reserved_smem_bytes = int(properties.reservedSharedMemPerBlock);
  return entry;
}

Arch arch_of([[maybe_unused]] const Device& device) {
#if defined(ILLADA_BUILT_SM90A)
  if (device.compute_capability == 90) return Arch::kSm90;
#endif
  return Arch::kSm80;
}

DeviceGuard::DeviceGuard(const char* op, int index) {
  int current = 0;
  ILLADA_CUDA_CHECK(op, cudaGetDevice(&current), "asking for the current device");
  if (current == index) return;
  ILLADA_CUDA_CHECK(op, cudaSetDevice(index), "using device ", index);
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void check_launch_shape(const char* op, const LaunchShape& shape) {
  const dim3 &grid = shape.grid, &block = shape.block;
  if (grid.x && grid.y && grid.z && block.x && block.y && block.z) return;
  detail::fail<std::logic_error>(op, "internal error: a launch of ", grid.x, " x ", grid.y, " x ", grid.z, " CTAs of ",
                                 block.x, " x ", block.y, " x ", block.z, " threads; please report it");
}

void fail_launch(const char* op, const LaunchShape& shape, cudaError_t status) {
  const dim3 &grid = shape.grid, &block = shape.block;
  fail_cuda(op, status, "launching ", grid.x, " x ", grid.y, " x ", grid.z, " CTAs (clusters of ", shape.cluster,
            ") of ", block.x, " x ", block.y, " x ", block.z, " threads with ", shape.smem_bytes,
            " bytes of shared memory");
}

void fill_zeros(const char* op, const CudaLaunch& launch, void* data, int64_t bytes) {
  if (bytes == 0) return;
  ILLADA_CUDA_CHECK(op, cudaMemsetAsync(data, 0, size_t(bytes), static_cast<cudaStream_t>(launch.stream)), "filling ",
                    bytes, " bytes with zeros");
}

int prepare_kernel(const char* op, const void* kernel, const Device& device, int smem_bytes) {
  struct Prepared {
    int code = 0;          // compute capability that the code was compiled for
    int static_bytes = 0;  // shared memory that the kernel has by itself
    int smem_bytes = 0;    // shared memory asked for so far
  };
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Prepared> prepared;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = prepared.try_emplace({kernel, device.index});
  if (is_new) {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) {
      prepared.erase(entry);
      cudaGetLastError();  // the error is told here, not by whoever asks CUDA next
      if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
          status == cudaErrorUnsupportedPtxVersion)
        detail::fail<NotSupported>(op, "no kernel was built for ", device.name, " (compute capability ",
                                   device.compute_capability / 10, ".", device.compute_capability % 10,
                                   "); built archs: ", build_info().cuda_archs,
                                   "; build with ILLADA_CUDA_ARCHS=", device.compute_capability,
                                   device.compute_capability == 90 ? "a-real" : "-real");
      ILLADA_CUDA_CHECK(op, status, "loading a kernel");
    }
    entry->second.code = attributes.ptxVersion;
    entry->second.static_bytes = int(attributes.sharedSizeBytes);
  }
  if (entry->second.static_bytes + smem_bytes > 48 * 1024 && smem_bytes > entry->second.smem_bytes) {
    ILLADA_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
                      "allowing a kernel ", smem_bytes, " bytes of shared memory");
    entry->second.smem_bytes = smem_bytes;
  }
  return entry->second.code;
}

int resident_ctas(const char* op, const void* kernel, const Device& device, int threads, int smem_bytes) {
  prepare_kernel(op, kernel, device, smem_bytes);
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({kernel, device.index}, 0);
  if (is_new) {
    const cudaError_t status =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&entry->second, kernel, threads, size_t(smem_bytes));
    if (status != cudaSuccess) known.erase(entry);
    ILLADA_CUDA_CHECK(op, status, "counting the CTAs of ", threads, " threads that fit a multiprocessor");
  }
  return entry->second;
}

}  // namespace illada
