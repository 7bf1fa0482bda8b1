// Portable SIMD with the compiler's vector extensions (GCC, Clang). This file is compiled once per instruction set,
// with different -m flags. Everything is in namespace ILLADA_ISA, so that the linker never merges the copies.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <limits>

namespace illada::cpu::ILLADA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));
typedef uint64_t VecL __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 words of 64 bits

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max(), kNaN = std::numeric_limits<float>::quiet_NaN();

struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline VecF splat(float x) { return x - VecF{}; }  // x - 0, also correct for -0 and infinities

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline VecF load(const BFloat16* p) {
  VecH half;
  std::memcpy(&half, p, sizeof(half));
  return bit_cast<VecF>(__builtin_convertvector(half, VecU) << 16);
}

inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }

// Rounds to nearest even. NaN stays NaN: its mantissa is truncated, not rounded up to infinity.
inline void store(BFloat16* p, VecF v) {
  const VecU bits = bit_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecI is_nan = v != v;
  const VecU out = is_nan ? ((bits >> 16) | 0x40) : rounded;
  const VecH half = __builtin_convertvector(out, VecH);
  std::memcpy(p, &half, sizeof(half));
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline void store_scalar(float* p, float x) { *p = x; }
inline void store_scalar(BFloat16* p, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  p->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Returns x unchanged. A product that passes through here is rounded: the compiler cannot fuse it with a following
// addition.
inline VecF rounded(VecF x) {
#if defined(__FMA__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// Returns a if a > b, else b. If either is NaN, the result is b.
inline VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecF>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
// Returns a if a < b, else b. If either is NaN, the result is b.
inline VecF min(VecF a, VecF b) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecF>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// Reductions over the lanes, in pairs as a tree, which is less deep than lane after lane. For the maximum, no lane may
// be NaN.
inline float horizontal_max(VecF v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

inline float horizontal_sum(VecF v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Returns true if a comparison holds in any lane.
inline bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bit_cast<__m256>(mask)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(bit_cast<__m128>(mask)) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// Returns 2^x with a relative error below 2.4e-7. x is clamped to [-126, 126], so 2^-inf is 1.2e-38, not 0. NaN stays
// NaN for all its bit patterns: the bits go into the power of two, but the polynomial is also NaN.
inline VecF exp2(VecF x) {
  x = max(splat(-126.0f), x);
  x = min(splat(126.0f), x);
  // 1.5 * 2^23 + 127 moves the integer part of x to the low mantissa bits, with the bias of an exponent.
  const VecF shifted = x + 12583039.0f;
  const VecF f = x - (shifted - 12583039.0f);
  // Minimax polynomial of 2^f on [-0.5, 0.5], degree 5, relative error 9.2e-8 before rounding.
  VecF p = splat(1.326472662e-3f);
  p = p * f + 9.671512959e-3f;
  p = p * f + 5.550733748e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return p * bit_cast<VecF>(bit_cast<VecI>(shifted) << 23);
}

// Multiplies the low 32 bits of each 64-bit word.
inline VecL mul_low32(VecL a, VecL b) {
#if defined(__AVX512F__)
  return bit_cast<VecL>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecL>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<VecL>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Interleaves two vectors of 64-bit words to (a0, b0, a1, b1, ...).
inline void interleave(VecL a, VecL b, VecL& low, VecL& high) {
#if defined(__AVX512F__)
  const __m512i low_index = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i high_index = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  low = bit_cast<VecL>(_mm512_permutex2var_epi64(bit_cast<__m512i>(a), low_index, bit_cast<__m512i>(b)));
  high = bit_cast<VecL>(_mm512_permutex2var_epi64(bit_cast<__m512i>(a), high_index, bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b));  // a0 b0 | a2 b2
  const __m256i odd = _mm256_unpackhi_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b));   // a1 b1 | a3 b3
  low = bit_cast<VecL>(_mm256_permute2x128_si256(even, odd, 0x20));
  high = bit_cast<VecL>(_mm256_permute2x128_si256(even, odd, 0x31));
#else
  for (int i = 0; i < kLanes / 2; ++i) {
    VecL& out = i < kLanes / 4 ? low : high;
    const int at = 2 * (i % (kLanes / 4));
    out[at] = a[i];
    out[at + 1] = b[i];
  }
#endif
}

// Interleaves two vectors of floats to (a0, b0, a1, b1, ...).
inline void interleave(VecF a, VecF b, VecF& low, VecF& high) {
#if defined(__AVX512F__)
  const __m512i low_index = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high_index = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  low = bit_cast<VecF>(_mm512_permutex2var_ps(bit_cast<__m512>(a), low_index, bit_cast<__m512>(b)));
  high = bit_cast<VecF>(_mm512_permutex2var_ps(bit_cast<__m512>(a), high_index, bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  const __m256 near = _mm256_unpacklo_ps(bit_cast<__m256>(a), bit_cast<__m256>(b));  // a0 b0 a1 b1 | a4 b4 a5 b5
  const __m256 far = _mm256_unpackhi_ps(bit_cast<__m256>(a), bit_cast<__m256>(b));   // a2 b2 a3 b3 | a6 b6 a7 b7
  low = bit_cast<VecF>(_mm256_permute2f128_ps(near, far, 0x20));
  high = bit_cast<VecF>(_mm256_permute2f128_ps(near, far, 0x31));
#elif defined(__SSE2__)
  low = bit_cast<VecF>(_mm_unpacklo_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
  high = bit_cast<VecF>(_mm_unpackhi_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  for (int i = 0; i < kLanes / 2; ++i) {
    low[2 * i] = a[i];
    low[2 * i + 1] = b[i];
    high[2 * i] = a[i + kLanes / 2];
    high[2 * i + 1] = b[i + kLanes / 2];
  }
#endif
}

// Transposes a square of kLanes x kLanes in place. An element's place is (row bits, column bits). Interleaving the two
// halves of the square rotates these bits by one. log2(kLanes) rotations swap rows and columns.
inline void transpose(VecF (&rows)[kLanes]) {
  for (int turn = 1; turn < kLanes; turn *= 2) {
    VecF turned[kLanes];
    for (int64_t i = 0; i < kLanes / 2; ++i)
      interleave(rows[i], rows[i + kLanes / 2], turned[2 * i], turned[2 * i + 1]);
    for (int i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
}

}  // namespace illada::cpu::ILLADA_ISA
