// Counts of CUDA calls by the host side of the launches, since the process began. A call takes from a tenth of a
// microsecond to several, before a kernel starts. Tests compare the counts with their limits.
#pragma once

#include <cstdint>

namespace illada {

enum class DriverCall { kQueryPointer, kQueryCapture, kEncodeTensorMap, kLaunch };
constexpr int kDriverCalls = 4;

void count_call(DriverCall call);   // thread-safe
int64_t calls_of(DriverCall call);  // number of calls so far; thread-safe

}  // namespace illada
