// Masked cross-entropy from logits: forward, backward, and both at once where a row fits the registers of a cluster.
//
//   lse = log sum_v e^x_v,   nll = lse - x_y,   dx = (w f + dlse) e^(x - lse) - w f onehot(y)
//
// Forward and backward divide a row into vocab tiles of kVocabTileVectors vectors of 8 ids. One CTA processes one vocab
// tile and has all its loads in flight, so few rows fill a GPU and many rows need no loop. The forward writes the
// partial softmax (reference, sum) of each vocab tile to the workspace. One warp per row merges them in a fixed order.
//
// The fused kernel processes a row with a cluster of up to 8 CTAs. Each thread keeps its vectors in registers while the
// CTAs exchange their partial softmax through distributed shared memory. The row is read once and written once.
//
//   forward, one CTA per vocab tile of a row:
//     for each round: load all vectors of the round; raise the reference; add the exponentials (add_tile)
//     merge the softmax of the CTA's threads; write it to the workspace, or the row's results if it has one vocab tile
//   combine, one warp per row of several vocab tiles:
//     merge the row's partial softmax in a fixed order; write the row's results
//   backward, one CTA per vocab tile of a row:
//     for each round: load all vectors of the round; compute dx from lse; write it (write_tile_gradient)
//   fused, one cluster per row:
//     load all vectors of the thread; compute their softmax
//     merge the softmax of the CTA (merge_block), then of the cluster (merge_cluster); rank 0 writes the row's results
//     compute dx from the vectors in the registers; write it to grad, which may be the logits
//   all, for a row without a token weight: write zeros and end, before any barrier
//
// Schedule of the fused kernel, for a row with 8 CTAs:
//
//            time ->
//   CTA 0    [ loads ][ softmax ] B [ partial ] C1 [ read 8 partials ] arrive C2 [ results, dx: stores ] wait C2
//   CTA 1    [ loads ][ softmax ] B [ partial ] C1 [ read 8 partials ] arrive C2 [          dx: stores ] wait C2
//     ...
//   CTA 7    [ loads ][ softmax ] B [ partial ] C1 [ read 8 partials ] arrive C2 [          dx: stores ] wait C2
//
//   B     __syncthreads: the warps' softmax is in shared memory
//   C1    barrier of the cluster, arrive and wait: the CTAs' partial softmax is in shared memory. In place, it also
//         orders the read of the target's logit before the writes of dx by the CTA that has the target
//   C2    barrier of the cluster, arrive and wait apart: no CTA exits while another still reads its shared memory
//
//   CTAs of other rows fill the time in which a CTA waits for memory or for its cluster (kFusedCtas per SM).
//   A row decides alone whether it has work, so all CTAs of a cluster reach C1 and C2, or none. Forward, combine and
//   backward have no barrier but B: each launch waits for the one before it.
//
// A row may start at any address. Its vectors begin at the first multiple of 16 bytes. The ids before and after the
// vectors are `single` ids; threads of the first vocab tile take one each. In the backward the gradient's row decides.
//
// Lower bound: rows x vocab x sizeof(T) bytes, each read once and, with a gradient, written once. Instructions per
// bf16 element: forward 6, backward 5. An H100 issues 20 (10 with the write) while memory delivers an element.
#include <cute/arch/cluster_sm90.hpp>

#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/online_softmax.cuh"
#include "common/ptx.cuh"
#include "loss/launch.h"

namespace illada::loss {
namespace {

constexpr int kVector = 8;
constexpr int kThreads = 256, kWarps = kThreads / 32;  // of forward and backward
constexpr int kFusedThreads = FusedShape::kThreads, kFusedWarps = kFusedThreads / 32;
constexpr int kSingles = 16;  // up to 7 ids before the vectors, up to 7 after them

// Vectors of a thread in one round of loads: 128 bytes. All are loaded before the first is used, to have many loads in
// flight.
template <typename T>
constexpr int kUnroll = sizeof(T) == 2 ? 8 : 4;

using Softmax = OnlineSoftmax<false>;

// The token of a row: its token weight, and its target in this shard or -1.
struct RowToken {
  float weight = 0.0f;
  int target = -1;

  __device__ __forceinline__ RowToken(const MaskedCrossEntropyParams& p, int64_t n) {
    const int64_t i = p.rows ? p.rows[n] : n;
    if (i < 0 || i >= p.num_tokens) return;
    weight = p.token_weights[i];
    const int64_t id = p.targets_are_int64 ? static_cast<const int64_t*>(p.targets)[i]
                                           : int64_t(static_cast<const int32_t*>(p.targets)[i]);
    if (id >= p.vocab_start && id - p.vocab_start < p.vocab_size) target = int(id - p.vocab_start);
  }
};

// log sum exp of a row as two terms: the largest logit and the rest. In fp32 their sum would lose the rest beside a
// large logit.
__device__ __forceinline__ float2 lse_parts(const Softmax& softmax) { return {softmax.reference, logf(softmax.sum)}; }

// Gradient of a row: dx = softmax e^(x - maximum) - onehot [v == y]. The factor `softmax` includes 1 / sum.
struct RowGradient {
  float maximum, softmax, onehot;
  int target;

  __device__ __forceinline__ RowGradient(const MaskedCrossEntropyParams& p, int64_t n, const RowToken& token,
                                         float maximum, float inverse_sum)
      : maximum(maximum), target(token.target) {
    float factor = p.scale;
    if (p.normalizer) factor /= *p.normalizer;
    if (p.dloss) factor *= *p.dloss;
    onehot = token.weight * factor;
    softmax = (onehot + (p.dlse ? p.dlse[n] : 0.0f)) * inverse_sum;
  }

  __device__ __forceinline__ float compute(float x, bool is_target) const {
    return fmaf(softmax, exp2_approx((x - maximum) * kLog2eF), is_target ? -onehot : 0.0f);
  }

  template <typename T>
  __device__ __forceinline__ Raw8<T> compute(const Raw8<T>& raw, int first_id) const {
    float x[kVector];
    unpack8(raw, x);
    const int at = target - first_id;
    if (at >= 0 && at < kVector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = compute(x[i], i == at);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = softmax * exp2_approx((x[i] - maximum) * kLog2eF);
    }
    return pack8<T>(x);
  }
};

// Position and number of the vectors of a row.
struct RowShape {
  int head, vectors, vocab_size;

  template <typename T>
  __device__ __forceinline__ RowShape(const T* row, int64_t vocab)
      : head(int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T))), vocab_size(int(vocab)) {
    head = min(head, vocab_size);
    vectors = (vocab_size - head) / kVector;
  }

  __device__ __forceinline__ int id_of(int vector) const { return head + vector * kVector; }
  // The id of single `i`, or -1.
  __device__ __forceinline__ int single(int i) const {
    const int id = i < kSingles / 2 ? i : id_of(vectors) + i - kSingles / 2;
    return id < (i < kSingles / 2 ? head : vocab_size) && i < kSingles ? id : -1;
  }
};

template <typename T>
__device__ __forceinline__ bool same_alignment(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// Vectors first, first + stride, ... below `end`; -inf beyond.
template <typename T, int kCount>
__device__ __forceinline__ void load_vectors(Raw8<T> (&raw)[kCount], const T* row, const RowShape& shape, bool aligned,
                                             int first, int stride, int end) {
  if (aligned) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) raw[u] = load8_if(first + u * stride < end, row + shape.id_of(first + u * stride));
  } else {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      raw[u] = minus_infinity8<T>();
      if (first + u * stride < end) raw[u] = load8_unaligned(row + shape.id_of(first + u * stride));
    }
  }
}

template <typename T>
__device__ __forceinline__ void add_vector(Softmax& softmax, const Raw8<T>& raw) {
  float x[kVector];
  unpack8(raw, x);
  softmax.raise(fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7]))));
#pragma unroll
  for (int i = 0; i < kVector; ++i) softmax.add(x[i]);
}

__device__ __forceinline__ void add_single(Softmax& softmax, float x) {
  softmax.raise(x);
  softmax.add(x);
}

__device__ __forceinline__ float2 to_partial(const Softmax& softmax) { return {softmax.reference, softmax.sum}; }
__device__ __forceinline__ Softmax from_partial(float2 partial) {
  Softmax softmax;
  softmax.reference = partial.x;
  softmax.sum = partial.y;
  return softmax;
}

// Merges the softmax of all threads of a CTA; every thread gets the result.
template <int kCtaWarps>
__device__ __forceinline__ Softmax merge_block(Softmax softmax, float2* shared) {
  softmax.merge_lanes();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = to_partial(softmax);
  __syncthreads();
  softmax = from_partial(shared[threadIdx.x % kCtaWarps]);
  softmax.merge_lanes<kCtaWarps>();
  return softmax;
}

// Writes the results of a row. One thread calls it.
__device__ __forceinline__ void write_row(const MaskedCrossEntropyParams& p, int64_t n, const RowToken& token,
                                          const Softmax& softmax, float target_logit) {
  const bool here = token.target >= 0;
  const float2 lse = lse_parts(softmax);
  // Where the target is the most likely id, its logit is the reference, so the small nll is no difference of large
  // numbers.
  if (p.nll) p.nll[n] = here ? lse.x - target_logit + lse.y : NAN;
  if (p.lse) p.lse[n] = lse.x + lse.y;
  if (p.lse_parts) reinterpret_cast<float2*>(p.lse_parts)[n] = lse;
  if (p.target_logit) p.target_logit[n] = here ? target_logit : 0.0f;
}
__device__ __forceinline__ void write_zero_row(const MaskedCrossEntropyParams& p, int64_t n) {
  if (p.nll) p.nll[n] = 0.0f;
  if (p.lse) p.lse[n] = 0.0f;
  if (p.lse_parts) reinterpret_cast<float2*>(p.lse_parts)[n] = {0.0f, 0.0f};
  if (p.target_logit) p.target_logit[n] = 0.0f;
}

template <typename T>
__device__ __forceinline__ const T* logits_row(const MaskedCrossEntropyParams& p, int64_t n) {
  return static_cast<const T*>(p.logits) + n * p.logits_row_stride;
}
template <typename T>
__device__ __forceinline__ float target_logit_of(const T* row, const RowToken& token) {
  return token.target >= 0 ? to_float(row[token.target]) : 0.0f;
}

// ----------------------------------------------------------------------------------------------------------- forward

// Adds the thread's share of a vocab tile's vectors, those before `end`, to the softmax.
template <typename T>
__device__ __forceinline__ void add_tile(Softmax& softmax, const T* row, const RowShape& shape, int vocab_tile,
                                         int end) {
#pragma unroll
  for (int offset = 0; offset < kVocabTileVectors; offset += kThreads * kUnroll<T>) {
    const int first = vocab_tile * kVocabTileVectors + offset + int(threadIdx.x);
    Raw8<T> raw[kUnroll<T>];
    load_vectors(raw, row, shape, true, first, kThreads, end);  // aligned: the row itself has decided the vectors
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u)
      if (first + u * kThreads < end) add_vector(softmax, raw[u]);
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads, 4) void illada_masked_cross_entropy_forward_sm80(
    const __grid_constant__ MaskedCrossEntropyParams p, int vocab_tiles,
    const __grid_constant__ DependentLaunch launch) {
  __shared__ float2 shared[kWarps];
  wait_for_previous_kernel(launch);
  const int64_t n = blockIdx.x / unsigned(vocab_tiles);
  const int vocab_tile = int(blockIdx.x % unsigned(vocab_tiles)), tid = int(threadIdx.x);
  const RowToken token(p, n);
  if (token.weight == 0.0f) {
    if (vocab_tiles == 1 && tid == 0) write_zero_row(p, n);  // else combine writes it
    return;
  }
  const T* const row = logits_row<T>(p, n);
  const RowShape shape(row, p.vocab_size);
  Softmax softmax;
  add_tile(softmax, row, shape, vocab_tile, min((vocab_tile + 1) * kVocabTileVectors, shape.vectors));
  if (vocab_tile == 0 && shape.single(tid) >= 0) add_single(softmax, to_float(row[shape.single(tid)]));
  softmax = merge_block<kWarps>(softmax, shared);
  if (tid > 0) return;
  if (vocab_tiles == 1) {
    write_row(p, n, token, softmax, target_logit_of(row, token));
  } else {
    static_cast<float2*>(p.workspace)[n * vocab_tiles + vocab_tile] = to_partial(softmax);
  }
}

// ----------------------------------------------------------------------------------------------------------- combine

constexpr int kCombineThreads = 128;

template <typename T>
__global__ __launch_bounds__(kCombineThreads) void illada_masked_cross_entropy_combine_sm80(
    const __grid_constant__ MaskedCrossEntropyParams p, int vocab_tiles,
    const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const int64_t n = int64_t(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x % 32);
  if (n >= p.num_rows) return;  // whole warps
  const RowToken token(p, n);
  if (token.weight == 0.0f) {
    if (lane == 0) write_zero_row(p, n);
    return;
  }
  const float2* const partials = static_cast<const float2*>(p.workspace) + n * vocab_tiles;
  Softmax total;
  // The order depends only on the number of vocab tiles, so a row has the same bits in every batch.
  for (int i = lane; i < vocab_tiles; i += 32) {
    Softmax partial = from_partial(partials[i]);
    total.raise(partial.reference);
    partial.rebase(total.reference);
    total.sum += partial.sum;
  }
  total.merge_lanes();
  if (lane == 0) write_row(p, n, token, total, target_logit_of(logits_row<T>(p, n), token));
}

// ---------------------------------------------------------------------------------------------------------- backward

// Writes zeros to the thread's share of a row of grad: vectors first, first + stride, ... below `end`, and the single
// id, or -1.
template <typename T>
__device__ __forceinline__ void clear_gradient(T* grad, const RowShape& shape, int first, int stride, int end,
                                               int single) {
  for (int vector = first; vector < end; vector += stride) store8(grad + shape.id_of(vector), Raw8<T>{});
  if (single >= 0) store_float(grad + single, 0.0f);
}

// Writes the gradient of the thread's share of a vocab tile. grad may be the row itself: a thread reads what it
// overwrites.
template <typename T>
__device__ __forceinline__ void write_tile_gradient(T* grad, const T* row, const RowShape& shape, bool aligned,
                                                    int vocab_tile, int tid, int end, const RowGradient& gradient) {
#pragma unroll
  for (int offset = 0; offset < kVocabTileVectors; offset += kThreads * kUnroll<T>) {
    const int first = vocab_tile * kVocabTileVectors + offset + tid;
    Raw8<T> raw[kUnroll<T>];
    load_vectors(raw, row, shape, aligned, first, kThreads, end);
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) {
      const int id = shape.id_of(first + u * kThreads);
      if (first + u * kThreads < end) store8(grad + id, gradient.compute(raw[u], id));
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads, 4) void illada_masked_cross_entropy_backward_sm80(
    const __grid_constant__ MaskedCrossEntropyParams p, int vocab_tiles,
    const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const int64_t n = blockIdx.x / unsigned(vocab_tiles);
  const int vocab_tile = int(blockIdx.x % unsigned(vocab_tiles)), tid = int(threadIdx.x);
  const RowToken token(p, n);
  T* const grad = static_cast<T*>(p.grad) + n * p.grad_row_stride;
  const RowShape shape(grad, p.vocab_size);
  const int end = min((vocab_tile + 1) * kVocabTileVectors, shape.vectors),
            single = vocab_tile == 0 ? shape.single(tid) : -1;
  if (token.weight == 0.0f) {
    clear_gradient(grad, shape, vocab_tile * kVocabTileVectors + tid, kThreads, end, single);
    return;
  }
  const T* const row = logits_row<T>(p, n);
  const bool aligned = same_alignment(row, grad);
  const float2 lse = reinterpret_cast<const float2*>(p.lse_parts)[n];
  const RowGradient gradient(p, n, token, lse.x, exp2_approx(-lse.y * kLog2eF));
  write_tile_gradient(grad, row, shape, aligned, vocab_tile, tid, end, gradient);
  if (single >= 0) store_float(grad + single, gradient.compute(to_float(row[single]), single == token.target));
}

// ------------------------------------------------------------------------------------------------------------- fused

// Merges the softmax of the CTAs of a cluster; every thread gets the result. The other CTAs read `partial` until the
// cluster's next barrier. This function arrives at that barrier, and the caller must wait for it.
__device__ __forceinline__ Softmax merge_cluster(Softmax softmax, float2* partial, int cluster) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) *partial = to_partial(softmax);
  ptx::keep_memory_order();
  cute::cluster_sync();
  const int cta = int(threadIdx.x % 8);  // each 8 lanes read the partials of the up to 8 CTAs
  softmax = {};
  if (cta < cluster) softmax = from_partial(ptx::load_cluster(ptx::smem_address(partial), uint32_t(cta)));
  cute::cluster_arrive();  // without a wait: the gradient is computed meanwhile
  softmax.merge_lanes<8>();
#endif
  return softmax;
}

// CTAs of the fused kernel per SM, as many as ptxas can give registers without spilling. While some wait for memory or
// for their cluster, others compute.
template <typename T, int kVectors>
constexpr int kFusedCtas =
#if __CUDA_ARCH__ == 900
    sizeof(T) == 2 ? (kVectors == 8 ? 4 : 3) : 2;
#else
    2;
#endif

// Launched as clusters of `cluster` CTAs, 1 before sm_90.
template <typename T, int kVectors>
__global__ __launch_bounds__(kFusedThreads, kFusedCtas<T, kVectors>) void illada_masked_cross_entropy_fused_sm80(
    const __grid_constant__ MaskedCrossEntropyParams p, int cluster, const __grid_constant__ DependentLaunch launch) {
  __shared__ float2 shared[kFusedWarps], partial;
  wait_for_previous_kernel(launch);
  const int64_t n = blockIdx.x / unsigned(cluster);
  const int rank = int(blockIdx.x % unsigned(cluster)), tid = int(threadIdx.x);
  const int first = rank * kFusedThreads + tid, stride = cluster * kFusedThreads;
  const RowToken token(p, n);
  T* const grad = static_cast<T*>(p.grad) + n * p.grad_row_stride;
  const RowShape shape(grad, p.vocab_size);
  const int single = rank == 0 ? shape.single(tid) : -1;
  if (token.weight == 0.0f) {  // all CTAs of the cluster, so that none waits for another
    clear_gradient(grad, shape, first, stride, shape.vectors, single);
    if (first == 0) write_zero_row(p, n);
    return;
  }
  const T* const row = logits_row<T>(p, n);
  Raw8<T> raw[kVectors];
  load_vectors(raw, row, shape, same_alignment(row, grad), first, stride, shape.vectors);
  const float single_logit = single >= 0 ? to_float(row[single]) : -INFINITY;
  const float target_logit = first == 0 ? target_logit_of(row, token) : 0.0f;  // read before the gradient overwrites it
  Softmax softmax;
#pragma unroll
  for (int u = 0; u < kVectors; ++u) add_vector(softmax, raw[u]);  // without a branch: vectors past the end are -inf
  if (single >= 0) add_single(softmax, single_logit);
  softmax = merge_block<kFusedWarps>(softmax, shared);
  if (cluster > 1) softmax = merge_cluster(softmax, &partial, cluster);
  if (first == 0) write_row(p, n, token, softmax, target_logit);

  const RowGradient gradient(p, n, token, softmax.reference, __fdividef(1.0f, softmax.sum));
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int vector = first + u * stride, id = shape.id_of(vector);
    if (vector < shape.vectors) store8(grad + id, gradient.compute(raw[u], id));
  }
  if (single >= 0) store_float(grad + single, gradient.compute(single_logit, single == token.target));
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) cute::cluster_wait();  // of merge_cluster's arrival
#endif
}

LaunchShape launch_shape(int64_t ctas, int threads) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(ctas));
  shape.block = dim3(unsigned(threads));
  shape.dependent = true;
  return shape;
}

constexpr const char* kOp = "masked_cross_entropy";

}  // namespace

void launch_forward(const MaskedCrossEntropyParams& p, const Device& device) {
  const int vocab_tiles = vocab_tile_count(p.vocab_size);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    launch_kernel(kOp, device, p.launch.stream, launch_shape(p.num_rows * vocab_tiles, kThreads),
                  illada_masked_cross_entropy_forward_sm80<T>, p, vocab_tiles);
    if (vocab_tiles == 1) return;
    constexpr int kRows = kCombineThreads / 32;
    launch_kernel(kOp, device, p.launch.stream, launch_shape((p.num_rows + kRows - 1) / kRows, kCombineThreads),
                  illada_masked_cross_entropy_combine_sm80<T>, p, vocab_tiles);
  });
}

void launch_backward(const MaskedCrossEntropyParams& p, const Device& device) {
  const int vocab_tiles = vocab_tile_count(p.vocab_size);
  dispatch_dtype(p.dtype, [&](auto element) {
    launch_kernel(kOp, device, p.launch.stream, launch_shape(p.num_rows * vocab_tiles, kThreads),
                  illada_masked_cross_entropy_backward_sm80<decltype(element)>, p, vocab_tiles);
  });
}

FusedShape fused_shape(int64_t vocab_size, const Device& device) {
  // With 8 vectors per thread a CTA holds 16,384 ids of a row. With 10 vectors, a cluster of 8 (which every GPU with
  // clusters allows) holds 163,840 ids.
  FusedShape shape;
  const auto any = reinterpret_cast<const void*>(&illada_masked_cross_entropy_fused_sm80<float, 8>);
  const int64_t max_cluster = prepare_kernel(kOp, any, device, 0) >= 90 ? 8 : 1;
  for (shape.vectors = 8; shape.vectors <= 10; shape.vectors += 2)
    for (shape.cluster = 1; shape.cluster <= max_cluster; shape.cluster *= 2)
      if (vocab_size <= int64_t(shape.vectors) * shape.cluster * kFusedThreads * kVector) return shape;
  return {0, 1};
}

void launch_fused(const MaskedCrossEntropyParams& p, const Device& device, const FusedShape& fused) {
  LaunchShape shape = launch_shape(p.num_rows * fused.cluster, kFusedThreads);
  shape.cluster = fused.cluster;
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    launch_kernel(kOp, device, p.launch.stream, shape,
                  fused.vectors == 8 ? illada_masked_cross_entropy_fused_sm80<T, 8>
                                     : illada_masked_cross_entropy_fused_sm80<T, 10>,
                  p, fused.cluster);
  });
}

}  // namespace illada::loss
