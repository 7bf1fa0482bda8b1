// Interface between launch.cpp, which validates the params and chooses a kernel, and masked_cross_entropy.cu and
// scalars.cu, which launch it.
#pragma once

#include "common/device.h"
#include "illada/loss.h"

namespace illada::loss {

// Vectors of 8 ids in a vocab tile. One CTA processes one vocab tile of one row. The vocab tiles of a row and the order
// in which their sums are added do not depend on the batch.
constexpr int kVocabTileVectors = 2048;
// Number of vocab tiles of a row.
inline int vocab_tile_count(int64_t vocab_size) {
  // A row that does not start at a vector's address has one whole vector less, never one more.
  const int64_t vectors = (vocab_size + 7) / 8;
  return int(vectors == 0 ? 1 : (vectors + kVocabTileVectors - 1) / kVocabTileVectors);
}

// Distribution of a row over the threads of the fused kernel, which computes nll and gradient at once. Each thread of a
// cluster of `cluster` CTAs holds `vectors` vectors of 8 ids. `vectors` is 0 where the row is too long for the kernel.
struct FusedShape {
  static constexpr int kThreads = 256;  // per CTA
  int vectors = 0;
  int cluster = 1;
};
FusedShape fused_shape(int64_t vocab_size, const Device& device);

void launch_forward(const MaskedCrossEntropyParams& params, const Device& device);
void launch_backward(const MaskedCrossEntropyParams& params, const Device& device);
void launch_fused(const MaskedCrossEntropyParams& params, const Device& device, const FusedShape& shape);
void launch_weighted_sum(const WeightedSumParams& params, const Device& device);
void launch_scale(const ScaleParams& params, const Device& device);

}  // namespace illada::loss
