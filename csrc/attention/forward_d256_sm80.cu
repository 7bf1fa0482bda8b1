#include "attention/forward_sm80.cuh"

namespace illada::attention {

template void launch_forward_sm80<256>(const ForwardParams&, const Device&, const Tiling&);

}  // namespace illada::attention
