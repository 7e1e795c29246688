// Which kernel a problem runs on, and with how many threads: pure host arithmetic, the one table that the launcher, the
// tests and both simulators share.
#pragma once
#include <algorithm>

#include "tiles.h"

namespace tinylora {

struct LaunchPlan {
  Tile tile;
  int team;    // threads of one team, whole warps: blockDim.x
  int teams;   // teams of a block: blockDim.y
  int blocks;  // gridDim.x; each takes consecutive rows, the same number to within one, a tile for each team at a time
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a row of this length.
constexpr int team_warps(int64_t features, const TileShape& shape) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(features, shape.vectors * shape.width * kWarp), 1,
                                              shape.threads / kWarp));
}

// The tile and its threads; `blocks` is left to spread(). stays: the rows that are read are those that are written.
// aligned: rows, factors and bias start on whole packets, and rows consist of them. few: a multiprocessor for each row.
// Few and Short sum alike: the bits of a row depend on that row alone.
inline LaunchPlan plan_tile(int64_t features, int element_bytes, bool aligned, bool stays, bool few) {
  const auto holds = [&](Tile tile) { return features <= tile_shape(tile, element_bytes).features(); };
  const Tile tile = !aligned              ? Tile::Scalar
                    : !stays              ? Tile::Stream
                    : holds(Tile::Short)  ? (few ? Tile::Few : Tile::Short)
                    : holds(Tile::Medium) ? Tile::Medium
                    : holds(Tile::Long)   ? Tile::Long
                                          : Tile::Stream;
  const int warps = team_warps(features, tile_shape(tile, element_bytes));
  const int teams = warps == 1 ? kMaxTeams : warps == 2 ? kMaxTeams / 2 : 1;
  return {tile, warps * kWarp, teams, 0};
}

// Blocks that would take a tile of each team. Few rows go to as many multiprocessors as there are rows.
constexpr int64_t wanted_blocks(int64_t rows, int block_rows, int multiprocessors) {
  return std::max(ceil_div(rows, block_rows), std::min<int64_t>(rows, multiprocessors));
}

// As many blocks as the card runs at once: every one takes the same rows to within one, and none waits for another to
// end.
inline int spread(int64_t rows, int block_rows, int multiprocessors, int resident) {
  const int64_t wanted = wanted_blocks(rows, block_rows, multiprocessors);
  return static_cast<int>(std::min<int64_t>({wanted, resident, kMaxBlocks}));
}

// Of the parts of a launch: each the share of them that it wants, at least one.
constexpr int share(int64_t wanted, int64_t wanted_by_all, int resident) {
  const int64_t most = std::min(resident, kMaxBlocks);
  return static_cast<int>(wanted_by_all <= most ? wanted : std::max<int64_t>(most * wanted / wanted_by_all, 1));
}

}  // namespace tinylora
