// The arguments of the ops as plain numbers and pointers, checked before anything is read or written.
// Shared by the CPU and the CUDA entry points; tensors.h makes views of torch's tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/native/kernels.h"

namespace tinylora {

// Which adapter each row belongs to: row n to ids[n / rows_per_id]; -1 leaves the row alone.
struct RowIds {
  const void* data = nullptr;  // [B] int32 or int64; null: every row belongs to adapter 0
  bool is_int64 = false;
  int64_t count = 0;           // B
  int64_t rows_per_id = 1;     // N / B

  int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Acc is float64 where the activation is float64, float32 otherwise.
struct Arguments {
  void* activation = nullptr;    // y or g, [N, D], last stride 1
  int64_t rows = 0;              // N
  int64_t features = 0;          // D
  int64_t stride = 0;            // elements between row starts
  Dtype dtype = Dtype::float32;  // of the activation
  int32_t device = -1;           // CUDA's index; -1: the CPU

  const void* basis = nullptr;       // Acc [r, D]
  int64_t basis_stride = 0;          // elements between its rows: D, but for a part of a wider one
  const void* v = nullptr;           // Acc [K, u]
  const void* projection = nullptr;  // Acc [u, r, r], or [r, r] if elementwise
  const void* offset = nullptr;      // Acc [r] or null
  const void* bias = nullptr;        // [D] in the dtype of the activation, or null
  const void* t = nullptr;           // Acc [N, r] or null
  RowIds ids;
  int64_t rank = 0;          // r
  int64_t numbers = 0;       // u
  int64_t adapters = 1;      // K
  bool elementwise = false;  // LoRA-XS: M = projection * v, u = r * r
};

// The other side of a frozen linear layer: [N, E] that is written, by which factor.
struct OtherSide {
  void* activation = nullptr;    // y or dx, last stride 1
  int64_t stride = 0;            // elements between row starts
  int64_t features = 0;          // E
  const void* factor = nullptr;  // Acc U^T or B^T = U^T W, [r, E]
  int64_t factor_stride = 0;     // elements between its rows
  const void* bias = nullptr;    // [E] in the dtype of the activation, or null
};

// One part of a fused projection: a call of its own over its columns. The ids are those of all.
struct Part {
  Arguments call;
  OtherSide out;      // the columns of y; of a backward pass without an activation
  int64_t begin = 0;  // its first column
  int64_t group = 0;  // its tie group
  bool of_input = false;  // t is that of the input x, and not of what is written
};

// Throw std::invalid_argument (ValueError in Python) with one line that names the argument, what was expected and what
// was found. The ids themselves are not looked at: they may live on a GPU.
Arguments check_update(const TensorView& y, const TensorView& basis, const TensorView& v, const TensorView& projection,
                       const TensorView* offset, const TensorView* bias, const TensorView* adapter_ids);
Arguments check_update_backward(const TensorView& g, const TensorView& basis, const TensorView& v,
                                const TensorView& projection, const TensorView* t, const TensorView* adapter_ids);
// Of low_rank: x as the activation, `right` as the basis; U^T and the bias are the other side, which has no rows yet.
Arguments check_low_rank(const TensorView& x, const TensorView& right, const TensorView& basis, const TensorView& v,
                         const TensorView& projection, const TensorView* bias,
                         const TensorView* adapter_ids, OtherSide& out);
// dx and right against the arguments that g, basis and the others were checked into.
OtherSide check_input_grad(const TensorView& dx, const TensorView& right, const Arguments& call);
// Of update_parts and its backward pass, in the order of the columns; schema.py has the shapes.
std::vector<Part> check_update_parts(const TensorView& y, const TensorView& basis, const TensorView& v,
                                     const TensorView& projection, const TensorView* offset, const TensorView* bias,
                                     const TensorView* x, const TensorView* right, const TensorView* adapter_ids,
                                     const std::vector<int64_t>& ends, const std::vector<int64_t>& groups);
std::vector<Part> check_update_parts_backward(const TensorView& g, const TensorView& basis, const TensorView& v,
                                              const TensorView& projection, const TensorView* t,
                                              const TensorView* adapter_ids, const std::vector<int64_t>& ends,
                                              const std::vector<int64_t>& groups);

// W [D, E] of any strides, whose B^T = U^T W is kept; dtype and features (D) in the arguments.
struct KeptRight {
  const void* weight = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  const void* basis = nullptr;  // Acc [r, D]
  void* right = nullptr;        // Acc [r, E]
  void* samples = nullptr;      // int32 [blocks, samples of a block]
  Dtype dtype = Dtype::float32;  // of the weight
  int32_t device = -1;           // CUDA's index; -1: the CPU
  int64_t rank = 0, rows = 0, columns = 0;  // r, D, E
};
KeptRight check_refresh_right(const TensorView& right, const TensorView& samples, const TensorView& weight,
                              const TensorView& basis, int64_t columns_of_a_block, int64_t samples_of_a_block);

}  // namespace tinylora
