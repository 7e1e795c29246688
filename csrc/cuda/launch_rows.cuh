// The table from (rank, tile) to a kernel, for one element type.
#pragma once
#include "launch.h"
#include "rows.cuh"

namespace tinylora {

template <class T, int R, bool IDS>
RowsKernel kernel_of_rank(Tile tile) {
  switch (tile) {
    case Tile::Few: return rows_kernel<T, R, Tile::Few, IDS>;
    case Tile::Short: return rows_kernel<T, R, Tile::Short, IDS>;
    case Tile::Medium: return rows_kernel<T, R, Tile::Medium, IDS>;
    case Tile::Long: return rows_kernel<T, R, Tile::Long, IDS>;
    case Tile::Stream: return rows_kernel<T, R, Tile::Stream, IDS>;
    default: return rows_kernel<T, R, Tile::Scalar, IDS>;
  }
}

template <class T>
RowsKernel rows_kernel_of(int rank, Tile tile, bool ids) {
  switch (rank) {
    case 1: return ids ? kernel_of_rank<T, 1, true>(tile) : kernel_of_rank<T, 1, false>(tile);
    case 2: return ids ? kernel_of_rank<T, 2, true>(tile) : kernel_of_rank<T, 2, false>(tile);
    case 4: return ids ? kernel_of_rank<T, 4, true>(tile) : kernel_of_rank<T, 4, false>(tile);
    case 8: return ids ? kernel_of_rank<T, 8, true>(tile) : kernel_of_rank<T, 8, false>(tile);
  }
  return nullptr;
}

}  // namespace tinylora
