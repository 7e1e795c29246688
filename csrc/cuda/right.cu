#include "right.cuh"

#include "launch.h"

namespace tinylora {
namespace {

template <class T>
void launch_rank(int rank, const RightArguments& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.columns, kRightColumns))), block(kRightThreads);
  switch (rank) {
    case 1: TL_LAUNCH((refresh_right_kernel<T, 1>), grid, block, stream, p); break;
    case 2: TL_LAUNCH((refresh_right_kernel<T, 2>), grid, block, stream, p); break;
    case 4: TL_LAUNCH((refresh_right_kernel<T, 4>), grid, block, stream, p); break;
    case 8: TL_LAUNCH((refresh_right_kernel<T, 8>), grid, block, stream, p); break;
  }
}

}  // namespace

void run_refresh_right(Element element, int rank, const RightArguments& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return;
  switch (element) {
    case Element::Float32: return launch_rank<float>(rank, p, stream);
    case Element::BFloat16: return launch_rank<__nv_bfloat16>(rank, p, stream);
    case Element::Float16: return launch_rank<__half>(rank, p, stream);
  }
}

}  // namespace tinylora
