// Programmatic dependent launch: how a kernel begins, so that its launch may overlap the end of the kernel before it.
#pragma once

#if defined(__CUDACC__)
#include "common/ptx.cuh"
#endif

namespace illada {

// Last parameter of every kernel; launch_kernel fills it.
struct DependentLaunch {
  // Let the next kernel be scheduled as soon as all CTAs of this one have begun; otherwise, once they have ended.
  bool early;
};

#if defined(__CUDACC__)
// By all threads, before the first access to global memory: waits for the kernels before this one in the stream.
__device__ __forceinline__ void wait_for_previous_kernel(const DependentLaunch& launch) {
  ptx::griddepcontrol_wait();
  if (launch.early) ptx::griddepcontrol_launch_dependents();
}
#endif

}  // namespace illada
