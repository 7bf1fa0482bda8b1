// sample_tokens from logits: one pass over each row. row_sample.cuh has the state of a row.
//
// A CTA processes a range of a row, in loop steps of kLoopVectors vectors of 8 neighbours, kUnroll for each thread:
//
//   load the first loop steps
//   with noise: raise the shared bound with the first vector of each thread
//   for each loop step of the range:
//     at the start of a vocab tile: each warp stores its softmax record of the tile before, and begins a new sum
//     take the logits that have arrived; start the load of a later loop step; add the bias
//     add the logits to the thread's softmax
//     without noise: remember the largest logit and the loop step that it is in
//     with noise: run the race: find vectors that may beat the shared bound, and score only their ids
//   add the ids after the last complete vector; store the last softmax record
//   without noise: the threads that saw the row's largest logit read its loop step again, for the lowest id
//   merge the leaders of the threads, then of the warps
//   one range per row: merge the softmax records, write the row; else write the range's leader to the workspace
//
// With several ranges per row, illada_sample_tokens_combine_sm80 finishes the rows, one warp per row.
//
// Schedule of a CTA with noise. Li: load of loop step i; Ci: its softmax; Ri: its race. Here one loop step is loaded
// ahead, to registers; with Source::kShared 2 or 4 are in flight, in a ring of stages in shared memory. Each thread
// waits for its own loads only. Warps meet at |, where all wait for all; otherwise they drift apart.
//
//            time ->
//   loads    [ L0    ]              [ L1    ]  [ L2    ]  [ L3    ]
//   warp 0            [first bound]|[C0 ][R0 ] [C1 ][R1 ] [C2 ][R2 ]  ...  [tail][leaders]|[merge, write]
//   warp 1            [first bound]|[C0 ][R0  ] [C1 ][R1 ] [C2 ][R2 ]      [tail][leaders]|
//   ...                      the bound: raised by any warp, read by all in every loop step; it only prunes
//   combine, a kernel of its own: waits for all CTAs of the sampler, then  [merge the records of a row, write]
//
// The first meeting exists with noise only. Without noise, the warps meet once before the lowest id is looked for.
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

// ------------------------------------------------------------------------------------------------------------- loads

// Source::kShared: a thread's part of a stage is kSharedVectors vectors of 16 bytes. Each thread copies the vectors
// that it reads itself, so that no thread waits for another. The ring has 2 or 4 stages, a power of two.
constexpr int kSharedVectors = 4, kStageBytes = kThreads * kSharedVectors * 16;

// Loads the vectors of a range, one loop step after the other, ahead of their use. `base` is a thread's first vector in
// a loop step; the others are kThreads vectors apart, so that a warp reads 32 neighbours at a time.
template <typename T, Source kSource>
struct RangeLoader {
  static constexpr bool kShared = kSource == Source::kShared;
  static constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2;   // vectors of a thread in a loop step
  static constexpr int kLoopVectors = kThreads * kUnroll;  // vectors of the CTA in a loop step
  using Reader = RowReader<T, kSource != Source::kUnaligned>;
  static_assert(kVocabTileVectors % kLoopVectors == 0);
  static_assert(!kShared || (kUnroll == kSharedVectors && Raw8<T>::kLoads == 1));

  const Reader& reader;
  const int first, end;         // vectors of the range
  const int stages;             // of the ring
  const uint4* thread_vectors;  // this thread's first vector in the first stage
  Raw8<T> next[kUnroll];        // vectors of a loop step that are loaded or have arrived

  // Starts the loads of the first loop steps, and waits for the first one where it comes through shared memory.
  __device__ __forceinline__ void start() {
    if constexpr (kShared) {
#pragma unroll 1
      for (int loop_step = 0; loop_step < stages; ++loop_step) start_copy(loop_step);
      finish_copy(0);
    } else {
      load(first + int(threadIdx.x));
    }
  }

  // Waits for the loop step that begins at `loop_base`, converts its vectors, and starts the load of a later one.
  // Vectors past the end are -inf.
  __device__ __forceinline__ void take(int loop_base, int base, float (&x)[kUnroll][kVector]) {
    if constexpr (kShared) finish_copy((loop_base - first) / kLoopVectors);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) unpack8(next[u], x[u]);
    if constexpr (kShared) {
      start_copy((loop_base - first) / kLoopVectors + stages);
    } else {
      if (loop_base + kLoopVectors < end) load(base + kLoopVectors);
    }
  }

 private:
  // To registers. Where the whole loop step exists, the vectors are not tested one by one.
  __device__ __forceinline__ void load(int base) {
    if (base - int(threadIdx.x) + kLoopVectors <= end) {
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
  }

  // The same through shared memory, in two halves: start_copy and finish_copy of loop step 0, 1, ... Both may be called
  // past the end: the number of groups in flight then stays the same, and finish_copy can wait for a constant.
  __device__ __forceinline__ const uint4* stage_vectors(int loop_step) const {
    return thread_vectors + (loop_step & (stages - 1)) * (kThreads * kUnroll);
  }
  __device__ __forceinline__ void start_copy(int loop_step) const {
    const int vector = first + loop_step * kLoopVectors + int(threadIdx.x);
    const uint32_t target = ptx::smem_address(stage_vectors(loop_step));
    const T* const source = reader.row + int64_t(vector) * kVector;
    const auto copy = [&](int u) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(reinterpret_cast<const uint4&>(source[u * kThreads * kVector]),
                                                   ptx::shared_at<uint4>(target + uint32_t(u * kThreads * 16)));
    };
    ptx::keep_memory_order();  // this thread's earlier reads of the stage are complete
    if (first + (loop_step + 1) * kLoopVectors <= end) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) copy(u);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (vector + u * kThreads < end) copy(u);
    }
    cute::cp_async_fence();
  }
  __device__ __forceinline__ void finish_copy(int loop_step) {  // later loop steps may still be in flight
    if (stages == 2) {  // the number of groups that may be in flight is part of the instruction
      cute::cp_async_wait<1>();
    } else {
      cute::cp_async_wait<3>();
    }
    ptx::keep_memory_order();
    const uint4* const source = stage_vectors(loop_step);
    if (first + (loop_step + 1) * kLoopVectors <= end) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) next[u].part[0] = source[u * kThreads];
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        next[u] = minus_infinity8<T>();
        if (first + loop_step * kLoopVectors + u * kThreads + int(threadIdx.x) < end)
          next[u].part[0] = source[u * kThreads];
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- phases

// Dynamic shared memory: with one range per row the softmax records of the row, then one bit per vector for the bias
// where there is one, then the ring of Source::kShared.
__device__ __forceinline__ uint32_t* bias_bits(uint4* dynamic_shared, const RowSplit& split) {
  return reinterpret_cast<uint32_t*>(dynamic_shared + (split.splits == 1 ? split.vocab_tiles * kWarps : 0));
}
__device__ __forceinline__ const uint4* thread_ring(const uint4* dynamic_shared, const RowSplit& split, bool has_bias) {
  const uint4* thread_vectors = dynamic_shared + threadIdx.x;
  thread_vectors += split.splits == 1 ? split.vocab_tiles * kWarps : 0;
  thread_vectors += has_bias ? split.split_tiles * kVocabTileVectors / 128 : 0;
  return thread_vectors;
}

// What a CTA does with its range of a row. All threads of the CTA call each method.
template <typename T, bool kWantExtras, Source kSource, bool kFiltered>
struct RangeSampler {
  using Loader = RangeLoader<T, kSource>;
  static constexpr int kUnroll = Loader::kUnroll, kLoopVectors = Loader::kLoopVectors;

  const SampleTokensParams& p;
  const RowSplit& split;
  SharedStorage& shared;
  uint4* const dynamic_shared;
  const int64_t row;
  const int range;
  const int vectors, first, end;  // complete vectors of the row; those of the range
  const RowNoise noise;
  const bool noisy;
  const KeptIds<kFiltered> kept;
  typename Loader::Reader reader;
  SharedBound shared_bound;
  SoftmaxRecord* const records;  // of this warp, for the first vocab tile of the range

  RowState<kWantExtras> state;
  float best = -INFINITY;  // without noise: the largest logit, and this thread's first vector in its loop step
  int best_base = 0;

  __device__ __forceinline__ RangeSampler(const SampleTokensParams& p, const RowSplit& split, const RowCut* cuts,
                                          SharedStorage& shared, uint4* dynamic_shared)
      : p(p),
        split(split),
        shared(shared),
        dynamic_shared(dynamic_shared),
        row(blockIdx.x / unsigned(split.splits)),
        range(int(blockIdx.x % unsigned(split.splits))),
        vectors(int(p.vocab_size / kVector)),
        first(range * split.split_tiles * kVocabTileVectors),
        end(min(first + split.split_tiles * kVocabTileVectors, vectors)),
        noise(p, row),
        noisy(noise.temperature > 0),
        kept(cuts, row, p.confidence_at_temperature),
        reader{static_cast<const T*>(p.logits) + row * p.logits_row_stride, nullptr, first, RowBias(p, row)},
        shared_bound{&shared.bound},
        records((split.splits == 1 ? reinterpret_cast<SoftmaxRecord*>(dynamic_shared)
                                   : softmax_records(p.workspace, p.num_rows, row_records(split), row)) +
                range * split.split_tiles * kWarps + threadIdx.x / 32) {}

  // Sets the bit of every vector of the range that holds a biased id.
  __device__ __forceinline__ void mark_biased_vectors() {
    if (p.bias_count) {
      uint32_t* const bits = bias_bits(dynamic_shared, split);
      for (int i = threadIdx.x; i < (end - first + 31) / 32; i += kThreads) bits[i] = 0;
      __syncthreads();
      for (int b = threadIdx.x; b < reader.bias.count; b += kThreads) {
        const int id = reader.bias.ids[b], bit = id / kVector - first;
        if (id >= 0 && bit >= 0 && bit < end - first) atomicOr(&bits[bit / 32], 1u << (bit % 32));
      }
      reader.biased = bits;
    }
    __syncthreads();  // also for the initial values of `shared`
  }

  // Raises the shared bound to a score that the row certainly reaches, from the first vector of each thread. Without
  // it, every vector of the first loop step would pass the test of the race.
  __device__ __forceinline__ void find_first_bound(const Raw8<T>& raw) {
    float lower_bound = -FLT_MAX;
    const int base = first + int(threadIdx.x);
    if (base < end) {
      float x[kVector];
      unpack8(raw, x);
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

  // Stores the warp's softmax of vocab tile `index` of the range, and begins a new sum. Sums of whole vocab tiles do
  // not depend on how the row is split.
  __device__ __forceinline__ void store_tile_record(int index) {
    state.softmax.merge_lanes();
    if (threadIdx.x % 32 == 0) records[index * kWarps] = to_record(state.softmax);
    state.softmax = {};
  }

  __device__ __forceinline__ void add_bias(int base, float (&x)[kUnroll][kVector]) const {
    if (!reader.biased) return;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (base + u * kThreads < end) reader.add_bias(base + u * kThreads, x[u]);
  }

  // Adds the logits of a loop step to the softmax. Sets the maximum of each vector and returns that of all of them.
  __device__ __forceinline__ float add_to_softmax(int base, const float (&x)[kUnroll][kVector],
                                                  float (&maximum)[kUnroll]) {
    float top = -INFINITY;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      maximum[u] = fmaxf(fmaxf(fmaxf(x[u][0], x[u][1]), fmaxf(x[u][2], x[u][3])),
                         fmaxf(fmaxf(x[u][4], x[u][5]), fmaxf(x[u][6], x[u][7])));
      top = fmaxf(top, maximum[u]);
    }
    state.softmax.raise(kept.scaled(top));  // the reference moves once for all vectors of the loop step
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float measured = kept.measured_logit(x[u][i], (base + u * kThreads) * kVector + i);
        state.softmax.add(measured);
        if constexpr (kWantExtras) state.top.add(measured);
      }
    }
    return top;
  }

  // Without noise: the id of the largest logit is not looked for here, which would cost an instruction per logit.
  __device__ __forceinline__ void remember_largest(int base, float top) {
    best_base = top > best ? base : best_base;  // in a tie the earlier loop step, which has the lower id
    best = fmaxf(best, top);
  }

  // With noise: offers the ids of a loop step that may beat the shared bound.
  __device__ __forceinline__ void race(int base, const float (&maximum)[kUnroll], const RowNoiseLoop& noise_loop) {
    const float bound = shared_bound.read();
    unsigned candidates[kUnroll] = {};
    find_candidates(base, maximum, noise_loop, bound, candidates);
    score_candidates(base - int(threadIdx.x % 32), bound, candidates);
  }

  // The ids after the last complete vector, fewer than kVector. They belong to the row's last range.
  __device__ __forceinline__ void process_tail() {
    const bool has_tail = range == split.splits - 1;
    const int id = vectors * kVector + int(threadIdx.x);
    if (!has_tail || id >= p.vocab_size) return;
    const float x = reader.single(id), measured = kept.measured_logit(x, id);
    state.softmax.raise(measured);
    state.softmax.add(measured);
    if constexpr (kWantExtras) state.top.add(measured);
    if (!kept.contains(x, id)) return;
    const double score = noisy ? noise.score(x, word(noise.upper(uint32_t(id) / 4), id % 4), uint32_t(id)) : double(x);
    state.leader.offer({score, id, measured});
  }

  // Without noise: the threads that saw the range's largest logit read its loop step again to find the lowest id.
  __device__ __forceinline__ void find_lowest_id() {
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

  // Merges the leaders of all threads and writes the row, or with several ranges per row this range's leader.
  __device__ __forceinline__ void write() {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) state.merge_leader(mask);
    if (threadIdx.x % 32 == 0) shared.leader[threadIdx.x / 32] = state.leader_record();
    __syncthreads();  // also for the softmax records, which the first warp now reads
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

 private:
  // Finds the lanes whose vector u may hold the winner: its smallest random word is compared with the limit of its
  // largest logit. A warp makes the words of a vector only if some lane needs them.
  __device__ __forceinline__ void find_candidates(int base, const float (&maximum)[kUnroll],
                                                  const RowNoiseLoop& noise_loop, float bound,
                                                  unsigned (&candidates)[kUnroll]) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float log2_bound = noise.log2_bound(maximum[u], bound);
      if (!__any_sync(kFullWarp, log2_bound > RowNoise::kMinLog2Bound && kept.may_contain(maximum[u]))) continue;
      const uint32_t block = 2 * uint32_t(base + u * kThreads);
      const uint32_t bits = min(smallest(noise_loop.upper(block)), smallest(noise_loop.upper(block + 1)));
      candidates[u] = __ballot_sync(
          kFullWarp, bits <= RowNoise::max_bits(log2_bound) && maximum[u] > -INFINITY && kept.may_contain(maximum[u]));
    }
  }

  // Rare: eight lanes process a vector of each u again, one id each. Its logits are still in the L2 cache. `warp_base`:
  // base of the warp's first lane.
  __device__ __forceinline__ void score_candidates(int warp_base, float bound, const unsigned (&candidates)[kUnroll]) {
    const int lane = threadIdx.x % 32, mine = lane / kVector % kUnroll;
    unsigned lanes = candidates[0];
#pragma unroll
    for (int u = 1; u < kUnroll; ++u) lanes = mine == u ? candidates[u] : lanes;  // indexing would use local memory
    if (lane >= kVector * kUnroll) lanes = 0;  // with kUnroll 2, half of the lanes have no vector
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
};

// ------------------------------------------------------------------------------------------------------------- kernels

template <typename T, bool kWantExtras, Source kSource, bool kFiltered>
__global__ __launch_bounds__(kThreads, kSampleCtasPerSm) void illada_sample_tokens_sm80(
    const __grid_constant__ SampleTokensParams p, const __grid_constant__ RowSplit split, int stages,
    const RowCut* cuts, const __grid_constant__ DependentLaunch launch) {
  using Sampler = RangeSampler<T, kWantExtras, kSource, kFiltered>;
  __shared__ SharedStorage shared;
  extern __shared__ uint4 dynamic_shared[];
  if (threadIdx.x == 0) shared.bound = shared.maximum = ordered(-FLT_MAX);
  wait_for_previous_kernel(launch);

  Sampler sampler(p, split, cuts, shared, dynamic_shared);
  const int first = sampler.first, end = sampler.end;
  sampler.mark_biased_vectors();
  typename Sampler::Loader loader{sampler.reader, first, end, stages, thread_ring(dynamic_shared, split, p.bias_count)};
  loader.start();
  const RowNoiseLoop noise_loop(sampler.noise);  // after the start: it waits for the row's seed, the loads do not
  if (sampler.noisy) sampler.find_first_bound(loader.next[0]);

  int base = first + int(threadIdx.x);
  for (int loop_base = first; loop_base < end; loop_base += Sampler::kLoopVectors, base += Sampler::kLoopVectors) {
    if (loop_base > first && (loop_base - first) % kVocabTileVectors == 0)
      sampler.store_tile_record((loop_base - first) / kVocabTileVectors - 1);
    float x[Sampler::kUnroll][kVector], maximum[Sampler::kUnroll];
    loader.take(loop_base, base, x);
    sampler.add_bias(base, x);
    const float top = sampler.add_to_softmax(base, x, maximum);
    if (sampler.noisy) {
      sampler.race(base, maximum, noise_loop);
    } else {
      sampler.remember_largest(base, top);
    }
  }

  sampler.process_tail();
  sampler.store_tile_record(max(end - first - 1, 0) / kVocabTileVectors);
  if (!sampler.noisy) sampler.find_lowest_id();
  sampler.write();
}

// Finishes rows of several ranges, one warp per row.
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
  int stages = 0;
  if (cuts) {  // one instance for all measures
    kernel = aligned ? illada_sample_tokens_sm80<T, true, Source::kAligned, true>
                     : illada_sample_tokens_sm80<T, true, Source::kUnaligned, true>;
  } else if constexpr (sizeof(T) == 2) {
    constexpr int kMaxSmemBytes = 98 * 1024;  // every GPU from sm_80 on allows this much per CTA
    const int wanted_stages = shared_sample_stages();
    if (aligned && wanted_stages && shape.smem_bytes + wanted_stages * kStageBytes <= kMaxSmemBytes) {
      kernel = illada_sample_tokens_sm80<T, kWantExtras, Source::kShared, false>;
      stages = wanted_stages;
      shape.smem_bytes += wanted_stages * kStageBytes;
    }
  }
  launch_kernel("sample_tokens", device, p.launch.stream, shape, kernel, p, split, stages, cuts);
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
