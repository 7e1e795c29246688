// The launch table of csrc/cuda/launch_plan.h for Python.
#include "launch_plan.h"

extern "C" void tile_shape(int tile, int element_bytes, int* out) {
  const tinylora::TileShape s = tinylora::tile_shape(static_cast<tinylora::Tile>(tile), element_bytes);
  const int fields[] = {s.rows, s.vectors, s.width, s.threads, s.resident};
  for (int i = 0; i < 5; ++i) out[i] = fields[i];
}

extern "C" void plan_rows(int64_t rows, int64_t columns, int element_bytes, int aligned, int* out) {
  const tinylora::Plan p = tinylora::plan_rows(rows, columns, element_bytes, aligned != 0);
  const int fields[] = {static_cast<int>(p.tile), p.team, p.teams, p.blocks, p.tiles_per_block};
  for (int i = 0; i < 5; ++i) out[i] = fields[i];
}
