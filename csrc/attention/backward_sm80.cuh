// Attention backward on sm_80 and on GPUs without a specialised kernel. One file per head dim includes this file. There
// are two kernels. Neither uses atomics, so that every sum has a fixed order:
//
//   keys      A CTA has 64 keys (128 at D 64) of a backward item. It walks over all rows (tokens x heads of the
//             group) of their sequence and computes dk and dv with 4 products.
//   queries   A CTA has 64 or 128 rows of a forward item. It walks over all keys and computes dq with 3 products.
//
//             reads once       walks over          keeps in registers           writes once
//   keys      its k and v      tiles of q, dout    k, v, sums of dk and dv      dk, dv
//   queries   its q and dout   tiles of k, v       q, dout, sums of dq          dq
//
// The two kernels mirror each other:
//
//   choose the CTA's part of an item (open_keys, open_queries)
//   load the CTA's own operands (keys: k and v; queries: q and dout) to registers, 16 or 32 rows per warp or team
//   for each tile of the other two operands, 32 or 64 rows:
//     wait for the tile (one barrier) and start the copies of the next one (cp.async, ring of two stages)
//     for each step of 16 rows of the tile:
//       s and dp (multiply_pair; with two slices add_other_slice); p and ds from them (weigh_rows, weigh_keys)
//       keys: dv += p^T dout, dk += ds^T q      queries: dq += ds k      (add_product)
//   store the sums (store_keys, store_queries)
//
// Schedule of `keys` for one warp, with two steps of 16 rows per tile. Sj: s and dp of step j; ej: p and ds from them;
// Aj: dv and dk += the products with them; B: a barrier of all threads, before which (but for the second B) each thread
// waits for the copies that the next phase reads.
//
//                     time ->
// copies to stage 0   k |         | q0 dout0                                        | q2 dout2
// copies to stage 1   v           |            | q1 dout1                           |
// barriers              B         B  B         B                                    B
// tensor cores                                   [S0]    [A0][S1]    [A1]             [S2]    [A2][S3]    [A3]
// other units             [load k]    [load v]       [e0]        [e1]                     [e2]        [e3]
//
// A warp waits at B for the copies of all threads and for the slowest warp of its CTA; the two warps of a team also
// wait for each other in add_other_slice. No CTA waits for another: `queries` sees all keys, so dq needs no sum over
// CTAs. One warp alone leaves the tensor cores idle at each e. The SM's other warps, of a second CTA too, use them.
//
// The own operands and the sums stay in registers. The accumulators of s and dp have the layout of the A operands p and
// ds of the next products. Only the tiles are therefore ever in shared memory. A stage is as large as an operand, and
// the CTA's own operands arrive through the stages.
//
// n keys and m rows take 14 n m D flop. 4 of these 14 compute s and dp a second time, which is the price of a fixed
// order. The kernels read and write 6 T H D + 8 Tk G D bytes of memory, each element once. They are bound by the tensor
// cores, and at D 128 equally by shared memory: 512 bytes of ldmatrix take 4 cycles of it and feed 4 cycles of products
// (8 at D 64, where a warp has twice as many rows). While one CTA computes exponentials, others compute products. An SM
// holds two CTAs, or three of `queries` at D 128. Tiles come from the L2 cache at 8 to 21 bytes per cycle and SM.
//
// Registers limit the tiles: a lane of `keys` holds 128 registers of sums and 64 of operands. Values that are cheap to
// compute again (all that follow from the thread index and the item) are not kept over a step.
//
// D 96 has the tiles of D 128, with 96 registers of sums and 48 of operands. At D 256 these would be 256 and 128, so a
// team of two warps shares 16 rows: each warp has 128 columns of the operands and the sums (a slice). s and dp are sums
// over all columns. The two warps therefore exchange the sums over their slices, in fp32, at every step of 16 rows:
//
//   warp 0   s, dp of columns 0-127   | write buffer i % 2 | team's barrier | add the other's | dv, dk 0-127
//   warp 1   s, dp of columns 128-255 | write buffer i % 2 | team's barrier | add the other's | dv, dk 128-255
//
// a + b and b + a are the same bits, so both warps continue with the same p and ds. Beside 16 KB of ldmatrix per step
// (`queries`: 12 KB), a warp writes and reads 2 KB each. Shared memory is 97 KB: 64 for the ring, 32 for these sums. An
// SM holds one CTA of eight warps. `queries` does the same with dq.
//
//   backward_shared_sm80.cuh    sizes, arguments, shared memory; copies and products of both kernels
//   backward_keys_sm80.cuh      the keys kernel
//   backward_queries_sm80.cuh   the queries kernel
#pragma once

#include <cmath>

#include "attention/backward_keys_sm80.cuh"
#include "attention/backward_queries_sm80.cuh"
#include "attention/backward_shared_sm80.cuh"
#include "attention/launch.h"
#include "attention/tiles_sm80.cuh"
#include "attention/traits.h"
#include "common/dtype.cuh"

namespace illada::attention {
namespace {

template <typename T, int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling) {
  constexpr const char* kOp = "varlen_attention_backward";
  using Tiles = BackwardTiles<kHeadDim>;
  const PackShape& s = p.shape;
  BackwardArguments a{};
  a.plan = p.plan;
  a.first_backward_row = first_backward_row(s);
  a.q = p.q.data;
  a.dout = p.dout.data;
  a.k = p.k.data;
  a.v = p.v.data;
  a.q_token_bytes = p.q.token_stride * 2;
  a.q_head_bytes = p.q.head_stride * 2;
  a.dout_token_bytes = p.dout.token_stride * 2;
  a.dout_head_bytes = p.dout.head_stride * 2;
  a.k_token_bytes = p.k.token_stride * 2;
  a.k_head_bytes = p.k.head_stride * 2;
  a.v_token_bytes = p.v.token_stride * 2;
  a.v_head_bytes = p.v.head_stride * 2;
  a.rows = scratch_of(p, {}).rows;
  a.dq = p.dq;
  a.dk = p.dk;
  a.dv = p.dv;
  a.total_q = int32_t(s.total_q);
  a.num_heads = s.num_heads;
  a.num_kv_heads = s.num_kv_heads;
  a.group = group_of(s);
  a.own_tokens = tiling.item_tokens() * Tiles::kOwn / Tiles::kItemRows;
  a.walk_tokens = Copier<kHeadDim, Tiles::kThreads>::kRows / a.group;
  a.walk_heads = Copier<kHeadDim, Tiles::kThreads>::kRows % a.group;
  a.scale = p.softmax_scale;
  a.scale_log2 = p.softmax_scale * float(M_LOG2E);
  // Items are sorted by length, so CTAs start in that order. CTAs without an item exit at once.
  const auto launch = [&](auto kernel, int64_t items, int item_rows) {
    LaunchShape shape;
    shape.grid = dim3(unsigned(items * (item_rows / Tiles::kOwn)));
    shape.block = dim3(Tiles::kThreads);
    shape.smem_bytes = int(sizeof(BackwardStorage<kHeadDim>));
    shape.dependent = true;
    launch_kernel(kOp, device, p.launch.stream, shape, kernel, a);
  };
  launch(illada_attention_backward_keys_sm80<T, kHeadDim>, max_backward_items(s), kBackwardKeys);
  launch(illada_attention_backward_queries_sm80<T, kHeadDim>, max_forward_items(s), Tiles::kItemRows);
}

}  // namespace

template <int kHeadDim>
void launch_backward_sm80(const BackwardParams& p, const Device& device, const Tiling& tiling) {
  p.dtype == DType::kBFloat16 ? launch_backward<BFloat16, kHeadDim>(p, device, tiling)
                              : launch_backward<Half, kHeadDim>(p, device, tiling);
}

}  // namespace illada::attention
