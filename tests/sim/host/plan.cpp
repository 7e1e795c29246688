// The launch table of csrc/cuda/launch_plan.h for Python.
#include "launch_plan.h"

extern "C" void tile_shape(int tile, int element_bytes, int* out) {
  const tinylora::TileShape s = tinylora::tile_shape(static_cast<tinylora::Tile>(tile), element_bytes);
  const int fields[] = {s.rows, s.vectors, s.width, s.threads, s.resident};
  for (int i = 0; i < 5; ++i) out[i] = fields[i];
}

extern "C" void plan_tile(int64_t features, int element_bytes, int aligned, int stays, int few, int* out) {
  const tinylora::LaunchPlan p = tinylora::plan_tile(features, element_bytes, aligned != 0, stays != 0, few != 0);
  const int fields[] = {static_cast<int>(p.tile), p.team, p.teams};
  for (int i = 0; i < 3; ++i) out[i] = fields[i];
}

extern "C" int spread(int64_t rows, int block_rows, int multiprocessors, int resident) {
  return tinylora::spread(rows, block_rows, multiprocessors, resident);
}
