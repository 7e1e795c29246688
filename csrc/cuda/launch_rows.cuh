// The table from (rank, tile) to a kernel, for one element type.
#pragma once
#include "launch.h"
#include "rows.cuh"

namespace tinylora {

template <class T, int R>
void launch_rank(const Plan& plan, const RowsArguments& arguments, cudaStream_t stream) {
  const dim3 grid(plan.blocks), block(plan.team, plan.teams);
  switch (plan.tile) {
    case Tile::Short: TL_LAUNCH((rows_kernel<T, R, Tile::Short>), grid, block, stream, arguments); break;
    case Tile::Medium: TL_LAUNCH((rows_kernel<T, R, Tile::Medium>), grid, block, stream, arguments); break;
    case Tile::Long: TL_LAUNCH((rows_kernel<T, R, Tile::Long>), grid, block, stream, arguments); break;
    case Tile::Scalar: TL_LAUNCH((rows_kernel<T, R, Tile::Scalar>), grid, block, stream, arguments); break;
    case Tile::Stream: TL_LAUNCH((rows_kernel<T, R, Tile::Stream>), grid, block, stream, arguments); break;
    case Tile::StreamScalar: TL_LAUNCH((rows_kernel<T, R, Tile::StreamScalar>), grid, block, stream, arguments); break;
  }
}

template <class T>
void launch_rows(int rank, const Plan& plan, const RowsArguments& arguments, cudaStream_t stream) {
  switch (rank) {
    case 1: return launch_rank<T, 1>(plan, arguments, stream);
    case 2: return launch_rank<T, 2>(plan, arguments, stream);
    case 4: return launch_rank<T, 4>(plan, arguments, stream);
    case 8: return launch_rank<T, 8>(plan, arguments, stream);
  }
}

}  // namespace tinylora
