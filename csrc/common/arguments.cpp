#include "common/arguments.h"

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace tinylora {
namespace {

// torch's numbers for dtypes are part of no ABI: asked for once.
struct DtypeCodes {
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t float64 = aoti_torch_dtype_float64();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
};

const DtypeCodes& codes() {
  static const DtypeCodes instance;
  return instance;
}

void require(int32_t status, const char* what) {
  if (status != TORCH_SUCCESS) throw std::runtime_error(std::string("tinylora: torch refused to ") + what);
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  require(aoti_torch_get_dtype(tensor.get(), &code), "name a dtype");
  return code;
}

std::string dtype_name(int32_t code) {
  const DtypeCodes& c = codes();
  if (code == c.float32) return "float32";
  if (code == c.bfloat16) return "bfloat16";
  if (code == c.float16) return "float16";
  if (code == c.float64) return "float64";
  if (code == c.int32) return "int32";
  if (code == c.int64) return "int64";
  return "dtype " + std::to_string(code);
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

template <class... Parts>
[[noreturn]] void fail(const char* argument, const Parts&... parts) {
  std::ostringstream text;
  text << argument << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

Dtype activation_dtype(const char* name, const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  const DtypeCodes& c = codes();
  if (code == c.float32) return Dtype::float32;
  if (code == c.bfloat16) return Dtype::bfloat16;
  if (code == c.float16) return Dtype::float16;
  if (code == c.float64) return Dtype::float64;
  fail(name, "expected dtype float32, bfloat16, float16 or float64, found ", dtype_name(code));
}

struct Rows {
  int64_t count, width, stride;  // N, D, elements between row starts
};

// The leading dimensions of [..., D] as N rows with one stride between them.
Rows collapse_rows(const char* name, const Tensor& tensor, bool written) {
  Rows out;
  const int64_t dims = tensor.dim();
  if (dims < 1) fail(name, "expected [..., D], found a scalar");
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  out.width = sizes[dims - 1];
  out.count = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) out.count *= sizes[i];
  out.stride = out.width;
  if (out.count == 0 || out.width == 0) return out;
  if (out.width > 1 && strides[dims - 1] != 1) {
    fail(name, "expected last stride 1, found ", strides[dims - 1], "; call .contiguous() first");
  }
  int64_t rows = 1;  // those of the dimensions already folded in
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (rows == 1) out.stride = strides[i];
    if (strides[i] != rows * out.stride) {
      fail(name, "expected leading dimensions with one row stride, found stride ", strides[i], " instead of ",
           rows * out.stride, " in dimension ", i, "; call .contiguous() first");
    }
    rows *= sizes[i];
  }
  if (written && out.count > 1 && out.stride < out.width) {
    fail(name, "expected rows that do not overlap, found row stride ", out.stride, " below the width ", out.width);
  }
  return out;
}

// Same device, dtype Acc, contiguous: what basis, v, projection, offset and t have in common.
void check_factor(const char* name, const Tensor& factor, const Tensor& rows, const char* rows_name) {
  const int32_t expected = dtype_code(rows) == codes().float64 ? codes().float64 : codes().float32;
  if (dtype_code(factor) != expected) {
    fail(name, "expected dtype ", dtype_name(expected), " beside ", dtype_name(dtype_code(rows)), " ", rows_name,
         ", found ", dtype_name(dtype_code(factor)));
  }
  if (factor.is_cuda() != rows.is_cuda() || factor.get_device_index() != rows.get_device_index()) {
    fail(name, "expected the device of ", rows_name, ", found another");
  }
  if (!factor.is_contiguous()) fail(name, "expected a contiguous tensor; call .contiguous() first");
}

void check_basis(const char* rows_name, const Tensor& rows, const char* basis_name, const Tensor& basis,
                 Arguments& out) {
  check_factor(basis_name, basis, rows, rows_name);
  if (basis.dim() != 2 || basis.size(0) < 1) {
    fail(basis_name, "expected [r, D] with r at least 1, found ", shape_text(basis));
  }
  if (basis.size(1) != out.features) {
    fail(rows_name, "expected last dimension ", basis.size(1), " as in ", basis_name, " ", shape_text(basis), ", found ",
         shape_text(rows));
  }
  out.basis = basis.const_data_ptr();
  out.basis_stride = out.features;
  out.rank = basis.size(0);
}

void check_adapter(const char* rows_name, const Tensor& rows, const Tensor& v, const Tensor& projection,
                   const std::optional<Tensor>& adapter_ids, Arguments& out) {
  check_factor("projection", projection, rows, rows_name);
  check_factor("v", v, rows, rows_name);
  const int64_t r = out.rank, dims = projection.dim();
  if ((dims != 2 && dims != 3) || projection.size(dims - 1) != r || projection.size(dims - 2) != r) {
    fail("projection", "expected [u, ", r, ", ", r, "] or [", r, ", ", r, "] for a basis of rank ", r, ", found ",
         shape_text(projection));
  }
  out.elementwise = dims == 2;
  out.numbers = out.elementwise ? r * r : projection.size(0);
  const int64_t v_dims = adapter_ids ? 2 : 1;
  if (v.dim() != v_dims || v.size(v_dims - 1) != out.numbers || out.numbers < 1) {
    fail("v", "expected ", adapter_ids ? "[K, " : "[", out.numbers, adapter_ids ? "] with adapter_ids" : "]",
         ", at least one number, found ", shape_text(v));
  }
  out.adapters = adapter_ids ? v.size(0) : 1;
  out.projection = projection.const_data_ptr();
  out.v = v.const_data_ptr();
}

void check_ids(const char* rows_name, const Tensor& rows, const Tensor& ids, Arguments& out) {
  const int32_t code = dtype_code(ids);
  if ((code != codes().int32 && code != codes().int64) || ids.dim() != 1 || !ids.is_contiguous()) {
    fail("adapter_ids", "expected a contiguous 1-D int32 or int64 tensor, found ", dtype_name(code), " ",
         shape_text(ids));
  }
  if (ids.is_cuda() != rows.is_cuda() || ids.get_device_index() != rows.get_device_index()) {
    fail("adapter_ids", "expected the device of ", rows_name, ", found another");
  }
  const int64_t count = ids.size(0);
  if (count == 0 ? out.rows > 0 : out.rows % count != 0) {
    fail("adapter_ids", "expected a length that divides the ", out.rows, " rows, found ", count);
  }
  out.ids.data = ids.const_data_ptr();
  out.ids.is_int64 = code == codes().int64;
  out.ids.count = count;
  out.ids.rows_per_id = count ? out.rows / count : 1;
}

Arguments check_common(const char* name, const Tensor& rows, bool written, const char* basis_name, const Tensor& basis,
                       const Tensor& v, const Tensor& projection, const std::optional<Tensor>& adapter_ids) {
  Arguments out;
  out.dtype = activation_dtype(name, rows);
  const Rows collapsed = collapse_rows(name, rows, written);
  out.rows = collapsed.count;
  out.features = collapsed.width;
  out.stride = collapsed.stride;
  check_basis(name, rows, basis_name, basis, out);
  check_adapter(name, rows, v, projection, adapter_ids, out);
  if (adapter_ids) check_ids(name, rows, *adapter_ids, out);
  return out;
}

// b [D] as it is added to rows of their own dtype.
const void* check_bias(const char* rows_name, const Tensor& rows, const Tensor& bias, int64_t features) {
  if (dtype_code(bias) != dtype_code(rows)) {
    fail("bias", "expected the dtype of ", rows_name, ", found ", dtype_name(dtype_code(bias)));
  }
  if (bias.dim() != 1 || bias.size(0) != features || !bias.is_contiguous()) {
    fail("bias", "expected a contiguous tensor of shape (", features, "), found ", shape_text(bias));
  }
  if (bias.is_cuda() != rows.is_cuda() || bias.get_device_index() != rows.get_device_index()) {
    fail("bias", "expected the device of ", rows_name, ", found another");
  }
  return bias.const_data_ptr();
}

// A factor [r, E] of the side that is written; E below zero: any.
OtherSide other_side(const char* name, const Tensor& factor, int64_t rank, int64_t width, const Tensor& rows,
                     const char* rows_name) {
  check_factor(name, factor, rows, rows_name);
  if (factor.dim() != 2 || factor.size(0) != rank || (width >= 0 && factor.size(1) != width)) {
    fail(name, "expected shape (", rank, ", ", width >= 0 ? std::to_string(width) : "E", "), found ",
         shape_text(factor));
  }
  OtherSide out;
  out.features = out.factor_stride = factor.size(1);
  out.factor = factor.const_data_ptr();
  return out;
}

std::string list_text(const std::vector<int64_t>& numbers) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < numbers.size(); ++i) text << (i ? ", " : "") << numbers[i];
  text << "]";
  return text.str();
}

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = tensor.size(i) == shape[i];
  if (!equal) fail(name, "expected shape ", list_text(shape), ", found ", shape_text(tensor));
}

const void* at(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }

constexpr int64_t kBytesOf[] = {4, 2, 2, 8};  // by Dtype

// What both directions of a fused projection have in common, part by part.
std::vector<Part> check_parts(const char* name, const Tensor& rows, bool written, const Tensor& basis, const Tensor& v,
                              const Tensor& projection, const std::optional<Tensor>& adapter_ids,
                              const std::vector<int64_t>& ends, const std::vector<int64_t>& groups) {
  Arguments whole;
  whole.dtype = activation_dtype(name, rows);
  const Rows collapsed = collapse_rows(name, rows, written);
  whole.rows = collapsed.count;
  whole.features = collapsed.width;
  whole.stride = collapsed.stride;
  const int64_t parts = static_cast<int64_t>(ends.size());
  bool ascending = parts > 0 && ends[parts - 1] == whole.features;
  for (int64_t p = 0; p < parts; ++p) ascending = ascending && ends[p] > (p ? ends[p - 1] : 0);
  if (!ascending) {
    fail("ends", "expected ascending columns up to ", whole.features, ", the last dimension of ", name, ", found ",
         list_text(ends));
  }
  const int64_t held = v.dim() ? v.size(0) : 0;
  bool known = v.dim() >= 2 && groups.size() == ends.size();
  for (int64_t group : groups) known = known && group >= 0 && group < held;
  if (!known) {
    fail("groups", "expected ", parts, " numbers below ", held, ", the groups of v, found ", list_text(groups));
  }
  check_basis(name, rows, "basis", basis, whole);
  check_factor("projection", projection, rows, name);
  check_factor("v", v, rows, name);
  const int64_t r = whole.rank, dims = projection.dim();
  if ((dims != 3 && dims != 4) || projection.size(0) != parts || projection.size(dims - 1) != r ||
      projection.size(dims - 2) != r) {
    fail("projection", "expected [", parts, ", u, ", r, ", ", r, "] or [", parts, ", ", r, ", ", r,
         "] for a basis of rank ", r, ", found ", shape_text(projection));
  }
  whole.elementwise = dims == 3;
  whole.numbers = whole.elementwise ? r * r : projection.size(1);
  const int64_t v_dims = adapter_ids ? 3 : 2;
  if (v.dim() != v_dims || v.size(v_dims - 1) != whole.numbers || whole.numbers < 1) {
    fail("v", "expected ", adapter_ids ? "[G, K, " : "[G, ", whole.numbers, adapter_ids ? "] with adapter_ids" : "]",
         ", at least one number, found ", shape_text(v));
  }
  whole.adapters = adapter_ids ? v.size(1) : 1;
  if (adapter_ids) check_ids(name, rows, *adapter_ids, whole);

  const int64_t acc = whole.dtype == Dtype::float64 ? 8 : 4;
  const int64_t square = whole.elementwise ? r * r : whole.numbers * r * r;
  const void* data = rows.const_data_ptr();
  std::vector<Part> out(parts);
  for (int64_t p = 0; p < parts; ++p) {
    out[p].begin = p ? ends[p - 1] : 0;
    out[p].group = groups[p];
    Arguments& call = out[p].call = whole;
    call.features = ends[p] - out[p].begin;
    call.activation = const_cast<void*>(at(data, out[p].begin * kBytesOf[static_cast<int>(whole.dtype)]));
    call.basis = at(whole.basis, out[p].begin * acc);
    call.v = at(v.const_data_ptr(), groups[p] * whole.adapters * whole.numbers * acc);
    call.projection = at(projection.const_data_ptr(), p * square * acc);
    out[p].out = {call.activation, call.stride, call.features, call.basis, call.basis_stride, nullptr};
  }
  return out;
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
  return dtype_code(like) == codes().float64 ? codes().float64 : codes().float32;
}

}  // namespace

Arguments check_update(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                       const std::optional<Tensor>& offset, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& adapter_ids) {
  Arguments out = check_common("y", y, /*written=*/true, "basis", basis, v, projection, adapter_ids);
  if (offset) {
    check_factor("offset", *offset, y, "y");
    if (offset->dim() != 1 || offset->size(0) != out.rank) {
      fail("offset", "expected shape (", out.rank, "), found ", shape_text(*offset));
    }
    out.offset = offset->const_data_ptr();
  }
  if (bias) out.bias = check_bias("y", y, *bias, out.features);
  out.activation = y.mutable_data_ptr();
  return out;
}

Arguments check_update_backward(const Tensor& g, const Tensor& basis, const Tensor& v, const Tensor& projection,
                                const std::optional<Tensor>& t, const std::optional<Tensor>& adapter_ids) {
  Arguments out = check_common("g", g, /*written=*/false, "basis", basis, v, projection, adapter_ids);
  if (t) {
    check_factor("t", *t, g, "g");
    if (t->dim() != 2 || t->size(0) != out.rows || t->size(1) != out.rank) {
      fail("t", "expected shape (", out.rows, ", ", out.rank, "), found ", shape_text(*t));
    }
    out.t = t->const_data_ptr();
  }
  out.activation = const_cast<void*>(g.const_data_ptr());
  return out;
}

Arguments check_low_rank(const Tensor& x, const Tensor& right, const Tensor& basis, const Tensor& v,
                         const Tensor& projection, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& adapter_ids, OtherSide& out) {
  Arguments call = check_common("x", x, /*written=*/false, "right", right, v, projection, adapter_ids);
  out = other_side("basis", basis, call.rank, /*width=*/-1, x, "x");
  if (bias) out.bias = check_bias("x", x, *bias, out.features);
  call.activation = const_cast<void*>(x.const_data_ptr());
  return call;
}

OtherSide check_input_grad(const Tensor& dx, const Tensor& right, const Arguments& call) {
  const Dtype dtype = activation_dtype("dx", dx);
  if (dtype != call.dtype) fail("dx", "expected the dtype of g, found ", dtype_name(dtype_code(dx)));
  const Rows rows = collapse_rows("dx", dx, /*written=*/true);
  if (rows.count != call.rows) fail("dx", "expected ", call.rows, " rows as in g, found ", shape_text(dx));
  OtherSide out = other_side("right", right, call.rank, rows.width, dx, "dx");
  out.activation = dx.mutable_data_ptr();
  out.stride = rows.stride;
  return out;
}

std::vector<Part> check_update_parts(const Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection,
                                     const std::optional<Tensor>& offset, const std::optional<Tensor>& bias,
                                     const std::optional<Tensor>& x, const std::optional<Tensor>& right,
                                     const std::optional<Tensor>& adapter_ids,
                                     const std::vector<int64_t>& ends, const std::vector<int64_t>& groups) {
  std::vector<Part> out = check_parts("y", y, /*written=*/true, basis, v, projection, adapter_ids, ends, groups);
  const int64_t parts = static_cast<int64_t>(out.size()), r = out[0].call.rank;
  const int64_t acc = out[0].call.dtype == Dtype::float64 ? 8 : 4;
  if (x.has_value() != right.has_value() || (x && offset)) {
    fail("x and right", "expected both or neither, and no offset beside them");
  }
  if (offset) {
    check_factor("offset", *offset, y, "y");
    check_shape("offset", *offset, {parts, r});
    for (int64_t p = 0; p < parts; ++p) out[p].call.offset = at(offset->const_data_ptr(), p * r * acc);
  }
  if (bias) {
    const Part& last = out.back();
    const void* whole = check_bias("y", y, *bias, last.begin + last.out.features);
    for (Part& part : out) part.out.bias = at(whole, part.begin * kBytesOf[static_cast<int>(part.call.dtype)]);
  }
  if (!x) return out;
  const Rows input = collapse_rows("x", *x, /*written=*/false);
  if (dtype_code(*x) != dtype_code(y) || input.count != out[0].call.rows || x->is_cuda() != y.is_cuda() ||
      x->get_device_index() != y.get_device_index()) {
    fail("x", "expected ", dtype_name(dtype_code(y)), " rows as of y ", shape_text(y), ", found ",
         dtype_name(dtype_code(*x)), " ", shape_text(*x));
  }
  check_factor("right", *right, y, "y");
  check_shape("right", *right, {parts, r, input.width});
  for (int64_t p = 0; p < parts; ++p) {
    Arguments& call = out[p].call;
    call.activation = const_cast<void*>(x->const_data_ptr());
    call.features = call.basis_stride = input.width;
    call.stride = input.stride;
    call.basis = at(right->const_data_ptr(), p * r * input.width * acc);
  }
  return out;
}

std::vector<Part> check_update_parts_backward(const Tensor& g, const Tensor& basis, const Tensor& v,
                                              const Tensor& projection, const std::optional<Tensor>& t,
                                              const std::optional<Tensor>& adapter_ids, const std::vector<int64_t>& ends,
                                              const std::vector<int64_t>& groups) {
  std::vector<Part> out = check_parts("g", g, /*written=*/false, basis, v, projection, adapter_ids, ends, groups);
  const int64_t parts = static_cast<int64_t>(out.size()), r = out[0].call.rank, rows = out[0].call.rows;
  const int64_t acc = out[0].call.dtype == Dtype::float64 ? 8 : 4;
  if (t) {
    check_factor("t", *t, g, "g");
    check_shape("t", *t, {parts, rows, r});
  }
  for (int64_t p = 0; p < parts; ++p) {
    out[p].call.t = t ? at(t->const_data_ptr(), p * rows * r * acc) : nullptr;
    out[p].out.activation = nullptr;
  }
  return out;
}

KeptRight check_refresh_right(const Tensor& right, const Tensor& samples, const Tensor& weight, const Tensor& basis,
                              int64_t columns_of_a_block, int64_t samples_of_a_block) {
  KeptRight out;
  out.dtype = activation_dtype("weight", weight);
  if (weight.dim() != 2) fail("weight", "expected [D, E], found ", shape_text(weight));
  out.rows = weight.size(0);
  out.columns = weight.size(1);
  out.row_stride = weight.stride(0);
  out.column_stride = weight.stride(1);
  out.weight = weight.const_data_ptr();
  check_factor("basis", basis, weight, "weight");
  if (basis.dim() != 2 || basis.size(0) < 1 || basis.size(1) != out.rows) {
    fail("basis", "expected [r, ", out.rows, "], found ", shape_text(basis));
  }
  out.rank = basis.size(0);
  out.basis = basis.const_data_ptr();
  check_factor("right", right, weight, "weight");
  if (right.dim() != 2 || right.size(0) != out.rank || right.size(1) != out.columns) {
    fail("right", "expected shape (", out.rank, ", ", out.columns, "), found ", shape_text(right));
  }
  out.right = right.mutable_data_ptr();
  const int64_t blocks = (out.columns + columns_of_a_block - 1) / columns_of_a_block;
  if (dtype_code(samples) != codes().int32 || samples.dim() != 2 || samples.size(0) != blocks ||
      samples.size(1) != samples_of_a_block || !samples.is_contiguous()) {
    fail("samples", "expected contiguous int32 (", blocks, ", ", samples_of_a_block, "), found ",
         dtype_name(dtype_code(samples)), " ", shape_text(samples));
  }
  if (samples.is_cuda() != weight.is_cuda() || samples.get_device_index() != weight.get_device_index()) {
    fail("samples", "expected the device of weight, found another");
  }
  out.samples = samples.mutable_data_ptr();
  return out;
}

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
