// wgmma over arrays of accumulators, with CuTe's atoms; sm_90a. One warpgroup computes
//   d [64, N] (+)= a [64, 16] . b [16, N].
//
// Thread t holds the rows t / 32 * 16 + t % 32 / 4 + {0, 8} of d: d[4 j + 2 i + e] is (row + 8 i, column
// 8 j + t % 4 * 2 + e). An operand a in registers has the same layout, two 16-bit neighbours per word, for 16 columns:
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

// Product of a and b in shared memory. Each is K-major (gmma_descriptor_k) or has a contiguous M or N
// (gmma_descriptor_mn).
template <typename T, int kN, GmmaMajor kMajorA = GmmaMajor::K, GmmaMajor kMajorB = GmmaMajor::K>
__device__ __forceinline__ void warpgroup_mma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  using Element = CutlassElement<T>;
  using Tile = cute::Shape<cute::_64, cute::Int<kN>, cute::_16>;
  using Op = decltype(cute::SM90::GMMA::ss_op_selector<Element, Element, float, Tile, kMajorA, kMajorB>());
  detail::explode<Op>(std::make_index_sequence<kN / 2>(), d, accumulate, a, b);
}

// Product of a in registers and b in shared memory, with b's N contiguous.
template <typename T, int kN>
__device__ __forceinline__ void warpgroup_mma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                                 bool accumulate) {
  using Element = CutlassElement<T>;
  using Tile = cute::Shape<cute::_64, cute::Int<kN>, cute::_16>;
  using Op = decltype(cute::SM90::GMMA::rs_op_selector<Element, Element, float, Tile, GmmaMajor::K, GmmaMajor::MN>());
  detail::explode<Op>(std::make_index_sequence<kN / 2>(), d, accumulate, a[0], a[1], a[2], a[3], b);
}

// Fences accumulators: the compiler moves no arithmetic on them across this point.
template <int kSize>
__device__ __forceinline__ void warpgroup_fence_operands(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(d[i]);
}
// Waits until all but the last kPending groups have ended. `d` are the accumulators of the groups that have ended.
// Without the fence, the compiler could move arithmetic on them to before the wait, because it does not know of the
// connection.
template <int kPending, int... kSizes>
__device__ __forceinline__ void warpgroup_wait(float (&... d)[kSizes]) {
  cute::warpgroup_wait<kPending>();
  (warpgroup_fence_operands(d), ...);
}

// Descriptor of an operand in the 128-byte swizzle, as TMA writes it: groups of 8 rows of 128 bytes. The operand starts
// at a multiple of 1024 bytes. `leading`: CuTe's leading offset, in bytes.
__device__ __forceinline__ uint64_t gmma_descriptor(uint32_t smem, uint32_t leading) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.stride_byte_offset_ = 1024 >> 4;
  descriptor.bitfield.layout_type_ = uint8_t(cute::SM90::GMMA::LayoutType::B128);
  return descriptor.desc_ | uint64_t(leading >> 4) << 16 | uint64_t((smem & 0x3ffff) >> 4);
}
// Descriptor of a K-major operand. A row is 64 elements of K. The 16 elements of step k start 32 k bytes further on.
__device__ __forceinline__ uint64_t gmma_descriptor_k(uint32_t smem) { return gmma_descriptor(smem, 1 << 4); }
// Descriptor of an operand with contiguous M or N. A row is 64 elements for one k. The next 64 elements are `leading`
// bytes further on. The 16 k of step s start 2048 s bytes further on.
__device__ __forceinline__ uint64_t gmma_descriptor_mn(uint32_t smem, uint32_t leading) {
  return gmma_descriptor(smem, leading);
}

}  // namespace illada
