#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tinylora::cpu {
namespace {

// Where an extension narrows to bfloat16, one kernel changes.
[[maybe_unused]] Kernels with_bfloat16(const char* isa, Kernels kernels, RowsKernel rows) {
  kernels.isa = isa;
  kernels.rows[1] = rows;
  return kernels;
}

#if defined(__x86_64__)
constexpr char kNames[] = "portable, avx2, avx512 or avx512_bf16";

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = with_bfloat16("avx512_bf16", avx512_kernels(), avx512_bf16_rows);
  return kernels;
}
#elif defined(__aarch64__)
constexpr char kNames[] = "portable, neon, neon_bf16 or sve256";

const Kernels& neon_bf16_kernels() {
  static const Kernels kernels = with_bfloat16("neon_bf16", neon_kernels(), neon_bf16_rows);
  return kernels;
}

#if defined(__linux__)
// Bits of arch/arm64/include/uapi/asm/hwcap.h and a number of linux/prctl.h: older headers lack their names.
bool has_bf16() { return getauxval(AT_HWCAP2) & (1ul << 14); }
// The width is asked for as well: what was compiled for 256 bits is wrong on any other.
bool has_sve256() {
  const bool sve = getauxval(AT_HWCAP) & (1ul << 22), sve_bf16 = getauxval(AT_HWCAP2) & (1ul << 12);
  constexpr int get_length = 51, bytes = 0xffff;
  return sve && sve_bf16 && (prctl(get_length) & bytes) == 256 / 8;
}
#elif defined(__APPLE__)
bool has_bf16() {
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found;
}
#else
bool has_bf16() { return false; }
#endif
#else
constexpr char kNames[] = "portable";
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
#elif defined(__aarch64__)
#if defined(__linux__)
  if (wanted("sve256") && has_sve256()) return &sve256_kernels();
#endif
  if (wanted("neon_bf16") && has_bf16()) return &neon_bf16_kernels();
  if (wanted("neon")) return &neon_kernels();
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
    throw std::runtime_error(std::string("TINYLORA_CPU_ISA: expected ") + kNames + " within what this CPU runs (" +
                             find(nullptr)->isa + "), found '" + name + "'");
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
