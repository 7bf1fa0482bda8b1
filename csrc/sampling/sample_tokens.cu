// sample_tokens from logits: one pass over each row. row_sample.cuh has the state of a row.
//
// A CTA processes a range of a row. A thread processes kUnroll vectors of 8 neighbours at a time, while its next
// vectors are loaded. The softmax of each vocab tile of kVocabTileVectors vectors is summed separately, warp by warp.
// With one range per row, the CTA finishes the row and its records stay in shared memory. With several, the records go
// to the workspace, and a second kernel finishes the row, one warp per row.
//
// Lower bound: rows x vocab x sizeof(T) bytes, each read once. Instructions per bf16 element: convert 1, maximum 1,
// exponential 4 (one of them on the special-function unit); with noise also 9.3 for Philox and 2 for the comparison. An
// H100 can issue about 20 while memory delivers an element; that is about the number with noise, and three times the
// number without.
#include <cute/arch/copy_sm80.hpp>

#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "sampling/launch.h"
#include "sampling/row_reader.cuh"
#include "sampling/row_sample.cuh"

namespace illada::sampling {
namespace {

constexpr int kWarps = kSampleWarps, kThreads = 32 * kWarps;

struct SharedStorage {
  LeaderRecord leader[kWarps];
  int32_t bound;  // ordered(lower bound of the row's best score)
  int32_t maximum;
};

// How logits are loaded: to registers, by loads of 16 bytes or of one element, or through shared memory, where more of
// them can be in flight.
enum class Source { kUnaligned, kAligned, kShared };

// Sets the bit of every vector of this range that holds a biased id.
__device__ __forceinline__ void mark_biased(uint32_t* biased, const RowBias& bias, int first, int end) {
  for (int i = threadIdx.x; i < (end - first + 31) / 32; i += kThreads) biased[i] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b < bias.count; b += kThreads) {
    const int id = bias.ids[b], bit = id / kVector - first;
    if (id >= 0 && bit >= 0 && bit < end - first) atomicOr(&biased[bit / 32], 1u << (bit % 32));
  }
}

__device__ __forceinline__ uint32_t smallest(const PhiloxWords& w) {
  return min(min(w.word[0], w.word[1]), min(w.word[2], w.word[3]));
}

// The ids of a row that the filters keep; without filters, all ids. NaN is kept, because rows with NaN are not
// filtered.
template <bool kFiltered>
struct KeptIds {
  float value = 0, shift = 0, scale = 1;
  float measured_value = 0;  // cut of the ids that the confidence counts
  int32_t last = 0;

  __device__ __forceinline__ KeptIds(const RowCut* cuts, int64_t row, bool at_temperature) {
    if constexpr (kFiltered) {
      const RowCut cut = cuts[row];
      value = cut.value;
      last = cut.last;
      shift = cut.shift;
      scale = cut.scale;
      measured_value = at_temperature ? value : -INFINITY;
    }
  }

  __device__ __forceinline__ bool contains(float x, int id) const {
    return !kFiltered || !(x < value || (x == value && id > last));
  }
  __device__ __forceinline__ bool may_contain(float maximum) const { return !kFiltered || !(maximum < value); }
  __device__ __forceinline__ float scaled(float x) const { return kFiltered ? (x - shift) * scale : x; }
  // Logit from which the confidence is computed; -inf where the id does not count.
  __device__ __forceinline__ float measured_logit(float x, int id) const {
    if constexpr (!kFiltered) return x;
    return x < measured_value || (x == measured_value && id > last) ? -INFINITY : scaled(x);
  }
};

// Lower bound of the row's best score, shared by the warps of a CTA; see row_sample.cuh.
struct SharedBound {
  int32_t* ordered_bound;

  __device__ __forceinline__ float read() const { return from_ordered(*static_cast<volatile int32_t*>(ordered_bound)); }
  __device__ __forceinline__ void raise(float score) {
    atomicMax(ordered_bound, ordered(fminf(fmaxf(score, -FLT_MAX), FLT_MAX)));
  }
};

// Source::kShared: a step of a thread is kSharedVectors vectors of 16 bytes. Each thread loads its own vectors, so that
// no thread waits for another. Shared memory holds `shared_steps` steps, 2 or 4.
constexpr int kSharedVectors = 4, kSharedStepBytes = kThreads * kSharedVectors * 16;

template <typename T, bool kWantExtras, Source kSource, bool kFiltered>
__global__ __launch_bounds__(kThreads, kSampleCtasPerSm) void illada_sample_tokens_sm80(
    const __grid_constant__ SampleTokensParams p, const __grid_constant__ RowSplit split, int shared_steps,
    const RowCut* cuts, const __grid_constant__ DependentLaunch launch) {
  constexpr bool kAligned = kSource != Source::kUnaligned, kShared = kSource == Source::kShared;
  constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2, kStep = kThreads * kUnroll;
  static_assert(kVocabTileVectors % kStep == 0);
  static_assert(!kShared || (kUnroll == kSharedVectors && Raw8<T>::kLoads == 1));
  __shared__ SharedStorage shared;
  extern __shared__ uint4 dynamic_shared[];  // the softmax records of a whole row, then one bit per vector for the bias
  const int64_t row = blockIdx.x / unsigned(split.splits);
  const int range = int(blockIdx.x % unsigned(split.splits));
  const int vectors = int(p.vocab_size / kVector);
  const int first = range * split.split_tiles * kVocabTileVectors,
            end = min(first + split.split_tiles * kVocabTileVectors, vectors);
  const bool has_tail = range == split.splits - 1;  // the ids after the last complete vector
  if (threadIdx.x == 0) {
    shared.bound = shared.maximum = ordered(-FLT_MAX);
  }
  wait_for_previous_kernel(launch);

  const RowNoise noise(p, row);
  const KeptIds<kFiltered> kept(cuts, row, p.confidence_at_temperature);
  RowReader<T, kAligned> reader{static_cast<const T*>(p.logits) + row * p.logits_row_stride, nullptr, first,
                                RowBias(p, row)};
  if (p.bias_count) {
    auto* const bits =
        reinterpret_cast<uint32_t*>(dynamic_shared + (split.splits == 1 ? split.vocab_tiles * kWarps : 0));
    mark_biased(bits, reader.bias, first, end);
    reader.biased = bits;
  }
  __syncthreads();

  RowState<kWantExtras> state;
  SharedBound shared_bound{&shared.bound};
  float best = -INFINITY;  // without noise: the largest logit and the step it was seen in
  int best_base = 0;
  const bool noisy = noise.temperature > 0;
  const RowNoiseLoop noise_loop(noise);

  Raw8<T> next[kUnroll];
  // Loads this thread's vectors of the step that begins at `base`; vectors past the end are -inf.
  const auto load_step = [&](int base) {
    if (base - int(threadIdx.x) + kStep <= end) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) next[u] = reader.raw(base + u * kThreads);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int vector = base + u * kThreads;
        next[u] = minus_infinity8<T>();
        if (vector < end) next[u] = reader.raw(vector);
      }
    }
  };
  // The same through shared memory, in two halves: start_copy and finish_copy of step 0, 1, ... Both may be called past
  // the end. Where the whole step exists, the vectors are not tested one by one.
  const uint4* thread_vectors = dynamic_shared + threadIdx.x;  // this thread's first vector in the first step
  if constexpr (kShared) {
    thread_vectors += split.splits == 1 ? split.vocab_tiles * kWarps : 0;
    thread_vectors += p.bias_count ? split.split_tiles * kVocabTileVectors / 128 : 0;
  }
  const auto step_vectors = [&](int step) {
    return thread_vectors + (step & (shared_steps - 1)) * (kThreads * kUnroll);
  };
  const auto start_copy = [&](int step) {
    const int vector = first + step * kStep + int(threadIdx.x);
    const uint32_t target = ptx::smem_address(step_vectors(step));
    const T* const source = reader.row + int64_t(vector) * kVector;
    const auto copy = [&](int u) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(reinterpret_cast<const uint4&>(source[u * kThreads * kVector]),
                                                   ptx::shared_at<uint4>(target + uint32_t(u * kThreads * 16)));
    };
    ptx::keep_memory_order();  // earlier reads of this memory are complete
    if (first + (step + 1) * kStep <= end) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) copy(u);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (vector + u * kThreads < end) copy(u);
    }
    cute::cp_async_fence();
  };
  const auto finish_copy = [&](int step) {  // later steps may still be in flight
    if (shared_steps == 2) {
      cute::cp_async_wait<1>();
    } else {
      cute::cp_async_wait<3>();
    }
    ptx::keep_memory_order();
    const uint4* const source = step_vectors(step);
    if (first + (step + 1) * kStep <= end) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) next[u].part[0] = source[u * kThreads];
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        next[u] = minus_infinity8<T>();
        if (first + step * kStep + u * kThreads + int(threadIdx.x) < end) next[u].part[0] = source[u * kThreads];
      }
    }
  };

  int base = first + threadIdx.x;
  if constexpr (kShared) {
#pragma unroll 1
    for (int step = 0; step < shared_steps; ++step) start_copy(step);
    finish_copy(0);
  } else {
    load_step(base);
  }
  if (noisy) {  // initial bound, from the first vector of each thread
    float lower_bound = -FLT_MAX;
    if (base < end) {
      float x[kVector];
      unpack8(next[0], x);
      if (reader.biased) reader.add_bias(base, x);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PhiloxWords words = noise.upper(uint32_t(2 * base + half));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = RowNoise::score_lower_bound(x[4 * half + i], words.word[i], noise.temperature);
          if (kept.contains(x[4 * half + i], base * kVector + 4 * half + i)) lower_bound = fmaxf(lower_bound, score);
        }
      }
    }
    lower_bound = warp_max(lower_bound);
    if (threadIdx.x % 32 == 0) shared_bound.raise(lower_bound);
    __syncthreads();
  }

  SoftmaxRecord* const records =
      (split.splits == 1 ? reinterpret_cast<SoftmaxRecord*>(dynamic_shared)
                         : softmax_records(p.workspace, p.num_rows, row_records(split), row)) +
      range * split.split_tiles * kWarps + threadIdx.x / 32;
  const auto store_tile_record = [&](int index) {
    state.softmax.merge_lanes();
    if (threadIdx.x % 32 == 0) records[index * kWarps] = to_record(state.softmax);
    state.softmax = {};
  };
  const auto process_tail = [&] {
    const int id = vectors * kVector + int(threadIdx.x);
    if (!has_tail || id >= p.vocab_size) return;
    const float x = reader.single(id), measured = kept.measured_logit(x, id);
    state.softmax.raise(measured);
    state.softmax.add(measured);
    if constexpr (kWantExtras) state.top.add(measured);
    if (!kept.contains(x, id)) return;
    const double score = noisy ? noise.score(x, word(noise.upper(uint32_t(id) / 4), id % 4), uint32_t(id)) : double(x);
    state.leader.offer({score, id, measured});
  };

  for (int step_base = first; step_base < end; step_base += kStep, base += kStep) {
    if (step_base > first && (step_base - first) % kVocabTileVectors == 0)
      store_tile_record((step_base - first) / kVocabTileVectors - 1);
    float x[kUnroll][kVector], maximum[kUnroll];
    if constexpr (kShared) finish_copy((step_base - first) / kStep);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) unpack8(next[u], x[u]);
    if constexpr (kShared) {
      start_copy((step_base - first) / kStep + shared_steps);
    } else {
      if (step_base + kStep < end) load_step(base + kStep);
    }
    if (reader.biased) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (base + u * kThreads < end) reader.add_bias(base + u * kThreads, x[u]);
    }
    float top = -INFINITY;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      maximum[u] = fmaxf(fmaxf(fmaxf(x[u][0], x[u][1]), fmaxf(x[u][2], x[u][3])),
                         fmaxf(fmaxf(x[u][4], x[u][5]), fmaxf(x[u][6], x[u][7])));
      top = fmaxf(top, maximum[u]);
    }
    state.softmax.raise(kept.scaled(top));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float measured = kept.measured_logit(x[u][i], (base + u * kThreads) * kVector + i);
        state.softmax.add(measured);
        if constexpr (kWantExtras) state.top.add(measured);
      }
    }
    if (!noisy) {
      best_base = top > best ? base : best_base;
      best = fmaxf(best, top);
      continue;
    }

    const float bound = shared_bound.read();
    unsigned candidates[kUnroll] = {};  // the lanes whose vector u may hold the winner
    const int warp_base = base - int(threadIdx.x % 32);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float log2_bound = noise.log2_bound(maximum[u], bound);
      if (!__any_sync(kFullWarp, log2_bound > RowNoise::kMinLog2Bound && kept.may_contain(maximum[u]))) continue;
      const uint32_t block = 2 * uint32_t(base + u * kThreads);
      const uint32_t bits = min(smallest(noise_loop.upper(block)), smallest(noise_loop.upper(block + 1)));
      candidates[u] = __ballot_sync(
          kFullWarp, bits <= RowNoise::max_bits(log2_bound) && maximum[u] > -INFINITY && kept.may_contain(maximum[u]));
    }
    // Rare: eight lanes process a vector of each u again, one id each. Its logits are still in the L2 cache.
    const int lane = threadIdx.x % 32, mine = lane / kVector % kUnroll;
    unsigned lanes = candidates[0];
#pragma unroll
    for (int u = 1; u < kUnroll; ++u) lanes = mine == u ? candidates[u] : lanes;
    if (lane >= kVector * kUnroll) lanes = 0;
    for (; __any_sync(kFullWarp, lanes != 0); lanes &= lanes - 1) {
      if (lanes == 0) continue;
      const int id = (warp_base + mine * kThreads + __ffs(lanes) - 1) * kVector + lane % kVector;
      const float xi = reader.single(id);
      if (!kept.contains(xi, id)) continue;
      const uint32_t bits = word(noise.upper(uint32_t(id) / 4), id % 4);
      if (bits > RowNoise::max_bits(noise.log2_bound(xi, bound))) continue;
      const double score = noise.score(xi, bits, uint32_t(id));
      if (score > state.leader.score) shared_bound.raise(__double2float_rd(score));
      state.leader.offer({score, id, kept.scaled(xi)});
    }
  }

  process_tail();
  store_tile_record(max(end - first - 1, 0) / kVocabTileVectors);

  if (!noisy) {  // the threads that saw the maximum read their step again to find the lowest id
    const float warp_best = warp_max(best);
    if (threadIdx.x % 32 == 0) atomicMax(&shared.maximum, ordered(warp_best));
    __syncthreads();
    if (best == from_ordered(shared.maximum) && best > -INFINITY) {
#pragma unroll 1
      for (int u = 0; u < kUnroll; ++u) {
        const int vector = best_base + u * kThreads;
        if (vector >= end) break;
        float x[kVector];
        reader.values(vector, x);
        int found = kVector;
#pragma unroll
        for (int i = kVector - 1; i >= 0; --i) found = x[i] == best ? i : found;
        if (found == kVector) continue;
        state.leader.offer({double(best), vector * kVector + found, kept.scaled(best)});
        break;
      }
    }
  }

#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) state.merge_leader(mask);
  if (threadIdx.x % 32 == 0) shared.leader[threadIdx.x / 32] = state.leader_record();
  __syncthreads();
  if (threadIdx.x >= 32) return;
  state = {};
  if (threadIdx.x < kWarps) state.merge(shared.leader[threadIdx.x]);
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask /= 2) state.merge_leader(mask);
  if (split.splits == 1)
    state.softmax =
        merge_records<kWantExtras>(reinterpret_cast<SoftmaxRecord*>(dynamic_shared), split.vocab_tiles * kWarps);
  if (threadIdx.x > 0) return;
  if (split.splits == 1) {
    write_row(p, row, state);
  } else {
    static_cast<LeaderRecord*>(p.workspace)[row * split.splits + range] = state.leader_record();
  }
}

constexpr int kCombineThreads = 128;

template <bool kWantExtras>
__global__ __launch_bounds__(kCombineThreads) void illada_sample_tokens_combine_sm80(
    const __grid_constant__ SampleTokensParams p, const __grid_constant__ RowRecords records,
    const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const int64_t row = int64_t(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= p.num_rows) return;  // whole warps
  RowState<kWantExtras> state;
  const LeaderRecord* leaders = static_cast<const LeaderRecord*>(p.workspace) + row * records.leaders;
  for (int i = lane; i < records.leaders; i += 32) state.merge(leaders[i]);
  state.softmax = merge_records<kWantExtras>(softmax_records(p.workspace, p.num_rows, records, row), records.softmaxes);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) state.merge_leader(mask);
  if (lane == 0) write_row(p, row, state);
}

template <typename T, bool kWantExtras>
void launch(const SampleTokensParams& p, const Device& device, const RowSplit& split, const RowCut* cuts) {
  const bool aligned = has_aligned_rows(p, sizeof(T));
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.num_rows * split.splits));
  shape.block = dim3(kThreads);
  shape.smem_bytes = (split.splits == 1 ? split.vocab_tiles * kWarps * int(sizeof(SoftmaxRecord)) : 0) +
                     (p.bias_count ? split.split_tiles * kVocabTileVectors / 8 : 0);
  shape.dependent = true;
  auto kernel = aligned ? illada_sample_tokens_sm80<T, kWantExtras, Source::kAligned, false>
                        : illada_sample_tokens_sm80<T, kWantExtras, Source::kUnaligned, false>;
  int shared_steps = 0;
  if (cuts) {  // one instance for all measures
    kernel = aligned ? illada_sample_tokens_sm80<T, true, Source::kAligned, true>
                     : illada_sample_tokens_sm80<T, true, Source::kUnaligned, true>;
  } else if constexpr (sizeof(T) == 2) {
    constexpr int kMaxSmemBytes = 98 * 1024;  // every GPU from sm_80 on allows this much per CTA
    const int wanted_steps = shared_sample_steps();
    if (aligned && wanted_steps && shape.smem_bytes + wanted_steps * kSharedStepBytes <= kMaxSmemBytes) {
      kernel = illada_sample_tokens_sm80<T, kWantExtras, Source::kShared, false>;
      shared_steps = wanted_steps;
      shape.smem_bytes += wanted_steps * kSharedStepBytes;
    }
  }
  launch_kernel("sample_tokens", device, p.launch.stream, shape, kernel, p, split, shared_steps, cuts);
}

template <typename T>
void launch(const SampleTokensParams& p, const Device& device, const RowSplit& split, const RowCut* cuts) {
  wants_extras(p) ? launch<T, true>(p, device, split, cuts) : launch<T, false>(p, device, split, cuts);
}

}  // namespace

void launch_sample_tokens(const SampleTokensParams& p, const Device& device, const RowSplit& split,
                          const RowCut* cuts) {
  dispatch_dtype(p.dtype, [&](auto element) { launch<decltype(element)>(p, device, split, cuts); });
  if (split.splits > 1) launch_sample_tokens_combine(p, device, row_records(split));
}

void launch_sample_tokens_combine(const SampleTokensParams& p, const Device& device, const RowRecords& records) {
  LaunchShape shape;
  constexpr int kRows = kCombineThreads / 32;
  shape.grid = dim3(unsigned((p.num_rows + kRows - 1) / kRows));
  shape.block = dim3(kCombineThreads);
  shape.dependent = true;
  launch_kernel("sample_tokens", device, p.launch.stream, shape,
                wants_extras(p) ? illada_sample_tokens_combine_sm80<true> : illada_sample_tokens_combine_sm80<false>, p,
                records);
}

}  // namespace illada::sampling
