// Packed, bidirectional, grouped-query attention over sequences of any lengths.
//
//   out[i, h] = sum_j softmax_j(softmax_scale * q[i, h] . k[j, g]) v[j, g],   g = h / (H / G),
//
// with j over all keys of token i's own sequence. T packed queries, Tk packed keys, S sequences, H query heads, G
// key-value heads, D head dim. Nothing on the host depends on the lengths: they are read on the device, by the plan.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::attention {

// What is known of a pack on the host. Plan and calls must agree in all of it.
struct PackShape {
  int64_t total_q = 0;    // T
  int64_t total_k = 0;    // Tk; for a plan, -1: not known, and the plan has no work list for the backward
  int num_sequences = 0;  // S
  int num_heads = 0;      // H, a multiple of G
  int num_kv_heads = 0;   // G
  int head_dim = 0;       // D
};

// Work lists of a pack, longest sequence first, for all layers and both directions. Sequence s has the queries
// cu_seqlens[s] .. cu_seqlens[s + 1] - 1 and the keys from cu_seqlens_k[s] on, seqused_k[s] of them or all up to
// cu_seqlens_k[s + 1]. Queries from cu_seqlens[S] on belong to no sequence and meet no keys. Lengths that are negative
// or reach beyond total_q (total_k) are cut, never followed.
struct PlanParams {
  PackShape shape;
  const int32_t* cu_seqlens = nullptr;    // [S + 1]
  const int32_t* cu_seqlens_k = nullptr;  // [S + 1], or null: the same as cu_seqlens
  const int32_t* seqused_k = nullptr;     // [S], or null: all keys of each slot
  int32_t* plan = nullptr;                // [plan_rows(shape), 4], 16-byte aligned
  CudaLaunch launch;
};
int64_t plan_rows(const PackShape& shape);
void plan_cuda(const PlanParams& params);

// A packed tensor [tokens, heads, D], contiguous in D. Strides in elements; on a GPU multiples of 8, the data 16-byte
// aligned.
struct PackedView {
  const void* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
};

struct ForwardParams {
  PackShape shape;
  DType dtype = DType::kBFloat16;  // or kFloat16; on a CPU kFloat32 or kBFloat16
  PackedView q, k, v;
  float softmax_scale = 1.0f;     // finite and > 0
  const int32_t* plan = nullptr;  // of plan_cuda, of the same shape (total_k apart) and on the same device
  int64_t plan_rows = 0;
  void* out = nullptr;          // [T, H, D], contiguous; queries without keys get 0
  float* lse = nullptr;         // [H, T], natural log of the softmax's sum; -inf without keys
  void* workspace = nullptr;    // 16-byte aligned; contents need not be kept or set
  int64_t workspace_bytes = 0;  // at least forward_workspace(shape)
  int num_threads = 1;          // CPU
  CudaLaunch launch;
};
// On compute capability 8.0 and newer, D 64 and 128, H / G <= 64. NotSupported for anything else. At most 65,536 heads,
// 2^31 - 2^25 rows T x H and Tk x G, and 2^29 rows of a plan, as kernels count in 32 bits: Error for more.
void forward_cuda(const ForwardParams& params);
// D up to 256, any strides and alignment, no workspace. There a plan is a row (query start, query end, key start, key
// end) for each sequence, in the order in which they are to be taken; what it leaves out is not touched.
void forward_cpu(const ForwardParams& params);
// Bytes; 0 unless the pack is so small that sequences may be split over their keys.
int64_t forward_workspace(const PackShape& shape);

// How plan_cuda and forward_cuda cut packs of a shape on a device.
struct ForwardTiling {
  int tile_tokens = 0;  // queries of a CTA, each with the H / G heads of a key-value head
  int cluster = 1;      // CTAs that share their keys
  int key_tile = 0;     // keys of a step
  int warps = 0;        // of a CTA, where a kernel is built for several numbers; else 0
};
ForwardTiling forward_tiling(const PackShape& shape, int device);

// Gradients of a function of out and lse. With p = softmax, do = dout, c = do . out - dlse of each query and head:
//   dv = p^T do,   ds = p (do v^T - c),   dq = softmax_scale ds k,   dk = softmax_scale ds^T q.
struct BackwardParams {
  PackShape shape;
  DType dtype = DType::kBFloat16;
  PackedView dout, q, k, v;
  const void* out = nullptr;      // [T, H, D], contiguous, as the forward left it
  const float* lse = nullptr;     // [H, T]
  const float* dlse = nullptr;    // [H, T], or null: 0
  float softmax_scale = 1.0f;     // that of the forward
  const int32_t* plan = nullptr;  // of plan_cuda with total_k known
  int64_t plan_rows = 0;
  bool deterministic = false;         // the same bits in every run, at the price of some speed in long sequences
  bool multiplies_twice = false;      // dq by a kernel of its own: faster in short ones, and deterministic as well
  void* dq = nullptr;                 // [T, H, D], contiguous; 0 for queries without keys
  void *dk = nullptr, *dv = nullptr;  // [Tk, G, D], contiguous; 0 for keys that no sequence uses
  void* workspace = nullptr;          // 16-byte aligned; contents need not be kept or set
  int64_t workspace_bytes = 0;        // at least backward_workspace(...)
  int num_threads = 1;                // CPU
  CudaLaunch launch;
};
// The same support as forward_cuda.
void backward_cuda(const BackwardParams& params);
// The same support and plan as forward_cpu, no workspace, and the same bits whatever num_threads is. No key may be of
// two sequences. Gradients of queries and keys that the plan leaves out are 0.
void backward_cpu(const BackwardParams& params);
int64_t backward_workspace(const PackShape& shape, bool deterministic, bool multiplies_twice, int device);  // bytes

}  // namespace illada::attention
