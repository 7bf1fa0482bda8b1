// Tiles of head dim 128 that only a measurement can choose; see docs/notebook/attention.md.
#include "attention/forward_sm90.cuh"

namespace illada::attention {

template void launch_forward_sm90<128, 128, 2>(const ForwardParams&, const Device&, const Tiling&);
template void launch_forward_sm90<128, 176, 2>(const ForwardParams&, const Device&, const Tiling&);

}  // namespace illada::attention
