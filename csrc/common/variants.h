// The choices of illada/variants.h as enums, for the host code that launches kernels. To add a choice, add an enum here
// and an entry in the table in variants.cpp. The values of both must be in the same order.
#pragma once

#include "illada/variants.h"

namespace illada {

enum class ProgrammaticLaunch { kWait, kEarly, kOff };
enum class L2Hints { kOff, kOn };
enum class AttentionBackwardSums { kRed2, kRed4, kBulk, kRecompute };
enum class AttentionBackwardStart { kTogether, kStaggered };
enum class AttentionBackwardReports { k1, k2, k4 };
enum class AttentionForwardD128 { k128x2x3, k128x2x2, k176x2x2 };
enum class AttentionForwardD64 { k192x96, k192x128 };
enum class AttentionCluster { kAuto, k1 };
enum class SampleTokensLoads { kRegisters, kShared64, kShared128 };
enum class LossGradients { kFused, kMm };
enum class LossOrder { kHiddenFirst, kWeightFirst };
enum class LossRaster { kAll, k8, k4 };
enum class ForwardWarps { kAuto, kFour, kEight };

// Returns the value in use.
template <typename Choice>
Choice variant();

}  // namespace illada
