// How TMA ends a box where its sequence ends, although other sequences follow: coordinates that kernels and tensor maps
// (tensor_map_ragged) agree on.
//
// The tensor map has the token dimension three times. Its sizes are kRaggedTokens, more than that, and the number of
// tokens + 1; its strides s, 2^34 - s and s bytes. Token `row` of the sequence start .. start + count - 1 has the
// coordinates (kRaggedTokens - count + row, kRaggedTokens, start + count). The first one reaches the end of its
// dimension where the sequence ends. Their offsets add up to (start + row) s + kRaggedTokens 2^34, and the last term is
// 2^64, which is 0 for an address. So the map's address is the data's own.
//
// A map with two of these dimensions, whose address lies before the data, would do for stores. Loads may fail where the
// address of the map is not mapped, whatever the box.
#pragma once

#include <cstdint>

namespace illada {

constexpr int32_t kRaggedTokens = 1 << 30;

}  // namespace illada
