#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace illada::cpu {

// Returns `max_threads`, or 1 if `work` elements are too few for more threads. Waking threads takes microseconds.
inline int threads_for(int64_t work, int max_threads) {
  constexpr int64_t kMinWorkPerThread = 1 << 14;
  return work < kMinWorkPerThread ? 1 : max_threads;
}

// Calls f(n), or f(n, thread), for n in [0, count) on num_threads threads of the process's OpenMP pool. Where torch is
// loaded, that is torch's pool. `thread` is below max(num_threads, 1). The team has num_threads threads even if count
// is smaller: a smaller team would end threads of the pool, and the next team would start them again. If an f throws,
// the remaining work is skipped and the first exception is thrown again here.
template <typename F>
void parallel_for(int64_t count, [[maybe_unused]] int num_threads, F&& f) {
  const auto call = [&](int64_t n, [[maybe_unused]] int thread) {
    if constexpr (std::is_invocable_v<F&, int64_t, int>) {
      f(n, thread);
    } else {
      f(n);
    }
  };
#if defined(_OPENMP)
  // Not an `if` clause of the pragma: with it, one thread would still fetch the iterations one by one.
  if (num_threads > 1 && count > 1) {
    std::atomic<bool> failed = false;
    std::exception_ptr thrown;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t n = 0; n < count; ++n) {
      if (failed.load(std::memory_order_relaxed)) continue;
      try {  // an exception that leaves the parallel region ends the process
        call(n, omp_get_thread_num());
      } catch (...) {
        if (!failed.exchange(true)) thrown = std::current_exception();
      }
    }
    if (thrown) std::rethrow_exception(thrown);
    return;
  }
#endif
  // The number passed is 0, even where the caller is another thread of a parallel region.
  for (int64_t n = 0; n < count; ++n) call(n, 0);
}

// Calls f(item, thread) for all items, as parallel_for does. A thread gets runs of neighbouring items, with about equal
// sums of item.work. Neighbours are next to each other in memory: with one item at a time, the prefetchers of two
// threads would take the cache lines from each other.
template <typename Item, typename F>
void parallel_for_runs(const std::vector<Item>& items, int num_threads, F&& f) {
  constexpr int kRunsPerThread = 8;  // more runs are shared out more evenly, fewer have fewer ends
  const int64_t count = int64_t(items.size());
  if (num_threads <= 1) {
    for (const Item& item : items) f(item, 0);
    return;
  }
  double all = 0, work = 0;
  for (const Item& item : items) all += double(item.work);
  const double enough = all / (double(kRunsPerThread) * num_threads);
  std::vector<int64_t> ends;
  for (int64_t n = 0; n < count; ++n) {
    work += double(items[size_t(n)].work);
    if (work < enough && n + 1 < count) continue;
    ends.push_back(n + 1);
    work = 0;
  }
  parallel_for(int64_t(ends.size()), num_threads, [&](int64_t run, int thread) {
    for (int64_t n = run == 0 ? 0 : ends[size_t(run) - 1]; n < ends[size_t(run)]; ++n) f(items[size_t(n)], thread);
  });
}

}  // namespace illada::cpu
