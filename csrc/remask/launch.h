// Interface between launch.cpp, which validates the params, and remask.cu, which launches the kernel.
#pragma once

#include "common/device.h"
#include "illada/remask.h"

namespace illada::remask {

void launch_remask(const RemaskParams& params, const Device& device);

}  // namespace illada::remask
