// The three GEMMs of the fused head's loss on sm_90a. All are persistent (CUTLASS's main loop,
// common/gemm_mainloop.cuh, in clusters of two CTAs, one CTA an SM) and read on the device how many rows there are.
//
//                  a [M, K]                        b [K, N]           d [M, N]          what becomes of d
//   logits         hidden's rows [rows, width]     weight^T           [rows, V]         2^(d - reference) in bfloat16,
//                                                                                       its sum and the largest d;
//                                                                                       the target's d on its own
//   hidden_grad    probabilities [rows, V]         weight             [rows, width]     fp32 slabs, one a split of
//                                                                                       K = V
//   weight_grad    probabilities^T [V, rows]       hidden's rows      [V, width]        stored, or added
//
// A row's reference does not depend on the tile (linear_rows_sm90.cu says how it is found before the logits are known),
// so that the probabilities are plain operands of the two other GEMMs: what is left to multiply by, weight / sum,
// depends on the row alone, and goes into hidden's rows for one of them and onto the sums of the other. No pass over
// [rows, V] lies between the GEMMs.
#include <cuda.h>

#include "common/dependent_launch.h"
#include "common/gemm_mainloop.cuh"
#include "common/online_softmax.cuh"
#include "common/tensor_map.h"
#include "common/tile_store_sm90.cuh"
#include "loss/linear.h"
#include "loss/linear_split.cuh"
#include "loss/tile_order.h"

namespace illada::loss {
namespace {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64, kThreads = 384;
static_assert(kPairRows == 2 * kTileM && kTileIds == kTileN);
constexpr int kStepsOfFlag = 4;
static_assert(kStepsOfFlag * kTileK == kPairRows && kStepsOfFlag * kTileK == kTileIds);

__host__ __device__ constexpr int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// A tile: where in a and b it begins, and which steps of K. Where dead probabilities are left out (filter_eps), `live`
// says of each four steps from 0 on, `live_stride` flags apart, whether one of them matters; the first step is always
// taken, so that there is a product.
struct Tile {
  int m, n, k_first, k_tiles;
  const uint8_t* live = nullptr;
  int live_stride = 0;

  __device__ __forceinline__ bool wants(int k) const {
    return !live || k == k_first || live[int64_t(k / kStepsOfFlag) * live_stride];
  }
  // How many steps are wanted; by whole warps.
  __device__ __forceinline__ int count_steps() const {
    if (!live) return k_tiles;
    int count = 0;
    for (int k = int(threadIdx.x) % 32; k < k_tiles; k += 32) count += wants(k_first + k);
    return __reduce_add_sync(kFullWarp, count);
  }
};

// The steps of a tile that are wanted, as CUTLASS's producer takes them.
struct WantedSteps {
  const Tile& tile;
  int k;

  __device__ __forceinline__ explicit WantedSteps(const Tile& of) : tile(of), k(of.k_first) {}
  __device__ __forceinline__ int operator*() const { return k; }
  __device__ __forceinline__ WantedSteps& operator++() {
    do {
      ++k;
    } while (k < tile.k_first + tile.k_tiles && !tile.wants(k));
    return *this;
  }
};

// Tiles in the order that the chunk asks for.
__device__ __forceinline__ TilePlace place_of(const LinearChunk& c, int tiles_across, int i) {
  return {c.group_tiles, tiles_across, c.id_tiles, i};
}

template <typename LayoutA, typename LayoutB>
using LossGemm = Gemm<GemmMainloop<cutlass::arch::Sm90, BFloat16, LayoutA, LayoutB>>;

// Shared memory: what the main loop has, then the buffers of the eight warps that store.
template <typename Job>
constexpr int kSmemBytes = Job::Gemm::kSmemBytes + 8 * Job::Store::kBytes;

// Walks over a job's tiles, pair by pair of CTAs; neighbouring pairs have neighbouring tiles at the same time. `out`:
// where the products go, in boxes of a warp's rows.
template <typename Job>
__device__ __forceinline__ void run(const typename Job::Gemm::Params& params, const CUtensorMap& out_map,
                                    const LinearChunk& chunk, const DependentLaunch& launch, Job& job) {
  extern __shared__ __align__(1024) char raw_shared[];
  using Gemm = typename Job::Gemm;
  static_assert(Gemm::kThreads == kThreads && Gemm::kTileM == kTileM && Gemm::kTileN == kTileN &&
                Gemm::kTileK == kTileK);
  auto& storage = *reinterpret_cast<typename Gemm::Storage*>(raw_shared);
  Gemm gemm(params, storage, typename Gemm::Mainloop::DispatchPolicy::ClusterShape{});
  wait_for_previous_kernel(launch);
  const int pair = int(blockIdx.x) / 2, pairs = int(gridDim.x) / 2, rank = int(cute::block_rank_in_cluster());
  job.begin(chunk, pairs);
  if (Gemm::is_producer()) {
    Gemm::Registers::as_producer();
    if (Gemm::is_producer_warp()) {
      for (int i = pair; i < job.count; i += pairs) {
        if (!job.wanted(chunk, i)) continue;
        const Tile tile = job.tile(chunk, i, rank);
        gemm.load(tile.m / kTileM, tile.n / kTileN, WantedSteps(tile), tile.count_steps());
      }
      gemm.load_tail();
    }
  } else {
    Gemm::Registers::as_consumer();
    const int warp = int(threadIdx.x) / 32;
    typename Job::Store store(ptx::smem_address(&storage + 1) + uint32_t(warp * Job::Store::kBytes));
    float d[kTileN / 2];
    for (int i = pair; i < job.count; i += pairs) {
      if (!job.wanted(chunk, i)) continue;
      const Tile tile = job.tile(chunk, i, rank);
      const int warp_row = tile.m + warp * Job::Store::kRows;
      job.prepare(chunk, warp_row);
      gemm.multiply(d, tile.count_steps());
      job.finish(chunk, i, tile, warp_row, d, store, &out_map);
    }
    store.finish();
  }
}

// ------------------------------------------------------------------------------------------------------------ logits

struct LogitsJob {
  using Gemm = LossGemm<KMajor, KMajor>;
  using Store = TileStoreSm90<BFloat16>;
  bool keep;   // the probabilities, for gradients
  bool again;  // only the pairs that are marked
  int count, row_pairs;
  // Of the lane's two rows, loaded before the product: nothing else of the tile waits for memory.
  float reference[2];
  int target[2];

  __device__ __forceinline__ void begin(const LinearChunk& c, int) {
    row_pairs = tiles_of(c.used(), kPairRows);
    count = row_pairs * c.id_tiles;
  }
  __device__ __forceinline__ bool wanted(const LinearChunk& c, int i) const {
    return !again || c.again[place_of(c, row_pairs, i).across] != 0;
  }
  __device__ __forceinline__ Tile tile(const LinearChunk& c, int i, int rank) const {
    const TilePlace at = place_of(c, row_pairs, i);
    return {at.across * kPairRows + rank * kTileM, at.along * kTileN, 0, tiles_of(c.width, kTileK)};
  }
  __device__ __forceinline__ void prepare(const LinearChunk& c, int warp_row) {
    const int row = warp_row + int(threadIdx.x) % 32 / 4;
    reference[0] = c.references[row];
    reference[1] = c.references[row + 8];
    target[0] = c.targets[row];
    target[1] = c.targets[row + 8];
  }
  __device__ __forceinline__ void finish(const LinearChunk& c, int i, const Tile& tile, int warp_row,
                                         float (&d)[kTileN / 2], Store& store, const void* out_map) const {
    const int lane = int(threadIdx.x) % 32, left = c.vocab_size - tile.n;
    if (left < kTileN) {  // ids past the end are no part of any sum, and what is kept of them is not read
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + lane % 4 * 2 + e >= left) d[4 * j + e] = d[4 * j + 2 + e] = -INFINITY;
      }
    }
    const int row = warp_row + lane / 4;
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    const auto is_here = [&](int id) { return uint32_t(id - tile.n) < uint32_t(kTileN); };
    if (__any_sync(kFullWarp, is_here(target[0]) || is_here(target[1]))) take_targets<0>(c, tile.n, warp_row, d);
    boxes<0>(tile, warp_row, d, store, out_map, top, sum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = warp_reduce<4>(top[half], [](float a, float b) { return fmaxf(a, b); });
      sum[half] = warp_reduce<4>(sum[half], [](float a, float b) { return a + b; });
      if (lane % 4 == 0) {
        const int64_t at = int64_t(tile.n / kTileN) * c.rows + row + 8 * half;
        c.maxima[at] = top[half];
        c.sums[at] = sum[half];
      }
    }
  }

 private:
  // Box by box, so that one is stored while the next is on its way through the exponentials.
  template <int kBox>
  __device__ __forceinline__ void boxes(const Tile& tile, int warp_row, float (&d)[kTileN / 2], Store& store,
                                        const void* out_map, float (&top)[2], float (&sum)[2]) const {
#pragma unroll
    for (int n = 0; n < Store::kColumns / 2; ++n) {
      float& x = d[kBox * Store::kColumns / 2 + n];
      const int half = n / 2 % 2;
      top[half] = fmaxf(top[half], x);
      x = exp2_approx(fmaf(x, kLog2eF, -reference[half]));
      sum[half] += x;
    }
    if (keep) store.store_box<kBox>(d, out_map, tile.n, warp_row, false);
    if constexpr ((kBox + 1) * Store::kColumns < kTileN) boxes<kBox + 1>(tile, warp_row, d, store, out_map, top, sum);
  }

  // The targets' logits of a tile, which begins at first_id, go to memory and are no part of the sums: 1 - p is the sum
  // of the other probabilities (linear_rows_sm90.cu). Row by row of the lane and 32 columns at a time, where one is.
  template <int kPart>
  __device__ __forceinline__ void take_targets(const LinearChunk& c, int first_id, int warp_row,
                                               float (&d)[kTileN / 2]) const {
    constexpr int kHalf = kPart % 2, kFirst = kPart / 2 * 32;
    const int lane = int(threadIdx.x) % 32, column = target[kHalf] - first_id - kFirst;
    if (__any_sync(kFullWarp, uint32_t(column) < 32u)) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {  // columns 0, 1, 8, 9, .. from the lane's first one on
        float& own = d[kFirst / 2 + n / 2 * 4 + 2 * kHalf + n % 2];
        if (column != lane % 4 * 2 + n / 2 * 8 + n % 2) continue;
        c.target_logits[warp_row + lane / 4 + 8 * kHalf] = own;
        own = -INFINITY;
      }
    }
    if constexpr (kPart + 1 < 2 * kTileN / 32) take_targets<kPart + 1>(c, first_id, warp_row, d);
  }
};

__global__ __launch_bounds__(kThreads, 1) void illada_linear_masked_cross_entropy_logits_sm90(
    const __grid_constant__ LogitsJob::Gemm::Params params, const __grid_constant__ CUtensorMap probs_map,
    const __grid_constant__ LinearChunk chunk, bool keep, bool again, const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  LogitsJob job{keep, again};
  run(params, probs_map, chunk, launch, job);
#endif
}

// ------------------------------------------------------------------------------------------------- hidden's gradient

struct HiddenGradJob {
  using Gemm = LossGemm<KMajor, MnMajor>;
  using Store = TileStoreSm90<float>;
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
    const int row_pair = tile % split.row_pairs, k_tiles = min(split.k_tiles, tiles_of(c.vocab_size, kTileK) - k_first);
    return {row_pair * kPairRows + rank * kTileM,
            tile / split.row_pairs * kTileN,
            k_first,
            k_tiles,
            c.live ? c.live + int64_t(row_pair) * c.id_tiles : nullptr,
            1};
  }
  __device__ __forceinline__ void prepare(const LinearChunk&, int) {}
  __device__ __forceinline__ void finish(const LinearChunk&, int i, const Tile& tile, int warp_row,
                                         float (&d)[kTileN / 2], Store& store, const void* out_map) const {
    const int slab = i / (split.row_pairs * columns) * split.row_pairs * kPairRows;
    store.store(d, out_map, tile.n, slab + warp_row, false);
  }
};

__global__ __launch_bounds__(kThreads, 1) void illada_linear_masked_cross_entropy_hidden_grad_sm90(
    const __grid_constant__ HiddenGradJob::Gemm::Params params, const __grid_constant__ CUtensorMap slabs_map,
    const __grid_constant__ LinearChunk chunk, const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  HiddenGradJob job;
  run(params, slabs_map, chunk, launch, job);
#endif
}

// ------------------------------------------------------------------------------------------------- weight's gradient

// Out: float or BFloat16.
template <typename Out>
struct WeightGradJob {
  using Gemm = LossGemm<MnMajor, MnMajor>;
  using Store = TileStoreSm90<Out>;
  bool add;  // onto what is there, by one CTA and once for each element: there is no order that could matter
  int count, columns, k_tiles;

  __device__ __forceinline__ void begin(const LinearChunk& c, int) {
    k_tiles = tiles_of(c.used(), kTileK);
    columns = tiles_of(c.width, kTileN);
    count = k_tiles ? columns * c.id_tiles : 0;
  }
  __device__ __forceinline__ bool wanted(const LinearChunk&, int) const { return true; }
  __device__ __forceinline__ Tile tile(const LinearChunk& c, int i, int rank) const {
    const TilePlace at = place_of(c, columns, i);
    return {at.along * kTileIds + rank * kTileM,  at.across * kTileN, 0, k_tiles,
            c.live ? c.live + at.along : nullptr, c.id_tiles};
  }
  __device__ __forceinline__ void prepare(const LinearChunk&, int) {}
  __device__ __forceinline__ void finish(const LinearChunk&, int, const Tile& tile, int warp_row,
                                         float (&d)[kTileN / 2], Store& store, const void* out_map) const {
    store.store(d, out_map, tile.n, warp_row, add);
  }
};

template <typename Out>
__global__ __launch_bounds__(kThreads, 1) void illada_linear_masked_cross_entropy_weight_grad_sm90(
    const __grid_constant__ typename WeightGradJob<Out>::Gemm::Params params,
    const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ LinearChunk chunk, Out* target, bool add,
    const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wait_for_previous_kernel(launch);
  if (!add && chunk.used() == 0) {  // a gradient of zeros
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
  WeightGradJob<Out> job{add};
  run(params, grad_map, chunk, launch, job);
#endif
}

// ----------------------------------------------------------------------------------------------------------- launches

constexpr const char* kOp = "linear_masked_cross_entropy";

LaunchShape shape_of(const Device& device, int smem_bytes) {
  LaunchShape shape;
  shape.cluster = 2;
  shape.grid = dim3(unsigned(linear_clusters(device.sm_count) * shape.cluster));
  shape.block = dim3(kThreads);
  shape.smem_bytes = smem_bytes;
  shape.dependent = true;
  return shape;
}

MatrixView weight_of(const LinearMaskedCrossEntropyParams& p) {
  return {p.weight, DType::kBFloat16, p.vocab_size, p.width, p.weight_row_stride};
}
MatrixView hidden_of(const LinearChunk& c) { return {c.hidden, DType::kBFloat16, c.rows, c.width, c.width}; }
MatrixView probs_of(const LinearChunk& c) { return {c.probs, DType::kBFloat16, c.rows, c.vocab_size, c.prob_stride}; }

template <typename Out>
void launch_weight_grad(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearChunk& chunk) {
  using Job = WeightGradJob<Out>;
  const MatrixView grad{p.weight_grad, p.weight_grad_dtype, p.vocab_size, p.width, p.width};
  launch_kernel(kOp, device, p.launch.stream, shape_of(device, kSmemBytes<Job>),
                illada_linear_masked_cross_entropy_weight_grad_sm90<Out>,
                mainloop_params<typename Job::Gemm::Mainloop>(kOp, probs_of(chunk), hidden_of(chunk)),
                tensor_map_k128(kOp, grad, Job::Store::kRows), chunk, static_cast<Out*>(p.weight_grad),
                p.add_to_weight_grad || chunk.first > 0);
}

}  // namespace

void launch_linear_logits_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearChunk& chunk,
                               bool again) {
  const bool keep = p.hidden_grad || p.weight_grad;
  const auto params = mainloop_params<LogitsJob::Gemm::Mainloop>(kOp, hidden_of(chunk), weight_of(p));
  launch_kernel(kOp, device, p.launch.stream, shape_of(device, kSmemBytes<LogitsJob>),
                illada_linear_masked_cross_entropy_logits_sm90, params,
                keep ? tensor_map_k128(kOp, probs_of(chunk), LogitsJob::Store::kRows) : CUtensorMap{}, chunk, keep,
                again);
}

void launch_linear_hidden_grad_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device,
                                    const LinearChunk& chunk) {
  using Job = HiddenGradJob;
  const MatrixView slabs{chunk.slabs, DType::kFloat32, chunk.slab_rows, chunk.width, chunk.width};
  launch_kernel(kOp, device, p.launch.stream, shape_of(device, kSmemBytes<Job>),
                illada_linear_masked_cross_entropy_hidden_grad_sm90,
                mainloop_params<Job::Gemm::Mainloop>(kOp, probs_of(chunk), weight_of(p)),
                tensor_map_k128(kOp, slabs, Job::Store::kRows), chunk);
}

void launch_linear_weight_grad_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device,
                                    const LinearChunk& chunk) {
  p.weight_grad_dtype == DType::kFloat32 ? launch_weight_grad<float>(p, device, chunk)
                                         : launch_weight_grad<BFloat16>(p, device, chunk);
}

}  // namespace illada::loss
