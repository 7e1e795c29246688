#include "common/tensors.h"

#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace tinylora {
namespace {

// torch's numbers for dtypes are part of no ABI: asked for once.
struct DtypeCodes {
  int32_t by_dtype[6] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                         aoti_torch_dtype_float64(), aoti_torch_dtype_int32(),    aoti_torch_dtype_int64()};
};

void require(int32_t status, const char* what) {
  if (status != TORCH_SUCCESS) throw std::runtime_error(std::string("tinylora: torch refused to ") + what);
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  require(aoti_torch_get_dtype(tensor.get(), &code), "name a dtype");
  return code;
}

const DtypeCodes& codes() {
  static const DtypeCodes instance;
  return instance;
}

Dtype dtype_of(const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  int dtype = 0;
  while (dtype < static_cast<int>(Dtype::other) && codes().by_dtype[dtype] != code) ++dtype;
  return static_cast<Dtype>(dtype);
}

TensorView view_of(const Tensor& tensor, void* data) {
  return {data, tensor.sizes().data(), tensor.strides().data(), tensor.dim(), dtype_of(tensor),
          tensor.is_cuda() ? tensor.get_device_index() : -1};
}

Tensor empty_strided(const Tensor& like, int32_t dtype, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type = 0, device_index = 0;
  require(aoti_torch_get_device_type(like.get(), &device_type), "name a device");
  require(aoti_torch_get_device_index(like.get(), &device_index), "name a device");
  AtenTensorHandle handle = nullptr;
  require(aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle),
          "allocate a tensor");
  return Tensor(handle);
}

int32_t accumulation_code(const Tensor& like) {
  const Dtype dtype = dtype_of(like) == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  return codes().by_dtype[static_cast<int>(dtype)];
}

}  // namespace

TensorView view(const Tensor& tensor) { return view_of(tensor, const_cast<void*>(tensor.const_data_ptr())); }
TensorView written(const Tensor& tensor) { return view_of(tensor, tensor.mutable_data_ptr()); }

Tensor empty_matrix(const Tensor& like, bool accumulate, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty_strided(like, accumulate ? accumulation_code(like) : dtype_code(like), 2, sizes, strides);
}

Tensor empty_coefficients(const Tensor& like, int64_t parts, int64_t rows, int64_t rank) {
  const int64_t sizes[] = {parts, rows, rank}, strides[] = {rows * rank, rank, 1};
  return empty_strided(like, accumulation_code(like), 3, sizes, strides);
}

Tensor empty_contiguous_like(const Tensor& like) { return empty_rows_like(like, like.size(like.dim() - 1)); }

Tensor empty_rows_like(const Tensor& like, int64_t width) {
  constexpr int64_t most = 64;  // torch's own limit on dimensions
  const int64_t dims = like.dim();
  if (dims > most) throw std::invalid_argument("expected at most 64 dimensions, found " + std::to_string(dims));
  int64_t sizes[most], strides[most];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    sizes[i] = i == dims - 1 ? width : like.size(i);
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(like, dtype_code(like), dims, sizes, strides);
}

Tensor empty_vector(const Tensor& like) {
  const int64_t size = 0, stride = 1;
  return empty_strided(like, dtype_code(like), 1, &size, &stride);
}

}  // namespace tinylora
