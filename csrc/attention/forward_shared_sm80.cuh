// What the copies and the products of the sm_80 forward share: arguments, shared memory, order of the items.
#pragma once

#include <cstdint>

#include "attention/launch.h"
#include "attention/traits.h"

namespace illada::attention {
namespace {

// sm_100 and related architectures, where the compiler takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr bool kIsSm100 = true;
#else
constexpr bool kIsSm100 = false;
#endif

struct KeySource {
  const char *k, *v;  // addresses of an item's first key
};

// Shared memory of a CTA. Tiles are rows of kHeadDim elements in RowLayout.
template <int kHeadDim, int kKeys>
struct SharedStorage {
  using Tr = Traits<Arch::kSm80, kHeadDim>;
  static constexpr int kTileRows = Tr::kForwardBlocks * kBlockRows;
  static constexpr int kRowBytes = kHeadDim * 2;
  alignas(128) char q[kTileRows * kRowBytes];
  struct Stage {
    char v[kKeys * kRowBytes];  // V of a tile
    char k[kKeys * kRowBytes];  // K of the tile that follows, tile - 1
  } stage[2];                   // for even and odd tiles
  WorkItem item[3];             // the item in use, the next one and the one before
  KeySource source;             // keys of the item in use
  int items, round;             // read again where they are needed
};

struct ForwardArguments {
  const int32_t* plan;
  const void *q, *k, *v;
  int64_t q_token_bytes, q_head_bytes, k_token_bytes, k_head_bytes, v_token_bytes, v_head_bytes;
  void* out;
  float* lse;
  Slots slots;
  int32_t total_q, num_heads, group;
  uint32_t group_reciprocal;  // ceil(2^16 / group): row / group == row * group_reciprocal >> 16 for rows of a tile
  float scale, scale_log2;    // softmax_scale, and softmax_scale times log2(e)
};

// Index of a CTA's item in a round.
__device__ __forceinline__ int item_index(int round) {
  return serpentine_index(round, int(blockIdx.x), int(gridDim.x));
}

// Place of a tile's row in the pack.
struct TileRow {
  int token, head;  // token of the item, head of the group
  __device__ __forceinline__ TileRow(int row, const ForwardArguments& a)
      : token(int(uint32_t(row) * a.group_reciprocal >> 16)), head(row - token * a.group) {}
};

}  // namespace
}  // namespace illada::attention
