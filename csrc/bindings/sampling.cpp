// Bindings of sampling: csrc/include/illada/sampling.h.
#include "illada/sampling.h"
#include "bindings/fields.h"
#include "bindings/module.h"
#if defined(ILLADA_WITH_CUDA)
#include "sampling/launch.h"
#endif

namespace illada::bindings {
namespace {

// What sample_tokens and linear_sample_tokens share; `part` is the SampleTokensParams.
#define SAMPLE_FIELDS(part)                                                                                   \
  FIELD_IN(part, num_rows), FIELD_IN(part, vocab_size), FIELD_IN(part, dtype), FIELD_IN(part, temperature),   \
      FIELD_IN(part, seed), {"step", [](auto& params, PyObject* value) { part.step = read_step(value); }},    \
      FIELD_IN(part, temperatures), FIELD_IN(part, seeds), FIELD_IN(part, steps), FIELD_IN(part, row_ids),    \
      FIELD_IN(part, bias_ids), FIELD_IN(part, bias_values), FIELD_IN(part, bias_count),                      \
      FIELD_IN(part, bias_row_stride), FIELD_IN(part, measure), FIELD_IN(part, top_k), FIELD_IN(part, top_p), \
      FIELD_IN(part, top_ks), FIELD_IN(part, top_ps), FIELD_IN(part, confidence_at_temperature),              \
      FIELD_IN(part, token), FIELD_IN(part, confidence), FIELD_IN(part, logprob), FIELD_IN(part, entropy),    \
      FIELD_IN(part, margin), FIELD_IN(part, launch)

// A step is a word of the noise's counter: its lower 32 bits count.
int32_t read_step(PyObject* value) {
  int64_t step = 0;
  read(value, step);
  return static_cast<int32_t>(step);
}

constexpr Field<sampling::SampleTokensParams> kSampleFields[] = {
    FIELD(logits), FIELD(logits_row_stride), SAMPLE_FIELDS(params), FIELD(num_threads), WORKSPACE_FIELD,
};

#if defined(ILLADA_WITH_CUDA)
// Arguments of sample_tokens_workspace.
struct SampleWorkspaceParams {
  int64_t num_rows = 0;
  int64_t vocab_size = 0;
  bool filtered = false;
  CudaLaunch launch;
};

constexpr Field<SampleWorkspaceParams> kSampleWorkspaceFields[] = {
    FIELD(num_rows),
    FIELD(vocab_size),
    FIELD(filtered),
    FIELD(launch),
};

int64_t sample_workspace(const SampleWorkspaceParams& p) {
  return sampling::sample_tokens_workspace(p.num_rows, p.vocab_size, p.launch.device, p.filtered);
}

constexpr Field<sampling::LinearSampleTokensParams> kLinearSampleFields[] = {
    FIELD(hidden),
    FIELD(hidden_row_stride),
    FIELD(num_tokens),
    FIELD(rows),
    FIELD(head_weight),
    FIELD(head_weight_row_stride),
    FIELD(width),
    SAMPLE_FIELDS(params.sample),
    {"workspace",
     [](auto& params, PyObject* value) {
       read_workspace(value, params.sample.workspace, params.sample.workspace_bytes);
     }},
};

// Arguments of plan_head.
struct HeadPlanParams {
  int64_t num_rows = 0;
  int64_t vocab_size = 0;
  int sm_count = 0;
};

constexpr Field<HeadPlanParams> kHeadPlanFields[] = {FIELD(num_rows), FIELD(vocab_size), FIELD(sm_count)};

// For tests: returns how linear_sample_tokens divides its work on a GPU of sm_count multiprocessors, as (CTAs of a
// cluster, vocab ranges, slices of 32 ids per range, tasks). A task is (CTA, row tile, range, its tiles,
// tiles of its neighbour). The range of a task without tiles is one past the last.
py::tuple head_plan(const HeadPlanParams& p) {
  const sampling::HeadPlan plan = sampling::plan_head(p.num_rows, p.vocab_size, p.sm_count);
  py::list tasks;
  for (int work_item = 0; work_item < plan.work_items(); ++work_item) {
    for (int rank = 0; rank < plan.cluster; ++rank) {
      const sampling::HeadTask task = plan.task(work_item, rank);
      tasks.append(py::make_tuple(work_item % plan.clusters * plan.cluster + rank, task.row_tile, task.vocab_range,
                                  task.vocab_range < plan.vocab_ranges ? plan.range_tiles(task.vocab_range) : 0,
                                  task.tiles));
    }
  }
  return py::make_tuple(plan.cluster, plan.vocab_ranges, plan.range_slices, tasks);
}
#endif

}  // namespace

void define_sampling(py::module_& m) {
  Function<kSampleFields, run<sampling::sample_tokens_cpu, sampling::sample_tokens_cuda,
                              sampling::SampleTokensParams>>::define(m, "sample_tokens");
#if defined(ILLADA_WITH_CUDA)
  Function<kSampleWorkspaceFields, sample_workspace>::define(m, "sample_tokens_workspace");
  Function<kLinearSampleFields, run_cuda<sampling::linear_sample_tokens_cuda,
                                         sampling::LinearSampleTokensParams>>::define(m, "linear_sample_tokens");
  Function<kLinearSampleFields, sampling::linear_sample_tokens_workspace>::define(m, "linear_sample_tokens_workspace");
  Function<kHeadPlanFields, head_plan>::define(m, "head_plan");
#endif
}

}  // namespace illada::bindings
