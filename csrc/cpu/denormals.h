#pragma once

#include <cstdint>

namespace illada::cpu {

// Sets or restores the treatment of denormal numbers in this thread and in num_threads - 1 threads of its OpenMP team.
// These are the threads that the next kernels use. begin true: the threads treat denormal numbers as 0, on input and
// output. begin false: each thread restores its earlier setting. Calls must come in pairs.
void flush_denormals(bool begin, int num_threads);

// Scope guard: this thread treats denormal numbers as 0 while an object of this class exists.
class FlushedDenormals {
 public:
  FlushedDenormals();
  ~FlushedDenormals();
  FlushedDenormals(const FlushedDenormals&) = delete;
  FlushedDenormals& operator=(const FlushedDenormals&) = delete;

 private:
  uint64_t before_;
};

}  // namespace illada::cpu
