#include "bank_grad.cuh"

#include "launch.h"

namespace tinylora {

void launch_bank_grad(int rank, int blocks, const BankGradArguments& arguments, cudaStream_t stream) {
  const dim3 grid(blocks), block(kBankThreads);
  switch (rank) {
    case 1: TL_LAUNCH(bank_grad_kernel<1>, grid, block, stream, arguments); break;
    case 2: TL_LAUNCH(bank_grad_kernel<2>, grid, block, stream, arguments); break;
    case 4: TL_LAUNCH(bank_grad_kernel<4>, grid, block, stream, arguments); break;
    case 8: TL_LAUNCH(bank_grad_kernel<8>, grid, block, stream, arguments); break;
  }
}

}  // namespace tinylora
