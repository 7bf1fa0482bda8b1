// Thresholds of top_k and top_p for each row: the smallest logit that is kept and, among ids with that logit, the last
// id that is kept.
//
// One CTA processes one row. Both selections have the same form: from the largest logit down, sum a quantity (1 per id,
// or the id's probability) until the sum reaches a target.
//
//   without a filter: write a cut that keeps all ids, and end
//   mark the vectors with biased ids
//   find_range: the largest logit                                                       (a pass over the row)
//   for top_k, then for top_p among the ids that top_k keeps:
//     fill_bins: a histogram over the distance from the largest logit                   (a pass over the row)
//     find_bin: prefix sums over the bins; the bin in which the sum reaches the target
//     list_bin: the ids of this bin, listed in shared memory                            (a pass over the row)
//     find_key: a bisection over the bits of their logits
//     top_p: a bisection over the ids with the logit of the cut
//   write the cut
//
// If the list has no room for the ids, the bisection reads the row itself, once for each bit. The L2 cache holds the
// row after the first pass.
//
// Schedule of a selection. At | all warps of the CTA wait for all. No CTA waits for another. A thread loads its next
// vector while it counts or lists this one. There is one [sum] for each bit of the bisection; it has a wait inside.
//
//            time ->
//   warp 0   [clear]|[count in bins, by atomics  ]|[warp sums]|[prefix sums]|[list, by atomics  ]|[sum]|[sum]|  ...
//   warp 1   [clear]|[count in bins, by atomics  ]|[warp sums]|[prefix sums]|[list, by atomics  ]|[sum]|[sum]|  ...
//
// All sums are of integers. Their order does not matter, so a row's result depends on the row alone. The weight of an
// id is relative to the edge of its bin, because the distance of its logit from that edge is exact.
#include <climits>

#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "sampling/launch.h"
#include "sampling/row_reader.cuh"
#include "sampling/row_sample.cuh"

namespace illada::sampling {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2 * kThreads, kLastBin = kBins - 1;  // the last one holds all larger distances
constexpr float kBinsPerNat = 64.0f;                       // bins per factor e in probability; 32 nats in all
constexpr int kMaxListed = 2048;                           // ids of a bin that are listed in shared memory
constexpr int kBiasBits = 1 << 15;
constexpr int kEdgeBits = 24;  // fraction bits of a bin's mass, in addition to those of a weight

using Sum = unsigned long long;

struct Listed {
  float x;
  int32_t id;
};

struct SharedStorage {
  uint32_t count[kBins], fraction[kBins];
  Listed list[kMaxListed];
  uint32_t biased[kBiasBits / 32];  // RowReader::biased
  Sum partial[kWarps];
  Sum before;  // of the bin that was found
  int32_t bin, listed;
  int32_t maximum, minimum, low, high;  // ordered
};

__device__ __forceinline__ float from_key(int32_t key) { return from_ordered(key); }
// Equal floats have equal keys, the two zeros too.
__device__ __forceinline__ int32_t to_key(float x) { return ordered(x + 0.0f); }

template <typename T, bool kAligned>
struct RowFilter {
  SharedStorage& shared;
  RowReader<T, kAligned, kBiasBits> reader;
  int32_t vocab;
  float maximum = 0;
  float floor = -INFINITY;  // smaller logits are left out
  float scale = 0;          // bins per unit of distance
  int bin = 0, weight_bits = 0;

  // Calls f(x, id) for every id of the row. All threads of the CTA call it.
  template <typename F>
  __device__ __forceinline__ void for_each_id(F&& f) const {
    const int vectors = vocab / kVector;
    Raw8<T> next = minus_infinity8<T>();  // loads while the previous vector is in use
    if (int(threadIdx.x) < vectors) next = reader.raw(int(threadIdx.x));
    for (int vector = int(threadIdx.x); vector < vectors; vector += kThreads) {
      float x[kVector];
      unpack8(next, x);
      if (vector + kThreads < vectors) next = reader.raw(vector + kThreads);
      if (reader.bias.count) reader.add_bias(vector, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) f(x[i], vector * kVector + i);
    }
    const int id = vectors * kVector + int(threadIdx.x);
    if (id < vocab) f(reader.single(id), id);
  }

  __device__ __forceinline__ float distance(float x) const { return __fmul_rn(maximum - x, scale); }
  __device__ __forceinline__ int bin_of(float x) const {
    const float t = distance(x);
    return t < float(kLastBin) ? int(t) : kLastBin;
  }

  __device__ __forceinline__ Sum block_sum(Sum value) const {
    const auto add = [](Sum a, Sum b) { return a + b; };
    value = warp_reduce(value, add);
    __syncthreads();  // all threads have read the previous contents of `partial`
    if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_reduce(shared.partial[threadIdx.x % 32], add);
  }

  // Finds the largest logit, and the smallest above -inf in shared memory. Returns false if the row has no softmax.
  __device__ __forceinline__ bool find_range() {
    float largest = -INFINITY, smallest = INFINITY;
    bool nan = false;
    for_each_id([&](float x, int) {
      largest = fmaxf(largest, x);
      smallest = x > -INFINITY ? fminf(smallest, x) : smallest;
      nan |= x != x;
    });
    atomicMax(&shared.maximum, __reduce_max_sync(kFullWarp, to_key(largest)));
    atomicMin(&shared.minimum, __reduce_min_sync(kFullWarp, to_key(smallest)));
    nan = __syncthreads_or(nan);
    maximum = from_key(shared.maximum);
    return !nan && maximum > -INFINITY && maximum < INFINITY;
  }

  // Puts the ids with logits of at least `floor` into bins: their number, and the sum of their weight_deficit(x, bin).
  template <typename Deficit>
  __device__ __forceinline__ void fill_bins(Deficit&& weight_deficit) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < kBins; i += kThreads) shared.count[i] = shared.fraction[i] = 0;
    __syncthreads();
    for_each_id([&](float x, int) {
      if (!(x > -INFINITY && x >= floor)) return;
      const int at = bin_of(x);
      atomicAdd(&shared.count[at], 1u);
      if (const uint32_t part = weight_deficit(x, at)) atomicAdd(&shared.fraction[at], part);
    });
    __syncthreads();
  }

  // Returns the bin at which the running sum of masses reaches target(sum of all masses), or -1. Sets shared.before to
  // the sum before that bin.
  template <typename Mass, typename Target>
  __device__ __forceinline__ int find_bin(Mass&& mass, Target&& target) {
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32), at = 2 * int(threadIdx.x);
    const auto scan = [&](Sum value) {
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const Sum other = __shfl_up_sync(kFullWarp, value, offset);
        if (lane >= offset) value += other;
      }
      return value;
    };
    const Sum first = mass(at), both = first + mass(at + 1), warp_sum = scan(both);
    if (lane == 31) shared.partial[warp] = warp_sum;
    if (threadIdx.x == 0) shared.bin = -1;
    __syncthreads();
    const Sum warps = scan(shared.partial[lane]);
    const Sum total = __shfl_sync(kFullWarp, warps, 31);
    const Sum warps_before = __shfl_sync(kFullWarp, warps, warp) - shared.partial[warp];
    const Sum before = warps_before + warp_sum - both, wanted = target(total);
    if (before < wanted && before + both >= wanted) {
      const bool second = before + first < wanted;
      shared.bin = at + int(second);
      shared.before = second ? before + first : before;
    }
    __syncthreads();
    return shared.bin;
  }

  __device__ __forceinline__ bool in_bin(float x) const { return x > -INFINITY && x >= floor && bin_of(x) == bin; }

  // Lists the ids of `bin`, where they fit, and finds the range of their logits.
  __device__ __forceinline__ void list_bin() {
    const bool fits = shared.count[bin] <= kMaxListed;
    if (threadIdx.x == 0) {
      shared.listed = 0;
      shared.low = INT_MAX;
      shared.high = INT_MIN;
    }
    __syncthreads();
    int32_t low = INT_MAX, high = INT_MIN;
    for_each_id([&](float x, int id) {
      if (!in_bin(x)) return;
      low = min(low, to_key(x));
      high = max(high, to_key(x));
      if (fits) shared.list[atomicAdd(&shared.listed, 1)] = {x, id};
    });
    atomicMin(&shared.low, __reduce_min_sync(kFullWarp, low));
    atomicMax(&shared.high, __reduce_max_sync(kFullWarp, high));
    __syncthreads();
  }

  // The sum of value(x, id) over the ids of the bin.
  template <typename Value>
  __device__ __forceinline__ Sum sum_bin(Value&& value) const {
    Sum sum = 0;
    if (shared.count[bin] <= kMaxListed) {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < shared.listed; i += kThreads)
        sum += value(shared.list[i].x, shared.list[i].id);
    } else {
      for_each_id([&](float x, int id) {
        if (in_bin(x)) sum += value(x, id);
      });
    }
    return block_sum(sum);
  }

  // Returns the key of the largest logit in the bin such that the weights of all logits at or above it sum to at least
  // `needed`. If there is none, returns the key of the smallest logit.
  template <typename Weight>
  __device__ __forceinline__ int32_t find_key(Sum needed, Weight&& weight) {
    list_bin();
    int32_t low = shared.low, high = shared.high;
    while (low < high) {
      const int32_t middle = int32_t(low + int64_t(uint32_t(high) - uint32_t(low) + 1) / 2);
      const Sum sum = sum_bin([&](float x, int) { return to_key(x) >= middle ? Sum(weight(x)) : 0; });
      if (sum >= needed) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  // Returns the smallest logit that top_k keeps.
  __device__ __forceinline__ float find_top_k(int32_t top_k) {
    scale = kBinsPerNat;
    for (bool again = true;; again = false) {
      fill_bins([](float, int) { return 0u; });
      bin = find_bin([&](int at) { return Sum(shared.count[at]); }, [&](Sum) { return Sum(top_k); });
      if (bin != kLastBin || !again) break;
      // The cut is among the ids that share the last bin: stretch the bins over the range of the row.
      scale = float(kLastBin) / (maximum - from_key(shared.minimum));  // 0 where the difference is infinite
    }
    if (bin < 0) return -INFINITY;  // at most top_k - 1 logits are above it
    return from_key(find_key(Sum(top_k) - shared.before, [](float) { return 1u; }));
  }

  // Returns 2^weight_bits minus the weight of an id. 2^weight_bits is the weight at the edge of a bin. The last bin has
  // no mass: its ids are at most e^-32 times as likely as the first.
  __device__ __forceinline__ uint32_t weight_deficit(float x, int at) const {
    const float beyond = distance(x) - float(at);  // exact
    const float lost = 1.0f - exp2_approx(beyond * (-kLog2eF / kBinsPerNat));
    return at == kLastBin ? 0 : __float2uint_rn(lost * float(1 << weight_bits));
  }
  __device__ __forceinline__ uint32_t weight(float x) const { return (1u << weight_bits) - weight_deficit(x, bin); }

  // Finds the smallest logit that top_p keeps among logits of at least `floor`, and the last kept id with that logit.
  __device__ __forceinline__ void find_top_p(float top_p, float temperature, float& value, int32_t& last) {
    // Each id adds less than 2^(weight_bits - 6) to its bin's `fraction`, which therefore stays below 2^32.
    weight_bits = min(20, 6 + __clz(vocab - 1));
    scale = fminf(kBinsPerNat / temperature, 1e30f);
    fill_bins([&](float x, int at) { return weight_deficit(x, at); });
    Sum wanted = 0;
    bin = find_bin(
        [&](int at) {
          const Sum weights = (Sum(shared.count[at]) << weight_bits) - shared.fraction[at];
          return at == kLastBin ? 0 : Sum(double(weights) * bin_edge_mass(at) + 0.5);
        },
        [&](Sum total) { return wanted = Sum(fmax(ceil(double(top_p) * double(total)), 1.0)); });
    const Sum needed = Sum(fmax(ceil(double(wanted - shared.before) / bin_edge_mass(bin)), 1.0));
    const int32_t key = find_key(needed, [&](float x) { return weight(x); });
    value = from_key(key);
    // Of the ids with this logit, the lowest are kept, as many as the target needs.
    const Sum above = sum_bin([&](float x, int) { return to_key(x) > key ? Sum(weight(x)) : 0; });
    const Sum equal = sum_bin([&](float x, int) { return Sum(to_key(x) == key); });
    const Sum kept = above < needed ? (needed - above - 1) / weight(value) + 1 : 1;
    if (kept >= equal) return;
    int32_t low = 0, high = vocab - 1;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (sum_bin([&](float x, int id) { return Sum(to_key(x) == key && id <= middle); }) >= kept) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    last = low;
  }
  // Returns the factor from the weights of a bin to its mass, a fixed-point number.
  __device__ __forceinline__ static double bin_edge_mass(int at) {
    return exp2(double(at) * (-double(kLog2eF) / kBinsPerNat) + kEdgeBits);
  }

  // Sets the bit of every vector that holds a biased id, and the initial values of the range.
  __device__ __forceinline__ void prepare() {
    if (threadIdx.x == 0) {
      shared.maximum = INT_MIN;
      shared.minimum = INT_MAX;
    }
    if (threadIdx.x < kBiasBits / 32) shared.biased[threadIdx.x] = 0;
    __syncthreads();
    for (int b = int(threadIdx.x); b < reader.bias.count; b += kThreads) {
      const int id = reader.bias.ids[b], bit = id / kVector % kBiasBits;
      if (id >= 0) atomicOr(&shared.biased[bit / 32], 1u << (bit % 32));
    }
    __syncthreads();
  }
};

template <typename T, bool kAligned>
__global__ __launch_bounds__(kThreads,
                             1) void illada_sample_filters_sm80(const __grid_constant__ SampleTokensParams p,
                                                                RowCut* cuts,
                                                                const __grid_constant__ DependentLaunch launch) {
  __shared__ SharedStorage shared;
  const int64_t row = blockIdx.x;
  wait_for_previous_kernel(launch);
  RowCut cut;
  const float noise = p.temperatures ? p.temperatures[row] : p.temperature, temperature = noise > 0 ? noise : 1.0f;
  const int32_t top_k = p.top_ks ? p.top_ks[row] : p.top_k;
  const float top_p = p.top_ps ? p.top_ps[row] : p.top_p;
  const bool matters = noise > 0 || p.confidence_at_temperature;  // the largest logit is always kept
  const bool by_count = matters && top_k > 0 && top_k < p.vocab_size, by_mass = matters && top_p < 1.0f;
  if (!by_count && !by_mass && !p.confidence_at_temperature) {
    if (threadIdx.x == 0) cuts[row] = cut;
    return;
  }
  RowFilter<T, kAligned> filter{
      shared,
      {static_cast<const T*>(p.logits) + row * p.logits_row_stride, shared.biased, 0, RowBias(p, row)},
      int32_t(p.vocab_size)};
  filter.prepare();
  if (filter.find_range()) {
    if (by_count) cut.value = filter.floor = filter.find_top_k(top_k);
    if (by_mass) filter.find_top_p(top_p, temperature, cut.value, cut.last);
    if (p.confidence_at_temperature) {
      cut.shift = filter.maximum;
      cut.scale = fminf(1.0f / temperature, 1e30f);
    }
  }
  if (threadIdx.x == 0) cuts[row] = cut;
}

template <typename T>
void launch(const SampleTokensParams& p, const Device& device, RowCut* cuts) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.num_rows));
  shape.block = dim3(kThreads);
  shape.dependent = true;
  launch_kernel(
      "sample_tokens", device, p.launch.stream, shape,
      has_aligned_rows(p, sizeof(T)) ? illada_sample_filters_sm80<T, true> : illada_sample_filters_sm80<T, false>, p,
      cuts);
}

}  // namespace

void launch_sample_filters(const SampleTokensParams& p, const Device& device, RowCut* cuts) {
  dispatch_dtype(p.dtype, [&](auto element) { launch<decltype(element)>(p, device, cuts); });
}

}  // namespace illada::sampling
