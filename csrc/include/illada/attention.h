// Packed, bidirectional, grouped-query attention over sequences of any lengths.
//
//   out[i, h] = sum_j softmax_j(softmax_scale * q[i, h] . k[j, g]) v[j, g],   g = h / (H / G),
//
// where j runs over all keys of the sequence of token i. Sizes: T packed queries, Tk packed keys, S sequences, H query
// heads, G key-value heads, head dim D. The host never needs the lengths: the plan reads them on the device.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::attention {

// Sizes of a pack that the host knows. A plan and the calls that use it must agree in all of them.
struct PackShape {
  int64_t total_q = 0;    // T, packed queries
  int64_t total_k = 0;    // Tk, packed keys. In a plan, -1 means unknown: that plan has no work list for the backward
  int num_sequences = 0;  // S
  int num_heads = 0;      // H, query heads; a multiple of G
  int num_kv_heads = 0;   // G, key-value heads
  int head_dim = 0;       // D, elements of a head
};

// Arguments of plan_cuda. A plan holds the work lists of a pack, longest sequence first. One plan serves all layers,
// forward and backward.
//
// Sequence s has the queries cu_seqlens[s] .. cu_seqlens[s + 1] - 1. Its keys start at cu_seqlens_k[s]. It has
// seqused_k[s] keys, or all keys up to cu_seqlens_k[s + 1] where seqused_k is null. Queries from cu_seqlens[S] on
// belong to no sequence and attend to no keys. Lengths that are negative or reach beyond total_q (total_k) are cut;
// the kernels never follow them.
struct PlanParams {
  PackShape shape;
  const int32_t* cu_seqlens = nullptr;    // [S + 1] int32, offsets of the sequences' queries, in tokens
  const int32_t* cu_seqlens_k = nullptr;  // [S + 1] int32, offsets of the key slots; null means cu_seqlens
  const int32_t* seqused_k = nullptr;     // [S] int32, keys in use of each slot; null means all keys of the slot
  int32_t* plan = nullptr;                // output, [plan_rows(shape), 4] int32, 16-byte aligned
  CudaLaunch launch;
};
// Number of rows of a plan.
int64_t plan_rows(const PackShape& shape);
// Writes a plan on the device.
void plan_cuda(const PlanParams& params);
// Writes a plan for forward_cpu and backward_cpu to [S + 1, 4] int32 (see forward_cpu): one row for each sequence, then
// one for the queries that belong to no sequence. Of the shape it reads total_q and num_sequences. Returns false and
// writes nothing if the lengths do not ascend from 0 or do not fit.
bool plan_cpu(const PlanParams& params);

// A packed tensor [tokens, heads, D], contiguous in D. On a GPU, strides are multiples of 8 and the data is 16-byte
// aligned.
struct PackedView {
  const void* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;  // in elements
};

// Arguments of the forward.
struct ForwardParams {
  PackShape shape;
  DType dtype = DType::kBFloat16;  // of q, k, v and out. CUDA: kBFloat16 or kFloat16; CPU: kFloat32 or kBFloat16
  PackedView q, k, v;              // [T, H, D], [Tk, G, D], [Tk, G, D]
  float softmax_scale = 1.0f;      // factor of the scores, finite and > 0
  const int32_t* plan = nullptr;   // plan from plan_cuda for the same shape (total_k may differ), on the same device
  int64_t plan_rows = 0;           // rows of `plan`
  void* out = nullptr;             // output, [T, H, D], dtype, contiguous; 0 for queries without keys
  float* lse = nullptr;         // output, [H, T] fp32, natural log of the softmax's sum; -inf for queries without keys
  void* workspace = nullptr;    // 16-byte aligned; contents need no initialisation and need not be kept
  int64_t workspace_bytes = 0;  // at least forward_workspace(shape)
  int num_threads = 1;          // number of CPU threads; CPU only
  CudaLaunch launch;            // CUDA only
};
// Runs the forward on compute capability 8.0 and newer, for D 64, 96, 128 and 256 and H / G <= 64. Throws NotSupported
// for anything else. Kernels count in 32 bits. Throws Error above 65,536 heads, above 2^31 - 2^25 rows T x H or Tk x G,
// and above 2^29 rows of a plan.
void forward_cuda(const ForwardParams& params);
// Runs the forward on a CPU: D up to 256, any strides and alignment, no workspace. A CPU plan has one row (query start,
// query end, key start, key end) for each sequence, in processing order. Tokens outside of the plan are not touched.
void forward_cpu(const ForwardParams& params);
// Bytes of workspace of forward_cuda. It is 0 unless the pack is small enough for key splits.
int64_t forward_workspace(const PackShape& shape);

// How plan_cuda and forward_cuda divide packs of a shape into tiles on a device.
struct ForwardTiling {
  int tile_tokens = 0;  // queries per CTA, each with the H / G heads of a key-value head
  int cluster = 1;      // CTAs that share their keys
  int key_tile = 0;     // keys per step
  int warps = 0;        // warps per CTA where a kernel is built for several numbers of warps; else 0
};
ForwardTiling forward_tiling(const PackShape& shape, int device);

// Arguments of the backward: gradients of a function of out and lse. With p = softmax, do = dout and
// c = do . out - dlse of each query and head:
//   dv = p^T do,   ds = p (do v^T - c),   dq = softmax_scale ds k,   dk = softmax_scale ds^T q.
struct BackwardParams {
  PackShape shape;
  DType dtype = DType::kBFloat16;  // of dout, q, k, v, out, dq, dk and dv; the same types as in ForwardParams
  PackedView dout, q, k, v;        // [T, H, D], [T, H, D], [Tk, G, D], [Tk, G, D]
  const void* out = nullptr;       // [T, H, D], contiguous, the forward's output
  const float* lse = nullptr;      // [H, T] fp32, the forward's output
  const float* dlse = nullptr;     // [H, T] fp32, gradient of lse; null means 0
  float softmax_scale = 1.0f;      // the forward's softmax_scale
  const int32_t* plan = nullptr;   // plan from plan_cuda, made with total_k known
  int64_t plan_rows = 0;           // rows of `plan`
  // Every run gives the same bits. Costs some speed in long sequences.
  bool deterministic = false;
  // A separate kernel computes the scores again for dq. Faster in short sequences, and also deterministic.
  bool recompute_scores_for_dq = false;
  void* dq = nullptr;                 // output, [T, H, D], contiguous; 0 for queries without keys
  void *dk = nullptr, *dv = nullptr;  // outputs, [Tk, G, D], contiguous; 0 for keys that no sequence uses
  void* workspace = nullptr;          // 16-byte aligned; contents need no initialisation and need not be kept
  int64_t workspace_bytes = 0;        // at least backward_workspace(...)
  int num_threads = 1;                // number of CPU threads; CPU only
  CudaLaunch launch;                  // CUDA only
};
// Runs the backward on a GPU. Supports what forward_cuda supports.
void backward_cuda(const BackwardParams& params);
// Runs the backward on a CPU, without a workspace. Supports what forward_cpu supports and takes the same plan. The bits
// of the results do not depend on num_threads. No key may belong to two sequences. Gradients of queries and keys
// outside of the plan are 0.
void backward_cpu(const BackwardParams& params);
// Bytes of workspace of backward_cuda.
int64_t backward_workspace(const PackShape& shape, bool deterministic, bool recompute_scores_for_dq, int device);

}  // namespace illada::attention
