// The C++ API of illada: raw pointers, sizes and strides in, nothing allocated that outlives a call, no Python, no
// torch. One Params struct and one function per op and direction; every function throws illada::Error, or CudaError
// where CUDA fails.
#pragma once

#include <string>

#include "illada/attention.h"
#include "illada/dtype.h"
#include "illada/error.h"
#include "illada/linear_loss.h"
#include "illada/loss.h"
#include "illada/remask.h"
#include "illada/variants.h"

namespace illada {

// What this build is and what it found: the fields of `illada info`.
struct BuildInfo {
  std::string version;          // of the project, equal to the Python package's
  std::string compiler;         // "GNU 12.2.0"
  bool openmp = false;          // rows are spread over threads
  std::string cpu_isa;          // the instruction set chosen at run time: "avx512", "avx2" or "baseline"
  std::string cuda_version;     // toolkit, empty without CUDA
  std::string cuda_archs;       // "80-real 90a-real 90-virtual", empty without CUDA
  std::string cutlass_version;  // of the headers that the kernels were built with, empty without CUDA
  std::string no_cuda;          // why there are no CUDA kernels, empty with CUDA
};
BuildInfo build_info();

}  // namespace illada
