// Mathematical constants of host and device code.
#pragma once

namespace illada {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kLog2eF = float(kLog2e), kLn2F = float(kLn2);

}  // namespace illada
