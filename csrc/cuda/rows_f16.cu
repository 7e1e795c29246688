#include "launch_rows.cuh"

namespace tinylora {
template void launch_rows<__half>(int, const Plan&, const RowsArguments&, cudaStream_t);
}  // namespace tinylora
