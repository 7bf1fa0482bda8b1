// The C++ API of illada, without Python and torch. Its functions take raw pointers, sizes and strides. No allocation
// outlives a call. Each op and direction has one Params struct and one function. Every function throws illada::Error,
// or CudaError where CUDA fails.
#pragma once

#include <string>

#include "illada/attention.h"
#include "illada/dtype.h"
#include "illada/error.h"
#include "illada/linear_loss.h"
#include "illada/loss.h"
#include "illada/remask.h"
#include "illada/sampling.h"
#include "illada/variants.h"

namespace illada {

// Properties of this build and of the machine: the fields of `illada info`.
struct BuildInfo {
  std::string version;          // version of the project, equal to the Python package's
  std::string compiler;         // compiler and its version, such as "GNU 12.2.0"
  bool openmp = false;          // true: CPU kernels distribute rows over threads
  std::string cpu_isa;          // instruction set chosen at run time: "avx512", "avx2" or "baseline"
  std::string cuda_version;     // version of the CUDA toolkit; empty without CUDA
  std::string cuda_archs;       // architectures, such as "80-real 90a-real 90-virtual"; empty without CUDA
  std::string cutlass_version;  // version of the CUTLASS headers used in the build; empty without CUDA
  std::string no_cuda;          // why there are no CUDA kernels; empty with CUDA
};
BuildInfo build_info();

}  // namespace illada
