// Interface between linear_launch.cpp, which validates the params and plans the chunks, and the .cu files of the linear
// masked cross-entropy, which launch the kernels.
#pragma once

#include "common/device.h"
#include "illada/linear_loss.h"

namespace illada::loss {

constexpr int kPairRows = 256;  // rows of two neighbouring row tiles, which a cluster multiplies
constexpr int kTileIds = 256;   // ids of a vocab tile
constexpr int kMostSplits = 8;  // most splits of the vocabulary in hidden's gradient

// Sizes of a row chunk and layout of the workspace. Row r of a chunk is the r-th of its listed tokens.
struct LinearPlan {
  int64_t tokens = 0;       // upper bound of the listed tokens
  int chunks = 0;           // chunks launched; those that start behind the last listed token do nothing
  int rows = 0;             // rows of a chunk, a multiple of kPairRows
  int id_tiles = 0;         // vocab tiles
  int64_t prob_stride = 0;  // elements between rows of probabilities
  int slab_rows = 0;        // rows of fp32 sums of hidden's gradient, over all splits
  // The offsets below are in bytes. Of the call: the listed tokens, and their number.
  int64_t list = 0, count = 0;
  // Of a chunk:
  //   hidden         rows of hidden [rows, width]
  //   probs          2^(logit - reference) [rows, prob_stride], without the targets
  //   sums, maxima   sums of probs and largest logits [id_tiles, rows], without the targets
  //   targets        target of each row; -1 means none
  //   target_logits  logit of each row's target
  //   references     reference of each row, in log2
  //   factors        factor of each row that turns its probabilities into a gradient
  //   again          pairs of row tiles that must be computed again
  //   slabs          [slab_rows, width]
  //   lse            with filter_eps: lse relative to the reference, in log2 [rows]
  //   live           with filter_eps: pairs of row tiles x vocab tiles that matter
  int64_t hidden = 0, probs = 0, sums = 0, maxima = 0, targets = 0, target_logits = 0, references = 0, factors = 0,
          again = 0, slabs = 0, lse = 0, live = 0;
  int64_t bytes = 0;
};
// Plans a call. The second function looks the device up.
LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& params, const Device& device);
LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& params);

// The parts of linear_masked_cross_entropy_cuda, for a caller that computes the GEMMs itself (LossGradients::kMm). For
// each chunk of the plan:
//   1. linear_probabilities_cuda computes the probabilities [rows, vocab_size], with p - 1 at the target. If there is a
//      weight_grad, it also computes hidden's rows [rows, width] times their factors. The plan has the place of both.
//   2. The caller computes, in any order,
//        slabs [rows, width] = probabilities . weight          in fp32
//        weight_grad (+)= probabilities^T . hidden's rows
//   3. linear_scatter_cuda computes hidden's gradient from the slabs.
// Both functions ignore filter_eps. If there is a weight_grad, rows without a token are zeros in one of probabilities
// and hidden's rows and finite in the other. Without a weight_grad that does not hold: the slabs of such rows are not
// read.
void linear_probabilities_cuda(const LinearMaskedCrossEntropyParams& params, int chunk);
void linear_scatter_cuda(const LinearMaskedCrossEntropyParams& params, int chunk);

// Arguments of the kernels of one chunk: the plan's offsets as pointers.
struct LinearChunk {
  const int32_t* list;   // listed tokens of all chunks
  const int32_t* count;  // length of the list, a device pointer; null means `listed`
  int listed;            // length of the list where `count` is null
  int first, rows;       // place in the list and number of the rows of this chunk
  int vocab_size, width, id_tiles;
  uint16_t* hidden;  // bfloat16
  uint16_t* probs;   // bfloat16
  int64_t prob_stride;
  int32_t* targets;
  float *sums, *maxima, *target_logits, *references, *factors;
  int32_t* again;
  float* lse;     // used only with `live`
  uint8_t* live;  // [rows / kPairRows, id_tiles], tiles that matter; null means all
  float* slabs;
  int slab_rows;
  int group_tiles;  // most row tiles computed across a stretch of the vocabulary before the next stretch (tile_order.h)

#if defined(__CUDACC__)
  // Number of this chunk's rows that have a listed token.
  __device__ __forceinline__ int used() const {
    const int all = count ? *count : listed;
    return min(max(all - first, 0), rows);
  }
#endif
};

// Lists the tokens whose weight is not 0.
void launch_linear_select(const LinearMaskedCrossEntropyParams& params, const Device& device, int32_t* list,
                          int32_t* count);
void launch_linear_gather(const LinearMaskedCrossEntropyParams& params, const Device& device, const LinearChunk& chunk);
// `again`: computes only the pairs of row tiles that the first statistics marked.
void launch_linear_logits_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                               const LinearChunk& chunk, bool again);
void launch_linear_statistics(const LinearMaskedCrossEntropyParams& params, const Device& device,
                              const LinearChunk& chunk, bool again);
void launch_linear_hidden_grad_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                                    const LinearChunk& chunk);
// `whole`: the vocabulary is not split, so each row has one slab.
void launch_linear_scatter(const LinearMaskedCrossEntropyParams& params, const Device& device, const LinearChunk& chunk,
                           bool whole);
// Writes zeros to the rows that gather and logits leave out, for GEMMs that do not know the number of rows.
void launch_linear_clear(const LinearMaskedCrossEntropyParams& params, const Device& device, const LinearChunk& chunk);
void launch_linear_weight_grad_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                                    const LinearChunk& chunk);

}  // namespace illada::loss
