// Order of the tiles of a GEMM whose long side is the vocabulary. For host and device.
#pragma once

#include <limits>

#include "common/host_device.h"
#include "common/variants.h"

namespace illada::loss {

// Maximum number of tiles across that are computed for one stretch of the vocabulary before the next stretch.
inline int max_group_tiles() {
  switch (variant<LossRaster>()) {
    case LossRaster::k8:
      return 8;
    case LossRaster::k4:
      return 4;
    case LossRaster::kAll:
      break;
  }
  return std::numeric_limits<int>::max();
}

// Coordinates of the i-th tile of `tiles_across` x `tiles_along` tiles; the vocabulary runs along. Without groups, the
// kernel reads a stretch of the vocabulary once, for all tiles across it. With groups of tiles across, it reads the
// stretch once per group. The other operand of the tiles that are computed at the same time then takes less of the L2
// cache.
struct TileCoord {
  int across, along;

  ILLADA_HOST_DEVICE TileCoord(int max_group, int tiles_across, int tiles_along, int i) {
    const int group = max_group < tiles_across ? max_group : tiles_across;
    const int first = i / (group * tiles_along) * group, left = tiles_across - first;
    const int width = group < left ? group : left, index_in_group = i - first * tiles_along;
    across = first + index_in_group % width;
    along = index_in_group / width;
  }
};

}  // namespace illada::loss
