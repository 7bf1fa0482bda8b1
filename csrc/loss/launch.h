// Interface between launch.cpp, which validates the params and chooses a kernel, and masked_cross_entropy.cu and
// scalars.cu, which launch it.
#pragma once

#include "common/device.h"
#include "illada/loss.h"

namespace illada::loss {

// Vectors of 8 ids in a piece of a row of logits. One CTA handles one piece. The pieces of a row and their order of
// summation do not depend on the batch.
constexpr int kPieceVectors = 2048;
// Number of pieces of a row.
inline int pieces_of(int64_t vocab_size) {
  // A row that does not start at a vector's address has one whole vector less, never one more.
  const int64_t vectors = (vocab_size + 7) / 8;
  return int(vectors == 0 ? 1 : (vectors + kPieceVectors - 1) / kPieceVectors);
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
