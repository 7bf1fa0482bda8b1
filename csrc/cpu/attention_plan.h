#pragma once

#include "illada/attention.h"

namespace illada::attention {

// Writes a plan on a CPU, as plan_cuda does on a GPU. A CPU plan has one row for each sequence and one for the queries
// behind them; see forward_cpu. Returns false and writes no plan if the lengths do not ascend from 0 or do not fit.
bool plan_cpu(const PlanParams& params);

}  // namespace illada::attention
