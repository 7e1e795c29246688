// Facts about this library, readable through ctypes without torch.
#include <exception>
#include <string>

#include "cpu/isa.h"

#define TINYLORA_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__clang__)
#define TINYLORA_COMPILER "clang " __clang_version__
#else
#define TINYLORA_COMPILER "gcc " __VERSION__
#endif

// "key=value" lines.
TINYLORA_EXPORT const char* tinylora_build_info() {
  return "version=" TINYLORA_VERSION "\ncompiler=" TINYLORA_COMPILER "\ntorch_target=2.10\ninterface=" TINYLORA_INTERFACE
         "\n";
}

// The instruction set the CPU kernels run with, or a sentence beginning with "error: ".
TINYLORA_EXPORT const char* tinylora_isa() {
  static std::string text;
  try {
    text = tinylora::cpu::kernels().isa;
  } catch (const std::exception& error) {
    text = std::string("error: ") + error.what();
  }
  return text.c_str();
}

// 1 if the CPU kernels use that instruction set from now on, 0 if this machine cannot.
TINYLORA_EXPORT int tinylora_use_isa(const char* name) { return tinylora::cpu::use_isa(name) ? 1 : 0; }
