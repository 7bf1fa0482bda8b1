#include "attention/forward_sm90.cuh"

namespace illada::attention {

template void launch_forward_sm90<128, 128, 3>(const ForwardParams&, const Device&, const Tiling&);

}  // namespace illada::attention
