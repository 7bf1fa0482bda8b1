#pragma once

#include <cstdint>

namespace illada::cpu {

// begin: this thread and the num_threads - 1 of its OpenMP team that kernels called next will use treat denormal
// numbers as 0, on input and output; otherwise: each of them goes back to what it did before. Calls come in pairs.
void flush_denormals(bool begin, int num_threads);

// This thread treats denormal numbers as 0 as long as one of these lives.
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
