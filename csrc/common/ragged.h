// Coordinates with which TMA ends a box where its sequence ends, although other sequences follow. Kernels and tensor
// maps (tensor_map_ragged) must agree on them.
//
// The tensor map has the token dimension three times:
//   sizes        kRaggedTokens, more than kRaggedTokens, number of tokens + 1
//   strides      s, 2^34 - s, s bytes
//   coordinates  kRaggedTokens - count + row, kRaggedTokens, start + count
// for token `row` of the sequence start .. start + count - 1. The first coordinate reaches the end of its dimension
// where the sequence ends. The offsets add up to (start + row) s + kRaggedTokens 2^34. The last term is 2^64, which is
// 0 for an address. So the address of the map is the address of the data.
//
// For stores, a map with two of these dimensions and an address before the data would be enough. Loads may fail if the
// address of the map is not mapped, for any box.
#pragma once

#include <cstdint>

namespace illada {

constexpr int32_t kRaggedTokens = 1 << 30;

}  // namespace illada
