// The tiles of rows that a kernel is compiled for, and the numbers that host and device code agree on.
#pragma once
#include "integers.h"

namespace tinylora {

constexpr int kWarp = 32;                      // threads
constexpr int kMaxWarps = 16;                  // of a block
constexpr int kMaxTeams = 4;                   // of one or two warps, that share a block
constexpr int kMaxBlocks = 1024;               // the last of which adds up what all of them summed
constexpr int64_t kMaxExtent = 1 << 30;        // of N and D, counted in 32 bits with room to step past the end
constexpr int kBankThreads = 512;
constexpr int kRightThreads = 256;             // a sample of the weight each
constexpr int kRightColumns = 2 * kWarp;       // of a block
constexpr int kStreamTickets = 256;            // streams that have a ticket of their own
constexpr int kGraphTickets = 1 << 15;         // launches in graphs that have one

// How a team of threads holds its rows between the dot products and the update. All but the last two keep them in
// registers, so that memory is read once. The last two stream: rows too long for that, rows that are not aligned, and a
// target that is not the source.
enum class Tile : int { Few, Short, Medium, Long, Stream, Scalar };

struct TileShape {
  int rows;       // rows of one team: each packet of the factor is used for all of them
  int vectors;    // packets of one thread in each row
  int width;      // elements of one packet: four, or a single one where the rows are not aligned
  int threads;    // most threads of a block
  bool resident;  // the row stays in registers

  TL_BOTH constexpr int features() const { return threads * vectors * width; }  // the longest row it holds
};

// Four elements a packet whatever their type: a warp then reads the factor, four floats a lane, in whole lines.
TL_BOTH constexpr TileShape tile_shape(Tile tile, int element_bytes) {
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

}  // namespace tinylora
