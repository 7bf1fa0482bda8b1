// Cache policies of the L2 cache for accesses with a hint (.L2::cache_hint). A kernel gets them as arguments: a policy
// made on the device (createpolicy) would take registers that producers do not have.
#pragma once

#include <cstdint>

namespace illada {

// What createpolicy.fractional gives for all of an access: an access without a hint; what leaves first; what is kept
// longest. PTX does not say how a policy is encoded. ptxas makes the last two constants of createpolicy on sm_90, and
// CUTLASS passes all three.
enum class L2Policy : uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

// A hint, where they are wanted.
inline L2Policy l2_policy_if(bool wanted, L2Policy policy) { return wanted ? policy : L2Policy::kEvictNormal; }

}  // namespace illada
