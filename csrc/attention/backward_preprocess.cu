// The first pass of the backward, one read and one write of memory.
//
// It computes c = do . out - dlse and the offset (probabilities.cuh) of each query and head, laid out as the main
// kernels read them. It writes zeros where sums in fp32 begin, and in the gradients of what has no counterpart.
//
// Floor: T H (4 D + 16) bytes, and 4 T H D more of zeros if fused.
#include <cutlass/fast_math.h>

#include <algorithm>
#include <cmath>

#include "attention/launch.h"
#include "attention/probabilities.cuh"
#include "attention/traits.h"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

constexpr const char* kOp = "varlen_attention_backward";
constexpr int kThreads = 256;

// Division of rows among threads. Neighbouring lanes share a row; their number is a power of two (warp_reduce).
template <int kHeadDim>
struct RowLanes {
  static constexpr int kChunks = kHeadDim / 8;                           // chunks of 16 bytes in a row
  static constexpr int kPower = kChunks & -kChunks;                      // largest power of two that divides it
  static constexpr int kLanes = kPower < 32 ? kPower : 32;               // lanes of a row
  static constexpr int kLaneChunks = kChunks / kLanes;                   // chunks of a lane, kLanes chunks apart
  static constexpr int kUnroll = kLaneChunks < 4 ? 4 / kLaneChunks : 1;  // rows of a thread whose loads are in flight
  static constexpr int kRows = kThreads / kLanes;                        // rows of a CTA at a time
  static_assert(kHeadDim % 8 == 0);
};

struct PreprocessArguments {
  const int32_t* plan;
  const void *out, *dout;
  const float *lse, *dlse;
  RowStatistics* rows;
  uint32_t* arrivals;  // null, as dq_sums: there are none
  float* dq_sums;
  float4* key_sums;                                       // of dk, then of dv; null: there are none
  uint4 *dq, *dk, *dv;                                    // as 16-byte words
  int64_t key_words;                                      // of each
  int64_t dout_token_stride, dout_head_stride, num_rows;  // of out: tokens x heads
  int32_t total_q, num_kv_heads;
  cutlass::FastDivmod num_heads, group;
};

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kThreads) void illada_attention_backward_preprocess_sm80(
    const __grid_constant__ PreprocessArguments a, const __grid_constant__ DependentLaunch launch) {
  using Lanes = RowLanes<kHeadDim>;
  constexpr int kLanes = Lanes::kLanes, kLaneChunks = Lanes::kLaneChunks, kUnroll = Lanes::kUnroll;
  constexpr int kRows = Lanes::kRows;
  wait_for_previous_kernel(launch);
  const int idle = plan_header(a.plan).idle;
  const int column = int(threadIdx.x) % kLanes * 8;
  // Rows do not fit 32 bits, their distance to the first one of the CTA does.
  const int64_t cta_row = int64_t(blockIdx.x) * (kUnroll * kRows), first = cta_row + int(threadIdx.x) / kLanes;
  const int cta_token = int(uint64_t(cta_row) / uint32_t(int(a.num_heads)));
  const int cta_head = int(cta_row - int64_t(cta_token) * a.num_heads);
  const auto find = [&](int i, int& token, int& head) {
    a.num_heads(token, head, cta_head + int(threadIdx.x) / kLanes + i * kRows);
    token += cta_token;
  };
  Raw8<T> out[kUnroll][kLaneChunks], dout[kUnroll][kLaneChunks];
  float lse[kUnroll], dlse[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t row = first + i * kRows;
    if (row >= a.num_rows) continue;
    int token, head;
    find(i, token, head);
#pragma unroll
    for (int n = 0; n < kLaneChunks; ++n) {
      const int at = column + n * kLanes * 8;
      out[i][n] = load8(static_cast<const T*>(a.out) + row * kHeadDim + at);
      dout[i][n] = load8(static_cast<const T*>(a.dout) + token * a.dout_token_stride + head * a.dout_head_stride + at);
    }
    lse[i] = a.lse[int64_t(head) * a.total_q + token];
    dlse[i] = a.dlse ? a.dlse[int64_t(head) * a.total_q + token] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t row = first + i * kRows;
    const bool valid = row < a.num_rows;
    float c = 0;
#pragma unroll
    for (int n = 0; n < kLaneChunks; ++n) {
      float x[8], y[8];
      unpack8(out[i][n], x);
      unpack8(dout[i][n], y);
#pragma unroll
      for (int j = 0; j < 8; ++j) c = fmaf(x[j], y[j], c);
    }
    c = warp_reduce<kLanes>(c, [](float p, float q) { return p + q; });
    if (!valid) continue;
    if (column == 0) {
      int token, head, kv_head, of_group;
      find(i, token, head);
      a.group(kv_head, of_group, head);
      a.rows[(int64_t(kv_head) * a.total_q + token) * a.group + of_group] = {offset_of(lse[i]), c - dlse[i]};
      if (a.arrivals && of_group == 0) a.arrivals[int64_t(token) * a.num_kv_heads + kv_head] = 0;
    }
    if (a.dq_sums) {
      float4* const sums = reinterpret_cast<float4*>(a.dq_sums + row * kHeadDim) + column / 8;
#pragma unroll
      for (int n = 0; n < 2 * kLaneChunks; n += 2) sums[n * kLanes] = sums[(n + 1) * kLanes] = make_float4(0, 0, 0, 0);
      // Without keys: no tile of keys will write this row of dq. Of a sequence, whatever lse says: it may be that of
      // more keys than are in this pack. Behind the last sequence it is -inf.
      if ((idle & kIdleQueries) || lse[i] == -INFINITY) {
#pragma unroll
        for (int n = 0; n < kLaneChunks; ++n)
          a.dq[row * Lanes::kChunks + column / 8 + n * kLanes] = make_uint4(0, 0, 0, 0);
      }
    }
  }
  if (!a.key_sums && !(idle & kIdleKeys)) return;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.key_words; i += int64_t(gridDim.x) * kThreads) {
    if (a.key_sums) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a.key_sums[4 * i + j] = make_float4(0, 0, 0, 0);
    } else {
      a.dk[i] = a.dv[i] = make_uint4(0, 0, 0, 0);
    }
  }
}

template <typename T, int kHeadDim>
void launch_preprocess(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  constexpr int kRows = RowLanes<kHeadDim>::kRows * RowLanes<kHeadDim>::kUnroll;  // of a CTA
  const PackShape& s = p.shape;
  const BackwardScratch scratch = scratch_of(p, method);
  PreprocessArguments a{};
  a.plan = p.plan;
  a.out = p.out;
  a.dout = p.dout.data;
  a.dout_token_stride = p.dout.token_stride;
  a.dout_head_stride = p.dout.head_stride;
  a.lse = p.lse;
  a.dlse = p.dlse;
  a.rows = scratch.rows;
  a.arrivals = method.fused ? scratch.arrivals : nullptr;
  a.dq_sums = method.fused ? scratch.dq : nullptr;
  a.key_sums = method.query_splits > 1 ? reinterpret_cast<float4*>(scratch.dk) : nullptr;
  a.dq = static_cast<uint4*>(p.dq);
  a.dk = static_cast<uint4*>(p.dk);
  a.dv = static_cast<uint4*>(p.dv);
  a.key_words = s.total_k * s.num_kv_heads * (kHeadDim / 8);
  a.num_rows = s.total_q * s.num_heads;
  a.total_q = int32_t(s.total_q);
  a.num_heads = s.num_heads;
  a.num_kv_heads = s.num_kv_heads;
  a.group = s.num_heads / s.num_kv_heads;
  LaunchShape shape;
  shape.grid = dim3(unsigned(std::max<int64_t>((a.num_rows + kRows - 1) / kRows, 1)));
  shape.block = dim3(kThreads);
  shape.dependent = true;
  launch_kernel(kOp, device, p.launch.stream, shape, illada_attention_backward_preprocess_sm80<T, kHeadDim>, a);
}

template <typename T>
void launch_preprocess(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  dispatch_head_dim<Arch::kSm80>(
      kOp, p.shape.head_dim, [&](auto traits) { launch_preprocess<T, decltype(traits)::kHeadDim>(p, device, method); });
}

}  // namespace

void launch_backward_preprocess(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_preprocess<BFloat16>(p, device, method)
                              : launch_preprocess<Half>(p, device, method);
}

}  // namespace illada::attention
