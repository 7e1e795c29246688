#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tinylora::cpu {
namespace {

#if defined(__x86_64__)
// AVX-512 BF16 changes one kernel, the update of bfloat16 rows.
const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels changed = avx512_kernels();
    changed.isa = "avx512_bf16";
    changed.rows[1] = avx512_bf16_rows;
    return changed;
  }();
  return kernels;
}
#endif

// By name, or the fastest for null; null where the CPU or the operating system lacks it.
const Kernels* find(const char* name) {
  const auto wanted = [name](const char* isa) { return !name || !std::strcmp(name, isa); };
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wanted("avx512_bf16") && avx512 && __builtin_cpu_supports("avx512bf16")) return &avx512_bf16_kernels();
  if (wanted("avx512") && avx512) return &avx512_kernels();
  if (wanted("avx2") && avx2) return &avx2_kernels();
#endif
  return wanted("portable") ? &portable_kernels() : nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  if (const Kernels* current = chosen.load(std::memory_order_acquire)) return *current;
  const char* name = std::getenv("TINYLORA_CPU_ISA");
  if (name && !*name) name = nullptr;
  const Kernels* found = find(name);
  if (!found) {
    throw std::runtime_error(std::string("TINYLORA_CPU_ISA: expected portable, avx2, avx512 or avx512_bf16 within what "
                                         "this CPU runs (") + find(nullptr)->isa + "), found '" + name + "'");
  }
  chosen.store(found, std::memory_order_release);
  return *found;
}

bool use_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) chosen.store(found, std::memory_order_release);
  return found != nullptr;
}

}  // namespace tinylora::cpu
