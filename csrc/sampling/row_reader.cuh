// Reads a row of logits and adds its sparse bias, for the sampling kernel and the filters.
#pragma once

#include "common/dtype.cuh"
#include "sampling/row_sample.cuh"

namespace illada::sampling {

// Reads a row by whole vectors of kVector ids. The up to seven ids after the last vector are read by `single`.
//
// `biased` has one bit per vector: set if the vector may hold a biased id. Vector v has bit v - first_vector, modulo
// kMaskBits where that is not 0. The filters use kMaskBits. They always have bits, and call add_bias only where the row
// has a bias.
template <typename T, bool kAligned, int kMaskBits = 0>
struct RowReader {
  const T* row;
  const uint32_t* biased;  // with kMaskBits 0: null if the row has no bias
  int first_vector;        // vector of bit 0
  RowBias bias;

  __device__ __forceinline__ Raw8<T> raw(int vector) const {
    const T* at = row + int64_t(vector) * kVector;
    return kAligned ? load8(at) : load8_unaligned(at);
  }

  // Adds the bias to the values of a vector. `biased` must not be null.
  __device__ __forceinline__ void add_bias(int vector, float (&x)[kVector]) const {
    if constexpr (kMaskBits > 0) {
      const uint32_t bit = uint32_t(vector) % kMaskBits;
      if (!(biased[bit / 32] >> (bit % 32) & 1)) return;
#pragma unroll 1
      for (int b = 0; b < bias.count; ++b) {
        const int at = bias.ids[b] - vector * kVector;
        const float value = bias.values[b];
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] += at == i ? value : 0.0f;  // a branch would put x in local memory
      }
    } else {
      const int bit = vector - first_vector;
      if (!(biased[bit / 32] >> (bit % 32) & 1)) return;
      for (int b = 0; b < bias.count; ++b) {
        const int at = bias.ids[b] - vector * kVector;
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (at == i) x[i] += bias.values[b];
      }
    }
  }

  __device__ __forceinline__ void values(int vector, float (&x)[kVector]) const {
    unpack8(raw(vector), x);
    if (biased) add_bias(vector, x);
  }

  __device__ __forceinline__ float single(int id) const {
    float x = to_float(row[id]);
    if constexpr (kMaskBits > 0) {
#pragma unroll 1
      for (int b = 0; b < bias.count; ++b)
        if (bias.ids[b] == id) x += bias.values[b];
    } else {
      for (int b = 0; b < bias.count; ++b)
        if (bias.ids[b] == id) x += bias.values[b];
    }
    return x;
  }
};

}  // namespace illada::sampling
