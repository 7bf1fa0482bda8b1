// Attention of a tile of rows (queries of the heads of a group) against the keys of their sequence.
// row_kernels_impl.h includes this file.
//
// The rows of a tile are the lanes of vectors. The scores of a key, the sums of a column of the output and the
// softmax's state are kVectors vectors each, so that no sum crosses lanes. Keys and values are read in place, one
// element for all rows at a time. Queries are transposed on input, the output on output. Keys come in blocks of kKeys
// with the usual online softmax:
//
//   transpose q of the tile
//   for each block of kKeys keys:
//     s = q k^T, scaled; raise each row's reference to its largest score; rescale sums
//     p = exp(s - reference); row sums += p; output sums += p v
//   out = output sums / row sums, transposed; lse = reference + log(row sums)
//
// Sums run over columns in order, and scores and lse are in nats. They therefore match, mostly to the bit, the results
// of torch's kernels for the same numbers. A backward computes the scores again and relies on lse for probabilities
// that sum to 1. More exact scores here would make gradients worse where scores are large.
//
// Work: 4 rows keys D flop. The products hold 4 x kVectors sums in registers: 8 (4) loads for 16 (8) multiply-adds. A
// tile of fewer rows has fewer vectors and then 8 sums of each, so that enough operations are in flight.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace illada::cpu::ILLADA_ISA {

constexpr int kMaxVectors = kLanes == 16 ? 4 : 2;  // most vectors of a tile; registers hold 4 sums of each
constexpr int kTileRows = kMaxVectors * kLanes;
constexpr int kKeys = 64;
static_assert(kTileRows <= kMaxTileRows);
// Number of sums of `vectors` vectors each: as many as the registers hold, or enough to keep the units busy.
constexpr int sums_of(int vectors) { return 2 * vectors <= kMaxVectors ? 8 : 4; }

// sums[m] += sum_k a[m * next + k * step] b[k * pitch]
template <int kSums, int kVectors, typename T>
inline void multiply_add(const T* a, int64_t next, int64_t step, int count, const float* b, int64_t pitch,
                         VecF (&sums)[kSums][kVectors]) {
  for (int k = 0; k < count; ++k) {
    VecF x[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) x[v] = load(b + k * pitch + v * kLanes);
    for (int m = 0; m < kSums; ++m) {
      const VecF y = splat(to_float(a[m * next + k * step]));
      for (int v = 0; v < kVectors; ++v) sums[m][v] += y * x[v];
    }
  }
}

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};
// Calls f(Int<kMany>, first), f(Int<kMany>, first + kMany), ..., then f for the rest in powers of two.
template <int kMany, typename F>
inline void many_at_a_time(int count, F&& f, int first = 0) {
  for (; first + kMany <= count; first += kMany) f(Int<kMany>{}, first);
  if constexpr (kMany > 1) many_at_a_time<(kMany > 4 ? 4 : kMany / 2)>(count, f, first);
}

// Returns 2^x, and 0 where exp2 would return its minimum of 2^-126. A score of -inf must give exactly 0, because a
// remainder would count beside large values.
inline VecF exp2_or_0(VecF x) { return x < -126.0f ? VecF{} : exp2(x); }

template <int kVectors, typename T>
void attend_rows(const AttentionTile& a) {
  constexpr int kTile = kVectors * kLanes, kSums = sums_of(kVectors);
  alignas(64) float q[kMaxHeadDim * kTile], out[kMaxHeadDim * kTile], scores[kKeys * kTile], row_sum[kTile];
  const int dim = a.head_dim, whole_dim = dim - dim % kLanes;  // part of a row that whole vectors cover
  const auto token_of = [&](int row) { return (a.first_row + row) / a.group; };
  const auto head_of = [&](int row) { return (a.first_row + row) % a.group; };
  for (int first = 0; first < kTile; first += kLanes) {
    const T* from[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int row = std::min(first + i, a.rows - 1);  // lanes past the last row are never read
      from[i] = static_cast<const T*>(a.q) + token_of(row) * a.q_token_stride + head_of(row) * a.q_head_stride;
    }
    for (int d = 0; d < whole_dim; d += kLanes) {
      VecF square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(from[i] + d);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(q + (d + i) * kTile + first, square[i]);
    }
    for (int d = whole_dim; d < dim; ++d)
      for (int i = 0; i < kLanes; ++i) q[d * kTile + first + i] = to_float(from[i][d]);
  }
  std::fill_n(out, dim * kTile, 0.0f);
  VecF reference[kVectors], sum[kVectors]{};
  for (VecF& x : reference) x = splat(-kLargest);  // finite, so that rows with only -inf do not compute -inf - -inf

  for (int first = 0; first < a.keys; first += kKeys) {
    const int count = std::min(a.keys - first, kKeys);
    const T* const k = static_cast<const T*>(a.k) + first * a.k_token_stride;
    const T* const v = static_cast<const T*>(a.v) + first * a.v_token_stride;
    VecF top[kVectors], shrink[kVectors];
    for (int i = 0; i < kVectors; ++i) top[i] = reference[i];
    many_at_a_time<kSums>(count, [&](auto number, int key) {
      VecF s[number.value][kVectors]{};
      multiply_add(k + key * a.k_token_stride, a.k_token_stride, 1, dim, q, kTile, s);
      for (int m = 0; m < number.value; ++m)
        for (int i = 0; i < kVectors; ++i) {
          s[m][i] *= a.softmax_scale;
          store(scores + (key + m) * kTile + i * kLanes, s[m][i]);
          top[i] = max(s[m][i], top[i]);
        }
    });
    for (int i = 0; i < kVectors; ++i) {
      shrink[i] = exp2_or_0((reference[i] - top[i]) * float(kLog2e));
      sum[i] *= shrink[i];
      reference[i] = top[i];
    }
    for (int key = 0; key < count; ++key)
      for (int i = 0; i < kVectors; ++i) {
        float* const at = scores + key * kTile + i * kLanes;
        const VecF p = exp2_or_0((load(at) - top[i]) * float(kLog2e));
        store(at, p);
        sum[i] += p;
      }
    many_at_a_time<kSums>(dim, [&](auto number, int d) {
      VecF x[number.value][kVectors];
      for (int m = 0; m < number.value; ++m)
        for (int i = 0; i < kVectors; ++i) x[m][i] = load(out + (d + m) * kTile + i * kLanes) * shrink[i];
      multiply_add(v + d, 1, a.v_token_stride, count, scores, kTile, x);
      for (int m = 0; m < number.value; ++m)
        for (int i = 0; i < kVectors; ++i) store(out + (d + m) * kTile + i * kLanes, x[m][i]);
    });
  }

  for (int i = 0; i < kVectors; ++i) store(row_sum + i * kLanes, sum[i]);
  for (int first = 0; first < a.rows; first += kLanes) {
    const int count = std::min(a.rows - first, kLanes);
    T* to[kLanes];
    float inverse[kLanes];
    for (int i = 0; i < count; ++i) {
      const int64_t token = token_of(first + i), head = head_of(first + i);
      to[i] = static_cast<T*>(a.out) + (token * a.num_heads + head) * dim;
      const float total = row_sum[first + i];  // 0 where all scores are -inf
      inverse[i] = a.keys == 0 ? 0.0f : total == 0.0f ? kNaN : 1.0f / total;
      a.lse[head * a.total_q + token] = float(double(reference[first / kLanes][i]) + std::log(total));
    }
    for (int d = 0; d < whole_dim; d += kLanes) {
      VecF square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(out + (d + i) * kTile + first);
      transpose(square);
      for (int i = 0; i < count; ++i) store(to[i] + d, square[i] * inverse[i]);
    }
    for (int d = whole_dim; d < dim; ++d)
      for (int i = 0; i < count; ++i) store_scalar(to[i] + d, out[d * kTile + first + i] * inverse[i]);
  }
}

template <typename T>
void attend(const AttentionTile& a) {
  const int vectors = (a.rows + kLanes - 1) / kLanes;
  if (vectors == 1) return attend_rows<1, T>(a);
  if constexpr (kMaxVectors == 4) {
    if (vectors == 3) return attend_rows<3, T>(a);
    if (vectors == 4) return attend_rows<4, T>(a);
  }
  attend_rows<2, T>(a);
}

}  // namespace illada::cpu::ILLADA_ISA
