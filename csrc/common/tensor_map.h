// TMA descriptors, made on the host for each launch and passed by value as kernel parameters.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "illada/dtype.h"

namespace illada {

// A row-major matrix of 16-bit elements, read in boxes of 64 columns (128 bytes, swizzled over 8 rows as wgmma wants
// it); what lies outside of the matrix reads as 0.
struct MatrixView {
  const void* data;
  DType dtype;
  int64_t rows, columns, row_stride;  // in elements; data and row_stride * 2 multiples of 16 bytes
};
CUtensorMap tensor_map_k128(const char* op, const MatrixView& matrix, int box_rows);

}  // namespace illada
