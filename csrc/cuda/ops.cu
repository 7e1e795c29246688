// The CUDA entry points of the two ops: arguments checked, results allocated by torch, kernels on the caller's stream.
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/arguments.h"
#include "launch.h"

// Weak: a torch without CUDA has no such function, and the library must load beside it all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace tinylora {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error("tinylora: this torch has no CUDA; install a CUDA build of torch");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
    throw std::runtime_error("tinylora: torch did not give its current CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

Element element_of(const Arguments& call) {
  switch (call.dtype) {
    case Dtype::float32: return Element::Float32;
    case Dtype::bfloat16: return Element::BFloat16;
    case Dtype::float16: return Element::Float16;
    default:
      throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16 activations, found float64; "
                                  "use the reference backend");
  }
}

void at_most(const char* what, int64_t count, int64_t limit, const char* fix) {
  if (count <= limit) return;
  throw std::invalid_argument(std::string(what) + ": the CUDA kernels take at most " + std::to_string(limit) +
                              ", found " + std::to_string(count) + "; " + fix);
}

// What the two ops have in common; refuses what the kernels cannot count in 32 bits.
RowsArguments rows_arguments(const Arguments& call) {
  if (!supported_rank(call.rank)) {
    throw std::invalid_argument("basis: the CUDA kernels take ranks 1, 2, 4 and 8, found " +
                                std::to_string(call.rank) + "; use the triton or the reference backend");
  }
  constexpr int64_t most = INT32_MAX;
  at_most("columns", call.features, kMaxExtent, "use the reference backend");
  at_most("rows", call.rows, kMaxExtent, "split the batch");
  at_most("numbers of the projection", call.numbers * call.rank * call.rank, most, "use the reference backend");
  at_most("adapters times chunks of 4096 rows", call.adapters * ceil_div(call.rows + 1, kRowsPerChunk), most,
          "split the batch");
  RowsArguments p{};
  p.source = call.activation;
  p.source_stride = call.stride;
  p.rows = static_cast<int32_t>(call.rows);
  p.columns = static_cast<int32_t>(call.features);
  p.basis = static_cast<const float*>(call.basis);
  p.offset = static_cast<const float*>(call.offset);
  p.mixing.v = static_cast<const float*>(call.v);
  p.mixing.projection = static_cast<const float*>(call.projection);
  p.mixing.ids = call.ids.data;
  p.mixing.rows_per_id = static_cast<int32_t>(call.ids.rows_per_id);
  p.mixing.adapters = static_cast<int32_t>(call.adapters);
  p.mixing.numbers = static_cast<int32_t>(call.numbers);
  p.mixing.elementwise = call.elementwise;
  p.mixing.wide_ids = call.ids.is_int64;
  return p;
}

void check_launch() {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("tinylora: the CUDA launch failed: ") + cudaGetErrorString(status));
  }
}

Tensor update_cuda(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                   const std::optional<Tensor>& offset, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& adapter_ids) {
  const Arguments call = check_update(y, basis, v, projection, offset, bias, adapter_ids);
  if (call.bias) throw std::invalid_argument("bias: the CUDA kernels do not add it; ops/dispatch.py does");
  const Element element = element_of(call);
  RowsArguments p = rows_arguments(call);
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor t = empty_matrix(y, /*accumulate=*/true, call.rows, call.rank);
  p.target = call.activation;
  p.target_stride = call.stride;
  p.coefficients = static_cast<float*>(t.mutable_data_ptr());
  run_update(element, static_cast<int>(call.rank), p, current_stream(y));
  check_launch();
  return t;
}

std::tuple<Tensor, Tensor> update_backward_cuda(const Tensor& g, const Tensor& basis, const Tensor& v,
                                                const Tensor& projection, const std::optional<Tensor>& t,
                                                const std::optional<Tensor>& adapter_ids, bool need_input_grad) {
  const Arguments call = check_update_backward(g, basis, v, projection, t, adapter_ids);
  const Element element = element_of(call);
  RowsArguments p = rows_arguments(call);
  const int rank = static_cast<int>(call.rank);
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  Tensor g0 = need_input_grad ? empty_contiguous_like(g) : empty_vector(g);
  Tensor dv = t ? empty_contiguous_like(v) : empty_vector(v);
  Tensor workspace = empty_matrix(g, /*accumulate=*/true, 1, t ? workspace_words(rank, call.rows, call.adapters) : 0);
  p.target = need_input_grad ? g0.mutable_data_ptr() : nullptr;
  p.target_stride = call.features;
  run_update_backward(element, rank, p, static_cast<const float*>(call.t),
                      t ? static_cast<float*>(dv.mutable_data_ptr()) : nullptr, workspace.mutable_data_ptr(),
                      current_stream(g));
  check_launch();
  return {g0, dv};
}

}  // namespace
}  // namespace tinylora

STABLE_TORCH_LIBRARY_IMPL(tinylora, CUDA, m) {
  m.impl("update", TORCH_BOX(&tinylora::update_cuda));
  m.impl("update_backward", TORCH_BOX(&tinylora::update_backward_cuda));
}
