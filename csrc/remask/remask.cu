// remask: commits the candidates of each sequence with the highest confidence, one CTA per sequence.
//
// A candidate's rank is a 32-bit key that sorts like its confidence (for kEntropyBound like its negative entropy). Ties
// go to the lowest row. Keys stay in registers, kKeys per thread.
//
//   load: rows, then confidences and tokens, then the canvas; make the keys
//   count the candidates, and those of at least the threshold                        (barrier)
//   count_wanted: how many the rule commits; the factor and the entropy bound look for it by passes over the keys
//   select: the cut of the ranking behind so many candidates, by radix descent, four bits per pass:
//     each thread counts the digits of its keys that are still in question, in the 16 nibbles of one word
//     each warp adds its words with redux, and adds the sums to the CTA's in shared memory
//     all warps wait for each other                                                  (barrier)
//     each warp finds the digit that holds the cut; stop if the cut falls between two digits
//   ties at the cut: the same descent on the bits of the row
//   commit: write the tokens before the cut; count the masks that remain             (barrier)
//   write the sequence's counts and flags
//
// A descent for confidences takes about log16(candidates) + 2 passes. Schedule of two passes. The barrier of a pass is
// its only one, because passes take turns with three sets of counters: a pass clears those of the pass before.
//
//               time ->
//   warp 0      [count own keys][redux][add to set 0]|[find digit; clear set 2][count][redux][add to set 1]|[find ...
//   warp 1      [count own keys][redux][add to set 0]|[find digit             ][count][redux][add to set 1]|[find ...
//   ...         |: all warps wait for all. Every warp finds the same digit, so that none has to tell the others.
//
// The 28 bytes per candidate are negligible. Latency bounds the kernel: three dependent loads and about eight barriers.
#include "common/dependent_launch.h"
#include "common/reduce.cuh"
#include "remask/launch.h"

namespace illada::remask {
namespace {

// Entropies are summed in fixed point, so that sums do not depend on the order. Unit 2^-32 nats, at most 1024 nats
// each.
constexpr double kEntropyScale = 4294967296.0;

template <int kThreads, int kKeys, typename Token>
struct SequenceRanker {
  static constexpr int kWarps = kThreads / 32, kDigits = 16, kCapacity = kThreads * kKeys;

  struct SharedStorage {
    int32_t digits[3][kDigits];  // zero whenever a pass begins that uses them
    uint32_t sum[2][3][kWarps];
  };

  const RemaskParams& p;
  SharedStorage& shared;
  int begin, size;  // rows of the sequence
  bool cached;      // all keys are in registers
  uint32_t keys[kKeys];
  Token tokens[kKeys];  // of candidates; others may not fit
  uint32_t masked = 0;  // bit j: key j's position holds mask_id
  int pass = 0, parity = 0;

  // Returns the key of a row that holds a mask; 0 means no candidate. `rank`: confidence or, for kEntropyBound,
  // entropy.
  __device__ __forceinline__ uint32_t key_of(float confidence, float rank, int64_t token) const {
    const uint32_t key = key_of(rank + 0.0f);  // -0 ranks with 0
    const bool is_candidate = (confidence > -INFINITY) & (rank == rank) & (token == Token(token));
    return is_candidate ? (p.rule == Rule::kEntropyBound ? ~key : key) : 0;
  }

  __device__ __forceinline__ static uint32_t key_of(float confidence) {
    return uint32_t(ordered(confidence)) ^ 0x80000000u;
  }
  __device__ __forceinline__ static float confidence_of(uint32_t key) {
    return from_ordered(int32_t(key ^ 0x80000000u));
  }
  __device__ __forceinline__ static uint64_t entropy_of(uint32_t key) {
    const float entropy = from_ordered(int32_t(~key ^ 0x80000000u));
    return uint64_t(double(fminf(fmaxf(entropy, 0.0f), 1024.0f)) * kEntropyScale);
  }

  __device__ __forceinline__ bool holds_mask(int64_t position) const {
    const bool inside = position >= 0 && position < p.num_tokens;  // there is at least one
    return (static_cast<const Token*>(p.tokens)[inside ? position : 0] == p.mask_id) & inside;
  }

  // Loads the keys to registers. All loads of one kind come before the next kind, without branches, so that they wait
  // for memory together.
  __device__ __forceinline__ void load() {
    if (threadIdx.x < 3 * kDigits) shared.digits[0][threadIdx.x] = 0;
    const float* const ranks = p.rule == Rule::kEntropyBound ? p.entropy : p.confidence;
    if (cached && size > 0) {
      int32_t positions[kKeys];
      float confidences[kKeys], rank[kKeys];
      int64_t found[kKeys];
      bool masks[kKeys];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {  // threads past the end read the last row
        const int i = j * kThreads + threadIdx.x, n = begin + min(i, size - 1);
        positions[j] = __ldg(&p.rows[n]);
        confidences[j] = i < size ? __ldg(&p.confidence[n]) : -INFINITY;
        rank[j] = __ldg(&ranks[n]);
        found[j] = __ldg(&p.token[n]);
      }
#pragma unroll
      for (int j = 0; j < kKeys; ++j) masks[j] = holds_mask(positions[j]);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        tokens[j] = Token(found[j]);
        keys[j] = masks[j] ? key_of(confidences[j], rank[j], found[j]) : 0;
        masked |= uint32_t(masks[j] && j * kThreads + int(threadIdx.x) < size) << j;
      }
    }
    __syncthreads();
  }

  // Calls visit(key, i, j) for every row of this thread; j is its index in the registers, or -1.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    if (cached) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j)
        if (j * kThreads < size) visit(keys[j], j * kThreads + int(threadIdx.x), j);
    } else {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int64_t n = begin + i;
        const float confidence = p.confidence[n], rank = p.rule == Rule::kEntropyBound ? p.entropy[n] : confidence;
        const int64_t token = sizeof(Token) == 8 ? 0 : p.token[n];
        visit(holds_mask(p.rows[n]) ? key_of(confidence, rank, token) : 0, i, -1);
      }
    }
  }

  // Three sums over the CTA, at most 2^32 - 1 each. One barrier suffices, because calls alternate between two buffers.
  __device__ __forceinline__ void block_sum(uint32_t (&values)[3]) {
    const int lane = threadIdx.x % 32;
    parity ^= 1;
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      values[m] = __reduce_add_sync(kFullWarp, values[m]);
      if (lane == 0) shared.sum[parity][m][threadIdx.x / 32] = values[m];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 3; ++m)
      values[m] = __reduce_add_sync(kFullWarp, lane < kWarps ? shared.sum[parity][m][lane] : 0u);
  }

  struct Cut {
    uint32_t key;  // the ranking is cut at this key; all larger keys are before the cut
    int above;     // number of larger keys
    int equal;     // number of keys equal to `key`; where `between`, of the keys from `key` to the next larger digit
    bool between;  // the cut is behind all of these
  };

  // Finds the cut among the values value_of(key, i), largest first; 0 means no value. `top_shift`: the shift of the
  // highest digit. is_last(lowest, above, count) returns whether the cut is before or directly behind the last of the
  // `count` values from `lowest` on, where `above` values come before them. Once true, it stays true for lower values.
  template <typename Value, typename Last, typename Between>
  __device__ __forceinline__ Cut descend(int top_shift, Value value_of, Last is_last, Between is_between) {
    Cut cut{0, 0, 0, false};
    for (int shift = top_shift; shift >= 0; shift -= 4) {
      int32_t* const digits = shared.digits[pass % 3];
      count_digits(digits, shift, cut.key, value_of);
      __syncthreads();
      // The digits of the last pass are free; they are used again by the next but one.
      if (threadIdx.x < kDigits) shared.digits[(pass + 2) % 3][threadIdx.x] = 0;
      ++pass;
      find_digit(digits, shift, cut, is_last);
      if (is_between(cut.above, cut.equal)) {
        cut.between = true;
        break;
      }
    }
    return cut;
  }

  // Adds up the digits at `shift` of the values that have `prefix` above it.
  template <typename Value>
  __device__ __forceinline__ void count_digits(int32_t* digits, int shift, uint32_t prefix, Value value_of) const {
    uint64_t nibbles[(kKeys + 7) / 8] = {};  // eight keys each: a nibble counts to fifteen
    for_each([&](uint32_t key, int i, int j) {
      const uint32_t value = value_of(key, i), d = value >> shift & 15;
      // 64 bits, because a shift of 32 bits by 32 is undefined.
      const bool counts = value != 0 && uint64_t(value ^ prefix) >> (shift + 4) == 0;
      if (j >= 0) {
        nibbles[j / 8] += uint64_t(counts) << (4 * d);
      } else if (counts) {
        atomicAdd(&digits[d], 1);
      }
    });
    if (cached) add_nibbles(digits, nibbles);
  }

  // Adds the counts of the warp's threads to the digits of the CTA. Nibbles are spread over 16 bits, where the sum of a
  // warp fits, so that one redux adds two of them.
  __device__ __forceinline__ void add_nibbles(int32_t* digits, const uint64_t (&nibbles)[(kKeys + 7) / 8]) const {
    const int lane = threadIdx.x % 32;
    int count = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) {  // digits m, m + 4, m + 8, m + 12
      uint64_t four = 0;
#pragma unroll
      for (const uint64_t word : nibbles) four += word >> (4 * m) & 0x000f000f000f000full;
      const uint32_t low = __reduce_add_sync(kFullWarp, uint32_t(four));
      const uint32_t high = __reduce_add_sync(kFullWarp, uint32_t(four >> 32));
      if (lane % 4 == m) count = int((lane & 8 ? high : low) >> (lane & 4 ? 16 : 0) & 0xffff);
    }
    if (lane < kDigits && count) atomicAdd(&digits[lane], count);
  }

  // Moves the cut to the digit that holds it. Each warp does so by itself; lane n has the n-th largest digit.
  template <typename Last>
  __device__ __forceinline__ void find_digit(const int32_t* digits, int shift, Cut& cut, Last is_last) const {
    const int lane = threadIdx.x % 32, digit = kDigits - 1 - lane;  // of the first 16 lanes
    const int count = lane < kDigits ? digits[digit] : 0;
    int through = count;  // from the largest digit on
#pragma unroll
    for (int offset = 1; offset < kDigits; offset *= 2) {
      const int more = __shfl_up_sync(kFullWarp, through, offset);
      if (lane >= offset) through += more;
    }
    const uint32_t lowest = cut.key | uint32_t(digit) << shift;
    const bool last = lane < kDigits && is_last(lowest, cut.above + through - count, count);
    const unsigned lasts = __ballot_sync(kFullWarp, last);
    const int at = lasts ? __ffs(int(lasts)) - 1 : kDigits - 1;  // none: all values come before the cut
    cut.key = __shfl_sync(kFullWarp, lowest, at);
    cut.equal = __shfl_sync(kFullWarp, count, at);
    cut.above += __shfl_sync(kFullWarp, through, at) - cut.equal;
  }

  // Length of the longest prefix with confidence_(r) > 1 - factor / (r + 1). Confidences descend and the bound ascends,
  // so all values of a digit pass if its lowest value passes at the rank of its last.
  __device__ __forceinline__ int count_by_factor(double factor) {
    // Multiplied out, because a division would be a function call.
    const auto passes = [&](uint32_t key, int r) {
      return factor > (1.0 - double(confidence_of(key))) * double(r + 1);
    };
    const Cut cut = descend(
        28, [](uint32_t key, int) { return key; },
        [&](uint32_t lowest, int above, int count) { return count > 0 && !passes(lowest, above + count); },
        [](int, int) { return false; });
    int allowed = cut.above, refused = cut.above + cut.equal + 1;  // among equal confidences
    while (refused - allowed > 1) {
      const int r = (allowed + refused) / 2;
      (passes(cut.key, r) ? allowed : refused) = r;
    }
    return allowed;
  }

  // Number of r with entropy_(1) + ... + entropy_(r - 1) <= bound: all before the sum exceeds the bound, and the one
  // that exceeds it. One bit per pass: the sums of sixteen digits would cost more than the barriers that they save.
  __device__ __forceinline__ int count_by_entropy(float bound, int candidates) {
    if (!(bound >= 0)) return 0;
    const uint64_t limit = bound < 0x1p30f ? uint64_t(double(bound) * kEntropyScale) : ~uint64_t(0);
    uint64_t above_sum = 0;  // sum of the keys from `high` on; the sum exceeds the bound in [low, high)
    int above = 0, inside = candidates;
    uint32_t low = 0, high = 0;  // high 0: no end
    const auto between = [&](uint32_t trial, uint64_t& sum) {
      sum = 0;
      uint32_t sums[3] = {0, 0, 0};
      for_each([&](uint32_t key, int, int) {
        if (key == 0 || key < trial || (high && key >= high)) return;
        sum += entropy_of(key);
        ++sums[0];
      });
      sum = warp_reduce(sum, [](uint64_t a, uint64_t b) { return a + b; });
      // The warps' sums in two halves, of 31 bits and more: 32 of them fit.
      sums[1] = threadIdx.x % 32 == 0 ? uint32_t(sum & 0x3ffffff) : 0;
      sums[2] = threadIdx.x % 32 == 0 ? uint32_t(sum >> 26) : 0;
      block_sum(sums);
      sum = (uint64_t(sums[2]) << 26) + sums[1];
      return int(sums[0]);
    };
    uint64_t sum;
    between(0, sum);
    if (sum <= limit) return candidates;
    for (uint32_t bit = 1u << 31; bit && inside > 1; bit >>= 1) {
      const int count = between(low | bit, sum);
      if (above_sum + sum > limit) {
        low |= bit;
        inside = count;
      } else {
        above_sum += sum;
        above += count;
        inside -= count;
        high = low | bit;
      }
    }
    const uint64_t each = entropy_of(low);  // entropy of each key inside; the k-th is taken if k - 1 of them fit
    int taken = min(inside, 1), refused = inside + 1;
    while (refused - taken > 1) {
      const int k = (taken + refused) / 2;
      (above_sum + uint64_t(k - 1) * each <= limit ? taken : refused) = k;
    }
    return above + taken;
  }

  // The first `wanted` candidates, 0 < wanted <= candidates, are those with key > cut_key, or with key == cut_key and
  // i <= cut_index.
  __device__ __forceinline__ void select(int wanted, int candidates, uint32_t& cut_key, int& cut_index) {
    cut_key = 0;
    cut_index = 0x7fffffff;
    if (wanted == candidates) return;
    const Cut cut = descend(
        28, [](uint32_t key, int) { return key; },
        [&](uint32_t, int above, int count) { return above + count >= wanted; },
        [&](int above, int equal) { return above + equal == wanted; });
    cut_key = cut.key;
    if (cut.between) return;
    // Ties: the lowest rows first, so the largest of ~i.
    const int ties = wanted - cut.above, bits = 32 - __clz(size);
    const Cut last = descend(
        (bits - 1) / 4 * 4, [&](uint32_t key, int i) { return key == cut.key ? (1u << bits) - 1 - uint32_t(i) : 0u; },
        [&](uint32_t, int above, int count) { return above + count >= ties; }, [](int, int) { return false; });
    cut_index = int((1u << bits) - 1 - last.key);
  }

  // Counts the candidates, and those with a confidence of at least `limit`.
  __device__ __forceinline__ void count_candidates(float limit, uint32_t (&counts)[3]) {
    for_each([&](uint32_t key, int, int) {
      counts[0] += key != 0;
      counts[1] += key != 0 && confidence_of(key) >= limit;
    });
    block_sum(counts);
  }

  // Number of candidates that the rule commits in sequence s, before the limits of min_commit and of their number.
  __device__ __forceinline__ int64_t count_wanted(int64_t s, float limit, const uint32_t (&counts)[3]) {
    int64_t wanted = 0;
    switch (p.rule) {
      case Rule::kQuota:
        wanted = p.limits ? static_cast<const int32_t*>(p.limits)[s] : int64_t(fminf(p.limit, 2e9f));
        break;
      case Rule::kThreshold:
        wanted = counts[1];
        break;
      case Rule::kFactor:
        wanted = count_by_factor(limit);
        break;
      case Rule::kEntropyBound:
        wanted = count_by_entropy(limit, int(counts[0]));
        break;
    }
    return wanted;
  }

  // Commits the candidates before the cut. Counts the masks that remain, and the end tokens that are committed.
  __device__ __forceinline__ void commit(uint32_t cut_key, int cut_index, uint32_t (&left)[3]) {
    for_each([&](uint32_t key, int i, int j) {
      const int64_t n = begin + i;
      if (key == 0 || key < cut_key || (key == cut_key && i > cut_index)) {
        left[0] += j >= 0 ? masked >> j & 1 : uint32_t(holds_mask(p.rows[n]));
        return;
      }
      const int64_t token = j >= 0 ? tokens[j] : p.token[n];
      static_cast<Token*>(p.tokens)[__ldg(&p.rows[n])] = Token(token);  // read again to save registers
      left[0] += token == p.mask_id;
      for (int64_t e = 0; e < p.num_end_ids; ++e) left[1] += token == p.end_ids[e];
    });
    block_sum(left);
  }
};

template <int kThreads, int kKeys, typename Token>
__global__ __launch_bounds__(kThreads, 1) void illada_remask_sm80(const __grid_constant__ RemaskParams p,
                                                                  const __grid_constant__ DependentLaunch launch) {
  using Ranker = SequenceRanker<kThreads, kKeys, Token>;
  __shared__ typename Ranker::SharedStorage shared;
  wait_for_previous_kernel(launch);

  const int64_t s = blockIdx.x;
  const int begin = max(p.cu_rows[s], 0), end = min(p.cu_rows[s + 1], int(p.num_rows));
  const int size = p.num_tokens > 0 ? max(end - begin, 0) : 0;
  Ranker ranker{p, shared, begin, size, size <= Ranker::kCapacity};
  ranker.load();

  const float limit = p.limits && p.rule != Rule::kQuota ? static_cast<const float*>(p.limits)[s] : p.limit;
  uint32_t counts[3] = {0, 0, 0};  // candidates, those of at least the threshold
  ranker.count_candidates(limit, counts);
  const int candidates = int(counts[0]);
  int64_t wanted = ranker.count_wanted(s, limit, counts);
  // The threshold then is the cut: no descent is needed to find it.
  const bool threshold_decides = p.rule == Rule::kThreshold && wanted >= p.min_commit;
  if (p.rule != Rule::kQuota) wanted = max(wanted, p.min_commit);
  const int commit = int(min(max(wanted, int64_t(0)), int64_t(candidates)));

  uint32_t cut_key = ~0u;
  int cut_index = -1;  // nothing
  if (commit > 0 && threshold_decides) {
    cut_key = Ranker::key_of(limit + 0.0f);
    cut_index = 0x7fffffff;
  } else if (commit > 0) {
    ranker.select(commit, candidates, cut_key, cut_index);
  }
  uint32_t left[3] = {0, 0, 0};  // masks that remain, end tokens committed
  ranker.commit(cut_key, cut_index, left);
  if (threadIdx.x > 0) return;
  p.committed[s] = commit;
  if (p.remaining) p.remaining[s] = int32_t(left[0]);
  if (p.finished) p.finished[s] = left[0] == 0;
  if (p.ended) p.ended[s] = left[1] != 0;
}

}  // namespace

void launch_remask(const RemaskParams& p, const Device& device) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.num_sequences));
  shape.dependent = true;
  const bool few = p.num_rows <= 1024;
  shape.block = dim3(few ? 256 : 512);
  const auto kernel = p.tokens_are_int64
                          ? (few ? illada_remask_sm80<256, 4, int64_t> : illada_remask_sm80<512, 16, int64_t>)
                          : (few ? illada_remask_sm80<256, 4, int32_t> : illada_remask_sm80<512, 16, int32_t>);
  launch_kernel("remask", device, p.launch.stream, shape, kernel, p);
}

}  // namespace illada::remask
