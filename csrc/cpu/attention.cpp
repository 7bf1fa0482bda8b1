#include "illada/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/attention_tile.h"
#include "cpu/denormals.h"
#include "cpu/dtypes.h"
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

template <typename Params>
Sequence sequence(const Params& p, int64_t i) {
  return Sequence(p.plan + 4 * i);
}

// Address of the first element of a head of a token.
const char* address(const PackedView& view, DType dtype, int64_t token, int64_t head) {
  return static_cast<const char*>(view.data) +
         (token * view.token_stride + head * view.head_stride) * element_size(dtype);
}

template <typename Params>
void validate(const Params& p) {
  const PackShape& s = p.shape;
  ILLADA_CHECK(s.num_kv_heads > 0 && s.num_heads > 0 && s.num_heads % s.num_kv_heads == 0, kOp, "num_heads ",
               s.num_heads, " must be a multiple of num_kv_heads ", s.num_kv_heads);
  if (!cpu::has_kernels(p.dtype) || s.head_dim < 1 || s.head_dim > cpu::kMaxHeadDim)
    detail::fail<NotSupported>(kOp, "on a CPU there are kernels for float32 and bfloat16 and head dims up to ",
                               cpu::kMaxHeadDim, "; got ", name(p.dtype), " and ", s.head_dim);
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

// A tile of the forward: rows (queries of the heads of a group) of a sequence and key-value head.
struct Tile {
  int64_t sequence, kv_head, first_row, rows, work;
};

// A part of the backward: gradients of some rows (queries of the heads of a group), of some keys, or of all of a
// sequence and key-value head.
struct Part {
  int64_t sequence, kv_head, first_row, rows, first_key, keys;
  bool of_queries, of_keys;
  int64_t work = rows * keys;
};

struct Work {
  std::vector<Part> parts;
  int64_t queries = 0, keys = 0;  // of sequences that have both
  int64_t max_keys = 0;           // of a part with gradients of keys
  int threads = 1;
};

constexpr int64_t kRowsOfPart = 4 * cpu::kGradientRows, kKeysOfPart = 2 * cpu::kGradientKeys;

// One part for a sequence and key-value head, with five products. If threads would wait for it, parts for its queries
// and for its keys, with seven products in all: the scores are made twice. Sums are in the same order either way.
Work share_out(const BackwardParams& p) {
  const int64_t heads = p.shape.num_kv_heads, group = p.shape.num_heads / heads;
  Work work;
  const auto pairs = [&](const Sequence& x) { return (x.q_end - x.q_start) * (x.k_end - x.k_start); };
  double all = 0;
  for (int64_t i = 0; i < p.plan_rows; ++i) all += double(pairs(sequence(p, i))) * double(heads);
  work.threads = cpu::threads_for(int64_t(all * double(group)) * p.shape.head_dim, std::max(p.num_threads, 1));
  for (int64_t i = 0; i < p.plan_rows; ++i) {
    const Sequence x = sequence(p, i);
    if (pairs(x) == 0) continue;
    const int64_t rows = (x.q_end - x.q_start) * group, keys = x.k_end - x.k_start;
    work.queries += x.q_end - x.q_start;
    work.keys += keys;
    const bool whole = 5 * double(pairs(x)) * work.threads <= 7 * all;
    work.max_keys = std::max(work.max_keys, whole ? keys : std::min(keys, kKeysOfPart));
    for (int64_t head = 0; head < heads; ++head) {
      if (whole) {
        work.parts.push_back({i, head, 0, rows, 0, keys, true, true});
        continue;
      }
      for (int64_t key = 0; key < keys; key += kKeysOfPart)
        work.parts.push_back({i, head, 0, rows, key, std::min(keys - key, kKeysOfPart), false, true});
      for (int64_t row = 0; row < rows; row += kRowsOfPart)
        work.parts.push_back({i, head, row, std::min(rows - row, kRowsOfPart), 0, keys, true, false});
    }
  }
  return work;
}

cpu::AttentionGradient gradient_of(const BackwardParams& p, const Part& part, float* scratch) {
  const PackShape& s = p.shape;
  const int64_t size = element_size(p.dtype), group = s.num_heads / s.num_kv_heads;
  const Sequence x = sequence(p, part.sequence);
  const int64_t head = part.kv_head * group;
  cpu::AttentionGradient a;
  a.dout = address(p.dout, p.dtype, x.q_start, head);
  a.q = address(p.q, p.dtype, x.q_start, head);
  a.k = address(p.k, p.dtype, x.k_start, part.kv_head);
  a.v = address(p.v, p.dtype, x.k_start, part.kv_head);
  a.dout_token_stride = p.dout.token_stride;
  a.dout_head_stride = p.dout.head_stride;
  a.q_token_stride = p.q.token_stride;
  a.q_head_stride = p.q.head_stride;
  a.k_token_stride = p.k.token_stride;
  a.v_token_stride = p.v.token_stride;
  const int64_t of_rows = (x.q_start * s.num_heads + head) * s.head_dim * size;
  a.out = static_cast<const char*>(p.out) + of_rows;
  a.lse = p.lse + head * s.total_q + x.q_start;
  a.dlse = p.dlse ? p.dlse + head * s.total_q + x.q_start : nullptr;
  a.first_row = part.first_row;
  a.rows = part.rows;
  a.first_key = int(part.first_key);
  a.keys = int(part.keys);
  a.all_keys = int(x.k_end - x.k_start);
  a.group = int(group);
  a.head_dim = s.head_dim;
  a.softmax_scale = p.softmax_scale;
  const int64_t of_keys = (x.k_start * s.num_kv_heads + part.kv_head) * s.head_dim * size;
  a.dq = part.of_queries ? static_cast<char*>(p.dq) + of_rows : nullptr;
  a.dk = part.of_keys ? static_cast<char*>(p.dk) + of_keys : nullptr;
  a.dv = part.of_keys ? static_cast<char*>(p.dv) + of_keys : nullptr;
  a.scratch = scratch;
  a.num_heads = s.num_heads;
  a.num_kv_heads = s.num_kv_heads;
  a.total_q = s.total_q;
  return a;
}

// Floats, aligned as rows of scratch are.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(::operator new(size_t(count) * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Most floats of scratch that a thread keeps for its next call, 512 KiB. Short sequences would otherwise wait for the
// operating system, which clears and maps the pages of new memory.
constexpr int64_t kKeptFloats = int64_t(1) << 17;

float* kept_scratch() {
  thread_local const Scratch kept(kKeptFloats);
  return kept.data();
}

}  // namespace

void forward_cpu(const ForwardParams& p) {
  validate(p);
  const PackShape& s = p.shape;
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const auto attend = p.dtype == DType::kFloat32 ? kernels.attend_f32 : kernels.attend_bf16;
  const int64_t size = element_size(p.dtype), group = s.num_heads / s.num_kv_heads;
  int64_t pairs = 0;
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < p.plan_rows; ++i) {
    const Sequence x = sequence(p, i);
    const int64_t all_rows = (x.q_end - x.q_start) * group, keys = x.k_end - x.k_start;
    pairs += (x.q_end - x.q_start) * keys;
    for (int64_t head = 0; head < s.num_kv_heads; ++head)
      for (int64_t row = 0; row < all_rows; row += kernels.tile_rows) {
        const int64_t rows = std::min<int64_t>(all_rows - row, kernels.tile_rows);
        tiles.push_back({i, head, row, rows, rows * (keys + 1)});
      }
  }
  const int threads = cpu::threads_for(pairs * s.num_heads * s.head_dim, p.num_threads);
  cpu::parallel_for_runs(tiles, threads, [&](const Tile& t, int) {
    const Sequence x = sequence(p, t.sequence);
    const int64_t kv_head = t.kv_head;
    cpu::AttentionTile tile;
    tile.q = address(p.q, p.dtype, x.q_start, kv_head * group);
    tile.k = address(p.k, p.dtype, x.k_start, kv_head);
    tile.v = address(p.v, p.dtype, x.k_start, kv_head);
    tile.q_token_stride = p.q.token_stride;
    tile.q_head_stride = p.q.head_stride;
    tile.k_token_stride = p.k.token_stride;
    tile.v_token_stride = p.v.token_stride;
    tile.first_row = t.first_row;
    tile.rows = int(t.rows);
    tile.group = int(group);
    tile.keys = int(x.k_end - x.k_start);
    tile.head_dim = s.head_dim;
    tile.softmax_scale = p.softmax_scale;
    tile.out = static_cast<char*>(p.out) + (x.q_start * s.num_heads + kv_head * group) * s.head_dim * size;
    tile.lse = p.lse + kv_head * group * s.total_q + x.q_start;
    tile.num_heads = s.num_heads;
    tile.total_q = s.total_q;
    const cpu::FlushedDenormals flushed;  // keys with very low scores have denormal probabilities
    attend(tile);
  });
}

void backward_cpu(const BackwardParams& p) {
  validate(p);
  const PackShape& s = p.shape;
  ILLADA_CHECK(s.total_q == 0 || (p.dout.data && p.dq), kOp, "dout and dq must not be null");
  ILLADA_CHECK(s.total_k == 0 || (p.dk && p.dv), kOp, "dk and dv must not be null");
  const int64_t size = element_size(p.dtype);
  const Work work = share_out(p);
  if (work.queries < s.total_q) std::memset(p.dq, 0, size_t(s.total_q * s.num_heads * s.head_dim * size));
  if (work.keys < s.total_k) {
    for (void* const grad : {p.dk, p.dv}) std::memset(grad, 0, size_t(s.total_k * s.num_kv_heads * s.head_dim * size));
  }
  if (work.parts.empty()) return;

  const int64_t scratch_floats = cpu::gradient_scratch(s.head_dim, work.max_keys);
  const bool kept = scratch_floats <= kKeptFloats;
  const Scratch scratch(kept ? 0 : scratch_floats * work.threads);
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const auto differentiate = p.dtype == DType::kFloat32 ? kernels.differentiate_f32 : kernels.differentiate_bf16;
  cpu::parallel_for_runs(work.parts, work.threads, [&](const Part& part, int thread) {
    const cpu::FlushedDenormals flushed;
    differentiate(gradient_of(p, part, kept ? kept_scratch() : scratch.data() + scratch_floats * thread));
  });
}

}  // namespace illada::attention
