#include "images.h"

#include <atomic>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string>

#define TINYLORA_EXPORT extern "C" __attribute__((visibility("default")))

// The file TINYLORA_CUDA_ARCHIVE: sources and, in a wheel, compressed machine code, which Python takes out, or compiles,
// and hands back (ops/native/cuda_code.py).
extern "C" __attribute__((visibility("hidden"))) const char tinylora_archive_begin[], tinylora_archive_end[];
asm(".pushsection .rodata\n"
    ".hidden tinylora_archive_begin\n"
    ".hidden tinylora_archive_end\n"
    ".globl tinylora_archive_begin\n"
    ".globl tinylora_archive_end\n"
    "tinylora_archive_begin:\n"
    ".incbin \"" TINYLORA_CUDA_ARCHIVE "\"\n"
    "tinylora_archive_end:\n"
    ".popsection\n");

TINYLORA_EXPORT const char* tinylora_cuda_archive(int64_t* bytes) {
  *bytes = tinylora_archive_end - tinylora_archive_begin;
  return tinylora_archive_begin;
}

namespace tinylora {
namespace {

// Nothing is ever removed: the driver may read it again.
struct Handed {
  int module, architecture;
  bool ptx;
  std::string data;  // ends with a zero, as PTX must

  bool runs(int capability) const {
    return architecture <= capability && (ptx || architecture / 10 == capability / 10);
  }
};
std::mutex mutex;
std::list<Handed>& images() {
  static auto* const all = new std::list<Handed>;
  return *all;
}

// Hands over an image, or writes one line that says why not.
using Provider = void (*)(int element, int rank, int capability, char* why_not, int64_t bytes);
std::atomic<Provider> provider{nullptr};

}  // namespace

Image best_image(int module, int capability) {
  Image best{};
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Handed& image : images()) {
    if (image.module != module || !image.runs(capability)) continue;
    const bool better = best.ptx != image.ptx ? best.ptx : image.architecture > best.architecture;
    if (!best.data || better) best = {image.architecture, image.ptx, image.data.c_str()};
  }
  return best;
}

Image provided_image(Element element, int rank, int capability) {
  const int module = module_of(element, rank);
  char why_not[1000] = "python -m tinylora_kernels says what does";
  if (const Image image = best_image(module, capability); image.data) return image;
  if (const Provider provide = provider) provide(static_cast<int>(element), rank, capability, why_not, sizeof why_not);
  if (const Image image = best_image(module, capability); image.data) return image;
  throw std::runtime_error("tinylora: nothing in this library runs on sm_" + std::to_string(capability) + ": " + why_not);
}

}  // namespace tinylora

using namespace tinylora;

TINYLORA_EXPORT void tinylora_provide_cuda_images(Provider provide) { provider = provide; }

TINYLORA_EXPORT bool tinylora_has_cuda_image(int element, int rank, int capability) {
  return best_image(module_of(static_cast<Element>(element), rank), capability).data != nullptr;
}

TINYLORA_EXPORT void tinylora_add_cuda_image(int element, int rank, int architecture, bool ptx, const char* data,
                                             int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  images().push_back({module_of(static_cast<Element>(element), rank), architecture, ptx, std::string(data, bytes)});
}
