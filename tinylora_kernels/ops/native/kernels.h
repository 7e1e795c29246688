// The kernels of a kind of device as the native library hands them to linear/node.cpp (csrc/common/direct.h), past torch's
// dispatcher: an op of the stable ABI is boxed, and right after a matrix product, when nothing of that is in the caches, it
// costs 3 us more, where the CPU kernel of one row costs one. No torch in here, and nothing that depends on a C++ library.
#pragma once

#include <cstdint>

namespace tinylora {

enum class Dtype : int32_t { float32, bfloat16, float16, float64, int32, int64, other };

// A tensor as an op sees it. Sizes and strides are the tensor's own.
struct TensorView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  Dtype dtype;
  int32_t device;  // CUDA's index; -1: the CPU
};

enum class Status : int32_t { ok, value_error, index_error, error };

// Memory on the device of the call, which nobody else uses until what the call launched has run.
struct Scratch {
  void* (*allocate)(void* owner, int64_t words);  // of 4 bytes; null: there is none
  void* owner;
};

// The ops of schema.py with the same checks, but that the caller has allocated what they return, contiguous: t [N, r] or
// [k, N, r], y, g0 and dv. Null: not given, or not wanted.
struct Kernels {
  Status (*update)(const TensorView& y, const TensorView& basis, const TensorView& v, const TensorView& projection,
                   const TensorView* bias, const TensorView* adapter_ids, void* t);
  Status (*update_backward)(const TensorView& g, const TensorView& basis, const TensorView& v,
                            const TensorView& projection, const TensorView* t, const TensorView* adapter_ids, void* g0,
                            void* dv, const Scratch& scratch);
  Status (*low_rank)(const TensorView& x, const TensorView& right, const TensorView& basis, const TensorView& v,
                     const TensorView& projection, const TensorView* bias, const TensorView* adapter_ids, void* y,
                     void* t);
  Status (*update_input_grad)(const TensorView& dx, const TensorView& right, const TensorView& g,
                              const TensorView& basis, const TensorView& v, const TensorView& projection,
                              const TensorView* t, const TensorView* adapter_ids, bool add, void* dv,
                              const Scratch& scratch);
  // Of k parts: ends [k], groups [k].
  Status (*update_parts)(const TensorView& y, const TensorView& basis, const TensorView& v, const TensorView& projection,
                         const TensorView* bias, const TensorView* adapter_ids, int64_t parts, const int64_t* ends,
                         const int64_t* groups, void* t);
  Status (*update_parts_backward)(const TensorView& g, const TensorView& basis, const TensorView& v,
                                  const TensorView& projection, const TensorView* t, const TensorView* adapter_ids,
                                  int64_t parts, const int64_t* ends, const int64_t* groups, void* g0, void* dv,
                                  const Scratch& scratch);
  const char* (*last_error)();  // of this thread
};

}  // namespace tinylora
