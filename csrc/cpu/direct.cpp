// The ops' CPU kernels for callers in C++: ops/native/kernels.h.
#include <stdexcept>
#include <string>

#include "common/arguments.h"
#include "cpu/update.h"
#include "ops/native/kernels.h"

namespace tinylora::cpu {
namespace {

thread_local std::string last_error;

// No exception crosses into a caller that another compiler may have made.
template <class Call>
Status caught(const Call& call) {
  try {
    call();
    return Status::ok;
  } catch (const std::invalid_argument& error) {
    last_error = error.what();
    return Status::value_error;
  } catch (const std::out_of_range& error) {
    last_error = error.what();
    return Status::index_error;
  } catch (const std::exception& error) {
    last_error = error.what();
    return Status::error;
  }
}

Status direct_update(const TensorView& y, const TensorView& basis, const TensorView& v, const TensorView& projection,
                     const TensorView* bias, const TensorView* adapter_ids, void* t) {
  return caught([&] { update(check_update(y, basis, v, projection, /*offset=*/nullptr, bias, adapter_ids), t); });
}

Status direct_update_backward(const TensorView& g, const TensorView& basis, const TensorView& v,
                              const TensorView& projection, const TensorView* t, const TensorView* adapter_ids,
                              void* g0, void* dv) {
  return caught([&] { update_backward(check_update_backward(g, basis, v, projection, t, adapter_ids), g0, dv); });
}

Status direct_low_rank(const TensorView& x, const TensorView& right, const TensorView& basis, const TensorView& v,
                       const TensorView& projection, const TensorView* bias, const TensorView* adapter_ids, void* y,
                       void* t) {
  return caught([&] {
    OtherSide out;
    const Arguments call = check_low_rank(x, right, basis, v, projection, bias, adapter_ids, out);
    out.activation = y;
    out.stride = out.features;
    low_rank(call, out, t);
  });
}

Status direct_update_input_grad(const TensorView& dx, const TensorView& right, const TensorView& g,
                                const TensorView& basis, const TensorView& v, const TensorView& projection,
                                const TensorView* t, const TensorView* adapter_ids, bool add, void* dv) {
  return caught([&] {
    const Arguments call = check_update_backward(g, basis, v, projection, t, adapter_ids);
    update_input_grad(call, check_input_grad(dx, right, call), add, dv);
  });
}

constexpr CpuKernels kKernels{direct_update, direct_update_backward, direct_low_rank, direct_update_input_grad,
                              [] { return last_error.c_str(); }};

}  // namespace
}  // namespace tinylora::cpu

extern "C" __attribute__((visibility("default"))) const tinylora::CpuKernels* tinylora_cpu_kernels() {
  return &tinylora::cpu::kKernels;
}
