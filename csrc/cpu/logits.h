// Dtypes of logits that the CPU kernels take.
#pragma once

#include "illada/dtype.h"
#include "illada/error.h"

namespace illada::cpu {

inline void check_logits_dtype(const char* op, DType dtype) {
  ILLADA_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16, op,
               "logits on a CPU must be float32 or bfloat16, got ", name(dtype));
}

}  // namespace illada::cpu
