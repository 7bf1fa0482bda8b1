// Tiles of head dim 64 that only a measurement can choose; see docs/notebook/attention.md.
#include "attention/forward_sm90.cuh"

namespace illada::attention {

template void launch_forward_sm90<64, 128, 4>(const ForwardParams&, const Device&, const Tiling&);

}  // namespace illada::attention
