// sample_tokens from logits: one pass over each row, see row_sample.cuh for what is kept of it.
//
// A CTA takes a piece of a row, a thread kUnroll vectors of 8 neighbours at a time, the next ones on their way while
// these are worked on. One piece a row: the CTA writes the results. Several: it leaves a RowPiece, and a second kernel,
// one warp a row, merges them.
//
// Floor: bytes = rows x vocab x sizeof(T), each read once. Work an element of bf16: convert 1, maximum 1, exponential 3
// (one of them on the special-function unit), with noise 9.3 for Philox and 1 for the comparison: under the 20
// instructions that an H100 can issue while the memory delivers an element.
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "remask/launch.h"
#include "remask/row_sample.cuh"

namespace illada::remask {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kUnroll = 4;

struct SharedStorage {
  RowPiece piece[kWarps];
  int32_t bound;  // ordered(a score that the row reaches for sure)
  int32_t maximum;
  int32_t token;
};

// One row's logits with their bias, by vector.
template <typename T, bool kAligned>
struct RowReader {
  const T* row;
  int64_t vocab_size;
  const uint32_t* biased;  // a bit a vector of this piece, or null
  int64_t first_vector;    // of the piece
  RowBias bias;

  __device__ __forceinline__ Raw8<T> raw(int64_t vector, int64_t end) const {
    const int64_t at = vector * kVector;
    if (kAligned && vector < end && at + kVector <= vocab_size) return load8(row + at);
    return load8_partly(row + at, vector < end ? int(vocab_size - at) : 0);
  }

  __device__ __forceinline__ void values(const Raw8<T>& raw, int64_t vector, int64_t end, float (&x)[kVector]) const {
    unpack8(raw, x);
    if (biased && vector < end) {
      const int64_t bit = vector - first_vector;
      if (biased[bit / 32] >> (bit % 32) & 1) add_bias(vector, x);
    }
  }

 private:
  __device__ __forceinline__ void add_bias(int64_t vector, float (&x)[kVector]) const {
    for (int b = 0; b < bias.count; ++b) {
      const int64_t at = int64_t(bias.ids[b]) - vector * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (at == i && bias.ids[b] < vocab_size) x[i] += bias.values[b];
    }
  }
};

// Sets the bit of every vector of this piece that holds a biased id.
__device__ __forceinline__ void mark_biased(uint32_t* biased, const RowBias& bias, int64_t first, int64_t end,
                                            int64_t vocab_size) {
  for (int64_t i = threadIdx.x; i < (end - first + 31) / 32; i += kThreads) biased[i] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b < bias.count; b += kThreads) {
    const int64_t id = bias.ids[b], bit = id / kVector - first;
    if (id >= 0 && id < vocab_size && bit >= 0 && bit < end - first) atomicOr(&biased[bit / 32], 1u << (bit % 32));
  }
  __syncthreads();
}

// The noisy maximum over one thread's vectors; see row_sample.cuh.
struct Race {
  const RowNoise& noise;
  int32_t* shared_bound;
  float bound = -FLT_MAX;

  __device__ __forceinline__ void start(const float (&x)[kVector], int64_t vector) {
    float sure = -FLT_MAX;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PhiloxWords words = noise.upper(uint32_t(2 * vector + half));
#pragma unroll
      for (int i = 0; i < 4; ++i) sure = fmaxf(sure, noise.sure_score(x[4 * half + i], words.word[i]));
    }
    sure = warp_max(sure);
    if (threadIdx.x % 32 == 0) atomicMax(shared_bound, ordered(fminf(sure, FLT_MAX)));
    __syncthreads();
  }

  // All lanes of a warp together. `maximum` is that of x.
  __device__ __forceinline__ void run(const float (&x)[kVector], float maximum, int64_t vector, Leader& leader) {
    const float log2_bound = noise.log2_bound(maximum, bound);
    if (!__any_sync(kFullWarp, log2_bound > RowNoise::kHopeless)) return;
    const PhiloxWords a = noise.upper(uint32_t(2 * vector)), b = noise.upper(uint32_t(2 * vector + 1));
    const uint32_t smallest = min(min(min(a.word[0], a.word[1]), min(a.word[2], a.word[3])),
                                  min(min(b.word[0], b.word[1]), min(b.word[2], b.word[3])));
    if (smallest > RowNoise::as_limit(log2_bound)) return;
    const uint32_t words[kVector] = {a.word[0], a.word[1], a.word[2], a.word[3],
                                     b.word[0], b.word[1], b.word[2], b.word[3]};
    const double before = leader.score;
#pragma unroll 1
    for (int i = 0; i < kVector; ++i) {
      float xi = x[0];
      uint32_t wi = words[0];
#pragma unroll
      for (int j = 1; j < kVector; ++j) {
        xi = i == j ? x[j] : xi;
        wi = i == j ? words[j] : wi;
      }
      if (wi > RowNoise::as_limit(noise.log2_bound(xi, bound))) continue;
      const int64_t id = vector * kVector + i;
      leader.offer({noise.score(xi, wi, uint32_t(id)), int32_t(id), xi});
    }
    if (leader.score > before) {
      const float sure = fminf(fmaxf(__double2float_rd(leader.score), -FLT_MAX), FLT_MAX);
      bound = fmaxf(bound, sure);
      atomicMax(shared_bound, ordered(sure));
    }
  }

  __device__ __forceinline__ void look_around() {
    bound = fmaxf(bound, from_ordered(*static_cast<volatile int32_t*>(shared_bound)));
  }
};

template <typename T, bool kWantExtras, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void illada_sample_tokens_sm80(const __grid_constant__ SampleTokensParams p,
                                                                         const __grid_constant__ RowSplit split) {
  __shared__ SharedStorage shared;
  extern __shared__ uint32_t biased_vectors[];
  const int64_t row = blockIdx.x / unsigned(split.splits);
  const int piece = int(blockIdx.x % unsigned(split.splits));
  const int64_t vectors = (p.vocab_size + kVector - 1) / kVector;
  const int64_t first = piece * split.vectors, end = min(first + split.vectors, vectors);
  if (threadIdx.x == 0) {
    shared.bound = shared.maximum = ordered(-FLT_MAX);
    shared.token = kNoToken;
  }
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  const RowNoise noise(p, row);
  RowReader<T, kAligned> reader{static_cast<const T*>(p.logits) + row * p.logits_row_stride, p.vocab_size, nullptr,
                                first, RowBias(p, row)};
  if (p.bias_count) {
    mark_biased(biased_vectors, reader.bias, first, end, p.vocab_size);
    reader.biased = biased_vectors;
  }
  __syncthreads();

  RowState<kWantExtras> state;
  constexpr int kStep = kThreads * kUnroll;
  Raw8<T> next[kUnroll];
  const auto fetch = [&](int64_t base) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) next[u] = reader.raw(base + u * kThreads, end);
  };
  // Calls visit(x, base) for every step of this thread; all threads take the same number of steps.
  const auto walk = [&](auto visit) {
    const int steps = int((end - first + kStep - 1) / kStep);
    int64_t base = first + threadIdx.x;
    for (int step = 0; step < steps; ++step, base += kStep) {
      float x[kUnroll][kVector];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) reader.values(next[u], base + u * kThreads, end, x[u]);
      if (step + 1 < steps) fetch(base + kStep);
      float maximum[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        maximum[u] = fmaxf(fmaxf(fmaxf(x[u][0], x[u][1]), fmaxf(x[u][2], x[u][3])),
                           fmaxf(fmaxf(x[u][4], x[u][5]), fmaxf(x[u][6], x[u][7])));
      }
      const float top = fmaxf(fmaxf(maximum[0], maximum[1]), fmaxf(maximum[2], maximum[3]));
      state.softmax.raise(top);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          state.softmax.add(x[u][i]);
          if constexpr (kWantExtras) state.top.add(x[u][i]);
        }
      }
      visit(x, maximum, top, base);
    }
  };

  fetch(first + threadIdx.x);
  if (noise.temperature > 0) {
    Race race{noise, &shared.bound};
    {
      float x[kVector];
      reader.values(next[0], first + threadIdx.x, end, x);
      race.start(x, first + threadIdx.x);
    }
    walk([&](const auto& x, const auto& maximum, float, int64_t base) {
      race.look_around();
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) race.run(x[u], maximum[u], base + u * kThreads, state.leader);
    });
  } else {
    float best = -INFINITY;
    int64_t best_base = 0;
    walk([&](const auto&, const auto&, float top, int64_t base) {
      best_base = top > best ? base : best_base;
      best = fmaxf(best, top);
    });
    // The threads that saw the maximum look their step up again, for the lowest id.
    const float warp_best = warp_max(best);
    if (threadIdx.x % 32 == 0) atomicMax(&shared.maximum, ordered(warp_best));
    __syncthreads();
    const float block_best = from_ordered(shared.maximum);
    if (best == block_best && best > -INFINITY) {
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t vector = best_base + u * kThreads;
        float x[kVector];
        reader.values(reader.raw(vector, end), vector, end, x);
        int found = kVector;
#pragma unroll
        for (int i = kVector - 1; i >= 0; --i) found = x[i] == best ? i : found;
        if (found < kVector) {
          atomicMin(&shared.token, int32_t(vector * kVector + found));
          break;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x == 0 && shared.token != kNoToken) state.leader = {block_best, shared.token, block_best};
  }

#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) state.merge(state.shuffled(mask));
  if (threadIdx.x % 32 == 0) shared.piece[threadIdx.x / 32] = state.piece();
  __syncthreads();
  if (threadIdx.x >= 32) return;
  if (threadIdx.x < kWarps) state = RowState<kWantExtras>::from(shared.piece[threadIdx.x]);
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask /= 2) state.merge(state.shuffled(mask));
  if (threadIdx.x > 0) return;
  if (split.splits == 1) {
    write_row(p, row, state);
  } else {
    static_cast<RowPiece*>(p.workspace)[row * split.splits + piece] = state.piece();
  }
}

constexpr int kCombineThreads = 128;

template <bool kWantExtras>
__global__ __launch_bounds__(kCombineThreads) void illada_sample_tokens_combine_sm80(
    const __grid_constant__ SampleTokensParams p, int pieces) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int64_t row = int64_t(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= p.num_rows) return;  // whole warps
  const RowPiece* mine = static_cast<const RowPiece*>(p.workspace) + row * pieces;
  RowState<kWantExtras> state;
  for (int i = lane; i < pieces; i += 32) state.merge(RowState<kWantExtras>::from(mine[i]));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) state.merge(state.shuffled(mask));
  if (lane == 0) write_row(p, row, state);
}

bool wants_extras(const SampleTokensParams& p) {
  return p.entropy || p.margin || p.measure == Measure::kMargin || p.measure == Measure::kEntropy;
}

template <typename T, bool kWantExtras>
void launch(const SampleTokensParams& p, const Device& device, const RowSplit& split) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
                       (p.num_rows == 1 || p.logits_row_stride * int64_t(sizeof(T)) % 16 == 0);
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.num_rows * split.splits));
  shape.block = dim3(kThreads);
  shape.smem_bytes = p.bias_count ? int((split.vectors + 31) / 32 * 4) : 0;
  shape.dependent = true;
  launch_kernel("sample_tokens", device, p.launch.stream, shape,
                aligned ? illada_sample_tokens_sm80<T, kWantExtras, true>
                        : illada_sample_tokens_sm80<T, kWantExtras, false>,
                p, split);
}

template <typename T>
void launch(const SampleTokensParams& p, const Device& device, const RowSplit& split) {
  wants_extras(p) ? launch<T, true>(p, device, split) : launch<T, false>(p, device, split);
}

}  // namespace

void launch_sample_tokens(const SampleTokensParams& p, const Device& device, const RowSplit& split) {
  switch (p.dtype) {
    case DType::kFloat32:
      launch<float>(p, device, split);
      break;
    case DType::kBFloat16:
      launch<BFloat16>(p, device, split);
      break;
    case DType::kFloat16:
      launch<Half>(p, device, split);
      break;
  }
  if (split.splits > 1) launch_sample_tokens_combine(p, device, split.splits);
}

void launch_sample_tokens_combine(const SampleTokensParams& p, const Device& device, int pieces) {
  LaunchShape shape;
  constexpr int kRows = kCombineThreads / 32;
  shape.grid = dim3(unsigned((p.num_rows + kRows - 1) / kRows));
  shape.block = dim3(kCombineThreads);
  shape.dependent = true;
  launch_kernel("sample_tokens", device, p.launch.stream, shape,
                wants_extras(p) ? illada_sample_tokens_combine_sm80<true> : illada_sample_tokens_combine_sm80<false>, p,
                pieces);
}

}  // namespace illada::remask
