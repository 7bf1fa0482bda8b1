#include "attention/backward_sm80.cuh"

namespace illada::attention {

template void launch_backward_sm80<96>(const BackwardParams&, const Device&, const Tiling&);

}  // namespace illada::attention
