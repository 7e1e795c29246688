// Which kernel a problem runs on, and with how many threads: pure host arithmetic, the one table that the launcher, the
// tests and both simulators share.
#pragma once
#include <algorithm>
#include <cstdint>

namespace tinylora {

constexpr int kWarp = 32;                      // threads
constexpr int kMaxWarps = 16;                  // of a block
constexpr int kMaxTeams = 4;                   // of one or two warps, that share a block
constexpr int kMaxBlocks = 1024;               // the last of which adds up what all of them summed
constexpr int64_t kMaxExtent = 1 << 30;        // of N and D, counted in 32 bits with room to step past the end
constexpr int kBankThreads = 512;
constexpr int kRightThreads = 256;             // a sample of the weight each
constexpr int kRightColumns = 2 * kWarp;       // of a block

// How a team of threads holds its rows between the dot products and the update. All but the last two keep them in
// registers, so that memory is read once. The last two stream: rows too long for that, rows that are not aligned, and a target that is
// not the source.
enum class Tile : int { Few, Short, Medium, Long, Stream, Scalar };

struct TileShape {
  int rows;       // rows of one team: each packet of the factor is used for all of them
  int vectors;    // packets of one thread in each row
  int width;      // elements of one packet: four, or a single one where the rows are not aligned
  int threads;    // most threads of a block
  bool resident;  // the row stays in registers

  constexpr int features() const { return threads * vectors * width; }  // the longest row it holds
};

// Four elements a packet whatever their type: a warp then reads the factor, four floats a lane, in whole lines.
constexpr TileShape tile_shape(Tile tile, int element_bytes) {
  const bool wide = element_bytes == 4;
  switch (tile) {
    case Tile::Few: return {1, 4, 4, 256, true};                // D <= 4096, a row for each multiprocessor
    case Tile::Short: return {wide ? 2 : 4, 4, 4, 256, true};   // D <= 4096
    case Tile::Medium: return {wide ? 1 : 2, 8, 4, 256, true};  // D <= 8192
    case Tile::Long: return {1, 16, 4, wide ? 256 : 512, true};  // D <= 16384 in 32 bits, 32768 in 16
    case Tile::Stream: return {wide ? 2 : 4, 2, 4, 256, false};
    default: return {1, 8, 1, 256, false};
  }
}

template <Tile TILE, int ELEMENT_BYTES>
constexpr TileShape kTileShape = tile_shape(TILE, ELEMENT_BYTES);

struct LaunchPlan {
  Tile tile;
  int team;    // threads of one team, whole warps: blockDim.x
  int teams;   // teams of a block: blockDim.y
  int blocks;  // gridDim.x; each takes consecutive rows, the same number to within one, a tile for each team at a time
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  const TileShape shape = tile_shape(tile, element_bytes);
  const int64_t warps = std::clamp<int64_t>(ceil_div(features, shape.vectors * shape.width * kWarp), 1,
                                            shape.threads / kWarp);
  const int teams = warps == 1 ? kMaxTeams : warps == 2 ? kMaxTeams / 2 : 1;
  return {tile, static_cast<int>(warps) * kWarp, teams, 0};
}

// As many blocks as the card runs at once: every one takes the same rows to within one, and none waits for another to
// end. Few rows go to as many multiprocessors as there are rows.
inline int spread(int64_t rows, int block_rows, int multiprocessors, int resident) {
  const int64_t wanted = std::max(ceil_div(rows, block_rows), std::min<int64_t>(rows, multiprocessors));
  return static_cast<int>(std::min<int64_t>({wanted, resident, kMaxBlocks}));
}

}  // namespace tinylora
