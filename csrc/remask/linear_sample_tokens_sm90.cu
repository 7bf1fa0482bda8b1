// linear_sample_tokens on sm_90a: logits[n, v] = hidden[n] . weight[v], reduced where they are, in the accumulators.
//
// A CTA owns a tile of 128 rows and a range of the vocabulary, and walks over the range in tiles of 256 ids: one
// producer warp fills a ring of stages (64 columns of hidden and weight each) by TMA, two warpgroups multiply 64 rows
// each (wgmma m64n256k16) and reduce their tile into per-row states in registers (row_sample.cuh). At the end of the
// range the four lanes that share a row merge, leave their records in the workspace, and illada_sample_tokens_combine
// finishes.
//
//   full[s]   the producer's TMA bytes have landed in stage s             -> consumers
//   empty[s]  both warpgroups (of both CTAs of a cluster) have read it    -> producer
//
// Few rows: rows beyond N are not loaded and not multiplied, and the weight passes once through the chip at memory
// speed: 2 V C bytes (424 us at 3 TB/s for V 155,136, C 4096). The tensor cores need 2 * 64 V C flop for up to 64 rows,
// a fifth of that time, so nothing is gained by giving the weight the M side. Up to 128 rows: two fifths. Many rows:
// 2 N V C flop; CTAs of neighbouring row tiles take the same range in step, so the weight comes from memory once and
// from the L2 cache after that, and pairs of them (clusters) load each weight tile once, half each, for both.
#include <cuda.h>

#include <type_traits>

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "remask/head_tile.cuh"
#include "remask/launch.h"
#include "remask/row_sample.cuh"

namespace illada::remask {
namespace {

constexpr int kTileM = HeadPlan::kTileRows, kTileN = 256, kTileK = 64, kStages = 4;
constexpr int kChunk = HeadPlan::kChunkIds, kChunks = kTileN / kChunk;
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kRowBytesK = kTileK * 2;

struct SharedStorage {
  struct alignas(1024) Stage {
    char hidden[kTileM * kRowBytesK];
    char weight[kTileN * kRowBytesK];
  } stage[kStages];
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(SharedStorage) + 1024 <= 227 * 1024);

template <typename T, bool kWantExtras>
__global__ __launch_bounds__(kThreads, 1) void illada_linear_sample_tokens_sm90(
    const __grid_constant__ CUtensorMap hidden_map, const __grid_constant__ CUtensorMap weight_map,
    const __grid_constant__ SampleTokensParams p, const __grid_constant__ HeadPlan plan, int k_tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw_shared[];
  const uint32_t shared_start = ptx::smem_address(raw_shared), aligned_start = (shared_start + 1023) / 1024 * 1024;
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw_shared + (aligned_start - shared_start));
  const auto full = [&](int s) { return ptx::smem_address(&shared.full[s]); };
  const auto empty = [&](int s) { return ptx::smem_address(&shared.empty[s]); };

  const int row_tile = int(blockIdx.x) % plan.row_tiles, slot = int(blockIdx.x) / plan.row_tiles;
  const int first_row = row_tile * kTileM, rows = int(min(p.num_rows - first_row, int64_t(kTileM)));
  const int64_t first_id = int64_t(slot) * plan.chunks * kChunk;
  const int64_t end_id = min(first_id + int64_t(plan.chunks) * kChunk, p.vocab_size);
  const int tiles = int((end_id - first_id + kTileN - 1) / kTileN);

  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&hidden_map);
    ptx::prefetch_tensormap(&weight_map);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full(s), 1);
      ptx::mbarrier_init(empty(s), uint32_t(kConsumers * plan.cluster));
    }
    ptx::fence_mbarrier_init();
  }
  if (plan.cluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  if (threadIdx.x >= 128 * kConsumers) {  // ------------------------------------------------------------ producer
    ptx::setmaxnreg_decrease<40>();
    if (threadIdx.x == 128 * kConsumers) {
      const int rank = plan.cluster > 1 ? int(ptx::cluster_cta_rank()) : 0;
      Ring<kStages> ring;
      for (int tile = 0; tile < tiles; ++tile) {
        const int64_t tile_id = first_id + int64_t(tile) * kTileN;
        const int chunks = int(min((end_id - tile_id + kChunk - 1) / kChunk, int64_t(kChunks)));
        for (int k = 0; k < k_tiles; ++k, ring.advance()) {
          ptx::mbarrier_wait(empty(ring.stage), ring.parity ^ 1);
          const uint32_t barrier = full(ring.stage);
          ptx::mbarrier_arrive_expect_tx(barrier, uint32_t((kTileM + chunks * kChunk) * kRowBytesK));
          ptx::tma_load_2d(ptx::smem_address(shared.stage[ring.stage].hidden), &hidden_map, barrier, k * kTileK,
                           first_row);
          const uint32_t weight = ptx::smem_address(shared.stage[ring.stage].weight);
          for (int c = rank; c < chunks; c += plan.cluster) {
            const uint32_t target = weight + uint32_t(c * kChunk * kRowBytesK);
            const int id = int(tile_id) + c * kChunk;
            if (plan.cluster > 1) {
              ptx::tma_load_2d_multicast(target, &weight_map, barrier, k * kTileK, id, 3);
            } else {
              ptx::tma_load_2d(target, &weight_map, barrier, k * kTileK, id);
            }
          }
        }
      }
    }
  } else {  // ------------------------------------------------------------------------------------------- consumers
    ptx::setmaxnreg_increase<232>();
    const int warpgroup = int(threadIdx.x) / 128, lane = int(threadIdx.x) % 32;
    const int my_row = first_row + warpgroup * 64 + int(threadIdx.x) % 128 / 32 * 16 + lane / 4;
    const bool has_rows = warpgroup * 64 < rows;  // the same for the whole warpgroup
    // Rows past the end repeat the last one: harmless, and not written.
    const int64_t row[2] = {min(int64_t(my_row), p.num_rows - 1), min(int64_t(my_row) + 8, p.num_rows - 1)};
    RowPair<kWantExtras> pair(p, row);
    const auto release = [&](int stage,
                             bool really) {  // one thread for each CTA of the cluster, which may be just this one
      const int cta = int(threadIdx.x) % 128;
      ptx::mbarrier_arrive_cluster_if(really && cta < plan.cluster, empty(stage), uint32_t(cta));
    };

    Ring<kStages> ring;
    float d[128];
    for (int tile = 0; tile < tiles; ++tile) {
      if (has_rows) {
#pragma unroll 1
        for (int k = 0; k < k_tiles; ++k, ring.advance()) {
          ptx::mbarrier_wait(full(ring.stage), ring.parity);
          const uint64_t a = ptx::wgmma_descriptor_k128(ptx::smem_address(shared.stage[ring.stage].hidden) +
                                                        uint32_t(warpgroup * 64 * kRowBytesK));
          const uint64_t b = ptx::wgmma_descriptor_k128(ptx::smem_address(shared.stage[ring.stage].weight));
          ptx::wgmma_fence();
#pragma unroll
          for (int step = 0; step < kTileK / 16; ++step)
            ptx::wgmma_k16<T, kTileN>(d, a + uint64_t(step * 2), b + uint64_t(step * 2), k > 0 || step > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();  // the stage before this one has been read
          release((ring.stage + kStages - 1) % kStages, k > 0);
        }
        ptx::wgmma_wait<0>();
        release((ring.stage + kStages - 1) % kStages, true);
        pair.reduce(d, p, row, first_id + int64_t(tile) * kTileN, end_id);
      } else {
#pragma unroll 1
        for (int k = 0; k < k_tiles; ++k, ring.advance()) {
          ptx::mbarrier_wait(full(ring.stage), ring.parity);
          release(ring.stage, true);
        }
      }
    }
    if (has_rows) {
      const RowRecords records = records_of(plan);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        RowState<kWantExtras>& state = pair.state[i];
        state.merge_leader(1);
        state.merge_leader(2);
        state.softmax.template merge_lanes<4>();
        const int64_t own = my_row + 8 * i;
        if (lane % 4 == 0 && own < p.num_rows) {
          static_cast<LeaderRecord*>(p.workspace)[own * records.leaders + slot] = state.leader_record();
          softmax_records(p.workspace, p.num_rows, records, own)[slot] = record_of(state.softmax);
        }
      }
    }
  }
  // No CTA leaves while its neighbour may still write into it or arrive at its barriers.
  __syncwarp();  // the barrier is for whole warps, and one lane of the producer comes late
  if (plan.cluster > 1) ptx::cluster_sync();
#endif
}

// The rows that are listed, one after the other. One CTA a row.
constexpr int kGatherThreads = 128;
__global__ __launch_bounds__(kGatherThreads) void illada_gather_rows_sm90(const uint4* source, int64_t source_stride,
                                                                          int64_t source_rows, const int32_t* rows,
                                                                          uint4* target, int width) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
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
  if (p.rows) {
    void* gathered = static_cast<char*>(s.workspace) + records_of(plan).bytes(s.num_rows);
    LaunchShape shape;
    shape.grid = dim3(unsigned(s.num_rows));
    shape.block = dim3(kGatherThreads);
    shape.dependent = true;
    launch_kernel(kOp, device, s.launch.stream, shape, illada_gather_rows_sm90, static_cast<const uint4*>(p.hidden),
                  p.hidden_row_stride / 8, p.num_tokens, p.rows, static_cast<uint4*>(gathered), int(p.width / 8));
    hidden = {gathered, s.dtype, s.num_rows, p.width, p.width};
  }
  const CUtensorMap hidden_map = tensor_map_k128(kOp, hidden, kTileM);
  const CUtensorMap weight_map =
      tensor_map_k128(kOp, {p.weight, s.dtype, s.vocab_size, p.width, p.weight_row_stride}, kChunk);
  LaunchShape shape;
  shape.grid = dim3(unsigned(plan.row_tiles * plan.slots));
  shape.block = dim3(kThreads);
  shape.smem_bytes = int(sizeof(SharedStorage)) + 1024;  // what is aligned by hand
  shape.cluster = plan.cluster;
  shape.dependent = true;
  launch_kernel(kOp, device, s.launch.stream, shape, illada_linear_sample_tokens_sm90<T, kWantExtras>, hidden_map,
                weight_map, s, plan, int((p.width + kTileK - 1) / kTileK));
  launch_sample_tokens_combine(s, device, records_of(plan));
}

template <typename T>
void launch(const LinearSampleTokensParams& p, const Device& device, const HeadPlan& plan) {
  wants_extras(p.sample) ? launch<T, true>(p, device, plan) : launch<T, false>(p, device, plan);
}

}  // namespace

void launch_linear_sample_tokens_sm90(const LinearSampleTokensParams& p, const Device& device, const HeadPlan& plan) {
  p.sample.dtype == DType::kBFloat16 ? launch<BFloat16>(p, device, plan) : launch<Half>(p, device, plan);
}

}  // namespace illada::remask
