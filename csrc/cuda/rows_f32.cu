#include "launch_rows.cuh"

namespace tinylora {
template RowsKernel rows_kernel_of<float>(int, Tile, bool);
}  // namespace tinylora
