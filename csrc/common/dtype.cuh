// 16-bit element types on the device, and conversions of eight neighbouring elements of any type.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"
#include "illada/dtype.h"

namespace illada {

// These types hold only bits. Every use converts them, with CUTLASS's converters.
struct BFloat16 {
  uint16_t bits;
  static constexpr uint16_t kMinusInfinity = 0xff80;
};
struct Half {
  uint16_t bits;
  static constexpr uint16_t kMinusInfinity = 0xfc00;
};

// Calls f(T{}) with the element type T of logits in `dtype`: float, BFloat16 or Half. The kernels on logits have an
// instance for each of them.
template <typename F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
  }
}

// CUTLASS's type with the same bits.
template <typename T>
using CutlassElement = std::conditional_t<std::is_same_v<T, BFloat16>, cutlass::bfloat16_t, cutlass::half_t>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) { return float(cutlass::half_t::bitcast(x.bits)); }

// Eight neighbouring elements as loaded: one 16-byte load for 16-bit elements, two for floats.
template <typename T>
struct Raw8 {
  static constexpr int kLoads = int(8 * sizeof(T) / 16);
  uint4 part[kLoads];
};

template <typename T>
__device__ __forceinline__ Raw8<T> load8(const T* address) {  // 16-byte aligned
  Raw8<T> raw;
#pragma unroll
  for (int i = 0; i < Raw8<T>::kLoads; ++i)
    raw.part[i] = ptx::load_streaming(reinterpret_cast<const uint4*>(address) + i);
  return raw;
}

// Loads eight elements from an address that is aligned only to its elements.
template <typename T>
__device__ __forceinline__ Raw8<T> load8_unaligned(const T* address) {
  union {
    Raw8<T> raw;
    T element[8];
  } u;
#pragma unroll
  for (int i = 0; i < 8; ++i) u.element[i] = address[i];
  return u.raw;
}

// Returns eight times -inf.
template <typename T>
__device__ __forceinline__ Raw8<T> minus_infinity8() {
  uint32_t word = 0xff800000u;
  if constexpr (sizeof(T) == 2) word = T::kMinusInfinity * 0x10001u;
  Raw8<T> raw;
#pragma unroll
  for (int i = 0; i < Raw8<T>::kLoads; ++i) raw.part[i] = make_uint4(word, word, word, word);
  return raw;
}

// Loads eight elements, 16-byte aligned; returns eight times -inf where `valid` is false. The memory may be memory that
// this kernel also writes. There is no branch, so that successive loads wait for memory together.
template <typename T>
__device__ __forceinline__ Raw8<T> load8_if(bool valid, const T* address) {
  Raw8<T> raw = minus_infinity8<T>();
#pragma unroll
  for (int i = 0; i < Raw8<T>::kLoads; ++i)
    ptx::load_streaming_if(valid, raw.part[i], reinterpret_cast<const uint4*>(address) + i);
  return raw;
}

template <typename T>
__device__ __forceinline__ void store8(T* address, const Raw8<T>& raw) {  // 16-byte aligned
#pragma unroll
  for (int i = 0; i < Raw8<T>::kLoads; ++i) reinterpret_cast<uint4*>(address)[i] = raw.part[i];
}

__device__ __forceinline__ void unpack2(uint32_t word, float& low, float& high, BFloat16) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack2(uint32_t word, float& low, float& high, Half) {
  low = to_float(Half{uint16_t(word)});
  high = to_float(Half{uint16_t(word >> 16)});
}

// Rounds two floats to T. `low` goes to the lower half of the word.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  using Element = CutlassElement<T>;
  union {
    cutlass::Array<Element, 2> both;
    uint32_t word;
  } u;
  u.both = cutlass::NumericArrayConverter<Element, float, 2>::convert({low, high});
  return u.word;
}

template <typename T>
__device__ __forceinline__ void unpack8(const Raw8<T>& raw, float (&x)[8]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[4 * i] = __uint_as_float(raw.part[i].x);
      x[4 * i + 1] = __uint_as_float(raw.part[i].y);
      x[4 * i + 2] = __uint_as_float(raw.part[i].z);
      x[4 * i + 3] = __uint_as_float(raw.part[i].w);
    }
  } else {
    unpack2(raw.part[0].x, x[0], x[1], T{});
    unpack2(raw.part[0].y, x[2], x[3], T{});
    unpack2(raw.part[0].z, x[4], x[5], T{});
    unpack2(raw.part[0].w, x[6], x[7], T{});
  }
}

// Rounds eight floats to T.
template <typename T>
__device__ __forceinline__ Raw8<T> pack8(const float (&x)[8]) {
  Raw8<T> raw;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      raw.part[i] = make_uint4(__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]), __float_as_uint(x[4 * i + 2]),
                               __float_as_uint(x[4 * i + 3]));
  } else {
    raw.part[0] = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ void store_float(T* address, float x) {
  if constexpr (sizeof(T) == 4) {
    *address = x;
  } else {
    *address = T{uint16_t(pack2<T>(x, 0.0f))};
  }
}

}  // namespace illada
