// Hints to the L2 cache (.L2::cache_hint), with CuTe's names. A kernel gets them as arguments. A policy created on the
// device (createpolicy) would take registers that producers do not have.
#pragma once

#include <cstdint>
#include <cute/arch/copy_sm90_desc.hpp>

namespace illada {

using L2Policy = cute::TMA::CacheHintSm90;

// Returns the hint if it is wanted, else the neutral hint.
inline uint64_t l2_policy_if(bool wanted, L2Policy policy) {
  return uint64_t(wanted ? policy : L2Policy::EVICT_NORMAL);
}

}  // namespace illada
