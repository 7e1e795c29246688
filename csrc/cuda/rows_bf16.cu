#include "launch_rows.cuh"

namespace tinylora {
template RowsKernel rows_kernel_of<__nv_bfloat16>(int, Tile, bool);
}  // namespace tinylora
