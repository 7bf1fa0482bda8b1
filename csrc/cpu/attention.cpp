#include "illada/attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/attention_tile.h"
#include "cpu/denormals.h"
#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "illada/error.h"

namespace illada::attention {
namespace {

constexpr const char* kOp = "varlen_attention";

// A row of the plan: queries and keys of a sequence, from .. to. In 64 bits, as tokens times heads need more than 32.
struct Sequence {
  explicit Sequence(const int32_t* row) : q_start(row[0]), q_end(row[1]), k_start(row[2]), k_end(row[3]) {}
  int64_t q_start, q_end, k_start, k_end;
};

Sequence sequence(const ForwardParams& p, int64_t i) { return Sequence(p.plan + 4 * i); }

void validate(const ForwardParams& p) {
  const PackShape& s = p.shape;
  ILLADA_CHECK(s.num_kv_heads > 0 && s.num_heads > 0 && s.num_heads % s.num_kv_heads == 0, kOp, "num_heads ",
               s.num_heads, " must be a multiple of num_kv_heads ", s.num_kv_heads);
  if ((p.dtype != DType::kFloat32 && p.dtype != DType::kBFloat16) || s.head_dim < 1 || s.head_dim > cpu::kMostHeadDim)
    detail::fail<NotSupported>(kOp, "on a CPU there are kernels for float32 and bfloat16 and head dims up to ",
                               cpu::kMostHeadDim, "; got ", name(p.dtype), " and ", s.head_dim);
  ILLADA_CHECK(p.softmax_scale > 0 && std::isfinite(p.softmax_scale), kOp, "softmax_scale must be finite and > 0, got ",
               p.softmax_scale);
  ILLADA_CHECK(s.total_q == 0 || (p.q.data && p.plan && p.out && p.lse), kOp, "q, plan, out and lse must not be null");
  ILLADA_CHECK(s.total_k == 0 || (p.k.data && p.v.data), kOp, "k and v must not be null");
  for (int64_t i = 0; i < p.plan_rows; ++i) {
    const Sequence x = sequence(p, i);
    ILLADA_CHECK(0 <= x.q_start && x.q_start <= x.q_end && x.q_end <= s.total_q, kOp, "plan has queries ", x.q_start,
                 " to ", x.q_end, " of ", s.total_q);
    ILLADA_CHECK(0 <= x.k_start && x.k_start <= x.k_end && x.k_end <= s.total_k, kOp, "plan has keys ", x.k_start,
                 " to ", x.k_end, " of ", s.total_k);
  }
}

}  // namespace

void forward_cpu(const ForwardParams& p) {
  validate(p);
  const PackShape& s = p.shape;
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const auto attend = p.dtype == DType::kFloat32 ? kernels.attend_f32 : kernels.attend_bf16;
  const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2, group = s.num_heads / s.num_kv_heads;
  int64_t most_tiles = 0, pairs = 0;
  for (int64_t i = 0; i < p.plan_rows; ++i) {
    const Sequence x = sequence(p, i);
    pairs += (x.q_end - x.q_start) * (x.k_end - x.k_start);
    most_tiles = std::max(most_tiles, (x.q_end - x.q_start) * group);
  }
  most_tiles = (most_tiles + kernels.tile_rows - 1) / kernels.tile_rows;
  // Sequences of fewer tiles than the longest one leave some of these without work.
  const int threads = cpu::threads_for(pairs * s.num_heads * s.head_dim, p.num_threads);
  cpu::parallel_for(p.plan_rows * s.num_kv_heads * most_tiles, threads, [&](int64_t n) {
    const Sequence x = sequence(p, n / most_tiles / s.num_kv_heads);
    const int64_t kv_head = n / most_tiles % s.num_kv_heads, first = n % most_tiles * kernels.tile_rows;
    const int64_t rows = std::min<int64_t>((x.q_end - x.q_start) * group - first, kernels.tile_rows);
    if (rows <= 0) return;
    const auto at = [&](const PackedView& view, int64_t token, int64_t head) {
      return static_cast<const char*>(view.data) + (token * view.token_stride + head * view.head_stride) * size;
    };
    cpu::AttentionTile tile;
    tile.q = at(p.q, x.q_start, kv_head * group);
    tile.k = at(p.k, x.k_start, kv_head);
    tile.v = at(p.v, x.k_start, kv_head);
    tile.q_token_stride = p.q.token_stride;
    tile.q_head_stride = p.q.head_stride;
    tile.k_token_stride = p.k.token_stride;
    tile.v_token_stride = p.v.token_stride;
    tile.first_row = first;
    tile.rows = int(rows);
    tile.group = int(group);
    tile.keys = int(x.k_end - x.k_start);
    tile.head_dim = s.head_dim;
    tile.softmax_scale = p.softmax_scale;
    tile.out = static_cast<char*>(p.out) + (x.q_start * s.num_heads + kv_head * group) * s.head_dim * size;
    tile.lse = p.lse + kv_head * group * s.total_q + x.q_start;
    tile.num_heads = s.num_heads;
    tile.total_q = s.total_q;
    const cpu::FlushedDenormals flushed;  // probabilities of keys that nobody looks at
    attend(tile);
  });
}

}  // namespace illada::attention
