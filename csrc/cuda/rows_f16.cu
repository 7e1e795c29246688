#include "launch_rows.cuh"

namespace tinylora {
template RowsKernel rows_kernel_of<__half>(int, Tile, bool);
}  // namespace tinylora
