// Bindings of attention: csrc/include/illada/attention.h.
#include "illada/attention.h"

#include "bindings/fields.h"
#include "bindings/module.h"
#include "cpu/attention_tile.h"

namespace illada::bindings {

// A tensor [tokens, heads, D] gives its address and both strides.
static void read(PyObject* value, attention::PackedView& view) {
  static PyObject* const name = PyUnicode_InternFromString("stride");
  const auto strides = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, name));
  if (!strides) throw py::error_already_set();
  if (!PyTuple_Check(strides.ptr()) || PyTuple_GET_SIZE(strides.ptr()) != 3) {
    PyErr_SetString(PyExc_TypeError, "must be a tensor of 3 dimensions");
    throw py::error_already_set();
  }
  read(value, view.data);
  read(PyTuple_GET_ITEM(strides.ptr(), 0), view.token_stride);
  read(PyTuple_GET_ITEM(strides.ptr(), 1), view.head_stride);
}

namespace {

#define SHAPE_FIELDS                                                                                       \
  FIELD_IN(params.shape, total_q), FIELD_IN(params.shape, total_k), FIELD_IN(params.shape, num_sequences), \
      FIELD_IN(params.shape, num_heads), FIELD_IN(params.shape, num_kv_heads), FIELD_IN(params.shape, head_dim)

constexpr Field<attention::PlanParams> kPlanFields[] = {
    SHAPE_FIELDS, FIELD(cu_seqlens), FIELD(cu_seqlens_k), FIELD(seqused_k), FIELD(plan), FIELD(launch),
};

constexpr Field<attention::ForwardParams> kForwardFields[] = {
    SHAPE_FIELDS,     FIELD(dtype), FIELD(q),   FIELD(k),           FIELD(v),      FIELD(softmax_scale), FIELD(plan),
    FIELD(plan_rows), FIELD(out),   FIELD(lse), FIELD(num_threads), FIELD(launch), WORKSPACE_FIELD,
};

constexpr Field<attention::BackwardParams> kBackwardFields[] = {
    SHAPE_FIELDS,
    FIELD(dtype),
    FIELD(dout),
    FIELD(q),
    FIELD(k),
    FIELD(v),
    FIELD(out),
    FIELD(lse),
    FIELD(dlse),
    FIELD(softmax_scale),
    FIELD(plan),
    FIELD(plan_rows),
    FIELD(deterministic),
    FIELD(recompute_scores_for_dq),
    FIELD(dq),
    FIELD(dk),
    FIELD(dv),
    FIELD(num_threads),
    FIELD(launch),
    WORKSPACE_FIELD,
};

#if defined(ILLADA_WITH_CUDA)
int64_t plan_rows(const attention::PlanParams& p) { return attention::plan_rows(p.shape); }

py::dict forward_tiling(const attention::PlanParams& p) {
  const attention::ForwardTiling tiling = attention::forward_tiling(p.shape, p.launch.device);
  py::dict d;
  d["tile_tokens"] = tiling.tile_tokens;
  d["cluster"] = tiling.cluster;
  d["key_tile"] = tiling.key_tile;
  d["warps"] = tiling.warps;
  return d;
}

int64_t forward_workspace(const attention::ForwardParams& p) { return attention::forward_workspace(p.shape); }

int64_t backward_workspace(const attention::BackwardParams& p) {
  return attention::backward_workspace(p.shape, p.deterministic, p.recompute_scores_for_dq, p.launch.device);
}
#endif

}  // namespace

void define_attention(py::module_& m) {
  m.attr("MAX_HEAD_DIM_CPU") = cpu::kMaxHeadDim;
  Function<kPlanFields, attention::plan_cpu>::define(m, "attention_plan_cpu");  // short: keeps the GIL
  Function<kForwardFields, run<attention::forward_cpu, attention::forward_cuda, attention::ForwardParams>>::define(
      m, "varlen_attention");
  Function<kBackwardFields, run<attention::backward_cpu, attention::backward_cuda, attention::BackwardParams>>::define(
      m, "varlen_attention_backward");
#if defined(ILLADA_WITH_CUDA)
  Function<kPlanFields, run_cuda<attention::plan_cuda, attention::PlanParams>>::define(m, "attention_plan");
  Function<kPlanFields, plan_rows>::define(m, "attention_plan_rows");
  Function<kPlanFields, forward_tiling>::define(m, "attention_forward_tiling");
  Function<kForwardFields, forward_workspace>::define(m, "varlen_attention_workspace");
  Function<kBackwardFields, backward_workspace>::define(m, "varlen_attention_backward_workspace");
#endif
}

}  // namespace illada::bindings
