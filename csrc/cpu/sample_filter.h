// Filters top_k and top_p of one row; see illada/sampling.h.
#pragma once

#include "cpu/row_kernels.h"

namespace illada::cpu {

struct RowFilter {
  int64_t top_k;  // 0 keeps all ids
  float top_p;    // 1 keeps all ids
  bool confidence_at_temperature;

  // Returns true if the row needs more than the row kernel.
  bool is_active(const SampleRow& row) const {
    return confidence_at_temperature ||
           (row.temperature > 0 && ((top_k > 0 && top_k < row.vocab_size) || top_p < 1.0f));
  }
};

// Runs kernels.sample_bf16 (or sample_f32) on the ids that the filter keeps.
SampleRowResult sample_filtered(const RowKernels& kernels, bool bf16, const SampleRow& row, const RowFilter& filter);

}  // namespace illada::cpu
