// Bindings of the launch of a call, of variants and of the state of processors.
#include "bindings/fields.h"
#include "bindings/module.h"
#include "cpu/denormals.h"
#include "cpu/row_kernels.h"
#include "illada/variants.h"
#if defined(ILLADA_WITH_CUDA)
#include <pybind11/stl.h>

#include "common/driver_calls.h"
#endif

namespace illada::bindings {
namespace {

constexpr Field<CudaLaunch> kLaunchFields[] = {FIELD(device), FIELD(stream), FIELD(pointers_checked)};

constexpr const char* kLaunchName = "illada.CudaLaunch";

// Returns a capsule, so that Python can make a launch in no other way than by the names of its fields.
py::object launch(const CudaLaunch& launch) {
  return py::capsule(new CudaLaunch(launch), kLaunchName, [](PyObject* capsule) {
    delete static_cast<CudaLaunch*>(PyCapsule_GetPointer(capsule, kLaunchName));
  });
}

#if defined(ILLADA_WITH_CUDA)
// Returns the number of CUDA driver calls by purpose.
py::dict driver_calls() {
  py::dict d;
  d["pointer_queries"] = calls_of(DriverCall::kQueryPointer);
  d["capture_queries"] = calls_of(DriverCall::kQueryCapture);
  d["tensor_maps"] = calls_of(DriverCall::kEncodeTensorMap);
  d["launches"] = calls_of(DriverCall::kLaunch);
  return d;
}

// Lists the name, environment variable, description, values (the default first) and value in use of each variant.
py::list list_variants() {
  py::list all;
  for (const Variant& choice : variants())
    all.append(py::make_tuple(choice.name, choice.environment, choice.description, py::tuple(py::cast(choice.values)),
                              choice.value));
  return all;
}
#endif

}  // namespace

void read(PyObject* value, CudaLaunch& launch) {
  if (value == Py_None) {
    launch.device = -1;
    return;
  }
  const void* made = PyCapsule_GetPointer(value, kLaunchName);
  if (made == nullptr) {
    PyErr_Clear();
    PyErr_SetString(PyExc_TypeError, "must come from launch(), or be None for the CPU");
    throw py::error_already_set();
  }
  launch = *static_cast<const CudaLaunch*>(made);
}

void define_device(py::module_& m) {
  Function<kLaunchFields, launch>::define(m, "launch");
  m.def("flush_denormals", &cpu::flush_denormals);
  m.def("multiplies_bfloat16", &cpu::multiplies_bfloat16);
#if defined(ILLADA_WITH_CUDA)
  m.def("driver_calls", &driver_calls);
  m.def("variants", &list_variants);
  m.def("set_variant", &set_variant);
#endif
}

}  // namespace illada::bindings
