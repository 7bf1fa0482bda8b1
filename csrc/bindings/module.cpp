// illada._C: addresses and sizes in, Params structs built, launch functions called without the GIL. Nothing else: the
// checks of shapes and dtypes and all allocation are in illada.ops, the checks of values in the launch functions.
#include <pybind11/pybind11.h>

#include "cpu/denormals.h"
#include "illada/illada.h"

namespace py = pybind11;
using namespace illada;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

loss::MaskedCrossEntropyParams cross_entropy_params(uintptr_t logits, int64_t logits_row_stride, uintptr_t rows,
                                                    uintptr_t targets, uintptr_t weights, uintptr_t nll, uintptr_t lse,
                                                    uintptr_t grad, int64_t grad_row_stride, int64_t num_rows,
                                                    int64_t num_tokens, int64_t vocab_size, float scale, int dtype,
                                                    int num_threads) {
  loss::MaskedCrossEntropyParams p;
  p.logits = pointer<const void>(logits);
  p.logits_row_stride = logits_row_stride;
  p.rows = pointer<const int32_t>(rows);
  p.targets = pointer<const int64_t>(targets);
  p.weights = pointer<const float>(weights);
  p.nll = pointer<float>(nll);
  p.lse = pointer<float>(lse);
  p.grad = pointer<void>(grad);
  p.grad_row_stride = grad_row_stride;
  p.num_rows = num_rows;
  p.num_tokens = num_tokens;
  p.vocab_size = vocab_size;
  p.scale = scale;
  p.dtype = DType(dtype);
  p.num_threads = num_threads;
  return p;
}

template <void (*launch)(const loss::MaskedCrossEntropyParams&), typename... Args>
void cross_entropy(Args... args) {
  const auto params = cross_entropy_params(args...);
  py::gil_scoped_release release;
  launch(params);
}

void sample_tokens(uintptr_t logits, int64_t logits_row_stride, int64_t num_rows, int64_t vocab_size, int dtype,
                   float temperature, int64_t seed, int64_t step, uintptr_t temperatures, uintptr_t seeds,
                   uintptr_t steps, uintptr_t row_ids, uintptr_t bias_ids, uintptr_t bias_values, int64_t bias_count,
                   int64_t bias_row_stride, int measure, uintptr_t token, uintptr_t confidence, uintptr_t logprob,
                   uintptr_t entropy, uintptr_t margin, int num_threads) {
  remask::SampleTokensParams p;
  p.logits = pointer<const void>(logits);
  p.logits_row_stride = logits_row_stride;
  p.num_rows = num_rows;
  p.vocab_size = vocab_size;
  p.dtype = DType(dtype);
  p.temperature = temperature;
  p.seed = seed;
  p.step = int32_t(step);
  p.temperatures = pointer<const float>(temperatures);
  p.seeds = pointer<const int64_t>(seeds);
  p.steps = pointer<const int32_t>(steps);
  p.row_ids = pointer<const int64_t>(row_ids);
  p.bias_ids = pointer<const int32_t>(bias_ids);
  p.bias_values = pointer<const float>(bias_values);
  p.bias_count = bias_count;
  p.bias_row_stride = bias_row_stride;
  p.measure = remask::Measure(measure);
  p.token = pointer<int64_t>(token);
  p.confidence = pointer<float>(confidence);
  p.logprob = pointer<float>(logprob);
  p.entropy = pointer<float>(entropy);
  p.margin = pointer<float>(margin);
  p.num_threads = num_threads;
  py::gil_scoped_release release;
  remask::sample_tokens_cpu(p);
}

void remask_tokens(uintptr_t tokens, bool tokens_are_int64, int64_t num_tokens, uintptr_t rows, uintptr_t cu_rows,
                   int64_t num_rows, int64_t num_sequences, uintptr_t token, uintptr_t confidence, uintptr_t entropy,
                   int rule, float limit, uintptr_t limits, int64_t mask_id, int64_t min_commit, uintptr_t committed) {
  remask::RemaskParams p;
  p.tokens = pointer<void>(tokens);
  p.tokens_are_int64 = tokens_are_int64;
  p.num_tokens = num_tokens;
  p.rows = pointer<const int32_t>(rows);
  p.cu_rows = pointer<const int32_t>(cu_rows);
  p.num_rows = num_rows;
  p.num_sequences = num_sequences;
  p.token = pointer<const int64_t>(token);
  p.confidence = pointer<const float>(confidence);
  p.entropy = pointer<const float>(entropy);
  p.rule = remask::Rule(rule);
  p.limit = limit;
  p.limits = pointer<const float>(limits);
  p.mask_id = mask_id;
  p.min_commit = min_commit;
  p.committed = pointer<int32_t>(committed);
  py::gil_scoped_release release;
  remask::remask_cpu(p);
}

py::dict info() {
  const BuildInfo build = build_info();
  py::dict d;
  d["version"] = build.version;
  d["compiler"] = build.compiler;
  d["openmp"] = build.openmp;
  d["cpu_isa"] = build.cpu_isa;
  d["cuda_version"] = build.cuda_version;
  d["cuda_archs"] = build.cuda_archs;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of illada; use illada.ops, which checks what this module does not.";
  m.attr("__version__") = ILLADA_VERSION;
  m.def("build_info", &info);
  // The signature is that of cross_entropy_params above, all positional: keywords would cost 0.7 us a call.
  m.def("masked_cross_entropy",
        &cross_entropy<&loss::masked_cross_entropy_cpu, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                       uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, float, int, int>);
  m.def("masked_cross_entropy_backward",
        &cross_entropy<&loss::masked_cross_entropy_backward_cpu, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t,
                       uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, float, int, int>);
  m.def("sample_tokens", &sample_tokens);
  m.def("remask", &remask_tokens);
  m.def("flush_denormals", &cpu::flush_denormals);
}
