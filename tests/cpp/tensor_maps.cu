// Tensor maps from the library's cache against those that the driver encodes: see tests/cuda/test_driver_calls.py.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "common/driver_calls.h"
#include "common/tensor_map.h"
#include "illada/error.h"

using namespace illada;

namespace {

decltype(&cuTensorMapEncodeTiled) encode_tiled = nullptr;

struct Case {
  RaggedView ragged;
  MatrixView matrix;
  int box;
};

// Never read through: any address is as good as another, as long as it is aligned.
Case make_case(int i) {
  char* const base = reinterpret_cast<char*>(uintptr_t(1) << 40);
  const DType dtype = i % 2 ? DType::kBFloat16 : DType::kFloat16;
  const int64_t tokens = 1 + i % 7, heads = 1 + i % 3, dim = i % 5 ? 128 : 64;
  const char* const data = base + int64_t(i / 4) * 4096;  // several shapes at an address
  return {{data, dtype, tokens, heads, dim, heads * dim, dim},
          {data, i % 3 ? dtype : DType::kFloat32, tokens, dim, dim + 8 * (i % 2)},
          32 << (i % 2)};
}

CUtensorMap encode(DType dtype, int rank, const void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                   const cuuint32_t* box) {
  struct {
    CUtensorMap map;
  } made;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto type = dtype == DType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode_tiled(&made.map, type, cuuint32_t(rank), const_cast<void*>(data), sizes, strides, box,
                                       steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) detail::fail("tensor_maps", "cuTensorMapEncodeTiled failed with ", int(result));
  return made.map;
}

// As common/ragged.h says.
CUtensorMap encode_ragged(const RaggedView& r, int box_tokens) {
  const cuuint64_t most = kRaggedTokens, stride = cuuint64_t(r.token_stride) * 2;
  const cuuint64_t sizes[5] = {cuuint64_t(r.columns), cuuint64_t(r.heads), most, most + 1, cuuint64_t(r.tokens) + 1};
  const cuuint64_t strides[4] = {cuuint64_t(r.head_stride) * 2, stride, (cuuint64_t(1) << 34) - stride, stride};
  const cuuint32_t box[5] = {64, cuuint32_t(r.heads), cuuint32_t(box_tokens), 1, 1};
  return encode(r.dtype, 5, r.data, sizes, strides, box);
}

bool is_right(const Case& c) {
  const RaggedView& r = c.ragged;
  const CUtensorMap want = encode_ragged(r, c.box);
  const CUtensorMap got = tensor_map_ragged("test", r, int(r.heads), c.box);

  const MatrixView& m = c.matrix;
  const cuuint32_t element = m.dtype == DType::kFloat32 ? 4 : 2;
  const cuuint64_t matrix_sizes[2] = {cuuint64_t(m.columns), cuuint64_t(m.rows)};
  const cuuint64_t matrix_strides[1] = {cuuint64_t(m.row_stride) * element};
  const cuuint32_t matrix_box[2] = {128 / element, cuuint32_t(c.box)};
  const CUtensorMap matrix_want = encode(m.dtype, 2, m.data, matrix_sizes, matrix_strides, matrix_box);
  const CUtensorMap matrix_got = tensor_map_k128("test", m, c.box);
  return !std::memcmp(&want, &got, sizeof(want)) && !std::memcmp(&matrix_want, &matrix_got, sizeof(want));
}

template <typename F>
double nanoseconds(int turns, F&& f) {
  double best = 1e30;
  for (int batch = 0; batch < 20; ++batch) {  // the fastest: the machine may have other things to do
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < turns; ++i) f(i);
    best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count());
  }
  return best / turns;
}

}  // namespace

int main() {
  cudaDriverEntryPointQueryResult found{};
  void* function = nullptr;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (!function) return std::puts("no cuTensorMapEncodeTiled"), 1;
  encode_tiled = reinterpret_cast<decltype(encode_tiled)>(function);

  // Each thread goes over all cases from another place, back and forth: hits, misses, and sets that overflow.
  constexpr int kCases = 5000, kThreads = 4;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 4 * kCases; ++i) {
        const int at = (i + t * kCases / kThreads) % (2 * kCases);
        wrong += !is_right(make_case(at < kCases ? at : 2 * kCases - 1 - at));
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (wrong) return std::printf("%d maps are wrong\n", wrong.load()), 1;
  std::printf("%d maps, in %d threads: all as the driver encodes them\n", kCases, kThreads);

  // Of what repeats nothing is encoded again; what cannot be encoded is an error each time, and not kept.
  const Case again = make_case(1);
  is_right(again);
  const int64_t before = calls_of(DriverCall::kEncodeTensorMap);
  for (int i = 0; i < 100; ++i) is_right(again);
  if (calls_of(DriverCall::kEncodeTensorMap) != before) return std::puts("encoded again"), 1;
  MatrixView bad = again.matrix;
  bad.data = static_cast<const char*>(bad.data) + 2;
  for (int i = 0; i < 2; ++i) {
    try {
      tensor_map_k128("test", bad, 32);
      return std::puts("an unaligned map was made"), 1;
    } catch (const CudaError&) {
    }
  }

  // 256 maps in turn, as a model of 32 layers has in each direction.
  constexpr int kTurns = 10240;
  volatile uint64_t sum = 0;  // the results are used
  std::vector<Case> cases;
  for (int i = 0; i < 256; ++i) cases.push_back(make_case(4 * i));
  const double encoding = nanoseconds(kTurns, [&](int i) {
    const RaggedView& r = cases[size_t(i % 256)].ragged;
    sum = sum + encode_ragged(r, 32).opaque[0];
  });
  const double hit = nanoseconds(kTurns, [&](int i) {
    const RaggedView& r = cases[size_t(i % 256)].ragged;
    sum = sum + tensor_map_ragged("test", r, int(r.heads), 32).opaque[0];
  });
  if (sum == 0) return std::puts("empty maps"), 1;
  std::printf("encoded by the driver: %.0f ns, from the cache: %.0f ns\n", encoding, hit);
}
