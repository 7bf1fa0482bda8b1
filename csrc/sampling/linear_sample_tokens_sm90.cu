// linear_sample_tokens on sm_90a: logits[n, v] = hidden[n] . head_weight[v], reduced in the GEMM's accumulators.
//
// A CTA processes a row tile (128 rows) and a vocab range at a time; HeadPlan says which. Products and pipeline are
// CUTLASS's (common/gemm_mainloop.cuh).
//
//   producer (load_work_items), one thread:
//     for each work item, for each vocab tile of its range:
//       for each tile of K: wait for an empty stage; load hidden, and the head weight or this CTA's half of it
//
//   each of the two consumer warpgroups (Consumer::run), with 64 of the rows:
//     for each work item:
//       without rows, or where only the neighbour has a tile: give the stages back unread
//       for each vocab tile of 256 ids:
//         start to read the rows' bounds
//         d = hidden . head_weight of the tile, in registers
//         reduce d into the states of the rows (RowPairState::reduce): softmax, and with noise the race
//       give back the stages of a tile that only the neighbour has
//       merge the four lanes that share a row; write its records to the workspace
//
// illada_sample_tokens_combine_sm80, a launch of its own, finishes the rows.
//
// Schedule of a work item of two tiles and the beginning of the next ('). A ring of four stages, 64 columns of K each.
//
//                   time ->
//   producer        [ tile 0, stage by stage   ][ tile 1 ...           ]     [ tile 0' ...   (ahead: four stages)
//   warpgroup 0     [ products 0  ][ reduce 0 ][ products 1  ][ reduce 1 ][records][ products 0' ]
//   warpgroup 1     [ products 0  ][ reduce 0 ][ products 1  ][ reduce 1 ][records][ products 0' ]
//   bounds            read         used, raised  read          used, raised           (never waited for)
//
//   A warpgroup waits for full stages. The producer waits for stages that all consumers of the cluster have given back:
//   its loads fill the stages of both CTAs. Both CTAs of a cluster take the same number of stages, which is why a
//   warpgroup without products still gives them back. The warpgroups do not wait for each other.
//
// Few rows: rows beyond N are neither loaded nor multiplied. The head weight is read once at memory speed: 2 V C bytes
// (424 us at 3 TB/s for V 155,136, C 4096). The tensor cores need 2 * 64 V C flop for up to 64 rows, a fifth of that
// time; up to 128 rows, two fifths. So nothing is gained by making the head weight the M operand.
//
// Many rows: 2 N V C flop. CTAs of neighbouring row tiles process the same range at the same time. The head weight then
// comes from memory once per group of row tiles, and from the L2 cache after that. Pairs of CTAs (clusters) load each
// tile of the head weight once, half each, for both. The CTAs are persistent: the next work item of a cluster is loaded
// while the last one is reduced.
#include <cuda.h>

#include <cfloat>

#include "common/dependent_launch.h"
#include "common/tensor_map.h"
#include "sampling/head_gemm_sm90.cuh"
#include "sampling/head_tile.cuh"
#include "sampling/launch.h"
#include "sampling/row_sample.cuh"

namespace illada::sampling {
namespace {

constexpr int kSlice = HeadPlan::kSliceIds;

// ------------------------------------------------------------------------------------------------------------ producer

// Loads the tiles of all work items of the cluster. One thread calls it.
template <typename Gemm>
__device__ __forceinline__ void load_work_items(Gemm& gemm, const HeadPlan& plan, int k_tiles, int first_work_item,
                                                int work_items) {
  for (int work_item = first_work_item; work_item < work_items; work_item += plan.clusters) {
    const HeadTask task = plan.task(work_item, gemm.rank());
    const int first_slice = task.vocab_range * plan.range_slices,
              end_slice = min(first_slice + plan.range_slices, plan.vocab_slices);
    for (int tile = 0; tile < task.tiles; ++tile) {
      const int slice = first_slice + tile * HeadPlan::kTileSlices;
      const int slices = max(min(end_slice - slice, HeadPlan::kTileSlices), 0);  // 0: only the neighbour has a tile
      gemm.load(task.row_tile * Gemm::kTileM, slice * kSlice, k_tiles, slices, task.shares_ids);
    }
  }
  gemm.load_tail();  // the CTA must outlive the neighbour's arrivals at its barriers
}

// ----------------------------------------------------------------------------------------------------------- consumers

// A consumer warpgroup: 64 rows of the row tile. A thread has two of them, eight apart, which it shares with three
// neighbouring lanes (wgmma's accumulator layout). All threads of the warpgroup call each method.
template <typename Gemm, bool kWantExtras>
struct Consumer {
  static constexpr int kTileM = Gemm::kTileM, kTileN = Gemm::kTileN;
  using RowPair = RowPairState<kWantExtras>;

  Gemm& gemm;
  const SampleTokensParams& p;
  const HeadPlan& plan;
  const int k_tiles;
  int32_t* const bounds;
  const int warpgroup = int(threadIdx.x) / 128, lane = int(threadIdx.x) % 32;
  const int row_of_tile = int(threadIdx.x) / 32 * 16 + lane / 4;  // and 8 rows below it

  // Processes all work items of the cluster.
  __device__ __forceinline__ void run(int first_work_item, int work_items) {
    for (int work_item = first_work_item; work_item < work_items; work_item += plan.clusters) {
      HeadTask task = plan.task(work_item, gemm.rank());
      const int first_row = task.row_tile * kTileM, last_row = int(p.num_rows) - 1;
      if (!takes_part(task, first_row, last_row)) {
        gemm.skip(task.tiles * k_tiles);
        continue;
      }
      // Rows past the end have logits of 0 and the arguments of the last one. They are not written.
      const int row[2] = {min(first_row + row_of_tile, last_row), min(first_row + row_of_tile + 8, last_row)};
      RowPair pair(p, row);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (first_row + row_of_tile + 8 * i > last_row) pair.exclude(i);

      reduce_range(pair, row, task.vocab_range);

      ptx::hide_value(work_item);  // values derived from it then take no registers in the loop
      task = plan.task(work_item, gemm.rank());
      gemm.skip((task.tiles - plan.range_tiles(task.vocab_range)) * k_tiles);  // tiles that only the neighbour has
      write_records(pair, task);
    }
  }

 private:
  // The same for the whole warpgroup: the products are the warpgroup's.
  __device__ __forceinline__ bool takes_part(const HeadTask& task, int first_row, int last_row) const {
    return first_row + warpgroup * 64 <= last_row && task.vocab_range < plan.vocab_ranges;
  }

  // Multiplies the tiles of a range and reduces each into the states of the rows.
  __device__ __forceinline__ void reduce_range(RowPair& pair, const int (&row)[2], int vocab_range) {
    const int end_id = int(min(int64_t(vocab_range + 1) * plan.range_slices * kSlice, p.vocab_size));
    float d[kTileN / 2];
    for (int id = vocab_range * plan.range_slices * kSlice; id < end_id; id += kTileN) {
      int32_t seen[2];
      pair.read_bounds(bounds, row, seen);  // in flight while the products are computed
      gemm.multiply(d, k_tiles);
      pair.apply_bounds(seen);
      pair.reduce(d, p, row, id, end_id, bounds);
    }
  }

  // Merges the four lanes that share a row, and writes the row's records of this range.
  __device__ __forceinline__ void write_records(RowPair& pair, const HeadTask& task) {
    const RowRecords records = row_records(plan);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      RowState<kWantExtras>& state = pair.state[i];
      state.merge_leader(1);
      state.merge_leader(2);
      state.softmax.template merge_lanes<4>();
      const int64_t own_row = task.row_tile * kTileM + row_of_tile + 8 * i;
      if (lane % 4 == 0 && own_row < p.num_rows) {
        static_cast<LeaderRecord*>(p.workspace)[own_row * records.leaders + task.vocab_range] = state.leader_record();
        softmax_records(p.workspace, p.num_rows, records, own_row)[task.vocab_range] = to_record(state.softmax);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- kernels

template <typename T, bool kWantExtras>
__global__ __launch_bounds__(HeadGemm<T>::kThreads, 1) void illada_linear_sample_tokens_sm90(
    const __grid_constant__ typename HeadGemm<T>::Params params, const __grid_constant__ CUtensorMap slice_map,
    const __grid_constant__ SampleTokensParams p, const __grid_constant__ HeadPlan plan, int k_tiles, int32_t* bounds,
    const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char raw_shared[];
  using Gemm = HeadGemm<T>;
  static_assert(Gemm::kTileM == HeadPlan::kTileRows && Gemm::kTileN == HeadPlan::kTileSlices * kSlice);
  Gemm gemm(params, slice_map, *reinterpret_cast<typename Gemm::Storage*>(raw_shared), plan.cluster);
  wait_for_previous_kernel(launch);
  const int first_work_item = int(blockIdx.x) / plan.cluster, work_items = plan.work_items();
  if (Gemm::is_producer()) {
    Gemm::Registers::as_producer();
    if (Gemm::is_producer_warp() && cute::elect_one_sync())
      load_work_items(gemm, plan, k_tiles, first_work_item, work_items);
  } else {
    Gemm::Registers::as_consumer();
    Consumer<Gemm, kWantExtras> consumer{gemm, p, plan, k_tiles, bounds};
    consumer.run(first_work_item, work_items);
  }
#endif
}

// Resets the lower bounds of the rows' best scores.
constexpr int kClearThreads = 256;
__global__ __launch_bounds__(kClearThreads) void illada_clear_bounds_sm90(
    int32_t* bounds, int64_t rows, const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const int64_t row = int64_t(blockIdx.x) * kClearThreads + threadIdx.x;
  if (row < rows) bounds[row] = ordered(-FLT_MAX);
}

// Copies the selected rows to contiguous memory, one CTA per row. It also resets the row's bound, if there is one.
constexpr int kGatherThreads = 128;
__global__ __launch_bounds__(kGatherThreads) void illada_gather_rows_sm90(
    const uint4* source, int64_t source_stride, int64_t source_rows, const int32_t* rows, uint4* target, int width,
    int32_t* bounds, const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  if (bounds && threadIdx.x == 0) bounds[blockIdx.x] = ordered(-FLT_MAX);
  const int64_t row = rows[blockIdx.x];
  const bool inside = row >= 0 && row < source_rows;
  for (int i = threadIdx.x; i < width; i += kGatherThreads)
    target[int64_t(blockIdx.x) * width + i] = inside ? source[row * source_stride + i] : make_uint4(0, 0, 0, 0);
}

template <typename T, bool kWantExtras>
void launch(const LinearSampleTokensParams& p, const Device& device, const HeadPlan& plan) {
  constexpr const char* kOp = "linear_sample_tokens";
  const SampleTokensParams& s = p.sample;
  MatrixView hidden{p.hidden, s.dtype, s.num_rows, p.width, p.hidden_row_stride};
  const HeadWorkspace layout = head_workspace(p, plan);
  // Only rows with noise use the bounds.
  const bool noisy = s.temperatures || s.temperature > 0;
  int32_t* const bounds = noisy ? reinterpret_cast<int32_t*>(static_cast<char*>(s.workspace) + layout.bounds) : nullptr;
  if (p.rows) {
    void* gathered = static_cast<char*>(s.workspace) + layout.gathered;
    LaunchShape shape;
    shape.grid = dim3(unsigned(s.num_rows));
    shape.block = dim3(kGatherThreads);
    shape.dependent = true;
    launch_kernel(kOp, device, s.launch.stream, shape, illada_gather_rows_sm90, static_cast<const uint4*>(p.hidden),
                  p.hidden_row_stride / 8, p.num_tokens, p.rows, static_cast<uint4*>(gathered), int(p.width / 8),
                  bounds);
    hidden = {gathered, s.dtype, s.num_rows, p.width, p.width};
  } else if (bounds) {
    LaunchShape shape;
    shape.grid = dim3(unsigned((s.num_rows + kClearThreads - 1) / kClearThreads));
    shape.block = dim3(kClearThreads);
    shape.dependent = true;
    launch_kernel(kOp, device, s.launch.stream, shape, illada_clear_bounds_sm90, bounds, s.num_rows);
  }
  using Gemm = HeadGemm<T>;
  const MatrixView weight{p.head_weight, s.dtype, s.vocab_size, p.width, p.head_weight_row_stride};
  LaunchShape shape;
  shape.grid = dim3(unsigned(plan.clusters * plan.cluster));
  shape.block = dim3(Gemm::kThreads);
  shape.smem_bytes = Gemm::kSmemBytes;
  shape.cluster = plan.cluster;
  shape.dependent = true;
  launch_kernel(kOp, device, s.launch.stream, shape, illada_linear_sample_tokens_sm90<T, kWantExtras>,
                mainloop_params<typename Gemm::Mainloop>(kOp, hidden, weight), tensor_map_k128(kOp, weight, kSlice), s,
                plan, int((p.width + Gemm::kTileK - 1) / Gemm::kTileK), bounds);
  launch_sample_tokens_combine(s, device, row_records(plan));
}

template <typename T>
void launch(const LinearSampleTokensParams& p, const Device& device, const HeadPlan& plan) {
  wants_extras(p.sample) ? launch<T, true>(p, device, plan) : launch<T, false>(p, device, plan);
}

}  // namespace

void launch_linear_sample_tokens_sm90(const LinearSampleTokensParams& p, const Device& device, const HeadPlan& plan) {
  p.sample.dtype == DType::kBFloat16 ? launch<BFloat16>(p, device, plan) : launch<Half>(p, device, plan);
}

}  // namespace illada::sampling
