// Gradients of a block of rows against blocks of keys. row_kernels_impl.h includes this file.
//
//   s = scale q k^T,   p = exp(s - lse),   ds = p (dout v^T - c),   c = dout . out - dlse of each row,
//   dv = p^T dout,     dk = scale ds^T q,  dq = scale ds k.
//
// Rows are the lanes of p and ds, as in attention_impl.h. The scores equal those of attention_impl.h to the bit:
// products of an element of a key with all rows, one after the other. A row's lse, c and softmax therefore need no sums
// across lanes. Columns of the head dim are the lanes of dq, dk and dv. Only q and dout are needed in both layouts;
// nothing else is transposed.
//
//   for each block of kGradientRows rows of the sequence:
//     load q and dout in both layouts; compute c
//     for each block of kGradientKeys keys:
//       compute p and ds; dv += p^T dout; dk += ds^T q; dq += ds k
//     store dq, which is complete
//   store dk and dv, which scratch sums until the last row
//
// Every sum is in the order of rows or keys, for any combination of requested gradients.
//
// Work: 10 rows keys D flop in five products, and an exponential for each row and key. A block of rows reads 3 rows D
// elements and writes rows D elements of memory. It also reads and writes 4 keys D floats, which the second-level cache
// holds up to some thousand keys: 64 rows have 2.5 x 64 flop for each of these bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/attention_impl.h"
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace illada::cpu::ILLADA_ISA {

static_assert(kGradientRows % kTileRows == 0);

// From this value on, the last bit of lse is so large that probabilities do not sum to 1.
constexpr float kLargestExactLse = 1024.0f;

struct Scratch {
  Scratch(float* from, int head_dim, int64_t keys) : pitch(gradient_pitch(head_dim)) {
    const auto take = [&](int64_t count) { return std::exchange(from, from + count); };
    q = take(kGradientRows * pitch);
    dout = take(kGradientRows * pitch);
    dq = take(kGradientRows * pitch);
    k = take(kGradientKeys * pitch);
    v = take(kGradientKeys * pitch);
    dk = take(keys * pitch);
    dv = take(keys * pitch);
    q_lanes = take(int64_t(kGradientRows) * head_dim);
    dout_lanes = take(int64_t(kGradientRows) * head_dim);
    p = take(int64_t(kGradientKeys) * kGradientRows);
    ds = take(int64_t(kGradientKeys) * kGradientRows);
    reference = take(kGradientRows);
    log_sum = take(kGradientRows);
    c = take(kGradientRows);
  }
  int64_t pitch;
  float *q, *dout, *dq;            // [rows, pitch]
  float *k, *v, *dk, *dv;          // [keys, pitch]
  float *q_lanes, *dout_lanes;     // [strips of rows, head dim, rows of the strip]
  float *p, *ds;                   // [keys, kGradientRows]
  float *reference, *log_sum, *c;  // per row; lse is the sum of the first two
};

// Calls f(Int<vectors>, first) for strips of `lanes`, each of at most kMaxVectors vectors. The last strip may extend
// beyond `lanes`.
template <typename F>
inline void strips(int lanes, F&& f) {
  constexpr int kStrip = kMaxVectors * kLanes;
  int first = 0;
  for (; first + kStrip <= lanes; first += kStrip) f(Int<kMaxVectors>{}, first);
  const int left = (lanes - first + kLanes - 1) / kLanes;
  if (left == 1) f(Int<1>{}, first);
  if constexpr (kMaxVectors == 4) {
    if (left == 2) f(Int<2>{}, first);
    if (left == 3) f(Int<3>{}, first);
    if (left == 4) f(Int<4>{}, first);
  } else {
    if (left == 2) f(Int<2>{}, first);
  }
}

// to[m] (+)= sum_k a[m * next + k * step] b[k], for `dim` columns
inline void add_product(int many, int count, const float* a, int64_t next, int64_t step, const float* b, int dim,
                        float* to, int64_t pitch, bool add) {
  strips(dim, [&](auto vectors, int d) {
    constexpr int kVectors = vectors.value;
    many_at_a_time<sums_of(kVectors)>(many, [&](auto number, int m) {
      VecF x[number.value][kVectors]{};
      float* const at = to + m * pitch + d;
      if (add) {
        for (int64_t i = 0; i < number.value; ++i)
          for (int64_t v = 0; v < kVectors; ++v) x[i][v] = load(at + i * pitch + v * kLanes);
      }
      multiply_add(a + m * next, next, step, count, b + d, pitch, x);
      for (int64_t i = 0; i < number.value; ++i)
        for (int64_t v = 0; v < kVectors; ++v) store(at + i * pitch + v * kLanes, x[i][v]);
    });
  });
}

// Computes the scores of `keys` keys and a strip of rows, some keys at a time, and calls f(Int<number>, first, scores).
// Each score is rounded, whatever its use: the largest score is subtracted later and must have the same value there.
template <int kVectors, typename F>
inline void scores(const float* k, int64_t pitch, int keys, const float* q_lanes, int dim, float scale, F&& f) {
  many_at_a_time<sums_of(kVectors)>(keys, [&](auto number, int key) {
    VecF s[number.value][kVectors]{};
    multiply_add(k + key * pitch, pitch, 1, dim, q_lanes, kVectors * kLanes, s);
    for (int64_t m = 0; m < number.value; ++m)
      for (int64_t i = 0; i < kVectors; ++i) s[m][i] = rounded(s[m][i] * scale);
    f(number, key, s);
  });
}

// Computes p and ds of `keys` keys and all rows.
inline void differentiate_scores(const Scratch& x, int rows, int keys, int dim, float scale) {
  strips(rows, [&](auto vectors, int first) {
    constexpr int kVectors = vectors.value;
    scores<kVectors>(
        x.k, x.pitch, keys, x.q_lanes + int64_t(first) * dim, dim, scale, [&](auto number, int64_t key, auto& s) {
          float* const p = x.p + key * kGradientRows + first;
          for (int64_t i = 0; i < kVectors; ++i) {
            const VecF reference = load(x.reference + first + i * kLanes),
                       log_sum = load(x.log_sum + first + i * kLanes);
            for (int64_t m = 0; m < number.value; ++m)
              store(p + m * kGradientRows + i * kLanes, exp2_or_0((s[m][i] - reference - log_sum) * float(kLog2e)));
          }
          VecF dp[number.value][kVectors]{};
          multiply_add(x.v + key * x.pitch, x.pitch, 1, dim, x.dout_lanes + int64_t(first) * dim, kVectors * kLanes,
                       dp);
          float* const ds = x.ds + key * kGradientRows + first;
          for (int64_t i = 0; i < kVectors; ++i) {
            const VecF c = load(x.c + first + i * kLanes);
            for (int64_t m = 0; m < number.value; ++m)
              store(ds + m * kGradientRows + i * kLanes, load(p + m * kGradientRows + i * kLanes) * (dp[m][i] - c));
          }
        });
  });
}

// Loads `keys` keys of k or v from `first` on, as floats.
template <typename T>
inline void load_keys(const void* from, int64_t token_stride, int64_t first, int keys, int dim, float* to,
                      int64_t pitch) {
  const int whole = dim - dim % kLanes;
  for (int key = 0; key < keys; ++key) {
    const T* const source = static_cast<const T*>(from) + (first + key) * token_stride;
    float* const target = to + key * pitch;
    for (int d = 0; d < whole; d += kLanes) store(target + d, load(source + d));
    if (whole < dim) store(target + whole, VecF{});
    for (int d = whole; d < dim; ++d) target[d] = to_float(source[d]);
  }
}

// Stores a row of summed gradients times a factor, converted to T.
template <typename T>
inline void store_row(const float* from, float factor, int dim, T* to) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d) * factor);
  for (; d < dim; ++d) store_scalar(to + d, from[d] * factor);
}

// Loads rows of q or dout in both layouts. Places past the last row hold the last row and are never used.
template <typename T>
inline void load_rows(const T* const (&from)[kGradientRows], int rows, int dim, float* to, int64_t pitch,
                      float* lanes) {
  const int whole = dim - dim % kLanes;
  strips(rows, [&](auto vectors, int first) {
    constexpr int kTile = vectors.value * kLanes;
    float* const strip = lanes + int64_t(first) * dim;
    for (int part = 0; part < kTile; part += kLanes) {
      const T* const* const row = from + first + part;
      float* const target = to + (first + part) * pitch;
      for (int64_t d = 0; d < whole; d += kLanes) {
        VecF square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          square[i] = load(row[i] + d);
          store(target + i * pitch + d, square[i]);
        }
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) store(strip + (d + i) * kTile + part, square[i]);
      }
      if (whole < dim)
        for (int64_t i = 0; i < kLanes; ++i) store(target + i * pitch + whole, VecF{});
      for (int d = whole; d < dim; ++d)
        for (int64_t i = 0; i < kLanes; ++i) strip[d * kTile + part + i] = target[i * pitch + d] = to_float(row[i][d]);
    }
  });
}

// Computes reference and log_sum of each row from all its scores. The pair is exact where a large lse is not.
template <typename T>
void find_softmax(const AttentionGradient& a, const Scratch& x, int rows) {
  std::fill_n(x.reference, kGradientRows, -kLargest);
  std::fill_n(x.log_sum, kGradientRows, 0.0f);
  for (int first_key = 0; first_key < a.all_keys; first_key += kGradientKeys) {
    const int keys = std::min(a.all_keys - first_key, kGradientKeys);
    load_keys<T>(a.k, a.k_token_stride, first_key, keys, a.head_dim, x.k, x.pitch);
    strips(rows, [&](auto vectors, int first) {
      constexpr int kVectors = vectors.value;
      VecF top[kVectors], sum[kVectors];
      for (int64_t i = 0; i < kVectors; ++i) top[i] = load(x.reference + first + i * kLanes);
      scores<kVectors>(x.k, x.pitch, keys, x.q_lanes + int64_t(first) * a.head_dim, a.head_dim, a.softmax_scale,
                       [&](auto number, int64_t key, auto& s) {
                         for (int64_t m = 0; m < number.value; ++m)
                           for (int64_t i = 0; i < kVectors; ++i) {
                             store(x.p + (key + m) * kGradientRows + first + i * kLanes, s[m][i]);
                             top[i] = max(s[m][i], top[i]);
                           }
                       });
      for (int64_t i = 0; i < kVectors; ++i) {
        float* const reference = x.reference + first + i * kLanes;
        sum[i] = load(x.log_sum + first + i * kLanes) * exp2_or_0((load(reference) - top[i]) * float(kLog2e));
        for (int64_t key = 0; key < keys; ++key)
          sum[i] += exp2_or_0((load(x.p + key * kGradientRows + first + i * kLanes) - top[i]) * float(kLog2e));
        store(reference, top[i]);
        store(x.log_sum + first + i * kLanes, sum[i]);
      }
    });
  }
  for (int row = 0; row < rows; ++row) x.log_sum[row] = std::log(x.log_sum[row]);
}

// Loads the rows first .. first + rows - 1 of the sequence to scratch. `place`: output, offset of each row in out and
// dq.
template <typename T>
void load_block(const AttentionGradient& a, const Scratch& x, int64_t first, int rows,
                int64_t (&place)[kGradientRows]) {
  const int dim = a.head_dim, whole = dim - dim % kLanes;
  const T *q[kGradientRows], *dout[kGradientRows];
  bool exact = true;
  int64_t token = first / a.group, head = first % a.group;
  for (int row = 0; row < rows; ++row) {
    q[row] = static_cast<const T*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
    dout[row] = static_cast<const T*>(a.dout) + token * a.dout_token_stride + head * a.dout_head_stride;
    place[row] = (token * a.num_heads + head) * dim;
    const T* const out = static_cast<const T*>(a.out) + place[row];
    VecF sum{};
    for (int d = 0; d < whole; d += kLanes) sum += load(dout[row] + d) * load(out + d);
    float c = horizontal_sum(sum);
    for (int d = whole; d < dim; ++d) c += to_float(dout[row][d]) * to_float(out[d]);
    const int64_t at = head * a.total_q + token;
    x.c[row] = a.dlse ? c - a.dlse[at] : c;
    x.reference[row] = a.lse[at];
    exact = exact && std::abs(a.lse[at]) < kLargestExactLse;
    if (++head == a.group) head = 0, ++token;
  }
  for (int row = rows; row < kGradientRows; ++row) q[row] = q[rows - 1], dout[row] = dout[rows - 1];
  load_rows(q, rows, dim, x.q, x.pitch, x.q_lanes);
  load_rows(dout, rows, dim, x.dout, x.pitch, x.dout_lanes);
  if (exact)
    std::fill_n(x.log_sum, kGradientRows, 0.0f);
  else
    find_softmax<T>(a, x, rows);
}

template <typename T>
void differentiate(const AttentionGradient& a) {
  const int dim = a.head_dim;
  const Scratch x(a.scratch, dim, a.dk ? a.keys : 0);
  for (int64_t first_row = 0; first_row < a.rows; first_row += kGradientRows) {
    const int rows = int(std::min<int64_t>(a.rows - first_row, kGradientRows));
    int64_t place[kGradientRows];
    load_block<T>(a, x, a.first_row + first_row, rows, place);
    for (int first_key = 0; first_key < a.keys; first_key += kGradientKeys) {
      const int keys = std::min(a.keys - first_key, kGradientKeys);
      if (first_row == 0 || a.all_keys > kGradientKeys) {
        load_keys<T>(a.k, a.k_token_stride, a.first_key + first_key, keys, dim, x.k, x.pitch);
        load_keys<T>(a.v, a.v_token_stride, a.first_key + first_key, keys, dim, x.v, x.pitch);
      }
      differentiate_scores(x, rows, keys, dim, a.softmax_scale);
      if (a.dk) {
        const int64_t at = first_key * x.pitch;
        add_product(keys, rows, x.p, kGradientRows, 1, x.dout, dim, x.dv + at, x.pitch, first_row > 0);
        add_product(keys, rows, x.ds, kGradientRows, 1, x.q, dim, x.dk + at, x.pitch, first_row > 0);
      }
      if (a.dq) add_product(rows, keys, x.ds, 1, kGradientRows, x.k, dim, x.dq, x.pitch, first_key > 0);
    }
    if (a.dq)
      for (int row = 0; row < rows; ++row)
        store_row(x.dq + row * x.pitch, a.softmax_scale, dim, static_cast<T*>(a.dq) + place[row]);
  }
  if (!a.dk) return;
  for (int key = 0; key < a.keys; ++key) {
    const int64_t to = (a.first_key + key) * a.num_kv_heads * dim;
    store_row(x.dk + key * x.pitch, a.softmax_scale, dim, static_cast<T*>(a.dk) + to);
    store_row(x.dv + key * x.pitch, 1.0f, dim, static_cast<T*>(a.dv) + to);
  }
}

}  // namespace illada::cpu::ILLADA_ISA
