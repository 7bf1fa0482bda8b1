// TMA descriptors (tensor maps), encoded on the host and passed by value as kernel parameters. They are cached: a
// launch whose tensors have not moved encodes none.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/ragged.h"
#include "illada/dtype.h"

namespace illada {

// Row-major matrix, read (or written) in boxes of 128 bytes x box_rows rows. The boxes are swizzled over 8 rows, as
// wgmma requires. Elements outside of the matrix read as 0 and are not written.
struct MatrixView {
  const void* data;
  DType dtype;
  int64_t rows, columns, row_stride;  // in elements; data and row_stride multiples of 16 bytes
};
CUtensorMap tensor_map_k128(const char* op, const MatrixView& matrix, int box_rows);

// Packed sequences [tokens, heads, columns], read or written in boxes of 128 bytes of columns x heads x tokens. The
// boxes are swizzled over 8 rows and end with their sequence. Elements behind the end of the sequence read as 0 and are
// not written, although other sequences are there. Coordinates of a box: common/ragged.h. At most kRaggedTokens tokens,
// less than 2^34 bytes apart.
struct RaggedView {
  const void* data;
  DType dtype;
  // Strides in elements; they and data's address are multiples of 16 bytes.
  int64_t tokens, heads, columns, token_stride, head_stride;
};
CUtensorMap tensor_map_ragged(const char* op, const RaggedView& view, int box_heads, int box_tokens);

}  // namespace illada
