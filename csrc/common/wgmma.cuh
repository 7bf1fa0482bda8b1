// wgmma with the shapes that the kernels use; sm_90a. d [64, N] (+)= a [64, 16] . b [16, N], by one warpgroup.
//
// Thread t holds the rows t / 32 * 16 + t % 32 / 4 + {0, 8} of d: d[4 j + 2 i + e] is (row + 8 i, column
// 8 j + t % 4 * 2 + e). An a in registers is that layout as well, two 16-bit neighbours to a word, for 16 columns:
// {columns 0..7 of row, of row + 8, columns 8..15 of row, of row + 8}.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada {

// Which dimension of an operand is contiguous.
enum class Major { kK, kMN };

}  // namespace illada

namespace illada::ptx {

// The registers of d as operands, and as asm constraints; each list begins with a shorter one.
// clang-format off
#define ILLADA_WGMMA_D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ILLADA_WGMMA_IO32(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define ILLADA_WGMMA_D48 \
  ILLADA_WGMMA_D32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ILLADA_WGMMA_IO48(d) \
  ILLADA_WGMMA_IO32(d), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define ILLADA_WGMMA_D64 \
  ILLADA_WGMMA_D48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ILLADA_WGMMA_IO64(d) \
  ILLADA_WGMMA_IO48(d), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define ILLADA_WGMMA_D88 \
  ILLADA_WGMMA_D64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87"
#define ILLADA_WGMMA_IO88(d) \
  ILLADA_WGMMA_IO64(d), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define ILLADA_WGMMA_D128 \
  ILLADA_WGMMA_D64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ILLADA_WGMMA_IO128(d) \
  ILLADA_WGMMA_IO64(d), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
  "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
  "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
  "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
  "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// A .. P: the numbers of the operands that follow those of d.
#define ILLADA_WGMMA_SS(N, COUNT, A, B, P, TYPE, TRANSPOSE) \
  asm volatile( \
      "{\n" \
      ".reg .pred accumulate;\n" \
      "setp.ne.b32 accumulate, %" #P ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ILLADA_WGMMA_D##COUNT "}, %" #A ", %" #B \
      ", accumulate, 1, 1, " TRANSPOSE ";\n" \
      "}" \
      : ILLADA_WGMMA_IO##COUNT(d) \
      : "l"(a), "l"(b), "r"(int(accumulate)))

#define ILLADA_WGMMA_RS(N, COUNT, A0, A1, A2, A3, B, P, TYPE, TRANSPOSE_B) \
  asm volatile( \
      "{\n" \
      ".reg .pred accumulate;\n" \
      "setp.ne.b32 accumulate, %" #P ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ILLADA_WGMMA_D##COUNT \
      "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", accumulate, 1, 1, " #TRANSPOSE_B ";\n" \
      "}" \
      : ILLADA_WGMMA_IO##COUNT(d) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))
// clang-format on

// a and b in shared memory, each with its K (wgmma_descriptor_k128) or its M or N contiguous (wgmma_descriptor_mn128).
template <typename T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ __forceinline__ void wgmma_k16(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  static_assert(kN == 64 || kN == 96 || kN == 128 || kN == 176 || kN == 256);
  constexpr bool kBf16 = std::is_same_v<T, BFloat16>;
  if constexpr (kMajorA == Major::kK && kMajorB == Major::kK) {
    if constexpr (kBf16) {
      if constexpr (kN == 64) ILLADA_WGMMA_SS(64, 32, 32, 33, 34, "bf16", "0, 0");
      if constexpr (kN == 96) ILLADA_WGMMA_SS(96, 48, 48, 49, 50, "bf16", "0, 0");
      if constexpr (kN == 128) ILLADA_WGMMA_SS(128, 64, 64, 65, 66, "bf16", "0, 0");
      if constexpr (kN == 176) ILLADA_WGMMA_SS(176, 88, 88, 89, 90, "bf16", "0, 0");
      if constexpr (kN == 256) ILLADA_WGMMA_SS(256, 128, 128, 129, 130, "bf16", "0, 0");
    } else {
      if constexpr (kN == 64) ILLADA_WGMMA_SS(64, 32, 32, 33, 34, "f16", "0, 0");
      if constexpr (kN == 96) ILLADA_WGMMA_SS(96, 48, 48, 49, 50, "f16", "0, 0");
      if constexpr (kN == 128) ILLADA_WGMMA_SS(128, 64, 64, 65, 66, "f16", "0, 0");
      if constexpr (kN == 176) ILLADA_WGMMA_SS(176, 88, 88, 89, 90, "f16", "0, 0");
      if constexpr (kN == 256) ILLADA_WGMMA_SS(256, 128, 128, 129, 130, "f16", "0, 0");
    }
  } else if constexpr (kMajorA == Major::kK) {
    static_assert(kN == 256 && kBf16, "not built");
    ILLADA_WGMMA_SS(256, 128, 128, 129, 130, "bf16", "0, 1");
  } else {
    static_assert(kMajorB == Major::kMN && (kN == 64 || (kN == 256 && kBf16)), "not built");
    if constexpr (kN == 256) ILLADA_WGMMA_SS(256, 128, 128, 129, 130, "bf16", "1, 1");
    if constexpr (kN == 64 && kBf16) ILLADA_WGMMA_SS(64, 32, 32, 33, 34, "bf16", "1, 1");
    if constexpr (kN == 64 && !kBf16) ILLADA_WGMMA_SS(64, 32, 32, 33, 34, "f16", "1, 1");
  }
}

// a in registers, b in shared memory with its N contiguous (wgmma_descriptor_mn128).
template <typename T, int kN>
__device__ __forceinline__ void wgmma_k16_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  static_assert(kN == 64 || kN == 128);
  if constexpr (std::is_same_v<T, BFloat16>) {
    if constexpr (kN == 64) ILLADA_WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, "bf16", 1);
    if constexpr (kN == 128) ILLADA_WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, "bf16", 1);
  } else {
    if constexpr (kN == 64) ILLADA_WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, "f16", 1);
    if constexpr (kN == 128) ILLADA_WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, "f16", 1);
  }
}

#undef ILLADA_WGMMA_SS
#undef ILLADA_WGMMA_RS
#undef ILLADA_WGMMA_D32
#undef ILLADA_WGMMA_IO32
#undef ILLADA_WGMMA_D48
#undef ILLADA_WGMMA_IO48
#undef ILLADA_WGMMA_D64
#undef ILLADA_WGMMA_IO64
#undef ILLADA_WGMMA_D88
#undef ILLADA_WGMMA_IO88
#undef ILLADA_WGMMA_D128
#undef ILLADA_WGMMA_IO128

}  // namespace illada::ptx
