#include "common/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <sstream>
#include <type_traits>

#include "common/check.h"
#include "common/driver_calls.h"

namespace illada {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Looks the function up through the runtime. Nothing links to the driver, so the module loads on machines without one.
Encode find_encode(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  ILLADA_CUDA_CHECK(op, status, "looking up cuTensorMapEncodeTiled");
  ILLADA_CHECK(found == cudaDriverEntryPointSuccess && function, op,
               "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or newer");
  return reinterpret_cast<Encode>(function);
}

CUtensorMapDataType data_type(DType dtype) {
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

constexpr int kMaxRank = 5;

// Everything that a tensor map depends on. Elements beyond `rank` are 0.
struct Key {
  uint64_t address = 0;
  uint64_t sizes[kMaxRank] = {};
  uint64_t strides[kMaxRank - 1] = {};  // in bytes; the first dimension has none
  uint32_t box[kMaxRank] = {};
  uint32_t rank = 0, type = 0, padding = 0;

  bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) == 0; }
};
static_assert(std::has_unique_object_representations_v<Key>);

// Boxes of 128-byte rows, swizzled.
CUtensorMap encode(const char* op, const Key& key) {
  // A member, so that the map is not built in the caller's return slot. GCC 12 aligns some of these slots to 16 bytes,
  // and the driver refuses a map that is not aligned to 64.
  struct {
    CUtensorMap map;
  } made;
  cuuint64_t sizes[kMaxRank], strides[kMaxRank];
  cuuint32_t steps[kMaxRank];
  std::copy(key.sizes, key.sizes + kMaxRank, sizes);
  std::copy(key.strides, key.strides + kMaxRank - 1, strides);
  std::fill(steps, steps + kMaxRank, 1);
  // CuTe from 4.3.4 on corrects the map of a tensor of less than 128 KiB on Blackwell with drivers older than
  // CUDA 13.2. A kernel for sm_100 would need that correction here. Hopper needs none.
  static const Encode encode_tiled = find_encode(op);
  count_call(DriverCall::kEncodeTensorMap);
  const CUresult result =
      encode_tiled(&made.map, CUtensorMapDataType(key.type), key.rank, reinterpret_cast<void*>(key.address), sizes,
                   strides, key.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    const int rank = int(key.rank);
    std::ostringstream shape;
    for (int i = rank - 1; i >= 0; --i) shape << sizes[i] << (i ? " x " : ", row strides in bytes");
    for (int i = rank - 2; i >= 0; --i) shape << " " << strides[i];
    detail::fail<CudaError>(op, "cuTensorMapEncodeTiled failed with ", int(result), " for a tensor of ", shape.str());
  }
  return made.map;
}

// Cache of encoded maps. A map is its key's numbers in another form. It describes neither the memory at its address nor
// a device (all devices with TMA kernels here have compute capability 9.0), so entries never become invalid. Calls of a
// model repeat with the same addresses: a training step has about 8 maps per layer.
//
// Set-associative with kWays; a full set replaces its oldest entry. 256 KiB in all; unused pages are never touched. No
// thread waits for a set: a thread that finds the set in use encodes its map.
class Cache {
 public:
  CUtensorMap find_or_encode(const char* op, const Key& key) {
    const uint64_t hash = hash_key(key);
    Set& set = sets_[hash >> 32 & (kSets - 1)];
    if (set.busy.test_and_set(std::memory_order_acquire)) return encode(op, key);
    for (int way = 0; way < kWays; ++way)
      if (set.hashes[way] == hash && set.keys[way] == key) {
        const CUtensorMap map = set.maps[way];
        set.busy.clear(std::memory_order_release);
        return map;
      }
    set.busy.clear(std::memory_order_release);

    const CUtensorMap map = encode(op, key);  // may throw
    if (set.busy.test_and_set(std::memory_order_acquire)) return map;
    const unsigned way = set.next++ % kWays;
    set.hashes[way] = hash;
    set.keys[way] = key;
    set.maps[way] = map;
    set.busy.clear(std::memory_order_release);
    return map;
  }

 private:
  static constexpr int kSets = 256, kWays = 4;
  struct Set {
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
    unsigned next = 0;
    uint64_t hashes[kWays] = {};
    Key keys[kWays] = {};  // rank 0 means empty
    CUtensorMap maps[kWays] = {};
  };

  // The products are independent of each other, and their upper halves depend on every bit.
  static uint64_t hash_key(const Key& key) {
    uint64_t words[sizeof(Key) / sizeof(uint64_t)], sum = 0, factor = 0x9e3779b97f4a7c15u;
    std::memcpy(words, &key, sizeof(words));
    for (const uint64_t word : words) {
      sum += (word ^ word >> 32) * factor;
      factor = factor * 0xd1342543de82ef95u + 2;  // known to the compiler
    }
    return sum ^ sum >> 29;
  }

  Set sets_[kSets];
};

Cache cache;  // zero-initialised, so no constructor runs before main

template <int kRank>
CUtensorMap tensor_map(const char* op, DType dtype, const void* data, const uint64_t (&sizes)[kRank],
                       const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank]) {
  static_assert(kRank <= kMaxRank);
  Key key;
  key.address = reinterpret_cast<uintptr_t>(data);
  std::copy(sizes, sizes + kRank, key.sizes);
  std::copy(strides, strides + kRank - 1, key.strides);
  std::copy(box, box + kRank, key.box);
  key.rank = kRank;
  key.type = uint32_t(data_type(dtype));
  return cache.find_or_encode(op, key);
}

}  // namespace

CUtensorMap tensor_map_k128(const char* op, const MatrixView& matrix, int box_rows) {
  const uint32_t element = uint32_t(element_size(matrix.dtype));
  return tensor_map<2>(op, matrix.dtype, matrix.data, {uint64_t(matrix.columns), uint64_t(matrix.rows)},
                       {uint64_t(matrix.row_stride) * element}, {128 / element, uint32_t(box_rows)});
}

CUtensorMap tensor_map_ragged(const char* op, const RaggedView& view, int box_heads, int box_tokens) {
  const uint64_t element = uint64_t(element_size(view.dtype));
  const uint64_t stride = uint64_t(view.token_stride) * element;
  // The second and third strides of tokens add up to 2^34, and kRaggedTokens times that is 2^64, which is 0.
  constexpr uint64_t kStrideSum = uint64_t(1) << 34;
  static_assert(uint64_t(kRaggedTokens) * kStrideSum == 0);
  ILLADA_CHECK(view.tokens <= kRaggedTokens && stride < kStrideSum, op, "TMA needs at most ", kRaggedTokens,
               " tokens, less than 2^34 bytes apart; got ", view.tokens, " tokens, ", stride, " bytes apart");
  return tensor_map<5>(op, view.dtype, view.data,
                       {uint64_t(view.columns), uint64_t(view.heads), uint64_t(kRaggedTokens),
                        uint64_t(kRaggedTokens) + 1, uint64_t(view.tokens) + 1},
                       {uint64_t(view.head_stride) * element, stride, kStrideSum - stride, stride},
                       {uint32_t(128 / element), uint32_t(box_heads), uint32_t(box_tokens), 1, 1});
}

}  // namespace illada
