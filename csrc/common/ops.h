// The ops as torch calls them: arguments checked, results allocated, the kernels of a kind of device in between. Their
// schemas are defined in Python (tinylora_kernels/ops/schema.py), so that they exist with or without this library.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/tensors.h"

namespace tinylora {

// A tensor of 4-byte words on the device of `like`, as long as it lives.
class ScratchTensor {
 public:
  explicit ScratchTensor(const Tensor& like) : like_(like) {}
  operator Scratch() {
    return {[](void* self, int64_t words) { return static_cast<ScratchTensor*>(self)->allocate(words); }, this};
  }

 private:
  void* allocate(int64_t words) {
    held_ = empty_matrix(like_, /*accumulate=*/true, 1, words);
    return held_->mutable_data_ptr();
  }

  const Tensor& like_;
  std::optional<Tensor> held_;
};

// Device has these, which write what was allocated for them; null is what nobody wants:
//
//     update(call, t)                         update_backward(call, g0, dv, scratch)
//     low_rank(call, y, t)                    update_input_grad(call, dx, add, dv, scratch)
//     update_parts(parts, t)                  update_parts_backward(parts, features, g0, groups, dv, scratch)
template <class Device>
class Ops {
 public:
  template <class Library>
  static void implement(Library& m) {
    m.impl("update", TORCH_BOX(&update));
    m.impl("update_backward", TORCH_BOX(&update_backward));
    m.impl("low_rank", TORCH_BOX(&low_rank));
    m.impl("update_input_grad", TORCH_BOX(&update_input_grad));
    m.impl("update_parts", TORCH_BOX(&update_parts));
    m.impl("update_parts_backward", TORCH_BOX(&update_parts_backward));
  }

 private:
  using Maybe = std::optional<Tensor>;
  using Ints = std::vector<int64_t>;

  static Tensor update(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                       const Maybe& offset, const Maybe& bias, const Maybe& adapter_ids) {
    const Arguments call = check_update(written(y), view(basis), view(v), view(projection), view(offset), view(bias),
                                        view(adapter_ids));
    Tensor t = empty_matrix(y, /*accumulate=*/true, call.rows, call.rank);
    Device::update(call, t.mutable_data_ptr());
    return t;
  }

  static std::tuple<Tensor, Tensor> update_backward(const Tensor& g, const Tensor& basis, const Tensor& v,
                                                    const Tensor& projection, const Maybe& t, const Maybe& adapter_ids,
                                                    bool need_input_grad) {
    const Arguments call = check_update_backward(view(g), view(basis), view(v), view(projection), view(t),
                                                 view(adapter_ids));
    Tensor g0 = need_input_grad ? empty_contiguous_like(g) : empty_vector(g);
    Tensor dv = t ? empty_contiguous_like(v) : empty_vector(v);
    Device::update_backward(call, need_input_grad ? g0.mutable_data_ptr() : nullptr, t ? dv.mutable_data_ptr() : nullptr,
                            ScratchTensor(g));
    return {g0, dv};
  }

  static std::tuple<Tensor, Tensor> low_rank(const Tensor& x, const Tensor& right, const Tensor& basis, const Tensor& v,
                                             const Tensor& projection, const Maybe& bias, const Maybe& adapter_ids) {
    OtherSide out;
    const Arguments call = check_low_rank(view(x), view(right), view(basis), view(v), view(projection), view(bias),
                                          view(adapter_ids), out);
    Tensor y = empty_rows_like(x, out.features);
    Tensor t = empty_matrix(x, /*accumulate=*/true, call.rows, call.rank);
    out.activation = y.mutable_data_ptr();
    out.stride = out.features;
    Device::low_rank(call, out, t.mutable_data_ptr());
    return {y, t};
  }

  static Tensor update_input_grad(const Tensor& dx, const Tensor& right, const Tensor& g, const Tensor& basis,
                                  const Tensor& v, const Tensor& projection, const Maybe& t, const Maybe& adapter_ids,
                                  bool add) {
    const Arguments call = check_update_backward(view(g), view(basis), view(v), view(projection), view(t),
                                                 view(adapter_ids));
    const OtherSide out = check_input_grad(written(dx), view(right), call);
    Tensor dv = t ? empty_contiguous_like(v) : empty_vector(v);
    Device::update_input_grad(call, out, add, t ? dv.mutable_data_ptr() : nullptr, ScratchTensor(g));
    return dv;
  }

  static Tensor update_parts(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                             const Maybe& offset, const Maybe& bias, const Maybe& x, const Maybe& right,
                             const Maybe& adapter_ids, const Ints& ends, const Ints& groups) {
    const std::vector<Part> parts =
        check_update_parts(written(y), view(basis), view(v), view(projection), view(offset), view(bias), view(x),
                           view(right), view(adapter_ids), ends, groups);
    Tensor t = empty_coefficients(y, ends.size(), parts[0].call.rows, parts[0].call.rank);
    Device::update_parts(parts, t.mutable_data_ptr());
    return t;
  }

  static std::tuple<Tensor, Tensor> update_parts_backward(const Tensor& g, const Tensor& basis, const Tensor& v,
                                                          const Tensor& projection, const Maybe& t,
                                                          const Maybe& adapter_ids, const Ints& ends, const Ints& groups,
                                                          bool need_input_grad) {
    const std::vector<Part> parts =
        check_update_parts_backward(view(g), view(basis), view(v), view(projection), view(t), view(adapter_ids), ends,
                                    groups);
    Tensor g0 = need_input_grad ? empty_contiguous_like(g) : empty_vector(g);
    Tensor dv = t ? empty_contiguous_like(v) : empty_vector(v);
    Device::update_parts_backward(parts, ends.back(), need_input_grad ? g0.mutable_data_ptr() : nullptr, v.size(0),
                                  t ? dv.mutable_data_ptr() : nullptr, ScratchTensor(g));
    return {g0, dv};
  }
};

}  // namespace tinylora
