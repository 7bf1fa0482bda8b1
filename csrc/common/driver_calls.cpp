#include "common/driver_calls.h"

#include <atomic>

namespace illada {
namespace {

std::atomic<int64_t> driver_calls[kDriverCalls];

}  // namespace

void count_call(DriverCall call) { driver_calls[int(call)].fetch_add(1, std::memory_order_relaxed); }
int64_t calls_of(DriverCall call) { return driver_calls[int(call)].load(std::memory_order_relaxed); }

}  // namespace illada
