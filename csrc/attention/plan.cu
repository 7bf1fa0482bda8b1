// Writes the plan of a pack: the work lists for all layers and both directions (plan.h has the layout).
//
//   CTA i has sequence i; one more CTA has the queries behind the last sequence:
//     if the pack may have key splits: choose their size (choose_split_tiles)
//     over all sequences: add up the items of those that come before sequence i in each list
//     write the sequence's lengths, its forward items and its backward items, side by side
//   CTA 0 also: look for keys that no sequence uses and for sequences without keys; write the header
//
// A pair (cost, index) has one place in an order, so every CTA finds the same lists. Nothing is sorted or exchanged,
// and nothing depends on which CTA is first. The grid depends on the number of sequences alone. Queries behind the last
// sequence are a part of their own, without keys: the kernels write zeros there, as for any queries without keys.
//
// Where tiles are so few that they may leave SMs idle, the keys of sequences are split. Every CTA tries all sizes of a
// key split and comes to the same one.
//
// Floor: the items, 32 bytes each, and S^2 / 2 comparisons, which are nothing up to some thousand sequences.
#include <algorithm>

#include "attention/launch.h"
#include "common/dependent_launch.h"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxSplitSizes = 2048;  // sizes of a key split that are tried, however long the keys are said to be
// What splits cost, in keys: an item more, and a launch that merges them.
constexpr int kItemKeys = 256, kMergeKeys = 640;

struct PlanArguments {
  const int32_t *cu_seqlens, *cu_seqlens_k, *seqused_k;
  int32_t* plan;
  int64_t rows, first_backward;  // in rows of the plan
  int32_t total_q, key_limit, num_sequences, num_kv_heads;
  int32_t max_forward, max_backward;  // what the plan has room for
  int32_t item_tokens, cluster, key_tile, sm_count;
  bool may_split;
  float item_cost, merge_cost;  // of kItemKeys, kMergeKeys, in key tiles
};

__device__ __forceinline__ int32_t ceil_div(int32_t x, int32_t y) { return int32_t((uint32_t(x) + y - 1) / y); }

// A sequence of the pack or, behind the last one, the queries that belong to no sequence.
struct Sequence {
  int32_t q_start, q_count, k_start, k_count;

  // Whatever stands in the lengths, ranges lie inside of the pack.
  __device__ __forceinline__ Sequence(const PlanArguments& a, int index) {
    q_start = min(max(a.cu_seqlens[index], 0), a.total_q);
    if (index == a.num_sequences) {
      q_count = a.total_q - q_start;
      k_start = k_count = 0;
      return;
    }
    q_count = min(max(a.cu_seqlens[index + 1], q_start), a.total_q) - q_start;
    k_start = min(max(a.cu_seqlens_k[index], 0), a.key_limit);
    k_count = min(max(a.cu_seqlens_k[index + 1], k_start), a.key_limit) - k_start;
    if (a.seqused_k) k_count = min(max(a.seqused_k[index], 0), k_count);
  }
};

// A sequence's part of the forward, with at most `split_tiles` key tiles in a key split.
struct ForwardShare {
  int32_t tiles, splits, split_keys;  // tiles of all key-value heads

  __device__ __forceinline__ ForwardShare(const PlanArguments& a, const Sequence& s, int split_tiles) {
    tiles = a.num_kv_heads * ceil_div(s.q_count, a.item_tokens);
    splits = 1;
    split_keys = s.k_count;
    if (!a.may_split) return;
    const int key_tiles = ceil_div(s.k_count, a.key_tile);
    if (key_tiles <= split_tiles) return;
    const int each = ceil_div(key_tiles, ceil_div(key_tiles, split_tiles));  // as even as whole tiles allow
    splits = ceil_div(key_tiles, each);
    if (splits > 1) split_keys = each * a.key_tile;
  }
  __device__ __forceinline__ int64_t items() const { return int64_t(tiles) * splits; }
  __device__ __forceinline__ int64_t slots() const { return splits > 1 ? items() : 0; }
};

// Returns the largest number of key tiles of a key split. The time of a size is that of the longest item or, if that is
// longer, of as many items of mean length as the busiest SM has: items that differ in length are dealt out evenly.
__device__ int choose_split_tiles(const PlanArguments& a) {
  __shared__ int32_t tiles[kSplitItems], key_tiles[kSplitItems];  // a sequence has a tile at least, or no part in this
  __shared__ int32_t max_key_tiles;
  __shared__ unsigned long long work, best;  // work: key tiles of all tiles
  if (threadIdx.x == 0) {
    max_key_tiles = 1;
    work = 0;
    best = ~0ull;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < a.num_sequences; i += kThreads) {
    const Sequence s(a, i);
    tiles[i] = a.num_kv_heads * ceil_div(s.q_count, a.item_tokens);
    key_tiles[i] = ceil_div(s.k_count, a.key_tile);
    if (tiles[i] == 0) continue;
    atomicMax(&max_key_tiles, key_tiles[i]);
    atomicAdd(&work, static_cast<unsigned long long>(tiles[i]) * key_tiles[i]);
  }
  __syncthreads();
  // As many lanes to a size as there are sequences, up to a warp.
  int lanes = 1;
  while (lanes < 32 && lanes < a.num_sequences) lanes *= 2;
  const int step = kThreads / lanes, last = max_key_tiles;
  const int grain = ceil_div(last, kMaxSplitSizes), sizes = ceil_div(last, grain);
  unsigned long long mine = ~0ull;
  for (int base = 1; base <= sizes; base += step) {
    const int number = base + int(threadIdx.x) / lanes, split_tiles = min(number * grain, last);
    int items = 0, slots = 0;
    for (int i = int(threadIdx.x) % lanes; i < a.num_sequences; i += lanes) {
      int splits = 1;
      if (key_tiles[i] > split_tiles) {
        splits = ceil_div(key_tiles[i], ceil_div(key_tiles[i], ceil_div(key_tiles[i], split_tiles)));
        splits = min(splits, kSplitSlots + 1);  // already too many: the sums stay small
        slots += tiles[i] * splits;
      }
      items += tiles[i] * splits;
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      items += __shfl_xor_sync(kFullWarp, items, mask);
      slots += __shfl_xor_sync(kFullWarp, slots, mask);
    }
    if (number > sizes || slots > kSplitSlots) continue;
    const float mean = __fdividef(float(work), float(max(items, 1))) + a.item_cost;
    const float longest = float(split_tiles) + a.item_cost, several = float(ceil_div(items, a.sm_count)) * mean;
    const unsigned long long cost = __float_as_uint(fmaxf(longest, several) + (slots ? a.merge_cost : 0));
    mine = min(mine, cost << 32 | (0xffffffffu - unsigned(split_tiles)));  // of equal ones the largest
  }
  if (mine != ~0ull) atomicMin(&best, mine);
  __syncthreads();
  return int(0xffffffffu - unsigned(best));
}

__device__ __forceinline__ void write_item(int32_t* items, int64_t index, const WorkItem& item) {
  int4* const at = reinterpret_cast<int4*>(items) + 2 * index;
  at[0] = make_int4(item.q_start, item.q_count, item.k_start, item.k_count);
  at[1] = make_int4(item.kv_head, item.split, item.splits, item.first_slot);
}

// What comes before a sequence: items of each list, slots, and (rank) longer sequences; and all items of each list.
// They have 64 bits, because overlapping lengths may add up to anything.
struct Sums {
  int64_t forward, slots, backward, rank, all_forward, all_backward;
};
constexpr int kSums = int(sizeof(Sums) / sizeof(int64_t));

// Adds the threads' shares of Sums to `word`: what stands before sequence `index` in each list, and the totals. The
// lists are ordered by cost, longest first, then by index.
__device__ __forceinline__ void add_up_lists(const PlanArguments& a, const Sequence& s, const ForwardShare& share,
                                             int split_tiles, int index, unsigned long long (&word)[kSums]) {
  Sums mine{};
#pragma unroll 1
  for (int i = threadIdx.x; i <= a.num_sequences; i += kThreads) {
    const Sequence other(a, i);
    const ForwardShare its_share(a, other, split_tiles);
    const auto is_before = [&](int32_t x, int32_t y) { return x > y || (x == y && i < index); };
    const int64_t backward =
        a.max_backward ? int64_t(a.num_kv_heads) * ceil_div(other.k_count, kBackwardKeys) : int64_t(0);
    if (is_before(its_share.split_keys, share.split_keys)) {
      mine.forward += its_share.items();
      mine.slots += its_share.slots();
    }
    if (is_before(other.q_count, s.q_count)) mine.backward += backward;
    if (is_before(other.k_count, s.k_count)) ++mine.rank;
    mine.all_forward += its_share.items();
    mine.all_backward += backward;
  }
  const int64_t words[kSums] = {mine.forward, mine.slots,       mine.backward,
                                mine.rank,    mine.all_forward, mine.all_backward};
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int64_t sum = warp_reduce<32>(words[i], [](int64_t x, int64_t y) { return x + y; });
    if (threadIdx.x % 32 == 0) atomicAdd(&word[i], static_cast<unsigned long long>(sum));
  }
}

// Writes the sequence's forward items, behind those of the sequences that come before it. A list that is full, because
// sequences overlap, takes no more.
__device__ __forceinline__ void write_forward_items(const PlanArguments& a, const Sequence& s,
                                                    const ForwardShare& share, const Sums& sums) {
  const int64_t forward = min(share.items(), a.max_forward - sums.forward);
  const int head_tiles = share.tiles / a.num_kv_heads;
  for (int i = threadIdx.x; i < forward; i += kThreads) {
    const int tile = i / share.splits, split = i - tile * share.splits;
    const int kv_head = tile / head_tiles, first = (tile - kv_head * head_tiles) * a.item_tokens;
    const int first_key = split * share.split_keys;
    write_item(a.plan + 4, sums.forward + i,
               {s.q_start + first, min(a.item_tokens, s.q_count - first), s.k_start + first_key,
                min(share.split_keys, s.k_count - first_key), kv_head, split, share.splits,
                share.splits > 1 ? int(sums.slots) + tile * share.splits : -1});
  }
}

// Writes the sequence's backward items: one for each key tile and key-value head.
__device__ __forceinline__ void write_backward_items(const PlanArguments& a, const Sequence& s, const Sums& sums) {
  const int key_tiles = ceil_div(s.k_count, kBackwardKeys);
  const int64_t backward = min(int64_t(a.num_kv_heads) * key_tiles, a.max_backward - sums.backward);
  for (int i = threadIdx.x; i < backward; i += kThreads) {
    const int kv_head = i / key_tiles, tile = i - kv_head * key_tiles, first = tile * kBackwardKeys;
    write_item(
        a.plan + 4 * a.first_backward, sums.backward + i,
        {s.q_start, s.q_count, s.k_start + first, min(kBackwardKeys, s.k_count - first), kv_head, tile, key_tiles, -1});
  }
}

__global__ __launch_bounds__(kThreads) void illada_attention_plan_sm80(const __grid_constant__ PlanArguments a,
                                                                       const __grid_constant__ DependentLaunch launch) {
  __shared__ int32_t keys, idle;  // in CTA 0: of all sequences, as far as 32 bits go; kIdleQueries
  __shared__ union {
    Sums sums;
    unsigned long long word[kSums];
  } shared;
  if (threadIdx.x < kSums) shared.word[threadIdx.x] = 0;
  if (threadIdx.x == 0) keys = idle = 0;
  wait_for_previous_kernel(launch);
  const int split_tiles = a.may_split ? choose_split_tiles(a) : 0;
  __syncthreads();

  const int index = int(blockIdx.x);
  const Sequence s(a, index);
  const ForwardShare share(a, s, split_tiles);
  add_up_lists(a, s, share, split_tiles, index, shared.word);
  if (index == 0) {
    for (int i = threadIdx.x; i < a.num_sequences; i += kThreads) {
      const Sequence other(a, i);
      atomicAdd(&keys, other.k_count);
      if (other.k_count == 0 && other.q_count) atomicOr(&idle, kIdleQueries);
    }
  }
  __syncthreads();
  const Sums& sums = shared.sums;
  if (index == 0 && threadIdx.x == 0)
    *reinterpret_cast<int4*>(a.plan) = make_int4(int(min(sums.all_forward, int64_t(a.max_forward))),
                                                 int(min(sums.all_backward, int64_t(a.max_backward))), a.num_sequences,
                                                 (keys != a.key_limit ? kIdleKeys : 0) | idle | a.cluster << 16);
  if (index < a.num_sequences && threadIdx.x == 0)
    reinterpret_cast<int4*>(a.plan)[a.rows - a.num_sequences + sums.rank] =
        make_int4(s.q_start, s.q_start + s.q_count, s.k_start, s.k_start + s.k_count);
  write_forward_items(a, s, share, sums);
  write_backward_items(a, s, sums);
}

}  // namespace

void launch_plan(const PlanParams& p, const Device& device, const Tiling& tiling) {
  const PackShape& s = p.shape;
  PlanArguments a{};
  a.cu_seqlens = p.cu_seqlens;
  a.cu_seqlens_k = p.cu_seqlens_k ? p.cu_seqlens_k : p.cu_seqlens;
  a.seqused_k = p.seqused_k;
  a.plan = p.plan;
  a.rows = plan_rows(s);
  a.first_backward = first_backward_row(s);
  a.total_q = int32_t(s.total_q);
  // Without a number of keys: nothing is known of other offsets than the queries'.
  a.key_limit = s.total_k >= 0 ? int32_t(s.total_k) : p.cu_seqlens_k ? INT32_MAX : int32_t(s.total_q);
  a.num_sequences = s.num_sequences;
  a.num_kv_heads = s.num_kv_heads;
  a.max_forward = int32_t(max_forward_items(s));
  a.max_backward = int32_t(max_backward_items(s));
  a.item_tokens = tiling.item_tokens();
  a.cluster = tiling.cluster;
  a.key_tile = tiling.key_tile;
  a.sm_count = device.sm_count;
  a.may_split = tiling.may_split;
  a.item_cost = float(kItemKeys) / float(tiling.key_tile);
  a.merge_cost = float(kMergeKeys) / float(tiling.key_tile);
  LaunchShape shape;
  shape.grid = dim3(unsigned(s.num_sequences + 1));
  shape.block = dim3(kThreads);
  shape.dependent = true;
  launch_kernel("attention_plan", device, p.launch.stream, shape, illada_attention_plan_sm80, a);
}

}  // namespace illada::attention
