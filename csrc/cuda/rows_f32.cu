#include "launch_rows.cuh"

namespace tinylora {
template void launch_rows<float>(int, const Plan&, const RowsArguments&, cudaStream_t);
}  // namespace tinylora
