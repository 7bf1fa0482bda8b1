// Bindings of the losses: csrc/include/illada/loss.h and linear_loss.h.
#include "illada/loss.h"

#include "bindings/fields.h"
#include "bindings/module.h"
#if defined(ILLADA_WITH_CUDA)
#include "illada/linear_loss.h"
#include "illada/variants.h"
#include "loss/linear.h"
#endif

namespace illada::bindings {
namespace {

constexpr Field<loss::MaskedCrossEntropyParams> kCrossEntropyFields[] = {
    FIELD(logits),
    FIELD(logits_row_stride),
    FIELD(num_rows),
    FIELD(vocab_size),
    FIELD(vocab_start),
    FIELD(dtype),
    FIELD(rows),
    FIELD(targets),
    FIELD(targets_are_int64),
    FIELD(token_weights),
    FIELD(num_tokens),
    FIELD(scale),
    FIELD(normalizer),
    FIELD(nll),
    FIELD(lse),
    FIELD(lse_parts),
    FIELD(target_logit),
    FIELD(dlse),
    FIELD(dloss),
    FIELD(grad),
    FIELD(grad_row_stride),
    FIELD(num_threads),
    FIELD(launch),
    WORKSPACE_FIELD,
};

constexpr Field<loss::WeightedSumParams> kWeightedSumFields[] = {
    FIELD(nll), FIELD(token_weights), FIELD(num_rows), FIELD(scale), FIELD(normalizer), FIELD(loss), FIELD(launch),
};

#if defined(ILLADA_WITH_CUDA)
int64_t cross_entropy_workspace(const loss::MaskedCrossEntropyParams& p) {
  return loss::masked_cross_entropy_workspace(p.num_rows, p.vocab_size);
}

constexpr Field<loss::ScaleParams> kScaleFields[] = {
    FIELD(data), FIELD(count), FIELD(dtype), FIELD(factor), FIELD(launch),
};

#define LINEAR_LOSS_FIELDS                                                                                      \
  FIELD(hidden), FIELD(hidden_dtype), FIELD(hidden_row_stride), FIELD(num_tokens), FIELD(head_weight),          \
      FIELD(head_weight_row_stride), FIELD(vocab_size), FIELD(width), FIELD(targets), FIELD(targets_are_int64), \
      FIELD(token_weights), FIELD(rows), FIELD(num_rows), FIELD(scale), FIELD(normalizer), FIELD(chunk_rows),   \
      FIELD(nll), FIELD(hidden_grad), FIELD(weight_grad), FIELD(weight_grad_dtype), FIELD(add_to_weight_grad),  \
      FIELD(filter_eps), FIELD(launch), WORKSPACE_FIELD

constexpr Field<loss::LinearMaskedCrossEntropyParams> kLinearLossFields[] = {LINEAR_LOSS_FIELDS};

// Returns whether the caller computes the products of the gradients (variant loss_gradients). The caller then calls
// linear_masked_cross_entropy in parts.
bool linear_loss_by_mm() { return variant<LossGradients>() == LossGradients::kMm; }

// Returns how a call is cut into row chunks, and the offsets of their buffers in the workspace, in bytes.
py::dict linear_loss_layout(const loss::LinearMaskedCrossEntropyParams& p) {
  const loss::LinearPlan plan = loss::plan_linear(p);
  py::dict d;
  d["row_chunks"] = plan.row_chunks;
  d["chunk_rows"] = plan.chunk_rows;
  d["probabilities_row_stride"] = plan.prob_stride;
  d["weight_first"] = variant<LossOrder>() == LossOrder::kWeightFirst;  // the weight's gradient before hidden's
  d["probabilities"] = plan.probs;
  d["hidden"] = plan.hidden;
  d["product"] = plan.slabs;  // of probabilities and weight, for hidden's gradient
  return d;
}

// Arguments of a part of linear_masked_cross_entropy, for one of its row chunks.
struct LinearChunkParams : loss::LinearMaskedCrossEntropyParams {
  int chunk = 0;
};

constexpr Field<LinearChunkParams> kLinearChunkFields[] = {LINEAR_LOSS_FIELDS, FIELD(chunk)};

template <void (*kPart)(const loss::LinearMaskedCrossEntropyParams&, int)>
void linear_loss_part(const LinearChunkParams& p) {
  const py::gil_scoped_release release;
  kPart(p, p.chunk);
}
#endif

}  // namespace

void define_loss(py::module_& m) {
  Function<kCrossEntropyFields, run<loss::masked_cross_entropy_cpu, loss::masked_cross_entropy_cuda,
                                    loss::MaskedCrossEntropyParams>>::define(m, "masked_cross_entropy");
  Function<kCrossEntropyFields, run<loss::masked_cross_entropy_backward_cpu, loss::masked_cross_entropy_backward_cuda,
                                    loss::MaskedCrossEntropyParams>>::define(m, "masked_cross_entropy_backward");
  Function<kWeightedSumFields, loss::weighted_sum_cpu>::define(m, "weighted_sum_cpu");  // short: keeps the GIL
#if defined(ILLADA_WITH_CUDA)
  Function<kCrossEntropyFields, cross_entropy_workspace>::define(m, "masked_cross_entropy_workspace");
  Function<kWeightedSumFields, run_cuda<loss::weighted_sum_cuda, loss::WeightedSumParams>>::define(m, "weighted_sum");
  Function<kScaleFields, run_cuda<loss::scale_cuda, loss::ScaleParams>>::define(m, "scale");
  Function<kLinearLossFields, run_cuda<loss::linear_masked_cross_entropy_cuda,
                                       loss::LinearMaskedCrossEntropyParams>>::define(m, "linear_masked_cross_entropy");
  Function<kLinearLossFields, loss::linear_masked_cross_entropy_workspace>::define(
      m, "linear_masked_cross_entropy_workspace");
  Function<kLinearLossFields, linear_loss_layout>::define(m, "linear_loss_layout");
  Function<kLinearChunkFields, linear_loss_part<loss::linear_probabilities_cuda>>::define(m,
                                                                                          "linear_loss_probabilities");
  Function<kLinearChunkFields, linear_loss_part<loss::linear_scatter_cuda>>::define(m, "linear_loss_scatter");
  m.def("linear_loss_by_mm", &linear_loss_by_mm);
#endif
}

}  // namespace illada::bindings
