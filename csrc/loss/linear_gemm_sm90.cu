// The three GEMMs of the fused head's loss on sm_90a. All are persistent and use CUTLASS's main loop
// (common/gemm_mainloop.cuh) in clusters of two CTAs, one CTA per SM. They read the number of rows on the device.
//
//                  a [M, K]                        b [K, N]           d [M, N]          epilogue
//   logits         hidden's rows [rows, width]     head weight^T      [rows, V]         2^(d - reference) in bfloat16,
//                                                                                       its sum and the largest d;
//                                                                                       the target's d separately
//   hidden_grad    probabilities [rows, V]         head weight        [rows, width]     fp32 slabs, one per split of
//                                                                                       K = V
//   weight_grad    probabilities^T [V, rows]       hidden's rows      [V, width]        stored, or added
//
// A row's reference does not depend on the tile (linear_rows_sm90.cu explains how it is found before the logits are
// known). The probabilities are therefore plain operands of the other two GEMMs. The remaining factor, token weight /
// sum, depends only on the row: hidden's rows are multiplied by it for weight_grad, the sums for hidden_grad. There is
// no pass over [rows, V] between the GEMMs.
//
// A CTA has one producer warp and two consumer warpgroups, 64 of the tile's 128 rows each. A job says which tiles there
// are and what becomes of d.
//
//   producer warp (Producer::run):
//     for each tile of the cluster that has work:
//       for each live step: load a [128, 64] of the own tile, and half of b [64, 256] for both CTAs
//     wait until all stages are released
//
//   each consumer warpgroup (Consumer::run):
//     for each tile of the cluster that has work, in the same order:
//       load what the epilogue reads from memory (Job::prepare)
//       for each live step: d += a . b; release the stage of the step before
//       epilogue (Job::finish): the job's arithmetic on d; store d by TMA, box by box
//     wait until all boxes are written
//
// Schedule of a cluster. A step is 64 columns of K. Ln: loads of step n; Pn: products of step n. Steps are counted
// through all tiles. Here a tile has 6 steps, and the pipeline has 4 stages.
//
//                             time ->
// CTA 0  producer             L0 L1 L2 L3    L4   L5   L6   L7   L8   L9                     L10  L11  ...
//        warpgroups 0 and 1      [P0 ][P1 ][P2 ][P3 ][P4 ][P5 ][ epilogue, d is stored ][P6 ][P7 ][P8 ] ...
// CTA 1                       the same steps, with the other 128 rows of a and the same b
//
//   Ln waits for empty, in both CTAs. Pn waits for full. A warpgroup arrives at empty of step n after it has issued
//   P(n + 1) and Pn has ended (wait_group 1), and of a tile's last step when its products have ended. The loads of the
//   next tile run during the epilogue.
//
//   barrier          who arrives                                                        who waits
//   full[stage]      the producer, and the bytes from the producers of both CTAs        the CTA's warpgroups, before P
//   empty[stage]     the four warpgroups of the cluster, at the barriers of both CTAs   each producer, before L
//   cluster          all threads, once the barriers are initialised (Gemm's constructor)  all threads, before the rest
//   bulk group       a warp's TMA stores                                                the warp: before it refills a
//                                                                                       buffer, and at the end
//
// The two CTAs cannot wait for each other forever: tiles, work and live steps depend only on the cluster and on what
// earlier launches wrote. Both CTAs and all roles therefore count the same steps.
//
// The tensor cores wait during an epilogue: an SM has one CTA, because two accumulators of [128, 256] do not fit its
// registers. The logits' epilogue therefore stores its first box before it computes the exponentials of the last
// (store_boxes). docs/kernels/loss.md says what the epilogues cost.
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
static_assert(kPairRows == 2 * kTileM && kVocabTileIds == kTileN);
constexpr int kStepsPerFlag = 4;
static_assert(kStepsPerFlag * kTileK == kPairRows && kStepsPerFlag * kTileK == kVocabTileIds);

__host__ __device__ constexpr int tile_count(int size, int tile) { return (size + tile - 1) / tile; }

// Tile of a GEMM: its position in a and b, and its steps of K. With filter_eps, `live` has one flag for each
// kStepsPerFlag steps, `live_stride` flags apart; steps whose flag is 0 are skipped. The first step is always taken:
// without a step, the main loop would not set d.
struct Tile {
  int m, n, k_first, k_tiles;
  const uint8_t* live = nullptr;
  int live_stride = 0;

  __device__ __forceinline__ bool is_live(int k) const {
    return !live || k == k_first || live[int64_t(k / kStepsPerFlag) * live_stride];
  }
  // Number of live steps. Whole warps call it.
  __device__ __forceinline__ int count_steps() const {
    if (!live) return k_tiles;
    int count = 0;
    for (int k = int(threadIdx.x) % 32; k < k_tiles; k += 32) count += is_live(k_first + k);
    return __reduce_add_sync(kFullWarp, count);
  }
};

// Iterator over the live steps of a tile, for CUTLASS's producer.
struct LiveSteps {
  const Tile& tile;
  int k;

  __device__ __forceinline__ explicit LiveSteps(const Tile& of) : tile(of), k(of.k_first) {}
  __device__ __forceinline__ int operator*() const { return k; }
  __device__ __forceinline__ LiveSteps& operator++() {
    do {
      ++k;
    } while (k < tile.k_first + tile.k_tiles && !tile.is_live(k));
    return *this;
  }
};

// Coordinates of tile i in the order that the row chunk specifies.
__device__ __forceinline__ TileCoord tile_coord(const LinearRowChunk& c, int tiles_across, int i) {
  return {c.max_group_tiles, tiles_across, c.vocab_tiles, i};
}

template <typename LayoutA, typename LayoutB>
using LossGemm = Gemm<GemmMainloop<cutlass::arch::Sm90, BFloat16, LayoutA, LayoutB>>;

// Bytes of shared memory: the main loop's storage, then the store buffers of the eight consumer warps.
template <typename Job>
constexpr int kSmemBytes = Job::Gemm::kSmemBytes + 8 * Job::Store::kBytes;

// Tiles of a CTA. Each cluster takes every clusters-th tile of the job, so neighbouring clusters have neighbouring
// tiles at the same time.
struct ClusterTiles {
  int cluster = int(blockIdx.x) / 2, clusters = int(gridDim.x) / 2;
  int rank = int(cute::block_rank_in_cluster());  // of the CTA in its cluster
};

// A job (LogitsJob, HiddenGradJob, WeightGradJob) has these members:
//
//   begin(chunk, clusters)           reads the number of rows; sets `count`, the number of tiles
//   has_work(chunk, i)               whether tile i is computed
//   tile(chunk, i, rank)             the CTA's half of tile i
//   prepare(chunk, warp_row)         loads what the epilogue needs, before the products
//   finish(chunk, i, tile, warp_row, d, store, out_map)   the epilogue
//
// The producer warp. It and the consumers call the job's functions in the same way, so that they agree on the tiles.
template <typename Job>
struct Producer {
  typename Job::Gemm& gemm;
  const LinearRowChunk& chunk;
  const ClusterTiles& tiles;
  const Job& job;

  __device__ __forceinline__ void run() {
    for (int i = tiles.cluster; i < job.count; i += tiles.clusters) {
      if (!job.has_work(chunk, i)) continue;
      const Tile tile = job.tile(chunk, i, tiles.rank);
      gemm.load(tile.m / kTileM, tile.n / kTileN, LiveSteps(tile), tile.count_steps());
    }
    gemm.load_tail();
  }
};

// A consumer warpgroup.
template <typename Job>
struct Consumer {
  using Store = typename Job::Store;

  typename Job::Gemm& gemm;
  const LinearRowChunk& chunk;
  const ClusterTiles& tiles;
  Job& job;
  const CUtensorMap& out_map;
  uint32_t store_buffers;  // of all consumer warps

  __device__ __forceinline__ void run() {
    const int warp = int(threadIdx.x) / 32;
    Store store(store_buffers + uint32_t(warp * Store::kBytes));
    float d[kTileN / 2];
    for (int i = tiles.cluster; i < job.count; i += tiles.clusters) {
      if (!job.has_work(chunk, i)) continue;
      const Tile tile = job.tile(chunk, i, tiles.rank);
      const int warp_row = tile.m + warp * Store::kRows;
      job.prepare(chunk, warp_row);
      gemm.multiply(d, tile.count_steps());
      job.finish(chunk, i, tile, warp_row, d, store, &out_map);
    }
    store.finish();
  }
};

// Body of the three kernels. `out_map`: tensor map of the products, in boxes of a warp's rows.
template <typename Job>
__device__ __forceinline__ void run(const typename Job::Gemm::Params& params, const CUtensorMap& out_map,
                                    const LinearRowChunk& chunk, const DependentLaunch& launch, Job& job) {
  extern __shared__ __align__(1024) char raw_shared[];
  using Gemm = typename Job::Gemm;
  static_assert(Gemm::kThreads == kThreads && Gemm::kTileM == kTileM && Gemm::kTileN == kTileN &&
                Gemm::kTileK == kTileK);
  auto& storage = *reinterpret_cast<typename Gemm::Storage*>(raw_shared);
  // The barriers are initialised while the previous kernel still runs.
  Gemm gemm(params, storage, typename Gemm::Mainloop::DispatchPolicy::ClusterShape{});
  wait_for_previous_kernel(launch);
  const ClusterTiles tiles;
  job.begin(chunk, tiles.clusters);
  if (Gemm::is_producer()) {
    Gemm::Registers::as_producer();
    if (Gemm::is_producer_warp()) Producer<Job>{gemm, chunk, tiles, job}.run();
  } else {
    Gemm::Registers::as_consumer();
    Consumer<Job>{gemm, chunk, tiles, job, out_map, ptx::smem_address(&storage + 1)}.run();
  }
}

// ------------------------------------------------------------------------------------------------------------ logits

// Tiles: pairs of row tiles x vocab tiles, with K = width.
struct LogitsJob {
  using Gemm = LossGemm<KMajor, KMajor>;
  using Store = TileStoreSm90<BFloat16>;
  bool keep_probs;  // true: store the probabilities, for gradients
  bool recompute;   // true: only the marked pairs of row tiles
  int count, row_pairs;
  // Reference and target of the lane's two rows, loaded before the product so that the epilogue does not wait for them.
  float reference[2];
  int target[2];

  __device__ __forceinline__ void begin(const LinearRowChunk& c, int) {
    row_pairs = tile_count(c.used_rows(), kPairRows);
    count = row_pairs * c.vocab_tiles;
  }
  __device__ __forceinline__ bool has_work(const LinearRowChunk& c, int i) const {
    return !recompute || c.recompute[tile_coord(c, row_pairs, i).across] != 0;
  }
  __device__ __forceinline__ Tile tile(const LinearRowChunk& c, int i, int rank) const {
    const TileCoord at = tile_coord(c, row_pairs, i);
    return {at.across * kPairRows + rank * kTileM, at.along * kTileN, 0, tile_count(c.width, kTileK)};
  }
  __device__ __forceinline__ void prepare(const LinearRowChunk& c, int warp_row) {
    const int row = warp_row + int(threadIdx.x) % 32 / 4;
    reference[0] = c.references[row];
    reference[1] = c.references[row + 8];
    target[0] = c.targets[row];
    target[1] = c.targets[row + 8];
  }
  // Writes the targets' logits, the exponentials of the others, and their largest logit and sum for each row.
  __device__ __forceinline__ void finish(const LinearRowChunk& c, int, const Tile& tile, int warp_row,
                                         float (&d)[kTileN / 2], Store& store, const void* out_map) const {
    exclude_ids_past_end(c.vocab_size - tile.n, d);
    if (warp_has_target(tile.n)) extract_targets<0>(c, tile.n, warp_row, d);
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    store_boxes<0>(tile, warp_row, d, store, out_map, top, sum);
    write_sums(c, tile.n / kTileN, warp_row, top, sum);
  }

 private:
  // The last vocab tile has `ids` ids. Those past the end count as -infinity in the sums. TMA does not store them.
  static __device__ __forceinline__ void exclude_ids_past_end(int ids, float (&d)[kTileN / 2]) {
    if (ids >= kTileN) return;
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * j + lane % 4 * 2 + e >= ids) d[4 * j + e] = d[4 * j + 2 + e] = -INFINITY;
    }
  }

  // True where a row of the warp has its target in the tile that begins at first_id: few tiles.
  __device__ __forceinline__ bool warp_has_target(int first_id) const {
    const auto is_here = [&](int id) { return uint32_t(id - first_id) < uint32_t(kTileN); };
    return __any_sync(kFullWarp, is_here(target[0]) || is_here(target[1]));
  }

  // Computes the exponentials, sums and largest logits. Processes box by box, so that one box is stored while the
  // exponentials of the next are computed.
  template <int kBox>
  __device__ __forceinline__ void store_boxes(const Tile& tile, int warp_row, float (&d)[kTileN / 2], Store& store,
                                              const void* out_map, float (&top)[2], float (&sum)[2]) const {
#pragma unroll
    for (int n = 0; n < Store::kColumns / 2; ++n) {
      float& x = d[kBox * Store::kColumns / 2 + n];
      const int half = n / 2 % 2;
      top[half] = fmaxf(top[half], x);
      x = exp2_approx(fmaf(x, kLog2eF, -reference[half]));  // replaces the logit, so that d needs no second array
      sum[half] += x;
    }
    if (keep_probs) store.store_box<kBox>(d, out_map, tile.n, warp_row, false);
    if constexpr ((kBox + 1) * Store::kColumns < kTileN)
      store_boxes<kBox + 1>(tile, warp_row, d, store, out_map, top, sum);
  }

  // Writes the largest logit and the sum of each row of the warp. Four lanes share two rows.
  static __device__ __forceinline__ void write_sums(const LinearRowChunk& c, int vocab_tile, int warp_row,
                                                    float (&top)[2], float (&sum)[2]) {
    const int lane = int(threadIdx.x) % 32, row = warp_row + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = warp_reduce<4>(top[half], [](float a, float b) { return fmaxf(a, b); });
      sum[half] = warp_reduce<4>(sum[half], [](float a, float b) { return a + b; });
      if (lane % 4 == 0) {
        const int64_t at = int64_t(vocab_tile) * c.rows + row + 8 * half;
        c.maxima[at] = top[half];
        c.sums[at] = sum[half];
      }
    }
  }

  // Writes the targets' logits of a tile that begins at first_id to memory and excludes them from the sums: 1 - p is
  // the sum of the other probabilities (linear_rows_sm90.cu). Each segment is one of the lane's rows and 32 columns.
  template <int kSegment>
  __device__ __forceinline__ void extract_targets(const LinearRowChunk& c, int first_id, int warp_row,
                                                  float (&d)[kTileN / 2]) const {
    constexpr int kHalf = kSegment % 2, kFirst = kSegment / 2 * 32;
    const int lane = int(threadIdx.x) % 32, column = target[kHalf] - first_id - kFirst;
    if (__any_sync(kFullWarp, uint32_t(column) < 32u)) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {  // columns 0, 1, 8, 9, ... from the lane's first column
        float& own = d[kFirst / 2 + n / 2 * 4 + 2 * kHalf + n % 2];
        if (column != lane % 4 * 2 + n / 2 * 8 + n % 2) continue;
        c.target_logits[warp_row + lane / 4 + 8 * kHalf] = own;
        own = -INFINITY;
      }
    }
    if constexpr (kSegment + 1 < 2 * kTileN / 32) extract_targets<kSegment + 1>(c, first_id, warp_row, d);
  }
};

__global__ __launch_bounds__(kThreads, 1) void illada_linear_masked_cross_entropy_logits_sm90(
    const __grid_constant__ LogitsJob::Gemm::Params params, const __grid_constant__ CUtensorMap probs_map,
    const __grid_constant__ LinearRowChunk chunk, bool keep_probs, bool recompute,
    const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  LogitsJob job{keep_probs, recompute};
  run(params, probs_map, chunk, launch, job);
#endif
}

// ------------------------------------------------------------------------------------------------- hidden's gradient

// Tiles: splits of the vocabulary x pairs of row tiles x tiles of the width, with K = the split's ids.
struct HiddenGradJob {
  using Gemm = LossGemm<KMajor, MnMajor>;
  using Store = TileStoreSm90<float>;
  int count, columns;
  HiddenGradSplit split;

  __device__ __forceinline__ void begin(const LinearRowChunk& c, int clusters) {
    split = hidden_grad_split(c, clusters);
    columns = tile_count(c.width, kTileN);
    count = split.splits * split.row_pairs * columns;
  }
  __device__ __forceinline__ bool has_work(const LinearRowChunk&, int) const { return true; }
  // The tiles of a split are consecutive, so that concurrent tiles read the same stretch of the vocabulary.
  __device__ __forceinline__ Tile tile(const LinearRowChunk& c, int i, int rank) const {
    const int tile = i % (split.row_pairs * columns), k_first = i / (split.row_pairs * columns) * split.k_tiles;
    const int row_pair = tile % split.row_pairs,
              k_tiles = min(split.k_tiles, tile_count(c.vocab_size, kTileK) - k_first);
    return {row_pair * kPairRows + rank * kTileM,
            tile / split.row_pairs * kTileN,
            k_first,
            k_tiles,
            c.live ? c.live + int64_t(row_pair) * c.vocab_tiles : nullptr,
            1};
  }
  __device__ __forceinline__ void prepare(const LinearRowChunk&, int) {}
  __device__ __forceinline__ void finish(const LinearRowChunk&, int i, const Tile& tile, int warp_row,
                                         float (&d)[kTileN / 2], Store& store, const void* out_map) const {
    const int slab = i / (split.row_pairs * columns) * split.row_pairs * kPairRows;
    store.store(d, out_map, tile.n, slab + warp_row, false);
  }
};

__global__ __launch_bounds__(kThreads, 1) void illada_linear_masked_cross_entropy_hidden_grad_sm90(
    const __grid_constant__ HiddenGradJob::Gemm::Params params, const __grid_constant__ CUtensorMap slabs_map,
    const __grid_constant__ LinearRowChunk chunk, const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  HiddenGradJob job;
  run(params, slabs_map, chunk, launch, job);
#endif
}

// ------------------------------------------------------------------------------------------------- weight's gradient

// Tiles: vocab tiles (128 ids for each CTA) x tiles of the width, with K = rows. Out: float or BFloat16.
template <typename Out>
struct WeightGradJob {
  using Gemm = LossGemm<MnMajor, MnMajor>;
  using Store = TileStoreSm90<Out>;
  bool add;  // true: add to memory. One CTA adds each element once, so the order does not matter
  int count, columns, k_tiles;

  __device__ __forceinline__ void begin(const LinearRowChunk& c, int) {
    k_tiles = tile_count(c.used_rows(), kTileK);
    columns = tile_count(c.width, kTileN);
    count = k_tiles ? columns * c.vocab_tiles : 0;
  }
  __device__ __forceinline__ bool has_work(const LinearRowChunk&, int) const { return true; }
  __device__ __forceinline__ Tile tile(const LinearRowChunk& c, int i, int rank) const {
    const TileCoord at = tile_coord(c, columns, i);
    return {at.along * kVocabTileIds + rank * kTileM, at.across * kTileN, 0, k_tiles,
            c.live ? c.live + at.along : nullptr,     c.vocab_tiles};
  }
  __device__ __forceinline__ void prepare(const LinearRowChunk&, int) {}
  __device__ __forceinline__ void finish(const LinearRowChunk&, int, const Tile& tile, int warp_row,
                                         float (&d)[kTileN / 2], Store& store, const void* out_map) const {
    store.store(d, out_map, tile.n, warp_row, add);
  }
};

// Writes zeros to `size` elements, an even number, with all threads of the grid.
template <typename Out>
__device__ __forceinline__ void fill_with_zeros(Out* target, int64_t size) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * 2;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 2; i < size; i += stride) {
    if constexpr (sizeof(Out) == 4) {
      *reinterpret_cast<float2*>(target + i) = make_float2(0, 0);
    } else {
      *reinterpret_cast<uint32_t*>(target + i) = 0;
    }
  }
}

template <typename Out>
__global__ __launch_bounds__(kThreads, 1) void illada_linear_masked_cross_entropy_weight_grad_sm90(
    const __grid_constant__ typename WeightGradJob<Out>::Gemm::Params params,
    const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ LinearRowChunk chunk, Out* target, bool add,
    const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wait_for_previous_kernel(launch);
  if (!add && chunk.used_rows() == 0) {  // a sum over no rows: the main loop needs at least one step
    fill_with_zeros(target, int64_t(chunk.vocab_size) * chunk.width);
    return;
  }
  WeightGradJob<Out> job{add};
  run(params, grad_map, chunk, launch, job);
#endif
}

// ----------------------------------------------------------------------------------------------------------- launches

constexpr const char* kOp = "linear_masked_cross_entropy";

LaunchShape launch_shape(const Device& device, int smem_bytes) {
  LaunchShape shape;
  shape.cluster = 2;
  shape.grid = dim3(unsigned(linear_clusters(device.sm_count) * shape.cluster));
  shape.block = dim3(kThreads);
  shape.smem_bytes = smem_bytes;
  shape.dependent = true;
  return shape;
}

MatrixView head_weight_view(const LinearMaskedCrossEntropyParams& p) {
  return {p.head_weight, DType::kBFloat16, p.vocab_size, p.width, p.head_weight_row_stride};
}
MatrixView hidden_view(const LinearRowChunk& c) { return {c.hidden, DType::kBFloat16, c.rows, c.width, c.width}; }
MatrixView probs_view(const LinearRowChunk& c) {
  return {c.probs, DType::kBFloat16, c.rows, c.vocab_size, c.prob_stride};
}

template <typename Out>
void launch_weight_grad(const LinearMaskedCrossEntropyParams& p, const Device& device, const LinearRowChunk& chunk) {
  using Job = WeightGradJob<Out>;
  const MatrixView grad{p.weight_grad, p.weight_grad_dtype, p.vocab_size, p.width, p.width};
  launch_kernel(kOp, device, p.launch.stream, launch_shape(device, kSmemBytes<Job>),
                illada_linear_masked_cross_entropy_weight_grad_sm90<Out>,
                mainloop_params<typename Job::Gemm::Mainloop>(kOp, probs_view(chunk), hidden_view(chunk)),
                tensor_map_k128(kOp, grad, Job::Store::kRows), chunk, static_cast<Out*>(p.weight_grad),
                p.add_to_weight_grad || chunk.first > 0);
}

}  // namespace

void launch_linear_logits_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device,
                               const LinearRowChunk& chunk, bool recompute) {
  const bool keep_probs = p.hidden_grad || p.weight_grad;
  const auto params = mainloop_params<LogitsJob::Gemm::Mainloop>(kOp, hidden_view(chunk), head_weight_view(p));
  launch_kernel(kOp, device, p.launch.stream, launch_shape(device, kSmemBytes<LogitsJob>),
                illada_linear_masked_cross_entropy_logits_sm90, params,
                keep_probs ? tensor_map_k128(kOp, probs_view(chunk), LogitsJob::Store::kRows) : CUtensorMap{}, chunk,
                keep_probs, recompute);
}

void launch_linear_hidden_grad_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device,
                                    const LinearRowChunk& chunk) {
  using Job = HiddenGradJob;
  const MatrixView slabs{chunk.slabs, DType::kFloat32, chunk.slab_rows, chunk.width, chunk.width};
  launch_kernel(kOp, device, p.launch.stream, launch_shape(device, kSmemBytes<Job>),
                illada_linear_masked_cross_entropy_hidden_grad_sm90,
                mainloop_params<Job::Gemm::Mainloop>(kOp, probs_view(chunk), head_weight_view(p)),
                tensor_map_k128(kOp, slabs, Job::Store::kRows), chunk);
}

void launch_linear_weight_grad_sm90(const LinearMaskedCrossEntropyParams& p, const Device& device,
                                    const LinearRowChunk& chunk) {
  p.weight_grad_dtype == DType::kFloat32 ? launch_weight_grad<float>(p, device, chunk)
                                         : launch_weight_grad<BFloat16>(p, device, chunk);
}

}  // namespace illada::loss
