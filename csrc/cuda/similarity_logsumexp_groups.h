// How the forward pass of similarity_logsumexp is shared out: a block takes up to 16×16 tiles of scores.
#pragma once

#include "tile.h"

namespace ncpvae::cuda {

constexpr int kGroup = 16;  // tiles along either side of a block's share, at most

struct Groups {
  int64_t row_tiles, column_tiles;
  int64_t tiles;  // of a group, along either side
  int64_t row_groups, column_groups;
};

// The largest groups that still make enough blocks: partials take N·K / (tiles per group · tile) values each way.
inline Groups choose_groups(int64_t rows, int64_t columns, int tile) {
  Groups g{ceil_div(rows, tile), ceil_div(columns, tile), kGroup, 0, 0};
  for (;; g.tiles /= 2) {
    g.row_groups = ceil_div(g.row_tiles, g.tiles);
    g.column_groups = ceil_div(g.column_tiles, g.tiles);
    if (g.tiles == 1 || g.row_groups * g.column_groups >= kEnoughBlocks) return g;
  }
}

}  // namespace ncpvae::cuda
