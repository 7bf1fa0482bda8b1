// Ops on plain CPU tensors in one call of C each. For small tensors, the attributes, checks and small torch calls of
// the same work in Python take longer than the kernels.
//
// A `_fits` function returns whether all checks of the public function pass, and nothing watches the call. The others
// compute an op from the arguments of its schema and return its results. They return None for arguments that they do
// not handle. illada.ops has the same work in Python for those, with all messages.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bindings/module.h"
#include "bindings/torch_tensors.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "illada/illada.h"

namespace py = pybind11;

namespace illada::bindings {
namespace {

using MaybeView = std::optional<View>;

bool any_negated(std::initializer_list<py::handle> tensors) {
  for (const py::handle tensor : tensors) {
    if (is_negated(tensor)) return true;
  }
  return false;
}

// Calls f, which returns an object; None where torch made other tensors than expected.
template <typename F>
py::object or_none(F&& f) {
  try {
    return f();
  } catch (const NotPlain&) {
    return py::none();
  }
}

// An argument that may be None: `given` is then false. `seen` is empty for tensors without a view.
struct OptionalTensor {
  explicit OptionalTensor(py::handle tensor) : given(!tensor.is_none()), seen(given ? view(tensor) : std::nullopt) {}
  bool readable() const { return !given || seen; }

  bool given;
  MaybeView seen;
};

// ---------------------------------------------------------------------------------------------------------- attention

attention::PackedView packed_view(const View& x) { return {x.data<void>(), x.stride(0), x.stride(1)}; }

// True for q [T, H, D] and k, v [Tk, G, D] of one type, contiguous in D.
bool are_packed(const MaybeView& q, const MaybeView& k, const MaybeView& v) {
  return q && k && v && q->is_activation() && k->has_type_of(*q) && v->has_type_of(*q) && q->dims() == 3 &&
         k->dims() == 3 && k->size(2) == q->size(2) && v->has_shape({k->size(0), k->size(1), k->size(2)}) &&
         q->last_is_contiguous() && k->last_is_contiguous() && v->last_is_contiguous();
}

// True for q, k, v and a plan whose sequences all go to csrc/cpu: none has more keys than max_keys.
bool are_for_kernel(const MaybeView& q, const MaybeView& k, const MaybeView& v, const MaybeView& plan,
                    int64_t num_sequences, int64_t max_keys) {
  if (!are_packed(q, k, v) || q->size(2) > cpu::kMaxHeadDim || !plan || !plan->is_int32() ||
      !plan->has_shape({num_sequences + 1, 4}) || !plan->is_contiguous())
    return false;
  const auto* row = plan->data<const int32_t>();
  for (int64_t i = 0; i < plan->size(0); ++i, row += 4) {
    if (int64_t(row[3]) - row[2] > max_keys) return false;
  }
  return true;
}

// What forward and backward have alike.
template <typename Params>
Params attention_params(const View& q, const View& k, const View& v, const View& plan, int64_t num_sequences,
                        double softmax_scale) {
  Params p;
  p.shape.total_q = q.size(0);
  p.shape.total_k = k.size(0);
  p.shape.num_sequences = int(num_sequences);
  p.shape.num_heads = int(q.size(1));
  p.shape.num_kv_heads = int(k.size(1));
  p.shape.head_dim = int(q.size(2));
  p.dtype = q.dtype();
  p.q = packed_view(q);
  p.k = packed_view(k);
  p.v = packed_view(v);
  p.softmax_scale = float(softmax_scale);
  p.plan = plan.data<const int32_t>();
  p.plan_rows = plan.size(0);
  p.num_threads = num_threads();
  return p;
}

// `plan` is an AttentionPlan: (work, num_heads, num_kv_heads, head_dim, total_q, num_sequences).
bool attention_fits(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens, py::handle plan) {
  if (is_watched()) return false;
  const MaybeView vq = view(q), vk = view(k), vv = view(v), starts = view(cu_seqlens);
  if (!are_packed(vq, vk, vv) || !starts || starts->dims() != 1 || starts->size(0) < 1) return false;
  const int64_t heads = vq->size(1), kv_heads = vk->size(1);
  if (vk->size(0) != vq->size(0) || kv_heads == 0 || heads % kv_heads != 0) return false;
  if (!PyTuple_Check(plan.ptr()) || PyTuple_GET_SIZE(plan.ptr()) != 6) return false;
  const py::handle work = PyTuple_GET_ITEM(plan.ptr(), 0);
  const int64_t sizes[] = {heads, kv_heads, vq->size(2), vq->size(0), starts->size(0) - 1};
  for (Py_ssize_t i = 0; i < 5; ++i) {
    PyObject* const number = PyTuple_GET_ITEM(plan.ptr(), i + 1);
    int overflow = 0;
    if (!PyLong_CheckExact(number) || PyLong_AsLongLongAndOverflow(number, &overflow) != sizes[i] || overflow)
      return false;
  }
  return view(work) && !any_negated({q, k, v, work});
}

py::object varlen_attention(py::handle q, py::handle k, py::handle v, py::handle plan, int64_t num_sequences,
                            double softmax_scale, int64_t max_keys) {
  const MaybeView vq = view(q), vk = view(k), vv = view(v), rows = view(plan);
  if (!are_for_kernel(vq, vk, vv, rows, num_sequences, max_keys)) return py::none();
  return or_none([&]() -> py::object {
    const Torch& torch = *bindings::torch();
    const NewTensor out = new_tensor({vq->size(0), vq->size(1), vq->size(2)}, torch.of(vq->dtype()));
    const NewTensor lse = new_tensor({vq->size(1), vq->size(0)}, torch.float32);
    auto p = attention_params<attention::ForwardParams>(*vq, *vk, *vv, *rows, num_sequences, softmax_scale);
    p.out = out.address;
    p.lse = static_cast<float*>(lse.address);
    {
      py::gil_scoped_release release;
      attention::forward_cpu(p);
    }
    return py::make_tuple(out.tensor, lse.tensor);
  });
}

py::object varlen_attention_backward(py::handle dout, py::handle dlse, py::handle q, py::handle k, py::handle v,
                                     py::handle out, py::handle lse, py::handle plan, int64_t num_sequences,
                                     double softmax_scale, int64_t max_keys) {
  const MaybeView vq = view(q), vk = view(k), vv = view(v), rows = view(plan), vdout = view(dout), vout = view(out),
                  vlse = view(lse);
  const OptionalTensor vdlse(dlse);
  if (!are_for_kernel(vq, vk, vv, rows, num_sequences, max_keys)) return py::none();
  const int64_t total_q = vq->size(0), heads = vq->size(1), dim = vq->size(2);
  const auto like_lse = [&](const MaybeView& x) {
    return x && x->is_float32() && x->has_shape({heads, total_q}) && x->is_contiguous();
  };
  if (!vdout || !vdout->has_type_of(*vq) || !vdout->has_shape({total_q, heads, dim}) || vdout->stride(2) != 1 ||
      !vout || !vout->has_type_of(*vq) || !vout->has_shape({total_q, heads, dim}) || !vout->is_contiguous() ||
      !like_lse(vlse) || (vdlse.given && !like_lse(vdlse.seen)))
    return py::none();
  return or_none([&]() -> py::object {
    const Elements& dtype = torch()->of(vq->dtype());
    const NewTensor dq = new_tensor({total_q, heads, dim}, dtype);
    const NewTensor dk = new_tensor({vk->size(0), vk->size(1), dim}, dtype);
    const NewTensor dv = new_tensor({vk->size(0), vk->size(1), dim}, dtype);
    auto p = attention_params<attention::BackwardParams>(*vq, *vk, *vv, *rows, num_sequences, softmax_scale);
    p.dout = packed_view(*vdout);
    p.out = vout->data<const void>();
    p.lse = vlse->data<const float>();
    p.dlse = vdlse.given ? vdlse.seen->data<const float>() : nullptr;
    p.dq = dq.address;
    p.dk = dk.address;
    p.dv = dv.address;
    {
      py::gil_scoped_release release;
      attention::backward_cpu(p);
    }
    return py::make_tuple(dq.tensor, dk.tensor, dv.tensor);
  });
}

// ------------------------------------------------------------------------------------------------------ cross-entropy

bool are_token_arguments(const MaybeView& targets, const MaybeView& weights, int64_t tokens) {
  return targets && (targets->is_int64() || targets->is_int32()) && targets->has_shape({tokens}) && weights &&
         weights->is_float32() && weights->has_shape({tokens});
}

// As `are_token_arguments`, in the form that the kernels take.
bool are_kernel_tokens(const MaybeView& targets, const MaybeView& weights, int64_t tokens) {
  return are_token_arguments(targets, weights, tokens) && targets->is_int64() && targets->is_contiguous() &&
         weights->is_contiguous();
}

bool are_logits(const MaybeView& logits) {
  return logits && logits->dims() == 2 && logits->is_activation() && logits->last_is_contiguous();
}

// scale / normalizer; nothing for a normalizer that is refused.
std::optional<double> full_scale(py::handle normalizer, double scale) {
  if (normalizer.is_none()) return scale;
  const MaybeView seen = view(normalizer);
  if (!seen || seen->dims() != 0 || !seen->is_float32()) return std::nullopt;
  const double value = *seen->data<const float>();
  if (!std::isfinite(value) || value <= 0) return std::nullopt;
  return scale / value;
}

bool cross_entropy_fits(py::handle logits, py::handle targets, py::handle token_weights) {
  if (is_watched()) return false;
  const MaybeView x = view(logits);
  return are_logits(x) && are_token_arguments(view(targets), view(token_weights), x->size(0)) &&
         !requires_grad(token_weights) && !any_negated({logits, targets, token_weights});
}

loss::MaskedCrossEntropyParams cross_entropy_params(const View& logits, const View& targets, const View& weights) {
  loss::MaskedCrossEntropyParams p;
  p.logits = logits.data<const void>();
  p.logits_row_stride = logits.stride(0);
  p.num_rows = logits.size(0);
  p.vocab_size = logits.size(1);
  p.dtype = logits.dtype();
  p.targets = targets.data<const void>();
  p.token_weights = weights.data<const float>();
  p.num_tokens = weights.size(0);
  p.num_threads = num_threads();
  return p;
}

void sum_weighted(const float* nll, const float* weights, int64_t rows, double scale, void* sum) {
  loss::WeightedSumParams p;
  p.nll = nll;
  p.token_weights = weights;
  p.num_rows = rows;
  p.scale = scale;
  p.loss = static_cast<float*>(sum);
  loss::weighted_sum_cpu(p);
}

// Returns (loss, nll, lse, lse_parts).
py::object masked_cross_entropy(py::handle logits, py::handle targets, py::handle token_weights, py::handle normalizer,
                                double scale) {
  const MaybeView x = view(logits), y = view(targets), w = view(token_weights);
  if (!are_logits(x) || !are_kernel_tokens(y, w, x->size(0))) return py::none();
  const std::optional<double> factor = full_scale(normalizer, scale);
  if (!factor) return py::none();
  return or_none([&]() -> py::object {
    const Elements& float32 = torch()->float32;
    const int64_t rows = x->size(0);
    const NewTensor nll = new_tensor({rows}, float32), lse = new_tensor({rows}, float32);
    const NewTensor lse_parts = new_tensor({rows, 2}, float32), sum = new_tensor({}, float32);
    auto p = cross_entropy_params(*x, *y, *w);
    p.nll = static_cast<float*>(nll.address);
    p.lse = static_cast<float*>(lse.address);
    p.lse_parts = static_cast<float*>(lse_parts.address);
    {
      py::gil_scoped_release release;
      loss::masked_cross_entropy_cpu(p);
      sum_weighted(p.nll, p.token_weights, rows, *factor, sum.address);
    }
    return py::make_tuple(sum.tensor, nll.tensor, lse.tensor, lse_parts.tensor);
  });
}

py::object masked_cross_entropy_backward(py::handle logits, py::handle targets, py::handle token_weights,
                                         py::handle normalizer, double scale, py::handle lse_parts, py::handle dloss,
                                         py::handle dlse, int64_t vocab_start) {
  const MaybeView x = view(logits), y = view(targets), w = view(token_weights), parts = view(lse_parts);
  const OptionalTensor of_loss(dloss), of_lse(dlse);
  if (!are_logits(x) || !are_kernel_tokens(y, w, x->size(0)) || !of_loss.readable() || !of_lse.readable())
    return py::none();
  const int64_t rows = x->size(0);
  if (!parts || !parts->is_float32() || !parts->has_shape({rows, 2}) || !parts->is_contiguous()) return py::none();
  if (of_loss.given && !(of_loss.seen->is_float32() && of_loss.seen->dims() == 0)) return py::none();
  if (of_lse.given && !(of_lse.seen->is_float32() && of_lse.seen->has_shape({rows}) && of_lse.seen->is_contiguous()))
    return py::none();
  const std::optional<double> factor = full_scale(normalizer, scale);
  if (!factor) return py::none();
  return or_none([&]() -> py::object {
    const NewTensor grad = new_tensor({rows, x->size(1)}, torch()->of(x->dtype()));
    auto p = cross_entropy_params(*x, *y, *w);
    p.lse_parts = parts->data<float>();
    p.dloss = of_loss.given ? of_loss.seen->data<const float>() : nullptr;
    p.dlse = of_lse.given ? of_lse.seen->data<const float>() : nullptr;
    p.scale = float(*factor);
    p.vocab_start = vocab_start;
    p.grad = grad.address;
    p.grad_row_stride = x->size(1);
    {
      py::gil_scoped_release release;
      loss::masked_cross_entropy_backward_cpu(p);
    }
    return grad.tensor;
  });
}

// ------------------------------------------------------------------------------------------ cross-entropy of the head

bool linear_cross_entropy_fits(py::handle hidden, py::handle weight, py::handle targets, py::handle token_weights) {
  if (is_watched()) return false;
  const MaybeView x = view(hidden), head = view(weight);
  return x && x->dims() == 2 && x->is_activation() && x->last_is_contiguous() && head && head->has_type_of(*x) &&
         head->dims() == 2 && head->size(0) >= 1 && head->size(1) == x->size(1) && head->last_is_contiguous() &&
         are_token_arguments(view(targets), view(token_weights), x->size(0)) && !requires_grad(token_weights) &&
         !any_negated({hidden, weight, targets, token_weights});
}

// Rows of a loss whose logits exist.
struct Selection {
  std::vector<int32_t> rows;  // ascending
  bool all = false;           // rows are all tokens, and all have a weight
};

// The rows given, or those with a weight. Nothing for rows that are refused.
std::optional<Selection> select(const OptionalTensor& rows, const View& weights) {
  const int64_t tokens = weights.size(0);
  Selection selected;
  if (!rows.given) {
    const auto* weight = weights.data<const float>();
    for (int64_t i = 0; i < tokens; ++i) {
      if (weight[i] != 0) selected.rows.push_back(int32_t(i));
    }
    selected.all = int64_t(selected.rows.size()) == tokens;
    return selected;
  }
  if (!rows.seen || !rows.seen->is_int32() || rows.seen->dims() != 1 || !rows.seen->is_contiguous())
    return std::nullopt;
  const auto* row = rows.seen->data<const int32_t>();
  int64_t last = -1;
  for (int64_t n = 0; n < rows.seen->size(0); ++n) {
    if (row[n] <= last || row[n] >= tokens) return std::nullopt;
    selected.rows.push_back(row[n]);
    last = row[n];
  }
  return selected;
}

// Copies the selected rows of hidden, and zeros for those without a weight: 0 * NaN is NaN in the weight's gradient.
void gather(const View& hidden, const Selection& selected, const float* weights, void* out) {
  const int64_t size = hidden.size(1) * element_size(hidden.dtype()), stride = hidden.stride(0);
  const int64_t count = int64_t(selected.rows.size());
  const int threads = cpu::threads_for(count * hidden.size(1), num_threads());
  const char* from = hidden.data<const char>();
  py::gil_scoped_release release;
  cpu::parallel_for(count, threads, [&](int64_t n) {
    const int64_t i = selected.rows[size_t(n)];
    char* to = static_cast<char*>(out) + n * size;
    if (weights[i] != 0) {
      std::memcpy(to, from + i * stride * element_size(hidden.dtype()), size_t(size));
    } else {
      std::memset(to, 0, size_t(size));
    }
  });
}

// Writes the selected rows to their places in `out`, and zeros between them.
void scatter(const View& rows, const Selection& selected, int64_t tokens, void* out) {
  const int64_t size = rows.size(1) * element_size(rows.dtype()), count = rows.size(0);
  const int threads = cpu::threads_for(tokens * rows.size(1), num_threads());
  const char* from = rows.data<const char>();
  py::gil_scoped_release release;
  cpu::parallel_for(count + 1, threads, [&](int64_t n) {
    const int64_t first = n ? int64_t(selected.rows[size_t(n - 1)]) + 1 : 0;
    const int64_t row = n < count ? int64_t(selected.rows[size_t(n)]) : tokens;
    std::memset(static_cast<char*>(out) + first * size, 0, size_t((row - first) * size));
    if (n < count) std::memcpy(static_cast<char*>(out) + row * size, from + n * size, size_t(size));
  });
}

// The view of a product that torch made. Throws NotPlain for another type, as under autocast.
View product_view(const py::object& product, const View& factor) {
  const MaybeView seen = view(product);
  if (!seen || seen->dims() != 2 || !seen->has_type_of(factor) || !seen->is_contiguous()) throw NotPlain();
  return *seen;
}

// Computes linear_masked_ce_fwd for all selected rows at once: (loss, nll, hidden_grad, weight_grad). Returns None
// where no row is selected, or where the logits take more than chunk_bytes.
py::object linear_masked_cross_entropy(py::handle hidden, py::handle weight, py::handle targets,
                                       py::handle token_weights, py::handle rows, py::handle normalizer, double scale,
                                       int64_t chunk_rows, bool hidden_grad, bool weight_grad, py::handle compute_dtype,
                                       py::handle grad_dtype, int64_t chunk_bytes) {
  const MaybeView x = view(hidden), head = view(weight), y = view(targets), w = view(token_weights);
  if (!x || x->dims() != 2 || !x->is_activation() || !x->last_is_contiguous() || !head || head->dims() != 2 ||
      !head->has_type_of(*x) || head->size(1) != x->size(1) || !are_kernel_tokens(y, w, x->size(0)))
    return py::none();
  const Torch& torch = *bindings::torch();
  const Elements& dtype = torch.of(x->dtype());
  const std::optional<double> factor = full_scale(normalizer, scale);
  if (!factor || compute_dtype.ptr() != dtype.dtype) return py::none();
  const int64_t tokens = x->size(0), vocab_size = head->size(0), width = x->size(1);
  const std::optional<Selection> selected = select(OptionalTensor(rows), *w);
  if (!selected || selected->rows.empty() || vocab_size == 0) return py::none();
  const int64_t count = int64_t(selected->rows.size());
  const int64_t row_bytes = vocab_size * element_size(x->dtype());
  if (count > (chunk_rows ? chunk_rows : std::max<int64_t>(128, chunk_bytes / row_bytes))) return py::none();
  return or_none([&]() -> py::object {
    auto of_rows = py::reinterpret_borrow<py::object>(hidden);
    if (!selected->all) {
      const NewTensor gathered = new_tensor({count, width}, dtype);
      gather(*x, *selected, w->data<const float>(), gathered.address);
      of_rows = gathered.tensor;
    }
    const py::object logits = call(torch.linear, {of_rows, weight});
    const View of_logits = product_view(logits, *x);
    const NewTensor nll = new_tensor({tokens}, torch.float32), sum = new_tensor({}, torch.float32);
    auto p = cross_entropy_params(of_logits, *y, *w);
    std::vector<float> nll_of_rows(selected->all ? 0 : size_t(count));
    auto* const all_nll = static_cast<float*>(nll.address);
    p.nll = selected->all ? all_nll : nll_of_rows.data();
    p.rows = selected->all ? nullptr : selected->rows.data();
    p.scale = float(*factor);
    p.grad = hidden_grad || weight_grad ? of_logits.data<void>() : nullptr;
    p.grad_row_stride = vocab_size;
    {
      py::gil_scoped_release release;
      loss::masked_cross_entropy_cpu(p);
      if (!selected->all) {
        std::memset(all_nll, 0, size_t(tokens) * sizeof(float));
        for (int64_t n = 0; n < count; ++n) all_nll[selected->rows[size_t(n)]] = nll_of_rows[size_t(n)];
      }
      sum_weighted(all_nll, p.token_weights, tokens, *factor, sum.address);
    }
    py::object d_hidden = py::none(), d_weight = py::none();
    if (hidden_grad) {
      d_hidden = call(torch.mm, {logits, weight});
      const View product = product_view(d_hidden, *x);
      if (!selected->all) {
        const NewTensor scattered = new_tensor({tokens, width}, dtype);
        scatter(product, *selected, tokens, scattered.address);
        d_hidden = scattered.tensor;
      }
    }
    if (weight_grad) {
      static PyObject* const transpose = PyUnicode_InternFromString("t");
      const auto transposed = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(logits.ptr(), transpose));
      if (!transposed) throw py::error_already_set();
      d_weight = call(torch.mm, {transposed, of_rows});
      product_view(d_weight, *x);
      if (grad_dtype.ptr() != dtype.dtype) d_weight = d_weight.attr("to")(grad_dtype);
    }
    return py::make_tuple(sum.tensor, nll.tensor, d_hidden, d_weight);
  });
}

// Computes linear_masked_ce_bwd, (hidden_grad * dloss, weight_grad * dloss), for so few float32 elements that one
// thread multiplies them.
py::object scaled_gradients(py::handle dloss, py::handle hidden_grad, py::handle weight_grad) {
  constexpr int64_t kMaxElements = 1 << 14;
  const MaybeView factor = view(dloss);
  if (!factor || !factor->is_float32() || factor->dims() != 0) return py::none();
  const auto is_small = [](const MaybeView& x) {
    return x && x->is_float32() && x->dims() >= 1 && x->dims() <= 2 && x->is_contiguous() &&
           x->elements() <= kMaxElements;
  };
  const MaybeView grads[] = {view(hidden_grad), view(weight_grad)};
  if (!is_small(grads[0]) || !is_small(grads[1])) return py::none();
  return or_none([&]() -> py::object {
    py::tuple results(2);
    for (int i = 0; i < 2; ++i) {
      const View& x = *grads[i];
      const NewTensor made = x.dims() == 2 ? new_tensor({x.size(0), x.size(1)}, torch()->float32)
                                           : new_tensor({x.elements()}, torch()->float32);
      const auto* from = x.data<const float>();
      for (int64_t n = 0; n < x.elements(); ++n)
        static_cast<float*>(made.address)[n] = from[n] * *factor->data<float>();
      results[size_t(i)] = made.tensor;
    }
    return results;
  });
}

// ----------------------------------------------------------------------------------------------------------- sampling

bool sample_fits(py::handle logits) {
  if (is_watched()) return false;
  const MaybeView x = view(logits);
  return are_logits(x) && x->size(1) >= 1 && !is_negated(logits);
}

// Samples with the same numbers for all rows and without a bias: (token, confidence, logprob, entropy, margin).
py::object sample_tokens(py::handle logits, double temperature, int64_t seed, int64_t step, int measure, int64_t top_k,
                         double top_p, bool confidence_at_temperature, bool want_entropy, bool want_margin) {
  const MaybeView x = view(logits);
  if (!are_logits(x) || x->size(1) < 1) return py::none();
  return or_none([&]() -> py::object {
    const Torch& torch = *bindings::torch();
    const int64_t rows = x->size(0);
    const NewTensor token = new_tensor({rows}, torch.int64), confidence = new_tensor({rows}, torch.float32);
    const NewTensor logprob = new_tensor({rows}, torch.float32);
    const NewTensor entropy = new_tensor({want_entropy ? rows : 0}, torch.float32);
    const NewTensor margin = new_tensor({want_margin ? rows : 0}, torch.float32);
    sampling::SampleTokensParams p;
    p.logits = x->data<const void>();
    p.logits_row_stride = x->stride(0);
    p.num_rows = rows;
    p.vocab_size = x->size(1);
    p.dtype = x->dtype();
    p.temperature = float(temperature);
    p.seed = seed;
    p.step = int32_t(step);
    p.measure = sampling::Measure(measure);
    p.top_k = int32_t(top_k);
    p.top_p = float(top_p);
    p.confidence_at_temperature = confidence_at_temperature;
    p.token = static_cast<int64_t*>(token.address);
    p.confidence = static_cast<float*>(confidence.address);
    p.logprob = static_cast<float*>(logprob.address);
    p.entropy = want_entropy ? static_cast<float*>(entropy.address) : nullptr;
    p.margin = want_margin ? static_cast<float*>(margin.address) : nullptr;
    p.num_threads = num_threads();
    {
      py::gil_scoped_release release;
      sampling::sample_tokens_cpu(p);
    }
    return py::make_tuple(token.tensor, confidence.tensor, logprob.tensor, entropy.tensor, margin.tensor);
  });
}

}  // namespace

void define_cpu_calls(py::module_& m) {
  py::module_ calls = m.def_submodule("cpu_calls", "Ops on plain CPU tensors; see illada.ops.");
  py::register_local_exception_translator([](std::exception_ptr thrown) {  // pybind11 knows its base class alone
    try {
      std::rethrow_exception(thrown);
    } catch (const NotSupported& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    }
  });
  calls.def("use_torch", &use_torch);
  calls.def("attention_fits", &attention_fits);
  calls.def("varlen_attention", &varlen_attention);
  calls.def("varlen_attention_backward", &varlen_attention_backward);
  calls.def("cross_entropy_fits", &cross_entropy_fits);
  calls.def("masked_cross_entropy", &masked_cross_entropy);
  calls.def("masked_cross_entropy_backward", &masked_cross_entropy_backward);
  calls.def("linear_cross_entropy_fits", &linear_cross_entropy_fits);
  calls.def("linear_masked_cross_entropy", &linear_masked_cross_entropy);
  calls.def("scaled_gradients", &scaled_gradients);
  calls.def("sample_fits", &sample_fits);
  calls.def("sample_tokens", &sample_tokens);
}

}  // namespace illada::bindings
