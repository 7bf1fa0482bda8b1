// Between launch.cpp, which validates and chooses, and masked_cross_entropy.cu and scalars.cu, which launch.
#pragma once

#include "common/device.h"
#include "illada/loss.h"

namespace illada::loss {

// A row of logits is cut into pieces of kPieceVectors vectors of 8 ids, one CTA each. The pieces of a row and the order
// in which they are summed up are the same whatever the batch is.
constexpr int kPieceVectors = 2048;
inline int pieces_of(int64_t vocab_size) {
  // A row that starts between two vectors' addresses has one vector less, never one more.
  const int64_t vectors = (vocab_size + 7) / 8;
  return int(vectors == 0 ? 1 : (vectors + kPieceVectors - 1) / kPieceVectors);
}

// How the kernel that makes nll and gradient at once holds a row: `vectors` vectors of 8 ids a thread in a cluster of
// `cluster` CTAs; 0: the row is too long for it.
struct FusedShape {
  static constexpr int kThreads = 256;
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
