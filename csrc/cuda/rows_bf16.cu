#include "launch_rows.cuh"

namespace tinylora {
template void launch_rows<__nv_bfloat16>(int, const Plan&, const RowsArguments&, cudaStream_t);
}  // namespace tinylora
