// The ops on NVIDIA GPUs, for torch and for linear/node.cpp.
#include "common/direct.h"
#include "common/ops.h"
#include "cuda/tiles.h"
#include "cuda/update.h"

namespace tinylora {
namespace {

struct Cuda {
  static constexpr auto update = cuda::update;
  static constexpr auto update_backward = cuda::update_backward;
  static constexpr auto low_rank = cuda::low_rank;
  static constexpr auto update_input_grad = cuda::update_input_grad;
  static constexpr auto update_parts = cuda::update_parts;
  static constexpr auto update_parts_backward = cuda::update_parts_backward;
};

constexpr Kernels kKernels = Direct<Cuda>::kernels();

void refresh_right(const Tensor& right, const Tensor& samples, const Tensor& weight, const Tensor& basis, bool force) {
  cuda::refresh_right(check_refresh_right(written(right), written(samples), view(weight), view(basis), kRightColumns,
                                          kRightThreads),
                      force);
}

}  // namespace
}  // namespace tinylora

STABLE_TORCH_LIBRARY_IMPL(tinylora, CUDA, m) {
  tinylora::Ops<tinylora::Cuda>::implement(m);
  m.impl("refresh_right", TORCH_BOX(&tinylora::refresh_right));
}

extern "C" __attribute__((visibility("default"))) const tinylora::Kernels* tinylora_cuda_kernels() {
  return &tinylora::kKernels;
}
