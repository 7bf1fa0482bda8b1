#pragma once

#include "illada/attention.h"

namespace illada::attention {

// plan_cuda on a CPU, where a plan has a row for each sequence and one for the queries behind them, as forward_cpu
// says. False, and no plan, where lengths do not ascend from 0 or do not fit.
bool plan_cpu(const PlanParams& params);

}  // namespace illada::attention
