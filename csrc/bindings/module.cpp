// illada._C: functions that fill a Params struct from keywords (bindings/fields.h) and call the C++ API. illada.ops
// checks shapes and dtypes and allocates all memory; the C++ API checks values. Kernels run without the GIL, but for
// the short attention_plan_cpu and weighted_sum_cpu. The submodule cpu_calls computes whole ops on plain CPU tensors.
#include "bindings/module.h"

#include "bindings/fields.h"
#include "illada/illada.h"

namespace py = pybind11;

namespace {

py::dict info() {
  const illada::BuildInfo build = illada::build_info();
  py::dict d;
  d["version"] = build.version;
  d["compiler"] = build.compiler;
  d["openmp"] = build.openmp;
  d["cpu_isa"] = build.cpu_isa;
  d["cuda_version"] = build.cuda_version;
  d["cuda_archs"] = build.cuda_archs;
  d["cutlass_version"] = build.cutlass_version;
  d["no_cuda"] = build.no_cuda;
  return d;
}

}  // namespace

// The module needs no GIL: all state that calls share is atomic or behind a mutex.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native ops of illada; use illada.ops, which checks what this module does not.";
  m.attr("__version__") = ILLADA_VERSION;
  m.def("build_info", &info);
  illada::bindings::define_attention(m);
  illada::bindings::define_cpu_calls(m);
  illada::bindings::define_device(m);
  illada::bindings::define_loss(m);
  illada::bindings::define_remask(m);
  illada::bindings::define_sampling(m);
}
