// Row-wise kernels between the GEMMs of the fused head's loss (linear_gemm_sm90.cu): select the tokens, gather their
// hidden rows, turn a row's sums into the loss (statistics), and scatter hidden's gradient to the tokens.
//
// References. The logits kernel keeps 2^(x - reference) in bfloat16 and needs references before any logit x is known
// (here and below in log2). A dot product gives an approximate logit y of the target beforehand. With y + 30 as
// reference, no probability of at least 2^-96 is lost (bfloat16 ends at 2^-126). Nothing overflows while the row's sum
// is below 2^64, that is while the target's nll is below 94 in log2, 65 nats. Rows beyond that take their largest
// logit, which the logits kernel also finds, and their tiles are multiplied once more. That second launch always
// happens and ends at once where no row needs it.
//
// The target. wgmma rounds sums toward zero, once per 16 products. A logit of 20 with 4096 products is therefore 1e-4
// to 4e-4 smaller than that of the dot product above. The loss and the gradients use only wgmma's logits: the logits
// kernel stores the target's logit separately and sums the other probabilities. Their sum is 1 - p. It is accurate
// where p is almost 1, and never negative.
//
//   select, one CTA:            for 1024 tokens at a time: count those with a token weight; append them to the list
//   gather, one CTA per row:    clear the flags of the row's pair of row tiles (first row of a pair)
//                               copy hidden's row in bfloat16; dot product with the target's row of the head weight
//                               write the target and the reference
//   statistics, one CTA per 32 rows; first launch, and second launch (`recompute`) for the marked pairs:
//                               sum the rows over the vocab tiles (add_vocab_tiles)
//                               write nll and factor of each row, or mark its pair for the second launch (finish_row)
//     second launch, all pairs: mark the live vocab tiles (mark_live_tiles)
//                               multiply hidden's rows by their factors (scale_hidden_rows)
//   scatter, one CTA per row:   sum the row's slabs; multiply by the factor; write to the token's row
//   clear, one CTA per row:     write zeros to an unused row, for a caller that computes the GEMMs itself
//
// Schedule of a row chunk. Each launch waits for the one before it (wait_for_previous_kernel); CTAs of one launch do
// not wait for each other. Launches in parentheses are of linear_gemm_sm90.cu; the last three depend on the gradients
// asked for, and the two GEMMs may change places.
//
//   time ->   select | gather | (logits) | statistics | (logits, marked pairs) | statistics | (hidden_grad) | scatter
//                                                                                           | (weight_grad)
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/online_softmax.cuh"
#include "common/reduce.cuh"
#include "loss/linear.h"
#include "loss/linear_split.cuh"

namespace illada::loss {
namespace {

constexpr const char* kOp = "linear_masked_cross_entropy";
constexpr float kReferenceAboveTarget = 30.0f, kMaxSum = 18446744073709551616.0f;  // 2^64

// ------------------------------------------------------------------------------------------------------------ select

// Lists the tokens with a nonzero token weight, in order. One CTA suffices: a token takes a fraction of a nanosecond.
constexpr int kSelectThreads = 1024;
__global__ __launch_bounds__(kSelectThreads) void illada_linear_masked_cross_entropy_select(
    const float* weights, int tokens, int32_t* list, int32_t* count, const __grid_constant__ DependentLaunch launch) {
  __shared__ int warp_counts[2][kSelectThreads / 32];
  wait_for_previous_kernel(launch);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int before = 0;
  // With two buffers one barrier is enough: the counts that a slow warp still reads are overwritten only after the next
  // barrier.
  for (int first = 0, buffer = 0; first < tokens; first += kSelectThreads, buffer ^= 1) {
    const int token = first + int(threadIdx.x);
    const bool listed = token < tokens && weights[token] != 0;
    const unsigned ballot = __ballot_sync(kFullWarp, listed);
    if (lane == 0) warp_counts[buffer][warp] = __popc(ballot);
    __syncthreads();
    const int of_lane = warp_counts[buffer][lane];
    const int of_warps = __reduce_add_sync(kFullWarp, lane < warp ? of_lane : 0);
    if (listed) list[before + of_warps + __popc(ballot & ((1u << lane) - 1))] = token;
    before += __reduce_add_sync(kFullWarp, of_lane);
  }
  if (threadIdx.x == 0) *count = before;
}

// ------------------------------------------------------------------------------------------------------------ gather

// Returns the token of row r of the row chunk, or -1 where the list has none or its token weight is 0.
__device__ __forceinline__ int token_of(const LinearMaskedCrossEntropyParams& p, const LinearRowChunk& c, int r) {
  const int token = c.list[c.first + r];
  return token >= 0 && token < p.num_tokens && p.token_weights[token] != 0 ? token : -1;
}

__device__ __forceinline__ int64_t target_of(const LinearMaskedCrossEntropyParams& p, int token) {
  return p.targets_are_int64 ? static_cast<const int64_t*>(p.targets)[token]
                             : static_cast<const int32_t*>(p.targets)[token];
}

constexpr int kRowThreads = 128;

// Clears the flags of the pair of row tiles that begins with row r, for the statistics.
__device__ __forceinline__ void clear_flags(const LinearRowChunk& c, int r) {
  if (threadIdx.x == 0) c.recompute[r / kPairRows] = 0;
  if (c.live)
    for (int i = int(threadIdx.x); i < c.vocab_tiles; i += kRowThreads)
      c.live[int64_t(r / kPairRows) * c.vocab_tiles + i] = 0;
}

// Copies the row `hidden` in bfloat16 to `out`, zeros if not `has_token`. Returns the thread's part of the dot product
// of the copy with `weight`.
template <typename T>
__device__ __forceinline__ float copy_row(const T* hidden, const BFloat16* weight, uint4* out, int width,
                                          bool has_token) {
  float dot = 0;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < width / 8; i += kRowThreads) {
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (has_token) {
      float x[8], w[8];
      unpack8(load8(hidden + 8 * i), x);
      packed = make_uint4(pack2<BFloat16>(x[0], x[1]), pack2<BFloat16>(x[2], x[3]), pack2<BFloat16>(x[4], x[5]),
                          pack2<BFloat16>(x[6], x[7]));
      unpack8(Raw8<BFloat16>{{packed}}, x);  // the rounded values, as the GEMM reads them
      unpack8(load8(weight + 8 * i), w);
#pragma unroll
      for (int e = 0; e < 8; ++e) dot = fmaf(x[e], w[e], dot);
    }
    out[i] = packed;
  }
  return dot;
}

// One CTA per row writes hidden's row in bfloat16 (zeros to the end of the pair of tiles), the target and the
// reference.
template <typename T>
__global__ __launch_bounds__(kRowThreads) void illada_linear_masked_cross_entropy_gather(
    const __grid_constant__ LinearMaskedCrossEntropyParams p, const __grid_constant__ LinearRowChunk c,
    const __grid_constant__ DependentLaunch launch) {
  __shared__ float warp_sums[kRowThreads / 32];
  wait_for_previous_kernel(launch);
  const int r = int(blockIdx.x), used_rows = c.used_rows();
  if (r >= (used_rows + kPairRows - 1) / kPairRows * kPairRows) return;
  if (r % kPairRows == 0) clear_flags(c, r);
  const int token = r < used_rows ? token_of(p, c, r) : -1;
  const int64_t target = token >= 0 ? target_of(p, token) : -1;
  const bool has_target = target >= 0 && target < p.vocab_size;

  // Without a token or target, the pointers are those of row 0, so that they stay valid.
  const T* hidden = static_cast<const T*>(p.hidden) + int64_t(max(token, 0)) * p.hidden_row_stride;
  const BFloat16* weight =
      static_cast<const BFloat16*>(p.head_weight) + (has_target ? target : int64_t(0)) * p.head_weight_row_stride;
  uint4* out = reinterpret_cast<uint4*>(c.hidden + int64_t(r) * c.width);
  float dot = copy_row(hidden, weight, out, c.width, token >= 0);
  dot = warp_reduce(dot, [](float a, float b) { return a + b; });
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = dot;
  __syncthreads();
  if (threadIdx.x == 0) {
    float logit = 0;
    for (float sum : warp_sums) logit += sum;
    c.targets[r] = has_target ? int32_t(target) : -1;
    c.references[r] = (has_target ? logit * kLog2eF : 0.0f) + kReferenceAboveTarget;
  }
}

// -------------------------------------------------------------------------------------------------------- statistics

// A CTA has 32 rows, one per lane; its 8 warps divide the vocab tiles. The first launch reads all sums and marks the
// pairs of row tiles that must be recomputed. The second launch (recompute) reads those of the recomputed pairs, marks
// the live tiles, and multiplies hidden's rows by their factors.
constexpr int kStatisticsRows = 32, kStatisticsWarps = 8;
static_assert(kPairRows % kStatisticsRows == 0);

// Computes nll and factor of row r from the sum over all ids but the target. Returns true where the sum overflowed and
// the row must be recomputed.
__device__ __forceinline__ bool finish_row(const LinearMaskedCrossEntropyParams& p, const LinearRowChunk& c, int r,
                                           float others, float top, bool recompute, bool keep_probs) {
  const int token = token_of(p, c, r);
  c.factors[r] = 0;
  if (c.lse) c.lse[r] = INFINITY;
  if (token < 0) return false;
  const int target = c.targets[r];
  const float reference = c.references[r];
  // The target's term, computed as the logits kernel computes the others.
  const float logit = target >= 0 ? c.target_logits[r] : -INFINITY;
  const float exponent = fmaf(logit, kLog2eF, -reference), own = exp2_approx(exponent), sum = others + own;
  if (!recompute && !(sum < kMaxSum)) {
    c.references[r] = fmaxf(top, logit) * kLog2eF;
    return true;
  }
  if (target < 0) {
    p.nll[token] = NAN;
    return false;
  }
  if (c.lse) c.lse[r] = log2f(sum);
  p.nll[token] = others < own ? log1pf(others / own) : (log2f(sum) - exponent) * kLn2F;
  const float normalizer = p.normalizer ? *p.normalizer : 1.0f;
  c.factors[r] = p.token_weights[token] * p.scale / normalizer / sum;
  if (keep_probs)  // p - 1
    reinterpret_cast<BFloat16*>(c.probs)[r * c.prob_stride + target].bits = uint16_t(pack2<BFloat16>(-others, 0));
  return false;
}

// Sum and largest logit of a row.
struct RowSums {
  float top = -INFINITY, sum = 0;
};

// Returns the sums of row r over the warp's vocab tiles: every kStatisticsWarps-th.
__device__ __forceinline__ RowSums add_vocab_tiles(const LinearRowChunk& c, int r, int warp) {
  RowSums row;
  for (int tile = warp; tile < c.vocab_tiles; tile += kStatisticsWarps) {
    row.sum += c.sums[int64_t(tile) * c.rows + r];
    row.top = fmaxf(row.top, c.maxima[int64_t(tile) * c.rows + r]);
  }
  return row;
}

// Marks the vocab tiles in which one of 32 rows, from `first` on, has its target or a probability of at least
// filter_eps. Whole warps call it, so that one lane marks a tile for 32 rows. CTAs of the same pair write the same
// value.
__device__ __forceinline__ void mark_live_tiles(const LinearMaskedCrossEntropyParams& p, const LinearRowChunk& c,
                                                int first, int used_rows) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int r = first + lane;
  const float lse = r < used_rows ? c.lse[r] : INFINITY;
  const float reference = lse < INFINITY ? c.references[r] : 0.0f;
  const int target = lse < INFINITY ? c.targets[r] : -1;
  for (int tile = warp; tile < c.vocab_tiles; tile += kStatisticsWarps) {
    const float top = lse < INFINITY ? c.maxima[int64_t(tile) * c.rows + r] : -INFINITY;
    const float probability = exp2f(fmaf(top, kLog2eF, -reference) - lse);
    const bool matters = probability >= p.filter_eps || (target >= 0 && target / kVocabTileIds == tile);
    if (__any_sync(kFullWarp, matters) && lane == 0) c.live[int64_t(first / kPairRows) * c.vocab_tiles + tile] = 1;
  }
}

// Multiplies hidden's rows by their factors: they become the operand of the weight's gradient.
__device__ __forceinline__ void scale_hidden_rows(const LinearRowChunk& c, int first, int end) {
  for (int row = first; row < end; ++row) {
    const float factor = c.factors[row];
    uint4* hidden = reinterpret_cast<uint4*>(c.hidden + int64_t(row) * c.width);
    for (int i = int(threadIdx.x); i < c.width / 8; i += 32 * kStatisticsWarps) {
      float x[8];
      unpack8(Raw8<BFloat16>{{hidden[i]}}, x);
      hidden[i] =
          make_uint4(pack2<BFloat16>(x[0] * factor, x[1] * factor), pack2<BFloat16>(x[2] * factor, x[3] * factor),
                     pack2<BFloat16>(x[4] * factor, x[5] * factor), pack2<BFloat16>(x[6] * factor, x[7] * factor));
    }
  }
}

__global__ __launch_bounds__(32 * kStatisticsWarps) void illada_linear_masked_cross_entropy_statistics(
    const __grid_constant__ LinearMaskedCrossEntropyParams p, const __grid_constant__ LinearRowChunk c, bool recompute,
    const __grid_constant__ DependentLaunch launch) {
  __shared__ float sums[kStatisticsWarps][kStatisticsRows], tops[kStatisticsWarps][kStatisticsRows];
  wait_for_previous_kernel(launch);
  const bool keep_probs = p.hidden_grad || p.weight_grad;
  const int first = int(blockIdx.x) * kStatisticsRows, used_rows = c.used_rows();
  if (first >= used_rows) return;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, r = first + lane;
  if (!recompute || c.recompute[first / kPairRows]) {
    RowSums row = add_vocab_tiles(c, r, warp);
    sums[warp][lane] = row.sum;
    tops[warp][lane] = row.top;
    __syncthreads();
    if (warp == 0 && r < used_rows) {
      for (int w = 1; w < kStatisticsWarps; ++w) {  // in a fixed order
        row.sum += sums[w][lane];
        row.top = fmaxf(row.top, tops[w][lane]);
      }
      if (finish_row(p, c, r, row.sum, row.top, recompute, keep_probs)) c.recompute[first / kPairRows] = 1;
    }
    __syncthreads();  // lse and factors are written by warp 0 and read by all warps
  }
  if (recompute && c.live) mark_live_tiles(p, c, first, used_rows);
  if (recompute && p.weight_grad) scale_hidden_rows(c, first, min(first + kStatisticsRows, used_rows));
}

// ----------------------------------------------------------------------------------------------------------- scatter

// One CTA per row writes the slabs' sum times the row's factor to the token's row of hidden_grad.
template <typename T>
__global__ __launch_bounds__(kRowThreads) void illada_linear_masked_cross_entropy_scatter(
    const __grid_constant__ LinearMaskedCrossEntropyParams p, const __grid_constant__ LinearRowChunk c, int clusters,
    bool single_slab, const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const int r = int(blockIdx.x);
  if (r >= c.used_rows()) return;
  const int token = token_of(p, c, r);
  if (token < 0) return;  // the gradient of tokens without a weight is not written here
  HiddenGradSplit split{};
  split.splits = 1;
  if (!single_slab) split = hidden_grad_split(c, clusters);  // as the GEMM that wrote the slabs
  const float factor = c.factors[r];
  T* out = static_cast<T*>(p.hidden_grad) + int64_t(token) * c.width;
  for (int i = int(threadIdx.x); i < c.width / 4; i += kRowThreads) {
    float4 sum = make_float4(0, 0, 0, 0);
    for (int s = 0; s < split.splits; ++s) {
      const int64_t row = int64_t(s) * split.row_pairs * kPairRows + r;
      const float4 x = reinterpret_cast<const float4*>(c.slabs + row * c.width)[i];
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<float4*>(out)[i] = make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
    } else {
      reinterpret_cast<uint2*>(out)[i] =
          make_uint2(pack2<T>(sum.x * factor, sum.y * factor), pack2<T>(sum.z * factor, sum.w * factor));
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- clear

// Writes zeros to the unused rows, one CTA per row.
constexpr int kClearThreads = 512;
__global__ __launch_bounds__(kClearThreads) void illada_linear_masked_cross_entropy_clear(
    const __grid_constant__ LinearRowChunk c, const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const int r = int(blockIdx.x);
  if (r < (c.used_rows() + kPairRows - 1) / kPairRows * kPairRows) return;
  const auto clear = [](uint16_t* row, int64_t size) {
    for (int64_t i = threadIdx.x; i < size / 8; i += kClearThreads)
      reinterpret_cast<uint4*>(row)[i] = make_uint4(0, 0, 0, 0);
  };
  clear(c.probs + r * c.prob_stride, c.prob_stride);
  clear(c.hidden + int64_t(r) * c.width, c.width);
}

LaunchShape launch_shape(int blocks, int threads) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(blocks));
  shape.block = dim3(unsigned(threads));
  shape.dependent = true;
  return shape;
}

}  // namespace

void launch_linear_select(const LinearMaskedCrossEntropyParams& p, const Device& device, int32_t* list,
                          int32_t* count) {
  launch_kernel(kOp, device, p.launch.stream, launch_shape(1, kSelectThreads),
                illada_linear_masked_cross_entropy_select, p.token_weights, int(p.num_tokens), list, count);
}

void launch_linear_gather(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearRowChunk& chunk) {
  const auto kernel = p.hidden_dtype == DType::kFloat32 ? illada_linear_masked_cross_entropy_gather<float>
                                                        : illada_linear_masked_cross_entropy_gather<BFloat16>;
  launch_kernel(kOp, device, p.launch.stream, launch_shape(chunk.rows, kRowThreads), kernel, p, chunk);
}

void launch_linear_statistics(const LinearMaskedCrossEntropyParams& p, const Device& device,
                              const LinearRowChunk& chunk, bool recompute) {
  launch_kernel(kOp, device, p.launch.stream, launch_shape(chunk.rows / kStatisticsRows, 32 * kStatisticsWarps),
                illada_linear_masked_cross_entropy_statistics, p, chunk, recompute);
}

void launch_linear_scatter(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearRowChunk& chunk,
                           bool single_slab) {
  const auto kernel = p.hidden_dtype == DType::kFloat32 ? illada_linear_masked_cross_entropy_scatter<float>
                                                        : illada_linear_masked_cross_entropy_scatter<BFloat16>;
  launch_kernel(kOp, device, p.launch.stream, launch_shape(chunk.rows, kRowThreads), kernel, p, chunk,
                linear_clusters(device.sm_count), single_slab);
}

void launch_linear_clear(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearRowChunk& chunk) {
  launch_kernel(kOp, device, p.launch.stream, launch_shape(chunk.rows, kClearThreads),
                illada_linear_masked_cross_entropy_clear, chunk);
}

}  // namespace illada::loss
