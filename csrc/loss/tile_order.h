// The order of the tiles of a GEMM whose long side is the vocabulary. Host and device.
#pragma once

#include <limits>

#include "common/host_device.h"
#include "common/variants.h"

namespace illada::loss {

// How many tiles of a stretch of the vocabulary are made before the next stretch: at most so many across.
inline int tiles_of_a_group() {
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

// Where the i-th tile of `tiles_across` x `tiles_along` lies; the vocabulary is along. A stretch of it is read once for
// all tiles across it. With groups of tiles across, it is read once a group, and the other operand of the tiles that
// are made at the same time takes less of the L2 cache.
struct TilePlace {
  int across, along;

  ILLADA_HOST_DEVICE TilePlace(int most_of_a_group, int tiles_across, int tiles_along, int i) {
    const int group = most_of_a_group < tiles_across ? most_of_a_group : tiles_across;
    const int first = i / (group * tiles_along) * group, left = tiles_across - first;
    const int width = group < left ? group : left, of_group = i - first * tiles_along;
    across = first + of_group % width;
    along = of_group / width;
  }
};

}  // namespace illada::loss
