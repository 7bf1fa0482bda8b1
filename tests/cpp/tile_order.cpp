// The tiles of the loss's GEMMs in the order of the choice loss_raster: see tests/builds/test_tile_order.py.
#include "loss/tile_order.h"

#include <cstdio>
#include <cstdlib>

// tile_order ACROSS ALONG: one tile a line.
int main(int, char** argv) {
  const int across = std::atoi(argv[1]), along = std::atoi(argv[2]);
  for (int i = 0; i < across * along; ++i) {
    const illada::loss::TileCoord tile(illada::loss::max_group_tiles(), across, along, i);
    std::printf("%d %d\n", tile.across, tile.along);
  }
}
