// The CPU entry points of the ops. Their schemas are defined in Python (tinylora_kernels/ops/schema.py), so that
// they exist with or without this library.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/tensors.h"
#include "cpu/update.h"

namespace tinylora {
namespace {

Tensor update_cpu(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                  const std::optional<Tensor>& offset, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& adapter_ids) {
  const Arguments call = check_update(written(y), view(basis), view(v), view(projection), view(offset), view(bias),
                                      view(adapter_ids));
  Tensor t = empty_matrix(y, /*accumulate=*/true, call.rows, call.rank);
  cpu::update(call, t.mutable_data_ptr());
  return t;
}

std::tuple<Tensor, Tensor> update_backward_cpu(const Tensor& g, const Tensor& basis, const Tensor& v,
                                               const Tensor& projection, const std::optional<Tensor>& t,
                                               const std::optional<Tensor>& adapter_ids, bool need_input_grad) {
  const Arguments call = check_update_backward(view(g), view(basis), view(v), view(projection), view(t),
                                               view(adapter_ids));
  Tensor g0 = need_input_grad ? empty_contiguous_like(g) : empty_vector(g);
  Tensor dv = t ? empty_contiguous_like(v) : empty_vector(v);
  cpu::update_backward(call, need_input_grad ? g0.mutable_data_ptr() : nullptr, t ? dv.mutable_data_ptr() : nullptr);
  return {g0, dv};
}

std::tuple<Tensor, Tensor> low_rank_cpu(const Tensor& x, const Tensor& right, const Tensor& basis, const Tensor& v,
                                        const Tensor& projection, const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& adapter_ids) {
  OtherSide out;
  const Arguments call = check_low_rank(view(x), view(right), view(basis), view(v), view(projection), view(bias),
                                        view(adapter_ids), out);
  Tensor y = empty_rows_like(x, out.features);
  Tensor t = empty_matrix(x, /*accumulate=*/true, call.rows, call.rank);
  out.activation = y.mutable_data_ptr();
  out.stride = out.features;
  cpu::low_rank(call, out, t.mutable_data_ptr());
  return {y, t};
}

Tensor update_input_grad_cpu(const Tensor& dx, const Tensor& right, const Tensor& g, const Tensor& basis, const Tensor& v,
                             const Tensor& projection, const std::optional<Tensor>& t,
                             const std::optional<Tensor>& adapter_ids, bool add) {
  const Arguments call = check_update_backward(view(g), view(basis), view(v), view(projection), view(t),
                                               view(adapter_ids));
  const OtherSide out = check_input_grad(written(dx), view(right), call);
  Tensor dv = t ? empty_contiguous_like(v) : empty_vector(v);
  cpu::update_input_grad(call, out, add, t ? dv.mutable_data_ptr() : nullptr);
  return dv;
}

Tensor update_parts_cpu(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                        const std::optional<Tensor>& offset, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& x, const std::optional<Tensor>& right,
                        const std::optional<Tensor>& adapter_ids, const std::vector<int64_t>& ends,
                        const std::vector<int64_t>& groups) {
  const std::vector<Part> parts =
      check_update_parts(written(y), view(basis), view(v), view(projection), view(offset), view(bias), view(x),
                         view(right), view(adapter_ids), ends, groups);
  Tensor t = empty_coefficients(y, ends.size(), parts[0].call.rows, parts[0].call.rank);
  cpu::update_parts(parts, t.mutable_data_ptr());
  return t;
}

std::tuple<Tensor, Tensor> update_parts_backward_cpu(const Tensor& g, const Tensor& basis, const Tensor& v,
                                                     const Tensor& projection, const std::optional<Tensor>& t,
                                                     const std::optional<Tensor>& adapter_ids,
                                                     const std::vector<int64_t>& ends, const std::vector<int64_t>& groups,
                                                     bool need_input_grad) {
  const std::vector<Part> parts =
      check_update_parts_backward(view(g), view(basis), view(v), view(projection), view(t), view(adapter_ids), ends,
                                  groups);
  Tensor g0 = need_input_grad ? empty_contiguous_like(g) : empty_vector(g);
  Tensor dv = t ? empty_contiguous_like(v) : empty_vector(v);
  cpu::update_parts_backward(parts, ends.back(), need_input_grad ? g0.mutable_data_ptr() : nullptr, v.size(0),
                             t ? dv.mutable_data_ptr() : nullptr);
  return {g0, dv};
}

}  // namespace
}  // namespace tinylora

STABLE_TORCH_LIBRARY_IMPL(tinylora, CPU, m) {
  m.impl("update", TORCH_BOX(&tinylora::update_cpu));
  m.impl("update_backward", TORCH_BOX(&tinylora::update_backward_cpu));
  m.impl("low_rank", TORCH_BOX(&tinylora::low_rank_cpu));
  m.impl("update_parts", TORCH_BOX(&tinylora::update_parts_cpu));
  m.impl("update_parts_backward", TORCH_BOX(&tinylora::update_parts_backward_cpu));
  m.impl("update_input_grad", TORCH_BOX(&tinylora::update_input_grad_cpu));
}
