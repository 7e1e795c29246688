#include "vector_grad.cuh"

#include "launch.h"

namespace tinylora {

void launch_vector_grad(int rank, const VectorGradArguments& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(arguments.chunks * arguments.mixing.adapters)), block(kVectorGradThreads);
  switch (rank) {
    case 1: TL_LAUNCH(vector_grad_kernel<1>, grid, block, stream, arguments); break;
    case 2: TL_LAUNCH(vector_grad_kernel<2>, grid, block, stream, arguments); break;
    case 4: TL_LAUNCH(vector_grad_kernel<4>, grid, block, stream, arguments); break;
    case 8: TL_LAUNCH(vector_grad_kernel<8>, grid, block, stream, arguments); break;
  }
}

}  // namespace tinylora
