// The CUDA entry points of the ops: arguments checked, results allocated by torch, kernels on the caller's stream.
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/tensors.h"
#include "cuda/launch.h"

// Weak: a torch without CUDA has no such function, and the library must load beside it all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace tinylora {
namespace {

Stream current_stream(const Tensor& tensor) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error("tinylora: this torch has no CUDA; install a CUDA build of torch");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
    throw std::runtime_error("tinylora: torch did not give its current CUDA stream");
  }
  return stream;
}

Element element_of(Dtype dtype) {
  switch (dtype) {
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

int rank_of(int64_t rank) {
  if (!supported_rank(rank)) {
    throw std::invalid_argument("basis: the CUDA kernels take ranks 1, 2, 4 and 8, found " + std::to_string(rank) +
                                "; use the triton or the reference backend");
  }
  return static_cast<int>(rank);
}

// What the ops have in common: the rows that are read. Refuses what the kernels cannot count in 32 bits.
RowsArguments rows_arguments(const Arguments& call) {
  rank_of(call.rank);
  at_most("features", call.features, kMaxExtent, "use the reference backend");
  at_most("rows", call.rows, kMaxExtent, "split the batch");
  at_most("numbers of the projection", call.numbers * call.rank * call.rank, INT32_MAX, "use the reference backend");
  at_most("adapters", call.adapters, INT32_MAX, "use the reference backend");
  RowsArguments p{};
  p.source = {call.activation, call.stride, static_cast<const float*>(call.basis), static_cast<int32_t>(call.features),
              static_cast<int32_t>(call.basis_stride)};
  p.rows = static_cast<int32_t>(call.rows);
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

Side side_of(const OtherSide& out) {
  at_most("features", out.features, kMaxExtent, "use the reference backend");
  return {out.activation, out.stride, static_cast<const float*>(out.factor), static_cast<int32_t>(out.features),
          static_cast<int32_t>(out.factor_stride)};
}

// A GPU while an op runs on it: torch's current device, for what torch allocates, and the driver's.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard torch;
  Device device;

  explicit OnDevice(const Tensor& tensor) : torch(tensor.get_device_index()), device(tensor.get_device_index()) {}
};

// Coefficients [N, R] of the rows of `p`, and its target written.
Tensor run_forward(const Tensor& like, const Arguments& call, RowsArguments p) {
  const Element element = element_of(call.dtype);
  const OnDevice on(like);
  const int rank = static_cast<int>(call.rank);
  Tensor t = empty_matrix(like, /*accumulate=*/true, call.rows, rank);
  p.coefficients = static_cast<float*>(t.mutable_data_ptr());
  run_rows(on.device, element, rank, plan_rows(on.device, element, rank, p), p, current_stream(like));
  return t;
}

// dv like v where it is wanted, and the target of `p` written.
Tensor run_backward(const Tensor& g, const Arguments& call, const Tensor& v, bool need_v_grad, RowsArguments p) {
  const Element element = element_of(call.dtype);
  const OnDevice on(g);
  const int rank = static_cast<int>(call.rank);
  const LaunchPlan plan = plan_rows(on.device, element, rank, p);
  p.transposed = true;
  if (!need_v_grad) {
    if (p.target.rows) run_rows(on.device, element, rank, plan, p, current_stream(g));
      return empty_vector(v);
  }
  Tensor dv = empty_contiguous_like(v);
  Tensor scratch = empty_matrix(g, /*accumulate=*/true, 1, scratch_words(rank, plan, p));
  run_rows_and_gradient(on.device, element, rank, plan, p, static_cast<const float*>(call.t),
                        static_cast<float*>(dv.mutable_data_ptr()), static_cast<float*>(scratch.mutable_data_ptr()),
                        current_stream(g));
  return dv;
}

Tensor update_cuda(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                   const std::optional<Tensor>& offset, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& adapter_ids) {
  const Arguments call = check_update(written(y), view(basis), view(v), view(projection), view(offset), view(bias),
                                      view(adapter_ids));
  RowsArguments p = rows_arguments(call);
  p.target = p.source;
  p.onto = Onto::Source;
  p.bias = call.bias;
  p.only_finite = true;
  return run_forward(y, call, p);
}

std::tuple<Tensor, Tensor> update_backward_cuda(const Tensor& g, const Tensor& basis, const Tensor& v,
                                                const Tensor& projection, const std::optional<Tensor>& t,
                                                const std::optional<Tensor>& adapter_ids, bool need_input_grad) {
  const Arguments call = check_update_backward(view(g), view(basis), view(v), view(projection), view(t),
                                               view(adapter_ids));
  Tensor g0 = need_input_grad ? empty_contiguous_like(g) : empty_vector(g);
  RowsArguments p = rows_arguments(call);
  p.target = {need_input_grad ? g0.mutable_data_ptr() : nullptr, call.features, p.source.factor, p.source.features,
              p.source.factor_stride};
  p.onto = Onto::Source;
  return {g0, run_backward(g, call, v, t.has_value(), p)};
}

std::tuple<Tensor, Tensor> low_rank_cuda(const Tensor& x, const Tensor& right, const Tensor& basis, const Tensor& v,
                                         const Tensor& projection, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& adapter_ids) {
  OtherSide out;
  const Arguments call = check_low_rank(view(x), view(right), view(basis), view(v), view(projection), view(bias),
                                        view(adapter_ids), out);
  Tensor y = empty_rows_like(x, out.features);
  out.activation = y.mutable_data_ptr();
  out.stride = out.features;
  RowsArguments p = rows_arguments(call);
  p.target = side_of(out);
  p.onto = Onto::Nothing;
  p.bias = out.bias;
  return {y, run_forward(x, call, p)};
}

Tensor update_input_grad_cuda(const Tensor& dx, const Tensor& right, const Tensor& g, const Tensor& basis,
                              const Tensor& v, const Tensor& projection, const std::optional<Tensor>& t,
                              const std::optional<Tensor>& adapter_ids, bool add) {
  const Arguments call = check_update_backward(view(g), view(basis), view(v), view(projection), view(t),
                                               view(adapter_ids));
  const OtherSide out = check_input_grad(written(dx), view(right), call);
  RowsArguments p = rows_arguments(call);
  p.target = side_of(out);
  p.onto = add ? Onto::Target : Onto::Nothing;
  return run_backward(g, call, v, t.has_value(), p);
}

// What both directions of a fused projection have in common.
PartsArguments parts_arguments(const std::vector<Part>& parts, int64_t groups) {
  at_most("parts", static_cast<int64_t>(parts.size()), kMaxParts, "use the triton or the reference backend");
  at_most("numbers of v", groups * parts[0].call.adapters * parts[0].call.numbers, INT32_MAX, "use the reference backend");
  PartsArguments all{};
  all.parts = static_cast<int32_t>(parts.size());
  all.groups = static_cast<int32_t>(groups);
  for (int i = 0; i < all.parts; ++i) {
    all.part[i] = rows_arguments(parts[i].call);
    all.group[i] = static_cast<int32_t>(parts[i].group);
  }
  return all;
}

Tensor update_parts_cuda(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                         const std::optional<Tensor>& offset, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& x, const std::optional<Tensor>& right,
                         const std::optional<Tensor>& adapter_ids, const std::vector<int64_t>& ends,
                         const std::vector<int64_t>& groups) {
  const std::vector<Part> parts =
      check_update_parts(written(y), view(basis), view(v), view(projection), view(offset), view(bias), view(x),
                         view(right), view(adapter_ids), ends, groups);
  const Arguments& call = parts[0].call;
  const Element element = element_of(call.dtype);
  const int rank = static_cast<int>(call.rank);
  PartsArguments all = parts_arguments(parts, v.size(0));
  const OnDevice on(y);
  Tensor t = empty_coefficients(y, all.parts, call.rows, rank);
  for (int i = 0; i < all.parts; ++i) {
    RowsArguments& p = all.part[i];
    p.target = side_of(parts[i].out);
    p.onto = x ? Onto::Target : Onto::Source;
    p.bias = parts[i].out.bias;
    p.only_finite = !x;
    p.coefficients = static_cast<float*>(t.mutable_data_ptr()) + i * call.rows * rank;
  }
  const LaunchPlan plan = plan_parts(on.device, element, rank, all);
  run_parts(on.device, element, rank, plan, all, current_stream(y));
  return t;
}

std::tuple<Tensor, Tensor> update_parts_backward_cuda(const Tensor& g, const Tensor& basis, const Tensor& v,
                                                      const Tensor& projection, const std::optional<Tensor>& t,
                                                      const std::optional<Tensor>& adapter_ids,
                                                      const std::vector<int64_t>& ends,
                                                      const std::vector<int64_t>& groups, bool need_input_grad) {
  const std::vector<Part> parts =
      check_update_parts_backward(view(g), view(basis), view(v), view(projection), view(t), view(adapter_ids), ends,
                                  groups);
  const Arguments& call = parts[0].call;
  const Element element = element_of(call.dtype);
  const int rank = static_cast<int>(call.rank);
  PartsArguments all = parts_arguments(parts, v.size(0));
  const OnDevice on(g);
  Tensor g0 = need_input_grad ? empty_contiguous_like(g) : empty_vector(g);
  char* const rows = need_input_grad ? static_cast<char*>(g0.mutable_data_ptr()) : nullptr;
  for (int i = 0; i < all.parts; ++i) {
    RowsArguments& p = all.part[i];
    p.target = p.source;
    p.target.rows = rows ? rows + parts[i].begin * element_bytes(element) : nullptr;
    p.target.stride = ends.back();
    p.onto = Onto::Source;
    p.transposed = true;
  }
  const LaunchPlan plan = plan_parts(on.device, element, rank, all);
  if (!t) {
    if (need_input_grad) run_parts(on.device, element, rank, plan, all, current_stream(g));
    return {g0, empty_vector(v)};
  }
  Tensor dv = empty_contiguous_like(v);
  Tensor scratch = empty_matrix(g, /*accumulate=*/true, 1, scratch_words(rank, plan, all));
  run_parts_and_gradient(on.device, element, rank, plan, all, static_cast<const float*>(t->const_data_ptr()),
                         static_cast<float*>(dv.mutable_data_ptr()), static_cast<float*>(scratch.mutable_data_ptr()),
                         current_stream(g));
  return {g0, dv};
}

void refresh_right_cuda(const Tensor& right, const Tensor& samples, const Tensor& weight, const Tensor& basis,
                        bool force) {
  const KeptRight kept = check_refresh_right(written(right), written(samples), view(weight), view(basis),
                                             kRightColumns, kRightThreads);
  const Element element = element_of(kept.dtype);
  at_most("features", std::max(kept.rows, kept.columns), kMaxExtent, "use the reference backend");
  const RightArguments p = {kept.weight, kept.row_stride, kept.column_stride, static_cast<const float*>(kept.basis),
                            static_cast<float*>(kept.right), static_cast<uint32_t*>(kept.samples),
                            static_cast<int32_t>(kept.rows), static_cast<int32_t>(kept.columns), force};
  const OnDevice on(weight);
  run_refresh_right(on.device, element, rank_of(kept.rank), p, current_stream(weight));
}

}  // namespace
}  // namespace tinylora

STABLE_TORCH_LIBRARY_IMPL(tinylora, CUDA, m) {
  m.impl("update", TORCH_BOX(&tinylora::update_cuda));
  m.impl("update_backward", TORCH_BOX(&tinylora::update_backward_cuda));
  m.impl("low_rank", TORCH_BOX(&tinylora::low_rank_cuda));
  m.impl("update_input_grad", TORCH_BOX(&tinylora::update_input_grad_cuda));
  m.impl("update_parts", TORCH_BOX(&tinylora::update_parts_cuda));
  m.impl("update_parts_backward", TORCH_BOX(&tinylora::update_parts_backward_cuda));
  m.impl("refresh_right", TORCH_BOX(&tinylora::refresh_right_cuda));
}
