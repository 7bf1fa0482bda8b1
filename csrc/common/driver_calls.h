// How often the host side of the launches has called CUDA, since the process began. A call takes from a tenth of a
// microsecond to several, before a kernel starts: the tests hold the counts against what they may be.
#pragma once

#include <cstdint>

namespace illada {

enum class DriverCall { kQueryPointer, kQueryCapture, kEncodeTensorMap, kLaunch };
constexpr int kDriverCalls = 4;

void count_call(DriverCall call);  // thread-safe, as is the next one
int64_t calls_of(DriverCall call);

}  // namespace illada
