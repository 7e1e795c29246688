// Torch's tensors, by its stable ABI: views of those that come, and new ones.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "common/arguments.h"

namespace tinylora {

using torch::stable::Tensor;

// Of a tensor that is read, or written; of one that is not there: null.
TensorView view(const Tensor& tensor);
TensorView written(const Tensor& tensor);
class MaybeView {
 public:
  explicit MaybeView(const std::optional<Tensor>& tensor) {
    if (tensor) view_ = tinylora::view(*tensor);
  }
  operator const TensorView*() const { return view_ ? &*view_ : nullptr; }

 private:
  std::optional<TensorView> view_;
};
inline MaybeView view(const std::optional<Tensor>& tensor) { return MaybeView(tensor); }

// New uninitialised tensors on the device of `like`; `accumulate` picks the dtype Acc instead of that of `like`.
Tensor empty_matrix(const Tensor& like, bool accumulate, int64_t rows, int64_t columns);
Tensor empty_coefficients(const Tensor& like, int64_t parts, int64_t rows, int64_t rank);  // Acc [k, N, r]
Tensor empty_contiguous_like(const Tensor& like);
Tensor empty_rows_like(const Tensor& like, int64_t width);  // the last dimension changed to `width`
Tensor empty_vector(const Tensor& like);

}  // namespace tinylora
