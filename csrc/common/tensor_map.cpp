#include "common/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <sstream>

#include "common/check.h"

namespace illada {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Asked of the runtime, so that nothing links to the driver: the module loads on machines that have none.
Encode find_encode(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  ILLADA_CUDA_CHECK(
      op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
  ILLADA_CUDA_CHECK(op, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  ILLADA_CHECK(found == cudaDriverEntryPointSuccess && function, op,
               "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or newer");
  return reinterpret_cast<Encode>(function);
}

CUtensorMapDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16:
      break;
  }
  return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Boxes of 128-byte rows, swizzled; `strides` in bytes, of all dimensions but the first.
template <int kRank>
CUtensorMap encode(const char* op, DType dtype, const void* data, const cuuint64_t (&sizes)[kRank],
                   const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  alignas(64) CUtensorMap map;
  cuuint32_t steps[kRank];
  std::fill(steps, steps + kRank, 1);
  static const Encode encode_tiled = find_encode(op);
  const CUresult result = encode_tiled(&map, type_of(dtype), kRank, const_cast<void*>(data), sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::ostringstream shape;
    for (int i = kRank - 1; i >= 0; --i) shape << sizes[i] << (i ? " x " : ", row strides in bytes");
    for (int i = kRank - 2; i >= 0; --i) shape << " " << strides[i];
    detail::fail(op, "cuTensorMapEncodeTiled failed with ", int(result), " for a tensor of ", shape.str());
  }
  return map;
}

}  // namespace

CUtensorMap tensor_map_k128(const char* op, const MatrixView& matrix, int box_rows) {
  const cuuint32_t element = matrix.dtype == DType::kFloat32 ? 4 : 2;
  return encode<2>(op, matrix.dtype, matrix.data, {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)},
                   {cuuint64_t(matrix.row_stride) * element}, {128 / element, cuuint32_t(box_rows)});
}

CUtensorMap tensor_map_ragged(const char* op, const RaggedView& view, int box_heads, int box_tokens) {
  const cuuint32_t element = view.dtype == DType::kFloat32 ? 4 : 2;
  const cuuint64_t tokens = cuuint64_t(view.tokens), stride = cuuint64_t(view.token_stride) * element;
  const auto address = reinterpret_cast<uintptr_t>(view.data) - tokens * stride;
  return encode<4>(op, view.dtype, reinterpret_cast<const void*>(address),
                   {cuuint64_t(view.columns), cuuint64_t(view.heads), tokens, tokens + 1},
                   {cuuint64_t(view.head_stride) * element, stride, stride},
                   {128 / element, cuuint32_t(box_heads), cuuint32_t(box_tokens), 1});
}

}  // namespace illada
