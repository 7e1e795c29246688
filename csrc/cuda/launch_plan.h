// Which kernel a problem runs on, and with how many threads: pure host arithmetic, the one table that the launcher, the
// tests and both simulators share. It depends on shapes and alignment alone, never on the card.
#pragma once
#include <cstdint>

namespace tinylora {

constexpr int kWarp = 32;
constexpr int kMaxResident = 32768;            // columns of the longest row that is held in registers
constexpr int kMaxTeams = 4;                   // teams of one warp that share a block
constexpr int kMaxBlocks = 2048;               // about four waves of resident blocks on the largest GPUs
constexpr int64_t kMaxExtent = 1 << 30;        // of rows and columns, counted in 32 bits with room to step past the end
constexpr int kRowsPerChunk = 4096;            // rows that one block of the dv kernel sums
constexpr int kVectorGradThreads = 256;

// How a team of threads holds its rows between the dot products and the update. The first four keep them in registers,
// so that memory is read once; rows too long for that are streamed through twice.
enum class Tile : int { Short, Medium, Long, Scalar, Stream, StreamScalar };

struct TileShape {
  int rows;       // rows of one team: each packet of the basis is used for all of them
  int vectors;    // packets of one thread in each row
  int width;      // elements of one packet: 16 bytes, or a single element where the rows are not aligned
  int threads;    // most threads of a block: leaves each of them enough registers for its packets
  bool resident;  // the row stays in registers

  constexpr int columns() const { return threads * vectors * width; }  // the longest row it holds
};

constexpr TileShape tile_shape(Tile tile, int element_bytes) {
  const int width = 16 / element_bytes;
  switch (tile) {
    case Tile::Short: return {4, 1, width, 256, true};                           // D <=  1024 fp32,  2048 16-bit
    case Tile::Medium: return {2, 4, width, 256, true};                          // D <=  4096 fp32,  8192 16-bit
    case Tile::Long:                                                             // D <= 32768
      return element_bytes == 4 ? TileShape{1, 22, 4, 384, true} : TileShape{1, 8, 8, 512, true};
    case Tile::Scalar: return {1, 32, 1, 512, true};                             // D <= 16384
    case Tile::Stream: return {1, 4, width, 512, false};
    default: return {1, 8, 1, 512, false};
  }
}

template <Tile TILE, int ELEMENT_BYTES>
constexpr TileShape kTileShape = tile_shape(TILE, ELEMENT_BYTES);

struct Plan {
  Tile tile;
  int team;                 // threads of one team, whole warps: blockDim.x
  int teams;                // teams of a block: blockDim.y
  int blocks;               // gridDim.x; each block takes tiles_per_block consecutive tiles of teams * rows rows
  int tiles_per_block;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// aligned: every row and the basis start on 16 bytes, and rows are whole packets.
inline Plan plan_rows(int64_t rows, int64_t columns, int element_bytes, bool aligned) {
  const auto fits = [&](Tile tile) {
    return columns <= kMaxResident && columns <= tile_shape(tile, element_bytes).columns();
  };
  const Tile tile = !aligned ? (fits(Tile::Scalar) ? Tile::Scalar : Tile::StreamScalar)
                    : fits(Tile::Short) ? Tile::Short
                    : fits(Tile::Medium) ? Tile::Medium
                    : fits(Tile::Long) ? Tile::Long
                                       : Tile::Stream;
  const TileShape shape = tile_shape(tile, element_bytes);
  const int64_t warps = columns ? ceil_div(columns, shape.vectors * shape.width * kWarp) : 1;
  Plan plan{};
  plan.tile = tile;
  plan.team = warps * kWarp < shape.threads ? int(warps) * kWarp : shape.threads;
  plan.teams = plan.team <= kWarp ? kMaxTeams : plan.team <= 2 * kWarp ? kMaxTeams / 2 : 1;
  const int64_t tiles = ceil_div(rows, int64_t(plan.teams) * shape.rows);
  plan.tiles_per_block = int(ceil_div(tiles, kMaxBlocks));
  plan.blocks = tiles ? int(ceil_div(tiles, plan.tiles_per_block)) : 0;
  return plan;
}

}  // namespace tinylora
