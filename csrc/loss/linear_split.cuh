// Split of the vocabulary in hidden's gradient. The kernel that multiplies and the kernel that sums must agree on it.
#pragma once

#include "loss/linear.h"

namespace illada::loss {

// Number of clusters of two CTAs that run at the same time.
inline int linear_clusters(int sm_count) { return sm_count > 1 ? sm_count / 2 : 1; }

struct HiddenGradSplit {
  int row_pairs, splits, k_tiles;  // k_tiles: tiles of 64 ids per split; the last split may have fewer
};

// Chooses, among the splits for which there is room, the one with the lowest cost: rounds of all clusters x steps of
// each round.
__device__ __forceinline__ HiddenGradSplit hidden_grad_split(const LinearRowChunk& c, int clusters) {
  constexpr int kOverhead = 12;  // cost, in steps, of a tile's beginning and end and of summing a slab
  HiddenGradSplit best;
  best.row_pairs = (c.used_rows() + kPairRows - 1) / kPairRows;
  best.splits = 1;
  const int all = (c.vocab_size + 63) / 64, tiles = best.row_pairs * ((c.width + 255) / 256);
  best.k_tiles = all;
  int cost = 0x7fffffff;
  for (int splits = 1; splits <= kMaxVocabSplits; ++splits) {
    const int k_tiles = (all + splits - 1) / splits;
    if (splits > 1 && (splits * best.row_pairs * kPairRows > c.slab_rows || (splits - 1) * k_tiles >= all)) break;
    const int found = (tiles * splits + clusters - 1) / clusters * (k_tiles + kOverhead);
    if (found < cost) {
      cost = found;
      best.splits = splits;
      best.k_tiles = k_tiles;
    }
  }
  return best;
}

}  // namespace illada::loss
