// A tile of rows (queries of the heads of a group) against the keys of their sequence. Included by row_kernels_impl.h.
//
// The rows of a tile are the lanes of vectors: scores of a key, sums of a column of the output and the softmax's state
// are each kVectors vectors, so that nothing is added up across lanes. Keys and values are read where they are, an
// element for all rows at a time; queries are turned around on the way in, the output on the way out. Keys come in
// blocks of kKeys with the usual online softmax.
//
// Sums go over columns one after the other, and scores and lse are in nats: so they are, mostly to the bit, what
// torch's kernels make of the same numbers. Its backward makes the scores again and relies on lse for probabilities
// whose sum is 1; more exact scores here would make gradients worse where scores are large.
//
// Work: 4 rows keys D flop. The products hold 4 x kVectors sums in registers: 8 (4) loads for 16 (8) multiply-adds.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace illada::cpu::ILLADA_ISA {

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // what the registers hold four times
constexpr int kTile = kVectors * kLanes;
constexpr int kKeys = 64;
static_assert(kTile <= kMostTileRows);

// sums[m] += sum_k a[m * next + k * step] b[k]
template <int kSums, typename T>
inline void multiply_add(const T* a, int64_t next, int64_t step, int count, const float* b,
                         VecF (&sums)[kSums][kVectors]) {
  for (int k = 0; k < count; ++k) {
    VecF x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(b + k * kTile + v * kLanes);
    for (int m = 0; m < kSums; ++m) {
      const VecF y = splat(to_float(a[m * next + k * step]));
      for (int v = 0; v < kVectors; ++v) sums[m][v] += y * x[v];
    }
  }
}

// f(Int<4>, 0), f(Int<4>, 4), ..., and f(Int<1>, i) of those that are left.
template <int kValue>
struct Int {
  static constexpr int value = kValue;
};
template <typename F>
inline void in_fours(int count, F&& f) {
  int i = 0;
  for (; i + 4 <= count; i += 4) f(Int<4>{}, i);
  for (; i < count; ++i) f(Int<1>{}, i);
}

template <typename T>
void attend(const AttentionTile& a) {
  alignas(64) float q[kMostHeadDim * kTile], out[kMostHeadDim * kTile], scores[kKeys * kTile], row_sum[kTile];
  const int dim = a.head_dim;
  const auto token_of = [&](int row) { return (a.first_row + row) / a.group; };
  const auto head_of = [&](int row) { return (a.first_row + row) % a.group; };
  for (int row = 0; row < kTile; ++row) {
    const bool is_real = row < a.rows;
    const T* const x =
        static_cast<const T*>(a.q) + (is_real ? token_of(row) * a.q_token_stride + head_of(row) * a.q_head_stride : 0);
    for (int d = 0; d < dim; ++d) q[d * kTile + row] = is_real ? to_float(x[d]) : 0.0f;
  }
  std::fill_n(out, dim * kTile, 0.0f);
  VecF reference[kVectors], sum[kVectors]{};
  for (VecF& x : reference) x = splat(-kInfinity);

  for (int first = 0; first < a.keys; first += kKeys) {
    const int count = std::min(a.keys - first, kKeys);
    const T* const k = static_cast<const T*>(a.k) + first * a.k_token_stride;
    const T* const v = static_cast<const T*>(a.v) + first * a.v_token_stride;
    VecF top[kVectors], shrink[kVectors];
    for (int i = 0; i < kVectors; ++i) top[i] = reference[i];
    in_fours(count, [&](auto number, int key) {
      VecF s[number.value][kVectors]{};
      multiply_add(k + key * a.k_token_stride, a.k_token_stride, 1, dim, q, s);
      for (int m = 0; m < number.value; ++m)
        for (int i = 0; i < kVectors; ++i) {
          s[m][i] *= a.softmax_scale;
          store(scores + (key + m) * kTile + i * kLanes, s[m][i]);
          top[i] = max(s[m][i], top[i]);
        }
    });
    for (int i = 0; i < kVectors; ++i) {
      shrink[i] = exp2((reference[i] - top[i]) * float(kLog2e));
      sum[i] *= shrink[i];
      reference[i] = top[i];
    }
    for (int key = 0; key < count; ++key)
      for (int i = 0; i < kVectors; ++i) {
        float* const at = scores + key * kTile + i * kLanes;
        const VecF p = exp2((load(at) - top[i]) * float(kLog2e));
        store(at, p);
        sum[i] += p;
      }
    in_fours(dim, [&](auto number, int d) {
      VecF x[number.value][kVectors];
      for (int m = 0; m < number.value; ++m)
        for (int i = 0; i < kVectors; ++i) x[m][i] = load(out + (d + m) * kTile + i * kLanes) * shrink[i];
      multiply_add(v + d, 1, a.v_token_stride, count, scores, x);
      for (int m = 0; m < number.value; ++m)
        for (int i = 0; i < kVectors; ++i) store(out + (d + m) * kTile + i * kLanes, x[m][i]);
    });
  }

  for (int i = 0; i < kVectors; ++i) store(row_sum + i * kLanes, sum[i]);
  for (int row = 0; row < a.rows; ++row) {
    const float inverse = a.keys ? 1.0f / row_sum[row] : 0.0f;
    T* const to = static_cast<T*>(a.out) + (token_of(row) * a.num_heads + head_of(row)) * dim;
    for (int d = 0; d < dim; ++d) store_scalar(to + d, out[d * kTile + row] * inverse);
    a.lse[head_of(row) * a.total_q + token_of(row)] =
        float(double(reference[row / kLanes][row % kLanes]) + std::log(row_sum[row]));
  }
}

}  // namespace illada::cpu::ILLADA_ISA
