#include "cpu/row_kernels.h"

#include <cstdlib>
#include <cstring>

namespace illada::cpu {
namespace {

const RowKernels& choose() {
#if defined(ILLADA_X86)
  const char* wanted = std::getenv("ILLADA_CPU_ISA");
  const auto allows = [&](const char* isa) {
    return wanted == nullptr || *wanted == '\0' || !std::strcmp(wanted, isa);
  };
  __builtin_cpu_init();
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return kRowKernelsAvx512;
  if ((allows("avx2") || allows("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kRowKernelsAvx2;
#endif
  return kRowKernelsBaseline;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

bool multiplies_bfloat16() {
#if defined(ILLADA_X86)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return true;
#endif
}

}  // namespace illada::cpu
