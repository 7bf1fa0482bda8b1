// The parts of illada._C. Each adds its functions to the module.
#pragma once

#include <pybind11/pybind11.h>

#include "illada/error.h"

namespace illada::bindings {

void define_attention(pybind11::module_& m);
void define_cpu_calls(pybind11::module_& m);  // functions of tensors, in a submodule
void define_device(pybind11::module_& m);
void define_loss(pybind11::module_& m);
void define_remask(pybind11::module_& m);
void define_sampling(pybind11::module_& m);

#if defined(ILLADA_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Runs an op without the GIL, on the device of its launch. A build without CUDA has no kernels for a GPU. A template,
// so that such a build needs no symbol of CUDA builds.
template <auto kOnCpu, auto kOnCuda, typename Params>
void run(const Params& params) {
  const pybind11::gil_scoped_release release;
  if (params.launch.device < 0) return kOnCpu(params);
  if constexpr (kWithCuda) {
    kOnCuda(params);
  } else {
    throw NotSupported("illada: this build has no CUDA kernels");
  }
}

// The same for an op of CUDA builds alone.
template <auto kOnCuda, typename Params>
void run_cuda(const Params& params) {
  const pybind11::gil_scoped_release release;
  kOnCuda(params);
}

}  // namespace illada::bindings
