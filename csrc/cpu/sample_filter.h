// top_k and top_p of one row, see illada/remask.h.
#pragma once

#include "cpu/row_kernels.h"

namespace illada::cpu {

struct RowFilter {
  int64_t top_k;  // 0: all
  float top_p;    // 1: all
  bool confidence_at_temperature;

  // Does the row need more than the row kernel alone?
  bool asks(const SampleRow& row) const {
    return confidence_at_temperature ||
           (row.temperature > 0 && ((top_k > 0 && top_k < row.vocab_size) || top_p < 1.0f));
  }
};

// What kernels.sample_bf16 (or sample_f32) finds of the ids that the filter keeps.
SampleRowResult sample_filtered(const RowKernels& kernels, bool bf16, const SampleRow& row, const RowFilter& filter);

}  // namespace illada::cpu
