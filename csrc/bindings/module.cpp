// illada._C: converts addresses and sizes to Params structs and calls the launch functions. All of them but
// attention_plan_cpu and weighted_sum_cpu run without the GIL. illada.ops checks shapes and dtypes and allocates all
// memory; the launch functions check values.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/cpu_calls.h"
#include "common/driver_calls.h"
#include "cpu/attention_plan.h"
#include "cpu/denormals.h"
#include "cpu/row_kernels.h"
#include "cpu/weighted_sum.h"
#include "illada/illada.h"
#if defined(ILLADA_WITH_CUDA)
#include "loss/linear.h"
#include "remask/launch.h"
#endif

namespace py = pybind11;
using namespace illada;

namespace {

// The address of a tensor's first element; null for None. An integer is an address already.
struct Address {
  uintptr_t value = 0;
  operator uintptr_t() const { return value; }
};

}  // namespace

namespace pybind11::detail {

// Calls data_ptr() in C++. That takes a third of the time of a call in Python and the conversion of its result.
template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("torch.Tensor | int | None"));

  bool load(handle source, bool /*convert*/) {
    if (source.is_none()) return true;
    object number = reinterpret_borrow<object>(source);
    if (!PyLong_Check(source.ptr())) {
      static PyObject* const name = PyUnicode_InternFromString("data_ptr");
      number = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), name));
      if (!number) throw error_already_set();
    }
    value.value = PyLong_AsSize_t(number.ptr());
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#if defined(ILLADA_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Launches on a GPU, or throws in builds without CUDA. A template, so that CPU builds need no symbol of CUDA builds.
template <auto launch, typename Params>
void on_gpu(const Params& params) {
  if constexpr (kWithCuda) {
    launch(params);
  } else {
    throw NotSupported("illada: this build has no CUDA kernels");
  }
}

// Arguments of a CUDA call: device, stream, pointers_checked, workspace, workspace_bytes. A negative device is the CPU.
using LaunchArguments = std::tuple<int, uintptr_t, bool, uintptr_t, int64_t>;

template <typename Params>
void set_launch(Params& p, const LaunchArguments& launch) {
  p.launch = {std::get<0>(launch), pointer<void>(std::get<1>(launch)), std::get<2>(launch)};
  p.workspace = pointer<void>(std::get<3>(launch));
  p.workspace_bytes = std::get<4>(launch);
}

// Arguments of both directions of masked_cross_entropy: logits, logits_row_stride, num_rows, vocab_size, dtype, rows,
// targets, targets_are_int64, weights, num_tokens, vocab_start, scale, normalizer.
using CrossEntropyArguments = std::tuple<Address, int64_t, int64_t, int64_t, int, Address, Address, bool, Address,
                                         int64_t, int64_t, float, Address>;

loss::MaskedCrossEntropyParams cross_entropy_params(const CrossEntropyArguments& rows, int num_threads,
                                                    const LaunchArguments& launch) {
  loss::MaskedCrossEntropyParams p;
  p.logits = pointer<const void>(std::get<0>(rows));
  p.logits_row_stride = std::get<1>(rows);
  p.num_rows = std::get<2>(rows);
  p.vocab_size = std::get<3>(rows);
  p.dtype = DType(std::get<4>(rows));
  p.rows = pointer<const int32_t>(std::get<5>(rows));
  p.targets = pointer<const void>(std::get<6>(rows));
  p.targets_are_int64 = std::get<7>(rows);
  p.weights = pointer<const float>(std::get<8>(rows));
  p.num_tokens = std::get<9>(rows);
  p.vocab_start = std::get<10>(rows);
  p.scale = std::get<11>(rows);
  p.normalizer = pointer<const float>(std::get<12>(rows));
  p.num_threads = num_threads;
  set_launch(p, launch);
  return p;
}

void masked_cross_entropy(const CrossEntropyArguments& rows, Address nll, Address lse, Address lse_parts,
                          Address target_logit, Address grad, int64_t grad_row_stride, int num_threads,
                          const LaunchArguments& launch) {
  auto p = cross_entropy_params(rows, num_threads, launch);
  p.nll = pointer<float>(nll);
  p.lse = pointer<float>(lse);
  p.lse_parts = pointer<float>(lse_parts);
  p.target_logit = pointer<float>(target_logit);
  p.grad = pointer<void>(grad);
  p.grad_row_stride = grad_row_stride;
  py::gil_scoped_release release;
  if (p.launch.device < 0) return loss::masked_cross_entropy_cpu(p);
  on_gpu<loss::masked_cross_entropy_cuda>(p);
}

void masked_cross_entropy_backward(const CrossEntropyArguments& rows, Address lse_parts, Address dlse, Address dloss,
                                   Address grad, int64_t grad_row_stride, int num_threads,
                                   const LaunchArguments& launch) {
  auto p = cross_entropy_params(rows, num_threads, launch);
  p.lse_parts = pointer<float>(lse_parts);
  p.dlse = pointer<const float>(dlse);
  p.dloss = pointer<const float>(dloss);
  p.grad = pointer<void>(grad);
  p.grad_row_stride = grad_row_stride;
  py::gil_scoped_release release;
  if (p.launch.device < 0) return loss::masked_cross_entropy_backward_cpu(p);
  on_gpu<loss::masked_cross_entropy_backward_cuda>(p);
}

// Sizes of a pack: total_q, total_k, num_sequences, num_heads, num_kv_heads, head_dim.
using PackArguments = std::tuple<int64_t, int64_t, int, int, int, int>;
// A packed tensor: address, token_stride, head_stride.
using ViewArguments = std::tuple<Address, int64_t, int64_t>;

attention::PackShape pack_shape(const PackArguments& pack) {
  return {std::get<0>(pack), std::get<1>(pack), std::get<2>(pack),
          std::get<3>(pack), std::get<4>(pack), std::get<5>(pack)};
}

attention::PackedView packed_view(const ViewArguments& view) {
  return {pointer<const void>(std::get<0>(view)), std::get<1>(view), std::get<2>(view)};
}

bool attention_plan_cpu(int64_t total_q, int num_sequences, Address cu_seqlens, Address cu_seqlens_k, Address seqused_k,
                        Address plan) {
  attention::PlanParams p;
  p.shape.total_q = total_q;
  p.shape.num_sequences = num_sequences;
  p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.cu_seqlens_k = pointer<const int32_t>(cu_seqlens_k);
  p.seqused_k = pointer<const int32_t>(seqused_k);
  p.plan = pointer<int32_t>(plan);
  return attention::plan_cpu(p);
}

void varlen_attention(const PackArguments& pack, int dtype, const ViewArguments& q, const ViewArguments& k,
                      const ViewArguments& v, float softmax_scale, Address plan, int64_t plan_rows, Address out,
                      Address lse, int num_threads, const LaunchArguments& launch) {
  attention::ForwardParams p;
  p.shape = pack_shape(pack);
  p.dtype = DType(dtype);
  p.q = packed_view(q);
  p.k = packed_view(k);
  p.v = packed_view(v);
  p.softmax_scale = softmax_scale;
  p.plan = pointer<const int32_t>(plan);
  p.plan_rows = plan_rows;
  p.out = pointer<void>(out);
  p.lse = pointer<float>(lse);
  p.num_threads = num_threads;
  set_launch(p, launch);
  py::gil_scoped_release release;
  if (p.launch.device < 0) return attention::forward_cpu(p);
  on_gpu<attention::forward_cuda>(p);
}

void weighted_sum_cpu(Address nll, Address weights, int64_t num_rows, double scale, Address loss) {
  loss::weighted_sum_cpu(pointer<const float>(nll), pointer<const float>(weights), num_rows, scale,
                         pointer<float>(loss));
}

void varlen_attention_backward(const PackArguments& pack, int dtype, const ViewArguments& dout, const ViewArguments& q,
                               const ViewArguments& k, const ViewArguments& v, Address out, Address lse, Address dlse,
                               float softmax_scale, Address plan, int64_t plan_rows, bool deterministic,
                               bool multiplies_twice, Address dq, Address dk, Address dv, int num_threads,
                               const LaunchArguments& launch) {
  attention::BackwardParams p;
  p.shape = pack_shape(pack);
  p.dtype = DType(dtype);
  p.dout = packed_view(dout);
  p.q = packed_view(q);
  p.k = packed_view(k);
  p.v = packed_view(v);
  p.out = pointer<const void>(out);
  p.lse = pointer<const float>(lse);
  p.dlse = pointer<const float>(dlse);
  p.softmax_scale = softmax_scale;
  p.plan = pointer<const int32_t>(plan);
  p.plan_rows = plan_rows;
  p.deterministic = deterministic;
  p.multiplies_twice = multiplies_twice;
  p.dq = pointer<void>(dq);
  p.dk = pointer<void>(dk);
  p.dv = pointer<void>(dv);
  p.num_threads = num_threads;
  set_launch(p, launch);
  py::gil_scoped_release release;
  if (p.launch.device < 0) return attention::backward_cpu(p);
  on_gpu<attention::backward_cuda>(p);
}

#if defined(ILLADA_WITH_CUDA)
void weighted_sum(Address nll, Address weights, int64_t num_rows, float scale, Address normalizer, Address loss,
                  int device, uintptr_t stream, bool pointers_checked) {
  loss::WeightedSumParams p;
  p.nll = pointer<const float>(nll);
  p.weights = pointer<const float>(weights);
  p.num_rows = num_rows;
  p.scale = scale;
  p.normalizer = pointer<const float>(normalizer);
  p.loss = pointer<float>(loss);
  p.launch = {device, pointer<void>(stream), pointers_checked};
  py::gil_scoped_release release;
  loss::weighted_sum_cuda(p);
}

void scale(uintptr_t data, int64_t count, int dtype, uintptr_t factor, int device, uintptr_t stream,
           bool pointers_checked) {
  loss::ScaleParams p;
  p.data = pointer<void>(data);
  p.count = count;
  p.dtype = DType(dtype);
  p.factor = pointer<const float>(factor);
  p.launch = {device, pointer<void>(stream), pointers_checked};
  py::gil_scoped_release release;
  loss::scale_cuda(p);
}
#endif

// Arguments of both sample_tokens and linear_sample_tokens: temperature, seed, step, temperatures, seeds, steps,
// row_ids, bias_ids, bias_values, bias_count, bias_row_stride, measure, token, confidence, logprob, entropy, margin,
// top_k, top_p, top_ks, top_ps, confidence_at_temperature.
using SampleArguments = std::tuple<float, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                                   uintptr_t, int64_t, int64_t, int, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                                   uintptr_t, int32_t, float, uintptr_t, uintptr_t, bool>;

remask::SampleTokensParams sample_params(int64_t num_rows, int64_t vocab_size, int dtype, const SampleArguments& sample,
                                         const LaunchArguments& launch) {
  remask::SampleTokensParams p;
  p.num_rows = num_rows;
  p.vocab_size = vocab_size;
  p.dtype = DType(dtype);
  p.temperature = std::get<0>(sample);
  p.seed = std::get<1>(sample);
  p.step = int32_t(std::get<2>(sample));
  p.temperatures = pointer<const float>(std::get<3>(sample));
  p.seeds = pointer<const int64_t>(std::get<4>(sample));
  p.steps = pointer<const int32_t>(std::get<5>(sample));
  p.row_ids = pointer<const int64_t>(std::get<6>(sample));
  p.bias_ids = pointer<const int32_t>(std::get<7>(sample));
  p.bias_values = pointer<const float>(std::get<8>(sample));
  p.bias_count = std::get<9>(sample);
  p.bias_row_stride = std::get<10>(sample);
  p.measure = remask::Measure(std::get<11>(sample));
  p.token = pointer<int64_t>(std::get<12>(sample));
  p.confidence = pointer<float>(std::get<13>(sample));
  p.logprob = pointer<float>(std::get<14>(sample));
  p.entropy = pointer<float>(std::get<15>(sample));
  p.margin = pointer<float>(std::get<16>(sample));
  p.top_k = std::get<17>(sample);
  p.top_p = std::get<18>(sample);
  p.top_ks = pointer<const int32_t>(std::get<19>(sample));
  p.top_ps = pointer<const float>(std::get<20>(sample));
  p.confidence_at_temperature = std::get<21>(sample);
  set_launch(p, launch);
  return p;
}

void sample_tokens(uintptr_t logits, int64_t logits_row_stride, int64_t num_rows, int64_t vocab_size, int dtype,
                   const SampleArguments& sample, int num_threads, const LaunchArguments& launch) {
  auto p = sample_params(num_rows, vocab_size, dtype, sample, launch);
  p.logits = pointer<const void>(logits);
  p.logits_row_stride = logits_row_stride;
  p.num_threads = num_threads;
  py::gil_scoped_release release;
  if (p.launch.device < 0) return remask::sample_tokens_cpu(p);
  on_gpu<remask::sample_tokens_cuda>(p);
}

#if defined(ILLADA_WITH_CUDA)
remask::LinearSampleTokensParams linear_sample_params(uintptr_t hidden, int64_t hidden_row_stride, int64_t num_tokens,
                                                      uintptr_t rows, uintptr_t weight, int64_t weight_row_stride,
                                                      int64_t width) {
  remask::LinearSampleTokensParams p;
  p.hidden = pointer<const void>(hidden);
  p.hidden_row_stride = hidden_row_stride;
  p.num_tokens = num_tokens;
  p.rows = pointer<const int32_t>(rows);
  p.weight = pointer<const void>(weight);
  p.weight_row_stride = weight_row_stride;
  p.width = width;
  return p;
}

int64_t linear_sample_tokens_workspace(uintptr_t hidden, int64_t hidden_row_stride, int64_t num_tokens, uintptr_t rows,
                                       uintptr_t weight, int64_t weight_row_stride, int64_t width, int64_t num_rows,
                                       int64_t vocab_size, int dtype, int device) {
  auto p = linear_sample_params(hidden, hidden_row_stride, num_tokens, rows, weight, weight_row_stride, width);
  p.sample.num_rows = num_rows;
  p.sample.vocab_size = vocab_size;
  p.sample.dtype = DType(dtype);
  p.sample.launch.device = device;
  return remask::linear_sample_tokens_workspace(p);
}

void linear_sample_tokens(uintptr_t hidden, int64_t hidden_row_stride, int64_t num_tokens, uintptr_t rows,
                          uintptr_t weight, int64_t weight_row_stride, int64_t width, int64_t num_rows,
                          int64_t vocab_size, int dtype, const SampleArguments& sample, const LaunchArguments& launch) {
  auto p = linear_sample_params(hidden, hidden_row_stride, num_tokens, rows, weight, weight_row_stride, width);
  p.sample = sample_params(num_rows, vocab_size, dtype, sample, launch);
  py::gil_scoped_release release;
  remask::linear_sample_tokens_cuda(p);
}

// Arguments of the fused head's loss: hidden, hidden_dtype, hidden_row_stride, num_tokens, weight, weight_row_stride,
// vocab_size, width, targets, targets_are_int64, weights, rows, num_rows, scale, normalizer, chunk_rows, nll,
// hidden_grad, weight_grad, weight_grad_dtype, add_to_weight_grad, filter_eps.
using LinearLossArguments =
    std::tuple<uintptr_t, int, int64_t, int64_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, bool, uintptr_t,
               uintptr_t, int64_t, float, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, int, bool, float>;

loss::LinearMaskedCrossEntropyParams linear_loss_params(const LinearLossArguments& arguments,
                                                        const LaunchArguments& launch) {
  loss::LinearMaskedCrossEntropyParams p;
  p.hidden = pointer<const void>(std::get<0>(arguments));
  p.hidden_dtype = DType(std::get<1>(arguments));
  p.hidden_row_stride = std::get<2>(arguments);
  p.num_tokens = std::get<3>(arguments);
  p.weight = pointer<const void>(std::get<4>(arguments));
  p.weight_row_stride = std::get<5>(arguments);
  p.vocab_size = std::get<6>(arguments);
  p.width = std::get<7>(arguments);
  p.targets = pointer<const void>(std::get<8>(arguments));
  p.targets_are_int64 = std::get<9>(arguments);
  p.weights = pointer<const float>(std::get<10>(arguments));
  p.rows = pointer<const int32_t>(std::get<11>(arguments));
  p.num_rows = std::get<12>(arguments);
  p.scale = std::get<13>(arguments);
  p.normalizer = pointer<const float>(std::get<14>(arguments));
  p.chunk_rows = std::get<15>(arguments);
  p.nll = pointer<float>(std::get<16>(arguments));
  p.hidden_grad = pointer<void>(std::get<17>(arguments));
  p.weight_grad = pointer<void>(std::get<18>(arguments));
  p.weight_grad_dtype = DType(std::get<19>(arguments));
  p.add_to_weight_grad = std::get<20>(arguments);
  p.filter_eps = std::get<21>(arguments);
  set_launch(p, launch);
  return p;
}

int64_t linear_masked_cross_entropy_workspace(const LinearLossArguments& arguments, int device) {
  return loss::linear_masked_cross_entropy_workspace(linear_loss_params(arguments, {device, 0, false, 0, 0}));
}

void linear_masked_cross_entropy(const LinearLossArguments& arguments, const LaunchArguments& launch) {
  const auto p = linear_loss_params(arguments, launch);
  py::gil_scoped_release release;
  loss::linear_masked_cross_entropy_cuda(p);
}

// Returns the number of CUDA driver calls by purpose.
py::dict driver_calls() {
  py::dict d;
  d["pointer_queries"] = calls_of(DriverCall::kQueryPointer);
  d["capture_queries"] = calls_of(DriverCall::kQueryCapture);
  d["tensor_maps"] = calls_of(DriverCall::kEncodeTensorMap);
  d["launches"] = calls_of(DriverCall::kLaunch);
  return d;
}

// Returns whether the caller computes the products of the gradients (variant loss_gradients). The caller then calls
// linear_masked_cross_entropy in parts.
bool linear_loss_by_mm() { return variant<LossGradients>() == LossGradients::kMm; }

// Returns (chunks, rows of a chunk, elements of a row of probabilities, whether the weight's gradient comes first), and
// the offsets in the workspace of the probabilities, hidden's rows and the product for hidden's gradient.
py::tuple linear_loss_layout(const LinearLossArguments& arguments, int device) {
  const loss::LinearPlan plan = loss::plan_linear(linear_loss_params(arguments, {device, 0, true, 0, 0}));
  return py::make_tuple(plan.chunks, plan.rows, plan.prob_stride, variant<LossOrder>() == LossOrder::kWeightFirst,
                        plan.probs, plan.hidden, plan.slabs);
}

template <void (*kPart)(const loss::LinearMaskedCrossEntropyParams&, int)>
void linear_loss_part(const LinearLossArguments& arguments, int chunk, const LaunchArguments& launch) {
  const auto p = linear_loss_params(arguments, launch);
  py::gil_scoped_release release;
  kPart(p, chunk);
}

// For tests: returns how linear_sample_tokens divides its work on a GPU of sm_count multiprocessors, as (CTAs of a
// cluster, ranges of the vocabulary, chunks of 32 ids in a range, tasks). A task is (CTA, row tile, range, its tiles,
// tiles of its neighbour). The range of a task without tiles is one past the last.
py::tuple head_plan(int64_t num_rows, int64_t vocab_size, int sm_count) {
  const remask::HeadPlan plan = remask::plan_head(num_rows, vocab_size, sm_count);
  py::list tasks;
  for (int item = 0; item < plan.items(); ++item) {
    for (int rank = 0; rank < plan.cluster; ++rank) {
      const remask::HeadTask task = plan.task(item, rank);
      tasks.append(py::make_tuple(item % plan.clusters * plan.cluster + rank, task.row_tile, task.slot,
                                  task.slot < plan.slots ? plan.tiles(task.slot) : 0, task.tiles));
    }
  }
  return py::make_tuple(plan.cluster, plan.slots, plan.chunks, tasks);
}

// Lists the name, environment variable, description, values (the default first) and value in use of each variant.
py::list list_variants() {
  py::list all;
  for (const Variant& choice : variants())
    all.append(py::make_tuple(choice.name, choice.environment, choice.description, py::tuple(py::cast(choice.values)),
                              choice.value));
  return all;
}

int64_t attention_plan_rows(const PackArguments& pack) { return attention::plan_rows(pack_shape(pack)); }
int64_t varlen_attention_workspace(const PackArguments& pack) { return attention::forward_workspace(pack_shape(pack)); }
// Returns (tile_tokens, cluster, key_tile, warps).
std::tuple<int, int, int, int> attention_forward_tiling(const PackArguments& pack, int device) {
  const attention::ForwardTiling cut = attention::forward_tiling(pack_shape(pack), device);
  return {cut.tile_tokens, cut.cluster, cut.key_tile, cut.warps};
}

void attention_plan(const PackArguments& pack, uintptr_t cu_seqlens, uintptr_t cu_seqlens_k, uintptr_t seqused_k,
                    uintptr_t plan, int device, uintptr_t stream, bool pointers_checked) {
  attention::PlanParams p;
  p.shape = pack_shape(pack);
  p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.cu_seqlens_k = pointer<const int32_t>(cu_seqlens_k);
  p.seqused_k = pointer<const int32_t>(seqused_k);
  p.plan = pointer<int32_t>(plan);
  p.launch = {device, pointer<void>(stream), pointers_checked};
  py::gil_scoped_release release;
  attention::plan_cuda(p);
}

int64_t varlen_attention_backward_workspace(const PackArguments& pack, bool deterministic, bool multiplies_twice,
                                            int device) {
  return attention::backward_workspace(pack_shape(pack), deterministic, multiplies_twice, device);
}
#endif

void remask_tokens(uintptr_t tokens, bool tokens_are_int64, int64_t num_tokens, uintptr_t rows, uintptr_t cu_rows,
                   int64_t num_rows, int64_t num_sequences, uintptr_t token, uintptr_t confidence, uintptr_t entropy,
                   int rule, float limit, uintptr_t limits, int64_t mask_id, int64_t min_commit, uintptr_t end_ids,
                   int64_t num_end_ids, uintptr_t committed, uintptr_t remaining, uintptr_t finished, uintptr_t ended,
                   int device, uintptr_t stream, bool pointers_checked) {
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
  p.limits = pointer<const void>(limits);
  p.mask_id = mask_id;
  p.min_commit = min_commit;
  p.end_ids = pointer<const int64_t>(end_ids);
  p.num_end_ids = num_end_ids;
  p.committed = pointer<int32_t>(committed);
  p.remaining = pointer<int32_t>(remaining);
  p.finished = pointer<bool>(finished);
  p.ended = pointer<bool>(ended);
  p.launch = {device, pointer<void>(stream), pointers_checked};
  py::gil_scoped_release release;
  if (device < 0) return remask::remask_cpu(p);
  on_gpu<remask::remask_cuda>(p);
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
  // All arguments are positional: keywords would cost 0.7 us a call.
  m.def("masked_cross_entropy", &masked_cross_entropy);
  m.def("masked_cross_entropy_backward", &masked_cross_entropy_backward);
  m.def("weighted_sum_cpu", &weighted_sum_cpu);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const NotSupported& error) {
      py::set_error(PyExc_NotImplementedError, error.what());
    }
  });
  bindings::add_cpu_calls(m);
  m.def("sample_tokens", &sample_tokens);
#if defined(ILLADA_WITH_CUDA)
  m.def("masked_cross_entropy_workspace", &loss::masked_cross_entropy_workspace);
  m.def("weighted_sum", &weighted_sum);
  m.def("scale", &scale);
  m.def("sample_tokens_workspace", &remask::sample_tokens_workspace);
  m.def("linear_sample_tokens", &linear_sample_tokens);
  m.def("linear_sample_tokens_workspace", &linear_sample_tokens_workspace);
  m.def("head_plan", &head_plan);
  m.def("linear_loss_by_mm", &linear_loss_by_mm);
  m.def("linear_loss_layout", &linear_loss_layout);
  m.def("linear_loss_probabilities", &linear_loss_part<loss::linear_probabilities_cuda>);
  m.def("linear_loss_scatter", &linear_loss_part<loss::linear_scatter_cuda>);
  m.def("linear_masked_cross_entropy", &linear_masked_cross_entropy);
  m.def("linear_masked_cross_entropy_workspace", &linear_masked_cross_entropy_workspace);
  m.def("driver_calls", &driver_calls);
  m.def("variants", &list_variants);
  m.def("set_variant", &set_variant);
  m.def("attention_plan", &attention_plan);
  m.def("attention_forward_tiling", &attention_forward_tiling);
  m.def("attention_plan_rows", &attention_plan_rows);
  m.def("varlen_attention_backward_workspace", &varlen_attention_backward_workspace);
  m.def("varlen_attention_workspace", &varlen_attention_workspace);
#endif
  m.def("remask", &remask_tokens);
  m.def("attention_plan_cpu", &attention_plan_cpu);
  m.def("varlen_attention", &varlen_attention);
  m.def("varlen_attention_backward", &varlen_attention_backward);
  m.def("flush_denormals", &cpu::flush_denormals);
  m.def("multiplies_bfloat16", &cpu::multiplies_bfloat16);
}
