// Dtypes that the CPU kernels take: the one list of C++. That of Python is LOGITS_DTYPES in
// python/illada/ops/capabilities.py, and a test compares them (tests/ops/test_ops_capabilities.py).
#pragma once

#include "illada/dtype.h"
#include "illada/error.h"

namespace illada::cpu {

// True for the dtypes of logits and activations that have CPU kernels.
constexpr bool has_kernels(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16; }

inline void check_logits_dtype(const char* op, DType dtype) {
  ILLADA_CHECK(has_kernels(dtype), op, "logits on a CPU must be float32 or bfloat16, got ", name(dtype));
}

}  // namespace illada::cpu
