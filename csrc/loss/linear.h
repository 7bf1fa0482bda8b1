// Interface between linear_launch.cpp, which validates the params and plans the row chunks, and the .cu files of the
// linear masked cross-entropy, which launch the kernels.
#pragma once

#include "common/device.h"
#include "illada/linear_loss.h"

namespace illada::loss {

constexpr int kPairRows = 256;      // rows of two neighbouring row tiles, which a cluster multiplies
constexpr int kVocabTileIds = 256;  // ids of a vocab tile
constexpr int kMaxVocabSplits = 8;  // maximum number of splits of the vocabulary in hidden's gradient

// Sizes of a row chunk and layout of the workspace. Row r of a chunk is the r-th of its listed tokens.
struct LinearPlan {
  int64_t tokens = 0;  // upper bound of the listed tokens
  int row_chunks = 0;  // row chunks launched; those that start behind the last listed token do nothing
  int chunk_rows = 0;  // rows of a row chunk, a multiple of kPairRows
  int vocab_tiles = 0;
  int64_t prob_stride = 0;  // elements between rows of probabilities
  int slab_rows = 0;        // rows of fp32 sums of hidden's gradient, over all splits
  // The offsets below are in bytes. Of the call: the listed tokens, and their number.
  int64_t list = 0, count = 0;
  // Of a row chunk:
  //   hidden         rows of hidden [rows, width]
  //   probs          2^(logit - reference) [rows, prob_stride], without the targets
  //   sums, maxima   sums of probs and largest logits [vocab_tiles, rows], without the targets
  //   targets        target of each row; -1 means none
  //   target_logits  logit of each row's target
  //   references     reference of each row, in log2
  //   factors        factor of each row that turns its probabilities into a gradient
  //   recompute      pairs of row tiles that must be computed again
  //   slabs          [slab_rows, width]
  //   lse            with filter_eps: lse relative to the reference, in log2 [rows]
  //   live           with filter_eps: pairs of row tiles x vocab tiles that matter
  int64_t hidden = 0, probs = 0, sums = 0, maxima = 0, targets = 0, target_logits = 0, references = 0, factors = 0,
          recompute = 0, slabs = 0, lse = 0, live = 0;
  int64_t bytes = 0;
};
// Plans a call. The second function looks the device up.
LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& params, const Device& device);
LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& params);

// Phases of linear_masked_cross_entropy_cuda, for a caller that computes the GEMMs itself (LossGradients::kMm). For
// each row chunk of the plan:
//   1. linear_probabilities_cuda computes the probabilities [rows, vocab_size], with p - 1 at the target. If there is a
//      weight_grad, it also computes hidden's rows [rows, width] times their factors. The plan has the offsets of both.
//   2. The caller computes, in any order,
//        slabs [rows, width] = probabilities . head weight     in fp32
//        weight_grad (+)= probabilities^T . hidden's rows
//   3. linear_scatter_cuda computes hidden's gradient from the slabs.
// Both functions ignore filter_eps. If there is a weight_grad, rows without a token are zeros in one of probabilities
// and hidden's rows and finite in the other. Without a weight_grad that does not hold: the slabs of such rows are not
// read.
void linear_probabilities_cuda(const LinearMaskedCrossEntropyParams& params, int chunk);
void linear_scatter_cuda(const LinearMaskedCrossEntropyParams& params, int chunk);

// Arguments of the kernels of one row chunk: the plan's offsets as pointers.
struct LinearRowChunk {
  const int32_t* list;   // listed tokens of all row chunks
  const int32_t* count;  // length of the list, a device pointer; null means `listed`
  int listed;            // length of the list where `count` is null
  int first, rows;       // position in the list and number of the rows of this row chunk
  int vocab_size, width, vocab_tiles;
  uint16_t* hidden;  // bfloat16
  uint16_t* probs;   // bfloat16
  int64_t prob_stride;
  int32_t* targets;
  float *sums, *maxima, *target_logits, *references, *factors;
  int32_t* recompute;
  float* lse;     // used only with `live`
  uint8_t* live;  // [rows / kPairRows, vocab_tiles], tiles that matter; null means all
  float* slabs;
  int slab_rows;
  int max_group_tiles;  // maximum number of tiles computed across a stretch of the vocabulary (tile_order.h)

#if defined(__CUDACC__)
  // Number of this row chunk's rows that have a listed token.
  __device__ __forceinline__ int used_rows() const {
    const int all = count ? *count : listed;
    return min(max(all - first, 0), rows);
  }
#endif
};

// Lists the tokens whose token weight is not 0.
void launch_linear_select(const LinearMaskedCrossEntropyParams& params, const Device& device, int32_t* list,
                          int32_t* count);
void launch_linear_gather(const LinearMaskedCrossEntropyParams& params, const Device& device,
                          const LinearRowChunk& chunk);
// `recompute`: computes only the pairs of row tiles that the first statistics marked.
void launch_linear_logits_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                               const LinearRowChunk& chunk, bool recompute);
void launch_linear_statistics(const LinearMaskedCrossEntropyParams& params, const Device& device,
                              const LinearRowChunk& chunk, bool recompute);
void launch_linear_hidden_grad_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                                    const LinearRowChunk& chunk);
// `single_slab`: the vocabulary is not split, so each row has one slab.
void launch_linear_scatter(const LinearMaskedCrossEntropyParams& params, const Device& device,
                           const LinearRowChunk& chunk, bool single_slab);
// Writes zeros to the rows that gather and logits leave out, for GEMMs that do not know the number of rows.
void launch_linear_clear(const LinearMaskedCrossEntropyParams& params, const Device& device,
                         const LinearRowChunk& chunk);
void launch_linear_weight_grad_sm90(const LinearMaskedCrossEntropyParams& params, const Device& device,
                                    const LinearRowChunk& chunk);

}  // namespace illada::loss
