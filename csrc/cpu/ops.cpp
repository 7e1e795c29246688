// The CPU's ops, for torch and for linear/node.cpp.
#include "common/direct.h"
#include "common/ops.h"
#include "cpu/update.h"

namespace tinylora {
namespace {

// Each thread keeps its own scratch (cpu/mixing.h).
struct Cpu {
  static constexpr auto update = cpu::update;
  static constexpr auto low_rank = cpu::low_rank;
  static constexpr auto update_parts = cpu::update_parts;
  static void update_backward(const Arguments& call, void* g0, void* dv, const Scratch&) {
    cpu::update_backward(call, g0, dv);
  }
  static void update_input_grad(const Arguments& call, const OtherSide& dx, bool add, void* dv, const Scratch&) {
    cpu::update_input_grad(call, dx, add, dv);
  }
  static void update_parts_backward(const std::vector<Part>& parts, int64_t features, void* g0, int64_t groups, void* dv,
                                    const Scratch&) {
    cpu::update_parts_backward(parts, features, g0, groups, dv);
  }
};

constexpr Kernels kKernels = Direct<Cpu>::kernels();

}  // namespace
}  // namespace tinylora

STABLE_TORCH_LIBRARY_IMPL(tinylora, CPU, m) { tinylora::Ops<tinylora::Cpu>::implement(m); }

extern "C" __attribute__((visibility("default"))) const tinylora::Kernels* tinylora_cpu_kernels() {
  return &tinylora::kKernels;
}
