// Between linear_launch.cpp, which validates and plans, and the .cu files of the fused head's loss, which launch.
#pragma once

#include "common/device.h"
#include "illada/linear_loss.h"

namespace illada::loss {

constexpr int kPairRows = 256;  // rows of two neighbouring tiles, which a cluster multiplies
constexpr int kTileIds = 256;   // of the vocabulary, in a tile of logits
constexpr int kMostSplits = 8;  // of the vocabulary, in hidden's gradient

// The sizes of a chunk and what lies where in the workspace. Row r of a chunk is the r-th of its listed tokens.
struct LinearPlan {
  int64_t tokens = 0;       // that may be listed
  int chunks = 0;           // launched; those that start behind the last listed token do nothing
  int rows = 0;             // of a chunk, a multiple of kPairRows
  int id_tiles = 0;         // of the vocabulary
  int64_t prob_stride = 0;  // elements of a row of probabilities
  int slab_rows = 0;        // rows of fp32 sums of hidden's gradient, all splits together
  // Offsets in bytes. Of the call: the tokens listed, and how many.
  int64_t list = 0, count = 0;
  // Of a chunk: rows of hidden [rows, width], 2^(logit - reference) [rows, prob_stride], their sums and the largest
  // logit [id_tiles, rows], all without the targets; of each row the target (-1: none), its logit, the reference in
  // log2, and the factor that makes a gradient of its probabilities; which pairs of tiles have to be done again; slabs
  // [slab_rows, width]; with filter_eps the lse above the reference in log2 [rows] and which pairs of row
  // tiles x tiles of the vocabulary matter.
  int64_t hidden = 0, probs = 0, sums = 0, maxima = 0, targets = 0, target_logits = 0, references = 0, factors = 0,
          again = 0, slabs = 0, lse = 0, live = 0;
  int64_t bytes = 0;
};
LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& params, const Device& device);
LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& params);

// linear_masked_cross_entropy_cuda in parts, for a caller with GEMMs of its own (LossGradients::kMm). For each chunk of
// the plan: the probabilities [rows, vocab_size] with p - 1 at the target, and hidden's rows [rows, width] times their
// factors if there is a weight_grad (the plan says where both are), then the caller's products
//   slabs [rows, width] = probabilities . weight          in fp32
//   weight_grad (+)= probabilities^T . hidden's rows
// in any order, then hidden's gradient from the slabs. filter_eps is not looked at. Rows without a token are zeros in
// one of the two and finite in the other, but only if there is a weight_grad: the slabs of such rows are not read.
void linear_probabilities_cuda(const LinearMaskedCrossEntropyParams& params, int chunk);
void linear_scatter_cuda(const LinearMaskedCrossEntropyParams& params, int chunk);

// What the kernels of one chunk see: the plan's places as pointers.
struct LinearChunk {
  const int32_t* list;   // tokens of all chunks
  const int32_t* count;  // of the list, on the device; null: `listed`
  int listed;
  int first, rows;  // of this chunk, in the list
  int vocab_size, width, id_tiles;
  uint16_t* hidden;  // bfloat16
  uint16_t* probs;   // bfloat16
  int64_t prob_stride;
  int32_t* targets;
  float *sums, *maxima, *target_logits, *references, *factors;
  int32_t* again;
  float* lse;     // with `live` alone
  uint8_t* live;  // [rows / kPairRows, id_tiles], or null: all are
  float* slabs;
  int slab_rows;
  int group_tiles;  // at most, across a stretch of the vocabulary, before the next stretch (tile_order.h)

#if defined(__CUDACC__)
  // Rows of this chunk that are listed.
  __device__ __forceinline__ int used() const {
    const int all = count ? *count : listed;
    return min(max(all - first, 0), rows);
  }
#endif
};

void launch_linear_select(const LinearMaskedCrossEntropyParams& params, const Device& device, int32_t* list,
                          int32_t* count);
void launch_linear_gather(const LinearMaskedCrossEntropyParams& params, const Device& device, const LinearChunk& chunk);
// `again`: only the pairs of row tiles that the first statistics asked for.
void launch_linear_logits_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                               const LinearChunk& chunk, bool again);
void launch_linear_statistics(const LinearMaskedCrossEntropyParams& params, const Device& device,
                              const LinearChunk& chunk, bool again);
void launch_linear_hidden_grad_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                                    const LinearChunk& chunk);
// `whole`: the slabs are not split.
void launch_linear_scatter(const LinearMaskedCrossEntropyParams& params, const Device& device, const LinearChunk& chunk,
                           bool whole);
// Zeros in the rows that gather and logits leave out, for GEMMs that do not know how many there are.
void launch_linear_clear(const LinearMaskedCrossEntropyParams& params, const Device& device, const LinearChunk& chunk);
void launch_linear_weight_grad_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                                    const LinearChunk& chunk);

}  // namespace illada::loss
