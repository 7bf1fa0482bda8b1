#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace illada::cpu {

// Of at most `most`, as many threads as so many elements of work pay for: to wake one takes microseconds.
inline int threads_for(int64_t work, int most) {
  constexpr int64_t kPerThread = 1 << 14;
  return int(work / kPerThread < most ? work / kPerThread + 1 : most);
}

// Calls f(n) for n in [0, count) on up to num_threads threads of the process's OpenMP pool (torch's own, where torch
// is loaded). f must not throw.
template <typename F>
void parallel_for(int64_t count, [[maybe_unused]] int num_threads, F&& f) {
#if defined(_OPENMP)
  const int threads = int(count < num_threads ? count : num_threads);
  if (threads > 1) {  // not `if` of the pragma, under which the loop is still handed out piece by piece
#pragma omp parallel for schedule(dynamic) num_threads(threads)
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
