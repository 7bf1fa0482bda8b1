// Programmatic dependent launch: the beginning of a kernel whose launch may overlap the end of the kernel before it.
#pragma once

#if defined(__CUDACC__)
#include "common/ptx.cuh"
#endif

namespace illada {

// Last parameter of every kernel; launch_kernel fills it.
struct DependentLaunch {
  // True: the next kernel may be scheduled as soon as all CTAs of this one have begun. False: once they have ended.
  bool early;
};

#if defined(__CUDACC__)
// Waits for the kernels before this one in the stream. All threads call it, before their first access to global memory.
__device__ __forceinline__ void wait_for_previous_kernel(const DependentLaunch& launch) {
  ptx::griddepcontrol_wait();
  if (launch.early) ptx::griddepcontrol_launch_dependents();
}
#endif

}  // namespace illada
