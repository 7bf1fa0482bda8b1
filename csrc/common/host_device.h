// Functions that host and device share, in headers that a C++ compiler reads as well. Always inlined: of several copies
// a linker keeps one, which may be that of another instruction set.
#pragma once

#if defined(__CUDACC__)
#define ILLADA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ILLADA_HOST_DEVICE inline __attribute__((always_inline))
#endif
