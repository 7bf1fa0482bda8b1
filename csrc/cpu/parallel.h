#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace illada::cpu {

// `most` threads, or one where so many elements of work do not pay for more: to wake them takes microseconds.
inline int threads_for(int64_t work, int most) {
  constexpr int64_t kPerThread = 1 << 14;
  return work < kPerThread ? 1 : most;
}

// Calls f(n) for n in [0, count) on num_threads threads of the process's OpenMP pool (torch's own, where torch is
// loaded), all of which are asked though count be smaller: a smaller team ends threads of the pool, and the next one
// starts them anew. f must not throw.
template <typename F>
void parallel_for(int64_t count, [[maybe_unused]] int num_threads, F&& f) {
#if defined(_OPENMP)
  // Not `if` of the pragma, under which the loop is still handed out piece by piece.
  if (num_threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t n = 0; n < count; ++n) f(n);
    return;
  }
#endif
  for (int64_t n = 0; n < count; ++n) f(n);
}

// Of the thread that calls f, below num_threads.
inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace illada::cpu
