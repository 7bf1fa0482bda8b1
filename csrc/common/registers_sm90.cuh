// Division of a CTA's registers among the warpgroups of a warp-specialised kernel.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

namespace illada {

// Registers per thread that ptxas gives a kernel of `threads` threads where an SM holds one CTA
// (__launch_bounds__(threads, 1)): an equal share of the SM's 65,536, in steps of 8.
constexpr int launch_registers(int threads) { return 65536 / threads / 8 * 8; }

// Register split of one producer warpgroup and several consumer warpgroups. A CTA owns the registers that it was
// launched with, launch_registers(threads) * threads, not all registers of the SM. setmaxnreg.inc waits for registers
// that other warps of the CTA released. A split that asks for more than the CTA owns therefore waits forever (PTX ISA,
// setmaxnreg).
template <int kConsumers, int kProducerRegisters, int kConsumerRegisters>
struct RegisterSplit {
  static constexpr int kWarpgroups = kConsumers + 1, kThreads = 128 * kWarpgroups;
  static constexpr int kLaunched = launch_registers(kThreads);
  static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0, "setmaxnreg takes multiples of 8");
  static_assert(kProducerRegisters >= 24 && kConsumerRegisters <= 256, "setmaxnreg takes 24 to 256 registers");
  static_assert(kProducerRegisters <= kLaunched && kConsumerRegisters >= kLaunched,
                "producers give registers up and consumers take them");
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= kLaunched * kWarpgroups,
                "the warpgroups ask for more registers than the CTA was launched with");

  // All warps of the producer warpgroup call the first function, all warps of each consumer the second. The kernel's
  // __launch_bounds__ are (kThreads, 1).
  static __device__ __forceinline__ void as_producer() { cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>(); }
  static __device__ __forceinline__ void as_consumer() { cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>(); }
};

}  // namespace illada
