#include "common/arguments.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace tinylora {
namespace {

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::float16: return "float16";
    case Dtype::float64: return "float64";
    case Dtype::int32: return "int32";
    case Dtype::int64: return "int64";
    default: return "another dtype";
  }
}

bool is_contiguous(const TensorView& tensor) {
  int64_t expected = 1;
  bool packed = true;
  for (int64_t i = tensor.dims - 1; i >= 0; --i) {
    if (tensor.sizes[i] == 0) return true;
    if (tensor.sizes[i] == 1) continue;
    packed = packed && tensor.strides[i] == expected;
    expected *= tensor.sizes[i];
  }
  return packed;
}

std::string shape_text(const TensorView& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dims; ++i) text << (i ? ", " : "") << tensor.sizes[i];
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

Dtype activation_dtype(const char* name, const TensorView& tensor) {
  if (tensor.dtype <= Dtype::float64) return tensor.dtype;
  fail(name, "expected dtype float32, bfloat16, float16 or float64, found ", dtype_name(tensor.dtype));
}

struct Rows {
  int64_t count, width, stride;  // N, D, elements between row starts
};

// The leading dimensions of [..., D] as N rows with one stride between them.
Rows collapse_rows(const char* name, const TensorView& tensor, bool written) {
  Rows out;
  const int64_t dims = tensor.dims;
  if (dims < 1) fail(name, "expected [..., D], found a scalar");
  const int64_t* sizes = tensor.sizes;
  const int64_t* strides = tensor.strides;
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
void check_factor(const char* name, const TensorView& factor, const TensorView& rows, const char* rows_name) {
  const Dtype expected = rows.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  if (factor.dtype != expected) {
    fail(name, "expected dtype ", dtype_name(expected), " beside ", dtype_name(rows.dtype), " ", rows_name,
         ", found ", dtype_name(factor.dtype));
  }
  if (factor.device != rows.device) {
    fail(name, "expected the device of ", rows_name, ", found another");
  }
  if (!is_contiguous(factor)) fail(name, "expected a contiguous tensor; call .contiguous() first");
}

void check_basis(const char* rows_name, const TensorView& rows, const char* basis_name, const TensorView& basis,
                 Arguments& out) {
  check_factor(basis_name, basis, rows, rows_name);
  if (basis.dims != 2 || basis.sizes[0] < 1) {
    fail(basis_name, "expected [r, D] with r at least 1, found ", shape_text(basis));
  }
  if (basis.sizes[1] != out.features) {
    fail(rows_name, "expected last dimension ", basis.sizes[1], " as in ", basis_name, " ", shape_text(basis), ", found ",
         shape_text(rows));
  }
  out.basis = basis.data;
  out.basis_stride = out.features;
  out.rank = basis.sizes[0];
}

void check_adapter(const char* rows_name, const TensorView& rows, const TensorView& v, const TensorView& projection,
                   const TensorView* adapter_ids, Arguments& out) {
  check_factor("projection", projection, rows, rows_name);
  check_factor("v", v, rows, rows_name);
  const int64_t r = out.rank, dims = projection.dims;
  if ((dims != 2 && dims != 3) || projection.sizes[dims - 1] != r || projection.sizes[dims - 2] != r) {
    fail("projection", "expected [u, ", r, ", ", r, "] or [", r, ", ", r, "] for a basis of rank ", r, ", found ",
         shape_text(projection));
  }
  out.elementwise = dims == 2;
  out.numbers = out.elementwise ? r * r : projection.sizes[0];
  const int64_t v_dims = adapter_ids ? 2 : 1;
  if (v.dims != v_dims || v.sizes[v_dims - 1] != out.numbers || out.numbers < 1) {
    fail("v", "expected ", adapter_ids ? "[K, " : "[", out.numbers, adapter_ids ? "] with adapter_ids" : "]",
         ", at least one number, found ", shape_text(v));
  }
  out.adapters = adapter_ids ? v.sizes[0] : 1;
  out.projection = projection.data;
  out.v = v.data;
}

void check_ids(const char* rows_name, const TensorView& rows, const TensorView& ids, Arguments& out) {
  if ((ids.dtype != Dtype::int32 && ids.dtype != Dtype::int64) || ids.dims != 1 || !is_contiguous(ids)) {
    fail("adapter_ids", "expected a contiguous 1-D int32 or int64 tensor, found ", dtype_name(ids.dtype), " ",
         shape_text(ids));
  }
  if (ids.device != rows.device) {
    fail("adapter_ids", "expected the device of ", rows_name, ", found another");
  }
  const int64_t count = ids.sizes[0];
  if (count == 0 ? out.rows > 0 : out.rows % count != 0) {
    fail("adapter_ids", "expected a length that divides the ", out.rows, " rows, found ", count);
  }
  out.ids.data = ids.data;
  out.ids.is_int64 = ids.dtype == Dtype::int64;
  out.ids.count = count;
  out.ids.rows_per_id = count ? out.rows / count : 1;
}

Arguments check_common(const char* name, const TensorView& rows, bool written, const char* basis_name,
                       const TensorView& basis, const TensorView& v, const TensorView& projection,
                       const TensorView* adapter_ids) {
  Arguments out;
  out.dtype = activation_dtype(name, rows);
  out.device = rows.device;
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
const void* check_bias(const char* rows_name, const TensorView& rows, const TensorView& bias, int64_t features) {
  if (bias.dtype != rows.dtype) {
    fail("bias", "expected the dtype of ", rows_name, ", found ", dtype_name(bias.dtype));
  }
  if (bias.dims != 1 || bias.sizes[0] != features || !is_contiguous(bias)) {
    fail("bias", "expected a contiguous tensor of shape (", features, "), found ", shape_text(bias));
  }
  if (bias.device != rows.device) {
    fail("bias", "expected the device of ", rows_name, ", found another");
  }
  return bias.data;
}

// A factor [r, E] of the side that is written; E below zero: any.
OtherSide other_side(const char* name, const TensorView& factor, int64_t rank, int64_t width, const TensorView& rows,
                     const char* rows_name) {
  check_factor(name, factor, rows, rows_name);
  if (factor.dims != 2 || factor.sizes[0] != rank || (width >= 0 && factor.sizes[1] != width)) {
    fail(name, "expected shape (", rank, ", ", width >= 0 ? std::to_string(width) : "E", "), found ",
         shape_text(factor));
  }
  OtherSide out;
  out.features = out.factor_stride = factor.sizes[1];
  out.factor = factor.data;
  return out;
}

std::string list_text(const std::vector<int64_t>& numbers) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < numbers.size(); ++i) text << (i ? ", " : "") << numbers[i];
  text << "]";
  return text.str();
}

void check_shape(const char* name, const TensorView& tensor, const std::vector<int64_t>& shape) {
  bool equal = tensor.dims == static_cast<int64_t>(shape.size());
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = tensor.sizes[i] == shape[i];
  if (!equal) fail(name, "expected shape ", list_text(shape), ", found ", shape_text(tensor));
}

const void* at(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }

constexpr int64_t kBytesOf[] = {4, 2, 2, 8};  // by Dtype

// What both directions of a fused projection have in common, part by part.
std::vector<Part> check_parts(const char* name, const TensorView& rows, bool written, const TensorView& basis,
                              const TensorView& v, const TensorView& projection, const TensorView* adapter_ids,
                              const std::vector<int64_t>& ends, const std::vector<int64_t>& groups) {
  Arguments whole;
  whole.dtype = activation_dtype(name, rows);
  whole.device = rows.device;
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
  const int64_t held = v.dims ? v.sizes[0] : 0;
  bool known = v.dims >= 2 && groups.size() == ends.size();
  for (int64_t group : groups) known = known && group >= 0 && group < held;
  if (!known) {
    fail("groups", "expected ", parts, " numbers below ", held, ", the groups of v, found ", list_text(groups));
  }
  check_basis(name, rows, "basis", basis, whole);
  check_factor("projection", projection, rows, name);
  check_factor("v", v, rows, name);
  const int64_t r = whole.rank, dims = projection.dims;
  if ((dims != 3 && dims != 4) || projection.sizes[0] != parts || projection.sizes[dims - 1] != r ||
      projection.sizes[dims - 2] != r) {
    fail("projection", "expected [", parts, ", u, ", r, ", ", r, "] or [", parts, ", ", r, ", ", r,
         "] for a basis of rank ", r, ", found ", shape_text(projection));
  }
  whole.elementwise = dims == 3;
  whole.numbers = whole.elementwise ? r * r : projection.sizes[1];
  const int64_t v_dims = adapter_ids ? 3 : 2;
  if (v.dims != v_dims || v.sizes[v_dims - 1] != whole.numbers || whole.numbers < 1) {
    fail("v", "expected ", adapter_ids ? "[G, K, " : "[G, ", whole.numbers, adapter_ids ? "] with adapter_ids" : "]",
         ", at least one number, found ", shape_text(v));
  }
  whole.adapters = adapter_ids ? v.sizes[1] : 1;
  if (adapter_ids) check_ids(name, rows, *adapter_ids, whole);

  const int64_t acc = whole.dtype == Dtype::float64 ? 8 : 4;
  const int64_t square = whole.elementwise ? r * r : whole.numbers * r * r;
  const void* data = rows.data;
  std::vector<Part> out(parts);
  for (int64_t p = 0; p < parts; ++p) {
    out[p].begin = p ? ends[p - 1] : 0;
    out[p].group = groups[p];
    Arguments& call = out[p].call = whole;
    call.features = ends[p] - out[p].begin;
    call.activation = const_cast<void*>(at(data, out[p].begin * kBytesOf[static_cast<int>(whole.dtype)]));
    call.basis = at(whole.basis, out[p].begin * acc);
    call.v = at(v.data, groups[p] * whole.adapters * whole.numbers * acc);
    call.projection = at(projection.data, p * square * acc);
    out[p].out = {call.activation, call.stride, call.features, call.basis, call.basis_stride, nullptr};
  }
  return out;
}

}  // namespace

Arguments check_update(const TensorView& y, const TensorView& basis, const TensorView& v, const TensorView& projection,
                       const TensorView* offset, const TensorView* bias, const TensorView* adapter_ids) {
  Arguments out = check_common("y", y, /*written=*/true, "basis", basis, v, projection, adapter_ids);
  if (offset) {
    check_factor("offset", *offset, y, "y");
    if (offset->dims != 1 || offset->sizes[0] != out.rank) {
      fail("offset", "expected shape (", out.rank, "), found ", shape_text(*offset));
    }
    out.offset = offset->data;
  }
  if (bias) out.bias = check_bias("y", y, *bias, out.features);
  out.activation = y.data;
  return out;
}

Arguments check_update_backward(const TensorView& g, const TensorView& basis, const TensorView& v,
                                const TensorView& projection, const TensorView* t, const TensorView* adapter_ids) {
  Arguments out = check_common("g", g, /*written=*/false, "basis", basis, v, projection, adapter_ids);
  if (t) {
    check_factor("t", *t, g, "g");
    if (t->dims != 2 || t->sizes[0] != out.rows || t->sizes[1] != out.rank) {
      fail("t", "expected shape (", out.rows, ", ", out.rank, "), found ", shape_text(*t));
    }
    out.t = t->data;
  }
  out.activation = const_cast<void*>(g.data);
  return out;
}

Arguments check_low_rank(const TensorView& x, const TensorView& right, const TensorView& basis, const TensorView& v,
                         const TensorView& projection, const TensorView* bias,
                         const TensorView* adapter_ids, OtherSide& out) {
  Arguments call = check_common("x", x, /*written=*/false, "right", right, v, projection, adapter_ids);
  out = other_side("basis", basis, call.rank, /*width=*/-1, x, "x");
  if (bias) out.bias = check_bias("x", x, *bias, out.features);
  call.activation = const_cast<void*>(x.data);
  return call;
}

OtherSide check_input_grad(const TensorView& dx, const TensorView& right, const Arguments& call) {
  const Dtype dtype = activation_dtype("dx", dx);
  if (dtype != call.dtype) fail("dx", "expected the dtype of g, found ", dtype_name(dx.dtype));
  if (dx.device != call.device) fail("dx", "expected the device of g, found another");
  const Rows rows = collapse_rows("dx", dx, /*written=*/true);
  if (rows.count != call.rows) fail("dx", "expected ", call.rows, " rows as in g, found ", shape_text(dx));
  OtherSide out = other_side("right", right, call.rank, rows.width, dx, "dx");
  out.activation = dx.data;
  out.stride = rows.stride;
  return out;
}

std::vector<Part> check_update_parts(const TensorView& y, const TensorView& basis, const TensorView& v,
                                     const TensorView& projection, const TensorView* offset, const TensorView* bias,
                                     const TensorView* x, const TensorView* right, const TensorView* adapter_ids,
                                     const std::vector<int64_t>& ends, const std::vector<int64_t>& groups) {
  std::vector<Part> out = check_parts("y", y, /*written=*/true, basis, v, projection, adapter_ids, ends, groups);
  const int64_t parts = static_cast<int64_t>(out.size()), r = out[0].call.rank;
  const int64_t acc = out[0].call.dtype == Dtype::float64 ? 8 : 4;
  if ((x == nullptr) != (right == nullptr) || (x && offset)) {
    fail("x and right", "expected both or neither, and no offset beside them");
  }
  if (offset) {
    check_factor("offset", *offset, y, "y");
    check_shape("offset", *offset, {parts, r});
    for (int64_t p = 0; p < parts; ++p) out[p].call.offset = at(offset->data, p * r * acc);
  }
  if (bias) {
    const Part& last = out.back();
    const void* whole = check_bias("y", y, *bias, last.begin + last.out.features);
    for (Part& part : out) part.out.bias = at(whole, part.begin * kBytesOf[static_cast<int>(part.call.dtype)]);
  }
  if (!x) return out;
  const Rows input = collapse_rows("x", *x, /*written=*/false);
  if (x->dtype != y.dtype || input.count != out[0].call.rows || x->device != y.device) {
    fail("x", "expected ", dtype_name(y.dtype), " rows as of y ", shape_text(y), ", found ",
         dtype_name(x->dtype), " ", shape_text(*x));
  }
  check_factor("right", *right, y, "y");
  check_shape("right", *right, {parts, r, input.width});
  for (int64_t p = 0; p < parts; ++p) {
    Arguments& call = out[p].call;
    out[p].of_input = true;
    call.activation = const_cast<void*>(x->data);
    call.features = call.basis_stride = input.width;
    call.stride = input.stride;
    call.basis = at(right->data, p * r * input.width * acc);
  }
  return out;
}

std::vector<Part> check_update_parts_backward(const TensorView& g, const TensorView& basis, const TensorView& v,
                                              const TensorView& projection, const TensorView* t,
                                              const TensorView* adapter_ids, const std::vector<int64_t>& ends,
                                              const std::vector<int64_t>& groups) {
  std::vector<Part> out = check_parts("g", g, /*written=*/false, basis, v, projection, adapter_ids, ends, groups);
  const int64_t parts = static_cast<int64_t>(out.size()), r = out[0].call.rank, rows = out[0].call.rows;
  const int64_t acc = out[0].call.dtype == Dtype::float64 ? 8 : 4;
  if (t) {
    check_factor("t", *t, g, "g");
    check_shape("t", *t, {parts, rows, r});
  }
  for (int64_t p = 0; p < parts; ++p) {
    out[p].call.t = t ? at(t->data, p * rows * r * acc) : nullptr;
    out[p].out.activation = nullptr;
  }
  return out;
}

KeptRight check_refresh_right(const TensorView& right, const TensorView& samples, const TensorView& weight,
                              const TensorView& basis, int64_t columns_of_a_block, int64_t samples_of_a_block) {
  KeptRight out;
  out.dtype = activation_dtype("weight", weight);
  out.device = weight.device;
  if (weight.dims != 2) fail("weight", "expected [D, E], found ", shape_text(weight));
  out.rows = weight.sizes[0];
  out.columns = weight.sizes[1];
  out.row_stride = weight.strides[0];
  out.column_stride = weight.strides[1];
  out.weight = weight.data;
  check_factor("basis", basis, weight, "weight");
  if (basis.dims != 2 || basis.sizes[0] < 1 || basis.sizes[1] != out.rows) {
    fail("basis", "expected [r, ", out.rows, "], found ", shape_text(basis));
  }
  out.rank = basis.sizes[0];
  out.basis = basis.data;
  check_factor("right", right, weight, "weight");
  if (right.dims != 2 || right.sizes[0] != out.rank || right.sizes[1] != out.columns) {
    fail("right", "expected shape (", out.rank, ", ", out.columns, "), found ", shape_text(right));
  }
  out.right = right.data;
  const int64_t blocks = (out.columns + columns_of_a_block - 1) / columns_of_a_block;
  if (samples.dtype != Dtype::int32 || samples.dims != 2 || samples.sizes[0] != blocks ||
      samples.sizes[1] != samples_of_a_block || !is_contiguous(samples)) {
    fail("samples", "expected contiguous int32 (", blocks, ", ", samples_of_a_block, "), found ",
         dtype_name(samples.dtype), " ", shape_text(samples));
  }
  if (samples.device != weight.device) {
    fail("samples", "expected the device of weight, found another");
  }
  out.samples = samples.data;
  return out;
}

}  // namespace tinylora
