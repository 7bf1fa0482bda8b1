// remask: commits the surest candidates of each sequence, one CTA a sequence.
//
// A candidate's rank is a 32-bit key that sorts like its confidence (like its entropy, backwards, for the entropy-bounded
// rule), ties by the lowest row. Keys stay in registers, kKeys a thread. Both questions, how many a rule takes and
// which are the first k, are answered by radix descent a bit at a time: one pass counts (or adds up) over the keys
// above a trial value, a compare a key and one barrier a pass, without atomics or shared-memory traffic beyond a word a
// warp. The descent stops as soon as a trial value splits the candidates at k, after about log2(candidates) + 9 passes
// for confidences; ties at the cut continue on the bits of the row.
//
// Floor: 28 bytes a candidate, negligible; what limits it is latency, three dependent loads and some thirty barriers.
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "remask/launch.h"

namespace illada::remask {
namespace {

constexpr int kKeys = 8;  // a thread

// Entropies are added up in fixed point, so that sums do not depend on the order: 2^-32 nats, at most 1024 nats each.
constexpr double kEntropyScale = 4294967296.0;

template <int kThreads>
struct SequenceRanker {
  static constexpr int kWarps = kThreads / 32;

  struct SharedStorage {
    int32_t count[2][kWarps];
    uint64_t sum[2][kWarps];
  };

  const RemaskParams& p;
  SharedStorage& shared;
  int begin, size;  // rows of the sequence
  bool cached;      // all keys are in registers
  uint32_t keys[kKeys];
  uint32_t masked = 0;  // bit j: key j's position holds mask_id
  int parity = 0;

  __device__ __forceinline__ int64_t token_at(int64_t position) const {
    return p.tokens_are_int64 ? static_cast<const int64_t*>(p.tokens)[position]
                              : static_cast<const int32_t*>(p.tokens)[position];
  }

  // Does the i-th row hold a mask, and what is its key (0: no candidate)?
  __device__ __forceinline__ bool look(int i, uint32_t& key) const {
    const int64_t n = begin + i, position = p.rows[n];
    key = 0;
    if (position < 0 || position >= p.num_tokens || token_at(position) != p.mask_id) return false;
    const float confidence = p.confidence[n] + 0.0f;  // -0 ranks with 0
    if (!(confidence > -INFINITY)) return true;
    if (p.rule == Rule::kEntropyBound) {
      key = ~(uint32_t(ordered(p.entropy[n] + 0.0f)) ^ 0x80000000u);
    } else {
      key = uint32_t(ordered(confidence)) ^ 0x80000000u;
    }
    return true;
  }

  __device__ __forceinline__ static float confidence_of(uint32_t key) {
    return from_ordered(int32_t(key ^ 0x80000000u));
  }
  __device__ __forceinline__ static uint64_t entropy_of(uint32_t key) {
    const float entropy = from_ordered(int32_t(~key ^ 0x80000000u));
    return uint64_t(double(fminf(fmaxf(entropy, 0.0f), 1024.0f)) * kEntropyScale);
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const int i = j * kThreads + threadIdx.x;
      keys[j] = 0;
      if (cached && i < size && look(i, keys[j])) masked |= 1u << j;
    }
  }

  // visit(key, i, holds a mask) for every row of this thread.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    if (cached) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j)
        if (j * kThreads < size) visit(keys[j], j * kThreads + int(threadIdx.x), (masked >> j & 1) != 0);
    } else {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        uint32_t key;
        const bool holds_mask = look(i, key);
        visit(key, i, holds_mask);
      }
    }
  }

  // Sums over the CTA. One barrier each: the buffer of the last but one sum is free again.
  __device__ __forceinline__ int block_sum(int value) {
    value = __reduce_add_sync(kFullWarp, value);
    parity ^= 1;
    if (threadIdx.x % 32 == 0) shared.count[parity][threadIdx.x / 32] = value;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return __reduce_add_sync(kFullWarp, lane < kWarps ? shared.count[parity][lane] : 0);
  }
  __device__ __forceinline__ uint64_t block_sum(uint64_t value) {
    const auto add = [](uint64_t a, uint64_t b) { return a + b; };
    value = warp_reduce(value, add);
    parity ^= 1;
    if (threadIdx.x % 32 == 0) shared.sum[parity][threadIdx.x / 32] = value;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return warp_reduce(lane < kWarps ? shared.sum[parity][lane] : uint64_t(0), add);
  }

  template <typename Predicate>
  __device__ __forceinline__ int count_if(Predicate predicate) {
    int count = 0;
    for_each([&](uint32_t key, int i, bool) { count += key != 0 && predicate(key, i); });
    return block_sum(count);
  }
  // Entropies of all candidates with key >= trial.
  __device__ __forceinline__ uint64_t entropy_from(uint32_t trial) {
    uint64_t sum = 0;
    for_each([&](uint32_t key, int, bool) { sum += key != 0 && key >= trial ? entropy_of(key) : 0; });
    return block_sum(sum);
  }

  // The longest prefix with confidence_(r) > 1 - factor / (r + 1). Confidences descend and the bound ascends, so that
  // r is allowed exactly where at least r confidences are above its bound.
  __device__ __forceinline__ int count_by_factor(double factor, int candidates) {
    int allowed = 0, refused = candidates + 1;
    while (refused - allowed > 1) {
      const int r = (allowed + refused) / 2;
      const double bound = 1.0 - factor / double(r + 1);
      if (count_if([&](uint32_t key, int) { return confidence_of(key) > bound; }) >= r) {
        allowed = r;
      } else {
        refused = r;
      }
    }
    return allowed;
  }

  // How many come before the sum of entropies passes the bound, and the one that passes it: those r with
  // entropy_(1) + .. + entropy_(r-1) <= bound.
  __device__ __forceinline__ int count_by_entropy(float bound, int candidates) {
    if (!(bound >= 0)) return 0;
    const uint64_t limit = bound < 0x1p30f ? uint64_t(double(bound) * kEntropyScale) : ~uint64_t(0);
    if (entropy_from(0) <= limit) return candidates;
    uint32_t pivot = 0;  // the largest key from which on the sum is above the limit
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
      if (entropy_from(pivot | bit) > limit) pivot |= bit;
    const int before = count_if([&](uint32_t key, int) { return key > pivot; });
    const int equal = count_if([&](uint32_t key, int) { return key == pivot; });
    const uint64_t left = limit - (pivot == ~0u ? 0 : entropy_from(pivot + 1)), each = entropy_of(pivot);
    return before + int(min(uint64_t(equal), left / each + 1));
  }

  // The first `wanted` candidates, 0 < wanted <= candidates, are those with key > cut_key, or with key == cut_key and
  // i <= cut_index.
  __device__ __forceinline__ void select(int wanted, int candidates, uint32_t& cut_key, int& cut_index) {
    cut_key = 0;
    cut_index = 0x7fffffff;
    if (wanted == candidates) return;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
      const uint32_t trial = cut_key | bit;
      const int above = count_if([&](uint32_t key, int) { return key >= trial; });
      if (above >= wanted) cut_key = trial;
      if (above == wanted) return;
    }
    const int ties = wanted - count_if([&](uint32_t key, int) { return key > cut_key; });
    // The last tie's index: the largest one with fewer than `ties` before it.
    cut_index = 0;
    for (int bit = 1 << (31 - __clz(max(size - 1, 1))); bit; bit >>= 1) {
      const int trial = cut_index | bit;
      if (count_if([&](uint32_t key, int i) { return key == cut_key && i < trial; }) < ties) cut_index = trial;
    }
  }
};

template <int kThreads>
__global__ __launch_bounds__(kThreads) void illada_remask_sm80(const __grid_constant__ RemaskParams p) {
  using Ranker = SequenceRanker<kThreads>;
  __shared__ typename Ranker::SharedStorage shared;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  const int64_t s = blockIdx.x;
  const int begin = max(p.cu_rows[s], 0), size = max(min(p.cu_rows[s + 1], int(p.num_rows)) - begin, 0);
  Ranker ranker{p, shared, begin, size, size <= kKeys * kThreads};
  ranker.load();

  const int candidates = ranker.count_if([](uint32_t, int) { return true; });
  const float limit = p.limits && p.rule != Rule::kQuota ? static_cast<const float*>(p.limits)[s] : p.limit;
  int64_t wanted = 0;
  switch (p.rule) {
    case Rule::kQuota:
      wanted = p.limits ? static_cast<const int32_t*>(p.limits)[s] : int64_t(fminf(p.limit, 2e9f));
      break;
    case Rule::kThreshold:
      wanted = ranker.count_if([&](uint32_t key, int) { return Ranker::confidence_of(key) >= limit; });
      break;
    case Rule::kFactor:
      wanted = ranker.count_by_factor(limit, candidates);
      break;
    case Rule::kEntropyBound:
      wanted = ranker.count_by_entropy(limit, candidates);
      break;
  }
  if (p.rule != Rule::kQuota) wanted = max(wanted, p.min_commit);
  const int commit = int(min(max(wanted, int64_t(0)), int64_t(candidates)));

  uint32_t cut_key = ~0u;
  int cut_index = -1;  // nothing
  if (commit > 0) ranker.select(commit, candidates, cut_key, cut_index);
  int remaining = 0, ended = 0;
  ranker.for_each([&](uint32_t key, int i, bool holds_mask) {
    if (key == 0 || key < cut_key || (key == cut_key && i > cut_index)) {
      remaining += holds_mask;
      return;
    }
    const int64_t n = begin + i, position = p.rows[n], token = p.token[n];
    if (p.tokens_are_int64) {
      static_cast<int64_t*>(p.tokens)[position] = token;
    } else {
      static_cast<int32_t*>(p.tokens)[position] = int32_t(token);
    }
    remaining += token == p.mask_id;
    for (int64_t e = 0; e < p.num_end_ids; ++e) ended |= token == p.end_ids[e];
  });
  remaining = ranker.block_sum(remaining);
  ended = __syncthreads_or(ended);
  if (threadIdx.x > 0) return;
  p.committed[s] = commit;
  if (p.remaining) p.remaining[s] = remaining;
  if (p.finished) p.finished[s] = remaining == 0;
  if (p.ended) p.ended[s] = ended != 0;
}

}  // namespace

void launch_remask(const RemaskParams& p, const Device& device) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.num_sequences));
  shape.dependent = true;
  const bool few = p.num_rows <= 128 * kKeys;
  shape.block = dim3(few ? 128 : 1024);
  launch_kernel("remask", device, p.launch.stream, shape, few ? illada_remask_sm80<128> : illada_remask_sm80<1024>, p);
}

}  // namespace illada::remask
