#include "common/tensor_map.h"

#include <cuda_runtime_api.h>

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

}  // namespace

CUtensorMap tensor_map_k128(const char* op, const MatrixView& matrix, int box_rows) {
  alignas(64) CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)};
  const cuuint64_t strides[1] = {cuuint64_t(matrix.row_stride) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const auto type =
      matrix.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // Asked of the runtime, so that nothing links to the driver: the module loads on machines that have none.
  static const Encode encode = find_encode(op);
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  ILLADA_CHECK(result == CUDA_SUCCESS, op, "cuTensorMapEncodeTiled failed with ", int(result), " for a matrix of ",
               matrix.rows, " x ", matrix.columns, ", row stride ", matrix.row_stride);
  return map;
}

}  // namespace illada
