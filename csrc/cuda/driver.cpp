// A GPU through NVIDIA's driver: its library is opened when the first op runs, and nothing of CUDA's runtime is needed.
#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "device.h"
#include "driver_api.h"
#include "images.h"

// By their names before glibc 2.34, where libdl became a part of libc: see csrc/manylinux.cpp.
#if defined(__GLIBC__) && defined(__x86_64__)
asm(".symver dlopen, dlopen@GLIBC_2.2.5\n.symver dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
asm(".symver dlopen, dlopen@GLIBC_2.17\n.symver dlsym, dlsym@GLIBC_2.17");
#endif

namespace tinylora {
namespace {

using namespace driver;

constexpr int kMaxCards = 128;  // torch counts devices in 8 bits
constexpr int kMaxWarpsOfBlock = 32;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("tinylora: " + what); }

struct Functions {
#define DECLARE(name, parameters) Result(*name) parameters;
  TINYLORA_DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
};

Functions find_functions() {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(std::string(kLibrary) + " is not found: install the NVIDIA driver");
  const auto get = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  const auto too_old = [](const char* name) {
    fail(std::string("the NVIDIA driver has no ") + name + " of CUDA 12.0: install driver " + kOldestDriver + " or newer");
  };
  if (!get) too_old("cuGetProcAddress");
  Functions found{};
#define FIND(name, parameters)                                                                                 \
  {                                                                                                            \
    void* function = nullptr;                                                                                  \
    if (get(#name, &function, kVersion, 0, nullptr) != kSuccess || !function) too_old(#name);                  \
    found.name = reinterpret_cast<decltype(found.name)>(function);                                             \
  }
  TINYLORA_DRIVER_FUNCTIONS(FIND)
#undef FIND
  if (const Result result = found.cuInit(0)) {
    const char* text = nullptr;
    found.cuGetErrorName(result, &text);
    fail(std::string("cuInit failed: ") + (text ? text : "unknown error") + ": see nvidia-smi");
  }
  return found;
}

const Functions& driver_functions() {
  static const Functions found = find_functions();
  return found;
}

void check(Result result, const char* call, const std::string& about = {}) {
  if (result == kSuccess) return;
  const char *name = nullptr, *text = nullptr;
  driver_functions().cuGetErrorName(result, &name);
  driver_functions().cuGetErrorString(result, &text);
  fail(std::string(call) + (about.empty() ? "" : " of " + about) + " failed: " + (name ? name : std::to_string(result)) +
       (text ? std::string(" (") + text + ")" : ""));
}
#define CALL(name, ...) check(driver_functions().name(__VA_ARGS__), #name)

// While it lives this thread may allocate, though some stream of the process is being captured into a graph.
class Uncaptured {
 public:
  Uncaptured() { CALL(cuThreadExchangeStreamCaptureMode, &mode_); }
  ~Uncaptured() { driver_functions().cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  int mode_ = kRelaxed;
};

}  // namespace

// What is remembered of a GPU. Cards and what they loaded stay until the process ends.
struct Device::Card {
  Ordinal ordinal = 0;
  Context primary = nullptr;  // the context that torch works in
  int capability = 0;         // 90 for 9.0
  int multiprocessors = 0;
  std::mutex mutex;  // of what follows, but for reading the atomics
  Library libraries[kModules] = {};
  std::atomic<KernelHandle> kernels[Kernel::kAll] = {};
  std::atomic<int8_t> resident[Kernel::kAll][kMaxWarpsOfBlock + 1] = {};
  std::map<std::pair<int, unsigned long long>, uint32_t*> tickets;  // by module and stream
  int of_streams[kModules] = {}, of_graphs[kModules] = {};  // handed out

  static Card& of(int index);
  KernelHandle kernel(const Kernel& wanted);
  uint32_t* ticket(int module, int number);

 private:
  Library library(const Kernel& wanted, const Image& image);
};

Device::Card& Device::Card::of(int index) {
  static std::atomic<Card*> known[kMaxCards];
  static std::mutex mutex;
  if (index < 0 || index >= kMaxCards) fail("device " + std::to_string(index) + ": expected one below 128");
  if (Card* const card = known[index]) return *card;
  const std::lock_guard<std::mutex> lock(mutex);
  if (Card* const card = known[index]) return *card;
  auto card = std::make_unique<Card>();
  int major = 0, minor = 0;
  CALL(cuDeviceGet, &card->ordinal, index);
  CALL(cuDeviceGetAttribute, &major, kMajor, card->ordinal);
  CALL(cuDeviceGetAttribute, &minor, kMinor, card->ordinal);
  CALL(cuDeviceGetAttribute, &card->multiprocessors, kMultiprocessors, card->ordinal);
  card->capability = 10 * major + minor;
  CALL(cuDevicePrimaryCtxRetain, &card->primary, card->ordinal);
  known[index] = card.get();
  return *card.release();
}

Library Device::Card::library(const Kernel& wanted, const Image& image) {
  Library& library = libraries[wanted.module()];
  if (library) return library;
  const std::string about = std::string(image.ptx ? "PTX for compute_" : "code for sm_") +
                            std::to_string(image.architecture) + " on sm_" + std::to_string(capability);
  check(driver_functions().cuLibraryLoadData(&library, image.data, nullptr, nullptr, 0, nullptr, nullptr, 0),
        "cuLibraryLoadData", about);
  return library;
}

// Loaded when it is first asked for, in the current context too: a launch may be recorded into a graph, loading may not.
KernelHandle Device::Card::kernel(const Kernel& wanted) {
  std::atomic<KernelHandle>& known = kernels[wanted.number()];
  if (KernelHandle found = known) return found;
  const Image image = provided_image(wanted.element, wanted.rank, capability);  // by Python, which may wait for threads
  const std::lock_guard<std::mutex> lock(mutex);
  const Uncaptured uncaptured;
  const std::string name = wanted.name();
  KernelHandle found = nullptr;
  Function function = nullptr;
  check(driver_functions().cuLibraryGetKernel(&found, library(wanted, image), name.c_str()), "cuLibraryGetKernel", name);
  check(driver_functions().cuKernelGetFunction(&function, found), "cuKernelGetFunction", name);
  return known = found;
}

// A thread in which nothing of CUDA has run has no context, and the one that is current may be another GPU's.
Device::Device(int index) : card_(Card::of(index)), pushed_(false) {
  Context current = nullptr;
  Ordinal ordinal = -1;
  CALL(cuCtxGetCurrent, &current);
  if (current) CALL(cuCtxGetDevice, &ordinal);
  if (current && ordinal == card_.ordinal) return;
  CALL(cuCtxPushCurrent, card_.primary);
  pushed_ = true;
}

Device::~Device() {
  Context popped = nullptr;
  if (pushed_) driver_functions().cuCtxPopCurrent(&popped);
}

int Device::multiprocessors() const { return card_.multiprocessors; }

int Device::resident_blocks(const Kernel& kernel, int threads) const {
  std::atomic<int8_t>& known = card_.resident[kernel.number()][threads / kWarp];
  if (known) return known;
  int blocks = 0;
  Function function = nullptr;
  CALL(cuKernelGetFunction, &function, card_.kernel(kernel));
  CALL(cuOccupancyMaxActiveBlocksPerMultiprocessor, &blocks, function, threads, 0);
  if (blocks < 1) fail(kernel.name() + ": a block of " + std::to_string(threads) + " threads does not fit the GPU");
  return known = static_cast<int8_t>(blocks);
}

uint32_t* Device::Card::ticket(int module, int number) {
  Address first = 0;
  size_t bytes = 0;
  const Uncaptured uncaptured;
  CALL(cuLibraryGetGlobal, &first, &bytes, libraries[module], kTicketsName);
  return reinterpret_cast<uint32_t*>(first) + number;
}

uint32_t* Device::ticket(const Kernel& kernel, Stream stream) const {
  const auto handle = static_cast<StreamHandle>(stream);
  const int module = kernel.module();
  int status = -1;
  unsigned long long id = 0;
  if (driver_functions().cuStreamIsCapturing(handle, &status)) return nullptr;
  const bool captured = status != kNotCapturing;
  if (!captured && driver_functions().cuStreamGetId(handle, &id)) return nullptr;
  card_.kernel(kernel);  // its module is loaded
  const std::lock_guard<std::mutex> lock(card_.mutex);
  if (captured) {
    int& used = card_.of_graphs[module];
    return used == kGraphTickets ? nullptr : card_.ticket(module, kStreamTickets + used++);
  }
  const auto key = std::make_pair(module, id);
  const auto found = card_.tickets.find(key);
  if (found != card_.tickets.end()) return found->second;
  int& used = card_.of_streams[module];
  if (used == kStreamTickets) return nullptr;
  return card_.tickets[key] = card_.ticket(module, used++);
}

void Device::clear(void* words, int64_t count, Stream stream) const {
  CALL(cuMemsetD32Async, reinterpret_cast<Address>(words), 0, static_cast<size_t>(count),
       static_cast<StreamHandle>(stream));
}

void Device::launch(const Kernel& kernel, Extent grid, Extent block, Stream stream, const void* arguments) const {
  void* parameters[] = {const_cast<void*>(arguments)};
  const auto handle = reinterpret_cast<Function>(card_.kernel(kernel));
  const Result result = driver_functions().cuLaunchKernel(handle, grid.x, grid.y, 1, block.x, block.y, 1, 0,
                                                          static_cast<StreamHandle>(stream), parameters, nullptr);
  if (result) check(result, "cuLaunchKernel", kernel.name());
}

}  // namespace tinylora

// Null if the device code of this element type and rank runs on this device, which it then is ready for; else what is
// wrong, in one line.
extern "C" __attribute__((visibility("default"))) const char* tinylora_why_not_cuda(int device, int element, int rank) {
  using namespace tinylora;
  static thread_local std::string reason;
  try {
    const Device on(device);
    on.resident_blocks({Kernel::Kind::Rows, static_cast<Element>(element), rank}, kWarp);
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}
