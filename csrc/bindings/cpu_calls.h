#pragma once

#include <pybind11/pybind11.h>

namespace illada::bindings {

// Adds the CPU kernels of ops to the module, as calls that take tensors and allocate their results.
void add_cpu_calls(pybind11::module_& module);

}  // namespace illada::bindings
