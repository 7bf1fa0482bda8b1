// The three GEMMs of the fused head's loss on sm_90a. All are persistent (common/gemm_sm90.cuh's main loop, clusters of
// two CTAs, one CTA an SM) and read on the device how many rows there are.
//
//                  a [M, K]                        b [K, N]           d [M, N]          what becomes of d
//   logits         hidden's rows [rows, width]     weight^T           [rows, V]         2^(d - reference) in bfloat16,
//                                                                                       its sum and the largest d
//   hidden_grad    probabilities [rows, V]         weight             [rows, width]     fp32 slabs, one a split of K =
//   V weight_grad    probabilities^T [V, rows]       hidden's rows      [V, width]        stored, or added
//
// A row's reference does not depend on the tile (linear_rows_sm90.cu says how it is found before the logits are known),
// so that the probabilities are plain operands of the two other GEMMs: what is left to multiply by, weight / sum,
// depends on the row alone, and goes into hidden's rows for one of them and onto the sums of the other. No pass over
// [rows, V] lies between the GEMMs.
#include <cuda.h>

#include "common/accumulator_rows.cuh"
#include "common/gemm_sm90.cuh"
#include "common/online_softmax.cuh"
#include "common/tensor_map.h"
#include "loss/linear.h"
#include "loss/linear_split.cuh"

namespace illada::loss {
namespace {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
static_assert(kPairRows == 2 * kTileM && kTileIds == kTileN);

__host__ __device__ constexpr int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// A tile: where in a and b it begins, and which steps of K.
struct Tile {
  int m, n, k_first, k_tiles;
};

// Where this lane's rows are in a warpgroup's share of a tile: this one and the one 8 below.
__device__ __forceinline__ int lane_row(int warpgroup) {
  return warpgroup * 64 + int(threadIdx.x) % 128 / 32 * 16 + int(threadIdx.x) % 32 / 4;
}

// Walks over a job's tiles, pair by pair of CTAs; neighbouring pairs have neighbouring tiles at the same time.
template <typename Job>
__device__ __forceinline__ void run(const CUtensorMap& a_map, const CUtensorMap& b_map, const LinearChunk& chunk,
                                    Job& job) {
  extern __shared__ char raw_shared[];
  using Gemm = typename Job::Gemm;
  Gemm gemm(raw_shared, &a_map, &b_map, 2);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int pair = int(blockIdx.x) / 2, pairs = int(gridDim.x) / 2;
  job.begin(chunk, pairs);
  if (threadIdx.x >= Gemm::kProducerThread) {
    ptx::setmaxnreg_decrease<Gemm::kProducerRegisters>();
    if (threadIdx.x == Gemm::kProducerThread) {
      for (int i = pair; i < job.count; i += pairs) {
        if (!job.wanted(chunk, i)) continue;
        const Tile tile = job.tile(chunk, i, gemm.rank());
        gemm.load(tile.m, tile.n, tile.k_first, tile.k_tiles);
      }
    }
  } else {
    ptx::setmaxnreg_increase<Gemm::kConsumerRegisters>();
    const int warpgroup = int(threadIdx.x) / 128;
    float d[kTileN / 2];
    for (int i = pair; i < job.count; i += pairs) {
      if (!job.wanted(chunk, i)) continue;
      const Tile tile = job.tile(chunk, i, gemm.rank());
      gemm.multiply(d, warpgroup, tile.k_tiles);
      job.store(chunk, i, tile, lane_row(warpgroup), d);
    }
  }
  gemm.finish();
}

// ------------------------------------------------------------------------------------------------------------ logits

struct LogitsJob {
  using Gemm = GemmSm90<BFloat16, Major::kK, Major::kK, 64>;
  bool keep;   // the probabilities, for gradients
  bool again;  // only the pairs that are marked
  int count, row_pairs;

  __device__ __forceinline__ void begin(const LinearChunk& c, int) {
    row_pairs = tiles_of(c.used(), kPairRows);
    count = row_pairs * c.id_tiles;
  }
  // All row tiles of a stretch of the vocabulary before the next: the weight comes from memory once.
  __device__ __forceinline__ bool wanted(const LinearChunk& c, int i) const {
    return !again || c.again[i % row_pairs] != 0;
  }
  __device__ __forceinline__ Tile tile(const LinearChunk& c, int i, int rank) const {
    return {i % row_pairs * kPairRows + rank * kTileM, i / row_pairs * kTileN, 0, tiles_of(c.width, kTileK)};
  }
  __device__ __forceinline__ void store(const LinearChunk& c, int i, const Tile& tile, int lane_row,
                                        float (&d)[kTileN / 2]) const {
    const int lane = int(threadIdx.x) % 32, left = c.vocab_size - tile.n;
    if (left < kTileN) {  // ids past the end are no part of any sum, and what is kept of them is not read
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + lane % 4 * 2 + e >= left) d[4 * j + e] = d[4 * j + 2 + e] = -INFINITY;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.m + lane_row + 8 * half;
      const float reference = c.references[row];
      float top = -INFINITY, sum = 0;
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = d[4 * j + 2 * half + e];
          top = fmaxf(top, x);
          x = exp2_approx(fmaf(x, kLog2eF, -reference));
          sum += x;
        }
      }
      top = warp_reduce<4>(top, [](float a, float b) { return fmaxf(a, b); });
      sum = warp_reduce<4>(sum, [](float a, float b) { return a + b; });
      if (lane % 4 == 0) {
        const int64_t at = int64_t(i / row_pairs) * c.rows + row;
        c.maxima[at] = top * kLog2eF;
        c.sums[at] = sum;
      }
      if (keep) {
        BFloat16* target = reinterpret_cast<BFloat16*>(c.probs) + row * c.prob_stride + tile.n;
        store_row<BFloat16, kTileN>(target, d, half, 1.0f, true, lane);
      }
    }
  }
};

__global__ __launch_bounds__(LogitsJob::Gemm::kThreads, 1) void illada_linear_masked_cross_entropy_logits_sm90(
    const __grid_constant__ CUtensorMap hidden_map, const __grid_constant__ CUtensorMap weight_map,
    const __grid_constant__ LinearChunk chunk, bool keep, bool again) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  LogitsJob job{keep, again};
  run(hidden_map, weight_map, chunk, job);
#endif
}

// ------------------------------------------------------------------------------------------------- hidden's gradient

struct HiddenGradJob {
  using Gemm = GemmSm90<BFloat16, Major::kK, Major::kMN, 64>;
  int count, columns;
  HiddenGradSplit split;

  __device__ __forceinline__ void begin(const LinearChunk& c, int clusters) {
    split = hidden_grad_split(c, clusters);
    columns = tiles_of(c.width, kTileN);
    count = split.splits * split.row_pairs * columns;
  }
  __device__ __forceinline__ bool wanted(const LinearChunk&, int) const { return true; }
  // A split's tiles one after the other: those that run at the same time read the same stretch of the vocabulary.
  __device__ __forceinline__ Tile tile(const LinearChunk& c, int i, int rank) const {
    const int tile = i % (split.row_pairs * columns), k_first = i / (split.row_pairs * columns) * split.k_tiles;
    return {tile % split.row_pairs * kPairRows + rank * kTileM, tile / split.row_pairs * kTileN, k_first,
            min(split.k_tiles, tiles_of(c.vocab_size, kTileK) - k_first)};
  }
  __device__ __forceinline__ void store(const LinearChunk& c, int i, const Tile& tile, int lane_row,
                                        float (&d)[kTileN / 2]) const {
    const int slab = i / (split.row_pairs * columns) * split.row_pairs * kPairRows;
    const int column = tile.n + int(threadIdx.x) % 4 * 2;
    float* target = c.slabs + int64_t(slab + tile.m + lane_row) * c.width + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j)
        if (column + 8 * j < c.width)
          *reinterpret_cast<float2*>(target + half * 8 * int64_t(c.width) + 8 * j) =
              make_float2(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
    }
  }
};

__global__ __launch_bounds__(HiddenGradJob::Gemm::kThreads, 1) void illada_linear_masked_cross_entropy_hidden_grad_sm90(
    const __grid_constant__ CUtensorMap probs_map, const __grid_constant__ CUtensorMap weight_map,
    const __grid_constant__ LinearChunk chunk) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  HiddenGradJob job;
  run(probs_map, weight_map, chunk, job);
#endif
}

// ------------------------------------------------------------------------------------------------- weight's gradient

// Out: float or BFloat16. kAdd: onto what is there.
template <typename Out, bool kAdd>
struct WeightGradJob {
  using Gemm = GemmSm90<BFloat16, Major::kMN, Major::kMN, 64>;
  Out* target;
  int count, columns, k_tiles;

  __device__ __forceinline__ void begin(const LinearChunk& c, int) {
    k_tiles = tiles_of(c.used(), kTileK);
    columns = tiles_of(c.width, kTileN);
    count = k_tiles ? columns * c.id_tiles : 0;
  }
  __device__ __forceinline__ bool wanted(const LinearChunk&, int) const { return true; }
  // All columns of a stretch of the vocabulary before the next: the probabilities come from memory once.
  __device__ __forceinline__ Tile tile(const LinearChunk&, int i, int rank) const {
    return {i / columns * kTileIds + rank * kTileM, i % columns * kTileN, 0, k_tiles};
  }
  __device__ __forceinline__ void store(const LinearChunk& c, int, const Tile& tile, int lane_row,
                                        float (&d)[kTileN / 2]) const {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int id = tile.m + lane_row + 8 * half;
      const bool is_real = id < c.vocab_size;
      Out* row = target + int64_t(id) * c.width + tile.n + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j) {
        if (!is_real || tile.n + lane % 4 * 2 + 8 * j >= c.width) continue;
        const float x = d[4 * j + 2 * half], y = d[4 * j + 2 * half + 1];
        if constexpr (sizeof(Out) == 4) {
          // One CTA adds to an element, once: the order of a reduction in the L2 cache does not matter.
          if constexpr (kAdd) {
            ptx::red_add_v2(row + 8 * j, x, y);
          } else {
            *reinterpret_cast<float2*>(row + 8 * j) = make_float2(x, y);
          }
        } else {
          float before[2] = {0, 0};
          if constexpr (kAdd) unpack2(*reinterpret_cast<uint32_t*>(row + 8 * j), before[0], before[1], BFloat16{});
          *reinterpret_cast<uint32_t*>(row + 8 * j) = pack2<BFloat16>(before[0] + x, before[1] + y);
        }
      }
    }
  }
};

template <typename Out, bool kAdd>
__global__ __launch_bounds__(
    WeightGradJob<Out, kAdd>::Gemm::kThreads,
    1) void illada_linear_masked_cross_entropy_weight_grad_sm90(const __grid_constant__ CUtensorMap probs_map,
                                                                const __grid_constant__ CUtensorMap hidden_map,
                                                                const __grid_constant__ LinearChunk chunk,
                                                                Out* target) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ptx::griddepcontrol_wait();
  if (!kAdd && chunk.used() == 0) {  // a gradient of zeros
    const int64_t size = int64_t(chunk.vocab_size) * chunk.width, step = int64_t(gridDim.x) * blockDim.x * 2;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 2; i < size; i += step) {
      if constexpr (sizeof(Out) == 4) {
        *reinterpret_cast<float2*>(target + i) = make_float2(0, 0);
      } else {
        *reinterpret_cast<uint32_t*>(target + i) = 0;
      }
    }
    return;
  }
  WeightGradJob<Out, kAdd> job{target};
  run(probs_map, hidden_map, chunk, job);
#endif
}

// ----------------------------------------------------------------------------------------------------------- launches

constexpr const char* kOp = "linear_masked_cross_entropy";

LaunchShape shape_of(const Device& device, int smem_bytes) {
  LaunchShape shape;
  shape.cluster = 2;
  shape.grid = dim3(unsigned(linear_clusters(device.sm_count) * shape.cluster));
  shape.block = dim3(LogitsJob::Gemm::kThreads);
  shape.smem_bytes = smem_bytes;
  shape.dependent = true;
  return shape;
}

MatrixView weight_of(const LinearMaskedCrossEntropyParams& p) {
  return {p.weight, DType::kBFloat16, p.vocab_size, p.width, p.weight_row_stride};
}
MatrixView hidden_of(const LinearChunk& c) { return {c.hidden, DType::kBFloat16, c.rows, c.width, c.width}; }
MatrixView probs_of(const LinearChunk& c) { return {c.probs, DType::kBFloat16, c.rows, c.vocab_size, c.prob_stride}; }

template <typename Out, bool kAdd>
void launch_weight_grad(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearChunk& chunk) {
  launch_kernel(kOp, device, p.launch.stream, shape_of(device, WeightGradJob<Out, kAdd>::Gemm::kSmemBytes),
                illada_linear_masked_cross_entropy_weight_grad_sm90<Out, kAdd>,
                tensor_map_k128(kOp, probs_of(chunk), kTileK), tensor_map_k128(kOp, hidden_of(chunk), kTileK), chunk,
                static_cast<Out*>(p.weight_grad));
}

}  // namespace

void launch_linear_logits_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearChunk& chunk,
                               bool again) {
  launch_kernel(kOp, device, p.launch.stream, shape_of(device, LogitsJob::Gemm::kSmemBytes),
                illada_linear_masked_cross_entropy_logits_sm90, tensor_map_k128(kOp, hidden_of(chunk), kTileM),
                tensor_map_k128(kOp, weight_of(p), 64), chunk, p.hidden_grad || p.weight_grad, again);
}

void launch_linear_hidden_grad_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device,
                                    const LinearChunk& chunk) {
  launch_kernel(kOp, device, p.launch.stream, shape_of(device, HiddenGradJob::Gemm::kSmemBytes),
                illada_linear_masked_cross_entropy_hidden_grad_sm90, tensor_map_k128(kOp, probs_of(chunk), kTileM),
                tensor_map_k128(kOp, weight_of(p), kTileK), chunk);
}

void launch_linear_weight_grad_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device,
                                    const LinearChunk& chunk) {
  const bool add = p.add_to_weight_grad || chunk.first > 0;
  if (p.weight_grad_dtype == DType::kFloat32) {
    add ? launch_weight_grad<float, true>(p, device, chunk) : launch_weight_grad<float, false>(p, device, chunk);
  } else {
    add ? launch_weight_grad<BFloat16, true>(p, device, chunk) : launch_weight_grad<BFloat16, false>(p, device, chunk);
  }
}

}  // namespace illada::loss
