// Sizes and alignment of the caller's memory. Host only.
#pragma once

#include <cstdint>

namespace illada {

// True if all pointers are 16-byte aligned; null is aligned.
template <typename... T>
bool is_aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Bytes from the first to the last element of `rows` rows of `columns` elements. The rows may lie apart or overlap.
// `row_stride`: elements between rows; `element`: bytes of an element.
inline int64_t strided_bytes(int64_t rows, int64_t row_stride, int64_t columns, int64_t element) {
  return rows == 0 ? 0 : ((rows - 1) * row_stride + columns) * element;
}

}  // namespace illada
