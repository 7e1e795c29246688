// The ops of a kind of device for callers in C++: ops/native/kernels.h.
#pragma once

#include <stdexcept>
#include <string>

#include "common/arguments.h"

namespace tinylora {

// Device is that of ops.h.
template <class Device>
class Direct {
 public:
  static constexpr Kernels kernels() {
    return {update, update_backward, low_rank, update_input_grad, update_parts, update_parts_backward,
            [] { return last_error().c_str(); }};
  }

 private:
  using View = const TensorView&;
  using Maybe = const TensorView*;

  static std::string& last_error() {
    static thread_local std::string text;
    return text;
  }

  // No exception crosses into a caller that another compiler may have made.
  template <class Call>
  static Status caught(const Call& call) {
    try {
      call();
      return Status::ok;
    } catch (const std::invalid_argument& error) {
      last_error() = error.what();
      return Status::value_error;
    } catch (const std::out_of_range& error) {
      last_error() = error.what();
      return Status::index_error;
    } catch (const std::exception& error) {
      last_error() = error.what();
      return Status::error;
    }
  }

  static Status update(View y, View basis, View v, View projection, Maybe bias, Maybe adapter_ids, void* t) {
    return caught([&] { Device::update(check_update(y, basis, v, projection, /*offset=*/nullptr, bias, adapter_ids), t); });
  }

  static Status update_backward(View g, View basis, View v, View projection, Maybe t, Maybe adapter_ids, void* g0,
                                void* dv, const Scratch& scratch) {
    return caught([&] {
      Device::update_backward(check_update_backward(g, basis, v, projection, t, adapter_ids), g0, dv, scratch);
    });
  }

  static Status low_rank(View x, View right, View basis, View v, View projection, Maybe bias, Maybe adapter_ids, void* y,
                         void* t) {
    return caught([&] {
      OtherSide out;
      const Arguments call = check_low_rank(x, right, basis, v, projection, bias, adapter_ids, out);
      out.activation = y;
      out.stride = out.features;
      Device::low_rank(call, out, t);
    });
  }

  static Status update_input_grad(View dx, View right, View g, View basis, View v, View projection, Maybe t,
                                  Maybe adapter_ids, bool add, void* dv, const Scratch& scratch) {
    return caught([&] {
      const Arguments call = check_update_backward(g, basis, v, projection, t, adapter_ids);
      Device::update_input_grad(call, check_input_grad(dx, right, call), add, dv, scratch);
    });
  }

  static Status update_parts(View y, View basis, View v, View projection, Maybe bias, Maybe adapter_ids, int64_t parts,
                             const int64_t* ends, const int64_t* groups, void* t) {
    return caught([&] {
      Device::update_parts(check_update_parts(y, basis, v, projection, /*offset=*/nullptr, bias, /*x=*/nullptr,
                                              /*right=*/nullptr, adapter_ids, {ends, ends + parts}, {groups, groups + parts}),
                           t);
    });
  }

  static Status update_parts_backward(View g, View basis, View v, View projection, Maybe t, Maybe adapter_ids,
                                      int64_t parts, const int64_t* ends, const int64_t* groups, void* g0, void* dv,
                                      const Scratch& scratch) {
    return caught([&] {
      const std::vector<Part> checked = check_update_parts_backward(g, basis, v, projection, t, adapter_ids,
                                                                    {ends, ends + parts}, {groups, groups + parts});
      Device::update_parts_backward(checked, ends[parts - 1], g0, v.sizes[0], dv, scratch);
    });
  }
};

}  // namespace tinylora
