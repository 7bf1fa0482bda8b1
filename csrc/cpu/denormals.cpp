#include "cpu/denormals.h"

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace illada::cpu {
namespace {

// The control register of floating-point arithmetic, one for each thread.
#if defined(__SSE2__)
constexpr uint64_t kFlush = 0x8040;  // flush to zero, denormals are zero
uint64_t control() { return _mm_getcsr(); }
void set_control(uint64_t value) { _mm_setcsr(unsigned(value)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlush = uint64_t(1) << 24;  // FZ
uint64_t control() {
  uint64_t value;
  __asm__ volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_control(uint64_t value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
constexpr uint64_t kFlush = 0;
uint64_t control() { return 0; }
void set_control(uint64_t) {}
#endif

thread_local uint64_t saved_control = 0;
thread_local bool has_saved = false;

}  // namespace

FlushedDenormals::FlushedDenormals() : before_(control()) { set_control(before_ | kFlush); }
FlushedDenormals::~FlushedDenormals() { set_control(before_); }

void flush_denormals(bool begin, int num_threads) {
  // Threads that were started since `begin` have saved nothing: they get what the caller had.
  const uint64_t callers = saved_control;
#if defined(_OPENMP)
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
#endif
  {
    if (begin) {
      saved_control = control();
      has_saved = true;
      set_control(saved_control | kFlush);
    } else {
      set_control(has_saved ? saved_control : callers);
      has_saved = false;
    }
  }
  (void)num_threads;
}

}  // namespace illada::cpu
