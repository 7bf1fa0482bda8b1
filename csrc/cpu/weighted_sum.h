#pragma once

#include <cstdint>

namespace illada::loss {

// Computes loss[0] = scale * sum_n weights[n] nll[n] over the n with weights[n] != 0, in double precision and in order.
void weighted_sum_cpu(const float* nll, const float* weights, int64_t num_rows, double scale, float* loss);

}  // namespace illada::loss
