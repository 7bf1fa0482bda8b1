// wgmma over arrays of accumulators, on CuTe's atoms; sm_90a. d [64, N] (+)= a [64, 16] . b [16, N], by one warpgroup.
//
// Thread t holds the rows t / 32 * 16 + t % 32 / 4 + {0, 8} of d: d[4 j + 2 i + e] is (row + 8 i, column
// 8 j + t % 4 * 2 + e). An a in registers is that layout as well, two 16-bit neighbours to a word, for 16 columns:
// {columns 0..7 of row, of row + 8, columns 8..15 of row, of row + 8}.
#pragma once

#if !defined(CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED)
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // N = 176
#endif
#include <cstdint>
#include <cute/arch/mma_sm90.hpp>
#include <type_traits>
#include <utility>

#include "common/dtype.cuh"

namespace illada {

using GmmaMajor = cute::SM90::GMMA::Major;  // which dimension of an operand is contiguous

namespace detail {

template <typename Op, size_t... kIndex, typename... Operands>
__device__ __forceinline__ void explode(std::index_sequence<kIndex...>, float (&d)[sizeof...(kIndex)], bool accumulate,
                                        const Operands&... operands) {
  Op::fma(operands..., d[kIndex]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

}  // namespace detail

// a and b in shared memory, each K-major (gmma_descriptor_k) or with its M or N contiguous (gmma_descriptor_mn).
template <typename T, int kN, GmmaMajor kMajorA = GmmaMajor::K, GmmaMajor kMajorB = GmmaMajor::K>
__device__ __forceinline__ void warpgroup_mma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  using Element = CutlassElement<T>;
  using Tile = cute::Shape<cute::_64, cute::Int<kN>, cute::_16>;
  using Op = decltype(cute::SM90::GMMA::ss_op_selector<Element, Element, float, Tile, kMajorA, kMajorB>());
  detail::explode<Op>(std::make_index_sequence<kN / 2>(), d, accumulate, a, b);
}

// a in registers, b in shared memory with its N contiguous.
template <typename T, int kN>
__device__ __forceinline__ void warpgroup_mma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                                 bool accumulate) {
  using Element = CutlassElement<T>;
  using Tile = cute::Shape<cute::_64, cute::Int<kN>, cute::_16>;
  using Op = decltype(cute::SM90::GMMA::rs_op_selector<Element, Element, float, Tile, GmmaMajor::K, GmmaMajor::MN>());
  detail::explode<Op>(std::make_index_sequence<kN / 2>(), d, accumulate, a[0], a[1], a[2], a[3], b);
}

// Until all but the last kPending groups have ended; the accumulators `d` are theirs: the compiler moves no arithmetic
// on them to before the wait, of which it would otherwise know nothing.
template <int kSize>
__device__ __forceinline__ void warpgroup_fence_operands(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(d[i]);
}
template <int kPending, int... kSizes>
__device__ __forceinline__ void warpgroup_wait(float (&... d)[kSizes]) {
  cute::warpgroup_wait<kPending>();
  (warpgroup_fence_operands(d), ...);
}

// Of an operand in the 128-byte swizzle, as TMA writes it, that starts at a multiple of 1024 bytes: groups of 8 rows of
// 128 bytes. `leading` as CuTe has it, in bytes.
__device__ __forceinline__ uint64_t gmma_descriptor(uint32_t smem, uint32_t leading) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.stride_byte_offset_ = 1024 >> 4;
  descriptor.bitfield.layout_type_ = uint8_t(cute::SM90::GMMA::LayoutType::B128);
  return descriptor.desc_ | uint64_t(leading >> 4) << 16 | uint64_t((smem & 0x3ffff) >> 4);
}
// K-major: a row is 64 elements of K, and the 16 elements of step k start 32 k bytes further on.
__device__ __forceinline__ uint64_t gmma_descriptor_k(uint32_t smem) { return gmma_descriptor(smem, 1 << 4); }
// M or N contiguous: a row is 64 elements for one k, the next 64 elements are `leading` bytes further on, and the 16 k
// of step s start 2048 s bytes further on.
__device__ __forceinline__ uint64_t gmma_descriptor_mn(uint32_t smem, uint32_t leading) {
  return gmma_descriptor(smem, leading);
}

}  // namespace illada
