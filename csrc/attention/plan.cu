// The work lists of a pack, from its lengths on the device.
//
// Every CTA reads all sequences, a chunk at a time through shared memory, and for each of its own kThreads sequences
// counts what comes before: the rank among the sequences, and the items of those that are longer. With that it knows
// where its own items go, and writes them, all threads to one sequence after the other. Nothing is exchanged between
// CTAs, and nothing depends on who is first: the plan is a function of the lengths. S^2 / kThreads comparisons a CTA;
// 16 bytes read a sequence and CTA, 32 bytes written an item.
#include "attention/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

constexpr int kThreads = 256;

// The numbers of PackShape, Tiling and Device that the kernel needs.
struct PlanArguments {
  const int32_t *cu_seqlens, *cu_seqlens_k, *seqused_k;
  int32_t* plan;
  int32_t num_sequences, total_q, total_k, num_kv_heads;  // total_k: -1 where it is not known
  int32_t item_tokens, key_tile, sm_count;
  int32_t max_forward, max_backward, rows;  // capacities; rows of the plan
  bool may_split;
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One sequence, its lengths cut to what is there.
struct Sequence {
  int32_t q_start, q_count, k_start, k_count;

  __device__ __forceinline__ int key_tiles(const PlanArguments& a) const { return ceil_div(k_count, a.key_tile); }
  __device__ __forceinline__ int q_tiles(const PlanArguments& a) const { return ceil_div(q_count, a.item_tokens); }
  __device__ __forceinline__ int backward_items(const PlanArguments& a) const {
    return a.max_backward ? a.num_kv_heads * ceil_div(k_count, kBackwardKeys) : 0;
  }
};

__device__ __forceinline__ Sequence read_sequence(const PlanArguments& a, int index) {
  const auto cut = [](int x, int low, int high) { return min(max(x, low), high); };
  Sequence s;
  s.q_start = cut(a.cu_seqlens[index], 0, a.total_q);
  s.q_count = cut(a.cu_seqlens[index + 1], s.q_start, a.total_q) - s.q_start;
  const int32_t* starts = a.cu_seqlens_k ? a.cu_seqlens_k : a.cu_seqlens;
  const int limit = a.total_k >= 0 ? a.total_k : 0x7fffffff;
  s.k_start = cut(starts[index], 0, limit);
  s.k_count = cut(starts[index + 1], s.k_start, limit) - s.k_start;
  if (a.seqused_k) s.k_count = cut(a.seqused_k[index], 0, s.k_count);
  return s;
}

// How the keys of a sequence's tiles are split: `pieces` parts of `per` key tiles, the last one with less.
struct Split {
  int pieces = 1, per;
  __device__ __forceinline__ Split(int key_tiles, int chunk) {
    per = max(key_tiles, 1);
    if (chunk > 0 && key_tiles > chunk) {
      per = ceil_div(key_tiles, ceil_div(key_tiles, chunk));
      pieces = ceil_div(key_tiles, per);
    }
  }
};

// What decides a sequence's place: cost of an item, items and slots of each of the lists.
struct Entry {
  int32_t cost, items, slots, backward_cost, backward_items, keys;
};
__device__ __forceinline__ Entry entry_of(const PlanArguments& a, const Sequence& s, int chunk) {
  const Split split(s.key_tiles(a), chunk);
  Entry e;
  e.cost = split.pieces > 1 ? split.per * a.key_tile : s.k_count;
  e.items = a.num_kv_heads * s.q_tiles(a) * split.pieces;
  e.slots = split.pieces > 1 ? e.items : 0;
  e.backward_cost = s.q_count;
  e.backward_items = s.backward_items(a);
  e.keys = s.k_count;
  return e;
}
// Does (cost, index) come before (other, other_index)?
__device__ __forceinline__ bool is_before(int cost, int index, int other, int other_index) {
  return cost > other || (cost == other && index < other_index);
}

// The chunk, in key tiles, that keys are split by: the one that keeps the busiest SM the shortest. A CTA's beginning
// and end cost about as much as kOverhead key tiles, a kernel to combine as much again. Threads take turns at the
// chunks.
__device__ int choose_chunk(const PlanArguments& a, int2 (&best_of_warp)[kThreads / 32], int& longest) {
  constexpr int kOverhead = 2;
  if (threadIdx.x == 0) longest = 1;
  __syncthreads();
  for (int i = int(threadIdx.x); i < a.num_sequences; i += kThreads)
    atomicMax(&longest, read_sequence(a, i).key_tiles(a));
  __syncthreads();
  int2 best = {0x7fffffff, 0};  // cost, chunk
  for (int chunk = 1 + int(threadIdx.x); chunk <= longest; chunk += kThreads) {
    int items = 0, slots = 0;
    for (int i = 0; i < a.num_sequences; ++i) {
      const Entry e = entry_of(a, read_sequence(a, i), chunk);
      items += e.items;
      slots += e.slots;
    }
    const int cost = ceil_div(items, a.sm_count) * (chunk + kOverhead) + (slots ? kOverhead : 0);
    if (slots <= kSplitSlots && (cost < best.x || (cost == best.x && chunk > best.y))) best = {cost, chunk};
  }
  const auto better = [](int2 x, int2 y) { return x.x < y.x || (x.x == y.x && x.y > y.y) ? x : y; };
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2)
    best = better(best, {__shfl_xor_sync(kFullWarp, best.x, lanes), __shfl_xor_sync(kFullWarp, best.y, lanes)});
  if (threadIdx.x % 32 == 0) best_of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) best = better(best, best_of_warp[w]);
  return best.y;
}

__device__ __forceinline__ void write_item(int32_t* plan, int row, const WorkItem& item) {
  int4* target = reinterpret_cast<int4*>(plan) + row;
  target[0] = make_int4(item.q_start, item.q_count, item.k_start, item.k_count);
  target[1] = make_int4(item.kv_head, item.piece, item.pieces, item.first_slot);
}

__global__ __launch_bounds__(kThreads) void illada_attention_plan_sm80(const __grid_constant__ PlanArguments a) {
  // Where a sequence's part of each list begins.
  struct Place {
    Sequence sequence;
    int32_t rank, item, slot, backward_item;
  };
  __shared__ Entry entries[kThreads];
  __shared__ Place places[kThreads];
  __shared__ int2 best_of_warp[kThreads / 32];
  __shared__ int longest;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  const int first = int(blockIdx.x) * kThreads, own = first + int(threadIdx.x);
  const int chunk = a.may_split ? choose_chunk(a, best_of_warp, longest) : 0;
  Place place{};
  Entry mine{};
  if (own < a.num_sequences) {
    place.sequence = read_sequence(a, own);
    mine = entry_of(a, place.sequence, chunk);
  }
  int64_t items = 0, backward_items = 0;  // of all sequences
  for (int begin = 0; begin < a.num_sequences; begin += kThreads) {
    const int count = min(a.num_sequences - begin, kThreads);
    __syncthreads();
    if (int(threadIdx.x) < count) entries[threadIdx.x] = entry_of(a, read_sequence(a, begin + int(threadIdx.x)), chunk);
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const Entry e = entries[i];
      items += e.items;
      backward_items += e.backward_items;
      place.rank += is_before(e.keys, begin + i, mine.keys, own);
      if (is_before(e.cost, begin + i, mine.cost, own)) {
        place.item += e.items;
        place.slot += e.slots;
      }
      if (is_before(e.backward_cost, begin + i, mine.backward_cost, own)) place.backward_item += e.backward_items;
    }
  }
  places[threadIdx.x] = place;
  __syncthreads();

  if (own == 0)
    *reinterpret_cast<int4*>(a.plan) = make_int4(int(min(items, int64_t(a.max_forward))),
                                                 int(min(backward_items, int64_t(a.max_backward))), a.num_sequences, 0);
  if (own < a.num_sequences) {
    const Sequence& s = place.sequence;
    reinterpret_cast<int4*>(a.plan)[a.rows - a.num_sequences + place.rank] =
        make_int4(s.q_start, s.q_start + s.q_count, s.k_start, s.k_start + s.k_count);
  }
  for (int i = 0; i < min(a.num_sequences - first, kThreads); ++i) {
    const Place& p = places[i];
    const Sequence& s = p.sequence;
    const Split split(s.key_tiles(a), chunk);
    const int tiles = s.q_tiles(a), per_head = tiles * split.pieces;
    for (int n = int(threadIdx.x); n < a.num_kv_heads * per_head; n += kThreads) {
      const int tile = n % per_head / split.pieces, token = tile * a.item_tokens;
      WorkItem item;
      item.kv_head = n / per_head;
      item.piece = n % split.pieces;
      item.pieces = split.pieces;
      item.first_slot = split.pieces > 1 ? p.slot + n - item.piece : -1;
      item.q_start = s.q_start + token;
      item.q_count = min(s.q_count - token, a.item_tokens);
      const int key = item.piece * split.per * a.key_tile;
      item.k_start = s.k_start + key;
      item.k_count = split.pieces > 1 ? min(s.k_count - key, split.per * a.key_tile) : s.k_count;
      // Lengths that overlap, which a correct caller does not have, may make more items than there is room for.
      if (uint32_t(p.item + n) < uint32_t(a.max_forward)) write_item(a.plan, 1 + 2 * (p.item + n), item);
    }
    const int key_blocks = a.max_backward ? ceil_div(s.k_count, kBackwardKeys) : 0;
    for (int n = int(threadIdx.x); n < a.num_kv_heads * key_blocks; n += kThreads) {
      const int key = n % key_blocks * kBackwardKeys;
      const WorkItem item{s.q_start, s.q_count, s.k_start + key, min(s.k_count - key, kBackwardKeys), n / key_blocks, 0,
                          1,         -1};
      if (uint32_t(p.backward_item + n) < uint32_t(a.max_backward))
        write_item(a.plan, 1 + 2 * (a.max_forward + p.backward_item + n), item);
    }
  }
}

}  // namespace

void launch_plan(const PlanParams& p, const Device& device, const Tiling& tiling) {
  PlanArguments a{};
  a.cu_seqlens = p.cu_seqlens;
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.seqused_k = p.seqused_k;
  a.plan = p.plan;
  a.num_sequences = p.shape.num_sequences;
  a.total_q = int32_t(p.shape.total_q);
  a.total_k = int32_t(p.shape.total_k);
  a.num_kv_heads = p.shape.num_kv_heads;
  a.item_tokens = tiling.item_tokens();
  a.key_tile = tiling.key_tile;
  a.sm_count = device.sm_count;
  a.max_forward = int32_t(max_forward_items(p.shape));
  a.max_backward = int32_t(max_backward_items(p.shape));
  a.rows = int32_t(plan_rows(p.shape));
  a.may_split = tiling.may_split;
  LaunchShape shape;
  shape.grid = dim3(unsigned(std::max(1, (a.num_sequences + kThreads - 1) / kThreads)));
  shape.block = dim3(kThreads);
  shape.dependent = true;
  launch_kernel("attention_plan", device, p.launch.stream, shape, illada_attention_plan_sm80, a);
}

}  // namespace illada::attention
