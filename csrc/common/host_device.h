// Qualifier of functions that host and device share, in headers that a C++ compiler also reads. The functions are
// always inlined. Of several copies, a linker keeps only one, which may be compiled for another instruction set.
#pragma once

#if defined(__CUDACC__)
#define ILLADA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ILLADA_HOST_DEVICE inline __attribute__((always_inline))
#endif
