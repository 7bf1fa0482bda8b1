// Functions that host and device share, in headers that a C++ compiler reads as well.
#pragma once

#if defined(__CUDACC__)
#define ILLADA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ILLADA_HOST_DEVICE inline
#endif
