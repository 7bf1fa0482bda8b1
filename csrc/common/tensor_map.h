// TMA descriptors, made on the host and passed by value as kernel parameters. Those made before are kept: a launch
// whose tensors are where they were encodes none.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/ragged.h"
#include "illada/dtype.h"

namespace illada {

// A row-major matrix, read (or written) in boxes of 128 bytes of some rows, swizzled over 8 rows as wgmma wants it;
// what lies outside of the matrix reads as 0 and is not written.
struct MatrixView {
  const void* data;
  DType dtype;
  int64_t rows, columns, row_stride;  // in elements; data and row_stride multiples of 16 bytes
};
CUtensorMap tensor_map_k128(const char* op, const MatrixView& matrix, int box_rows);

// Packed sequences [tokens, heads, columns], read or written in boxes of 128 bytes of columns x heads x tokens
// (swizzled over 8 rows) that end with their sequence: what lies behind its end reads as 0 and is not written, although
// other sequences are there. Coordinates of a box: common/ragged.h. At most kRaggedTokens tokens, less than 2^34 bytes
// apart.
struct RaggedView {
  const void* data;
  DType dtype;
  // Strides in elements; they and data's address are multiples of 16 bytes.
  int64_t tokens, heads, columns, token_stride, head_stride;
};
CUtensorMap tensor_map_ragged(const char* op, const RaggedView& view, int box_heads, int box_tokens);

}  // namespace illada
