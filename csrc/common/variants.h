// The choices of illada/variants.h as enums, for the host code that launches kernels. To add one: an enum here, whose
// values are in the order of its names in variants.cpp, and a line in the table there.
#pragma once

#include "illada/variants.h"

namespace illada {

enum class ProgrammaticLaunch { kEarly, kWait, kOff };
enum class ForwardWarps { kAuto, kFour, kEight };

// The value in use.
template <typename Choice>
Choice variant();

}  // namespace illada
