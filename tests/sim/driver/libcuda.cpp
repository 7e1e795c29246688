// A stand-in for NVIDIA's driver: the library opens it as libcuda.so.1 and cannot tell. Device memory is host memory, a
// kernel is looked up in the image that was loaded and then run by the emulator, at once. Every call is held to the
// driver's rules, and what breaks one is both refused, with the driver's error, and reported.
//
//     STANDIN_CARDS=90,90      compute capabilities of its devices
//     STANDIN_VERSION=12000    the newest CUDA that it has functions of
//     STANDIN_MISSING=cuX      a function that it does not have
//     STANDIN_FAIL=cuX:719     a call that fails, with this error
//     STANDIN_IDLE=1           launches are checked, and nothing is run
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cubin.h"
#include "driver_api.h"
#include "emulator.h"
#include "kernel_arguments.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace standin {
namespace {

using namespace tinylora::driver;

enum Error : int {
  kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kInvalidDevice = 101, kInvalidImage = 200,
  kInvalidContext = 201, kNoBinary = 209, kInvalidHandle = 400, kNotFound = 500, kLaunchOutOfResources = 701,
  kLaunchFailed = 719, kCaptureUnsupported = 900
};
const std::map<int, const char*> kErrorNames = {
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"}, {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"}, {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE"}, {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
    {kNoBinary, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND"}, {kLaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"}, {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};

struct ContextState {
  int device;
};
struct LibraryState {
  Facts facts;
  std::map<std::string, std::unique_ptr<struct KernelState>> kernels;
  std::map<std::pair<std::string, ContextState*>, std::vector<uint32_t>> variables;
};
struct KernelState {
  LibraryState* library;
  std::string name;
  KernelFacts facts;
  std::set<ContextState*> loaded;  // in these contexts
};
struct FunctionState {
  KernelState* kernel;
  ContextState* context;
};
struct Launch {
  KernelState* kernel;
  ContextState* context;
  std::vector<char> arguments;
  dim3 grid{1}, block{1};
};
struct StreamState {
  ContextState* context;
  unsigned long long id;
  bool capturing = false;
  std::vector<std::function<void()>> recorded;
};
struct Memory {
  size_t bytes;
  int device;
  bool of_graph = false;  // a graph will use it: torch keeps it too
};

struct Driver {
  std::recursive_mutex mutex;
  bool initialised = false;
  std::vector<int> cards;
  std::vector<std::unique_ptr<ContextState>> primaries;
  std::vector<std::unique_ptr<LibraryState>> libraries;
  std::vector<std::unique_ptr<FunctionState>> functions;
  std::vector<std::unique_ptr<StreamState>> streams;
  std::map<const char*, Memory> memory;
  std::deque<std::pair<void*, size_t>> freed;
  size_t bytes_freed = 0;
  std::map<std::string, int> calls;
  std::map<const uint32_t*, std::pair<unsigned long long, bool>> ticket_owners;  // a stream, or a launch that was captured
  std::vector<std::string> launched;
  std::string report;
};
Driver& d = *new Driver;  // as long as the process: what graphs hold of torch's is not freed behind torch

thread_local std::vector<ContextState*> stack;
thread_local int capture_mode = 0;  // global

const char* environment(const char* name) { return std::getenv(name) ? std::getenv(name) : ""; }

int refuse(int error, const std::string& why) {
  d.report += why + "\n";
  return error;
}

ContextState* current() { return stack.empty() ? nullptr : stack.back(); }

// What every call begins with: counted, and failed if it was asked to fail.
int begin(const char* name, bool needs_context = false) {
  ++d.calls[name];
  const std::string asked = environment("STANDIN_FAIL");
  const auto colon = asked.find(':');
  if (colon != std::string::npos && asked.substr(0, colon) == name) return std::atoi(asked.c_str() + colon + 1);
  if (!d.initialised && std::strcmp(name, "cuInit")) return refuse(kNotInitialized, std::string(name) + " before cuInit");
  if (needs_context && !current()) return refuse(kInvalidContext, std::string(name) + ": the thread has no context");
  return 0;
}
#define BEGIN(...) \
  const std::lock_guard<std::recursive_mutex> lock(d.mutex); \
  if (const int error = begin(__VA_ARGS__)) return error

bool capturing_somewhere() {
  return std::any_of(d.streams.begin(), d.streams.end(), [](const auto& stream) { return stream->capturing; });
}
// What a thread may not do while a stream is captured, unless it says that it knows.
int unsafe(const char* name) {
  if (capture_mode == kRelaxed || !capturing_somewhere()) return 0;
  return refuse(kCaptureUnsupported, std::string(name) + " while a stream is being captured");
}

template <class State, class Handle>
State* known(const std::vector<std::unique_ptr<State>>& all, Handle handle) {
  for (const auto& one : all)
    if (reinterpret_cast<Handle>(one.get()) == handle) return one.get();
  return nullptr;
}

// A stream of the current context; null is its default one.
int stream_of(const char* call, StreamHandle handle, StreamState** found) {
  *found = handle ? known<StreamState>(d.streams, handle) : nullptr;
  if (handle && !*found) return refuse(kInvalidHandle, std::string(call) + ": not a stream");
  if (*found && (*found)->context != current())
    return refuse(kInvalidContext, std::string(call) + ": the stream is of another context than the current one");
  return 0;
}

// A pointer that a kernel is given: null, or into memory of its device.
void expect_memory(const char* what, const void* pointer, int device) {
  if (!pointer) return;
  const auto* const address = static_cast<const char*>(pointer);
  auto after = d.memory.upper_bound(address);
  if (after != d.memory.begin()) {
    const auto& [first, memory] = *std::prev(after);
    if (address < first + std::max<size_t>(memory.bytes, 1)) {
      if (memory.device == device) return;
      throw std::runtime_error(std::string(what) + ": memory of device " + std::to_string(memory.device) +
                               " on device " + std::to_string(device));
    }
  }
  throw std::runtime_error(std::string(what) + ": not in the memory of any device");
}

void expect_mixing(const tinylora::Mixing& m, int device) {
  expect_memory("v", m.v, device);
  expect_memory("projection", m.projection, device);
  expect_memory("ids", m.ids, device);
}

// The block of parameters as the structure of the kernel.
template <class Arguments>
const Arguments& block_as(const KernelState& kernel, const std::vector<char>& block) {
  if (kernel.facts.parameters != 1 || block.size() != sizeof(Arguments))
    throw std::runtime_error(std::to_string(block.size()) + " bytes of parameters in the image, the structure has " +
                             std::to_string(sizeof(Arguments)));
  return *reinterpret_cast<const Arguments*>(block.data());
}

void expect_rows(const tinylora::RowsArguments& p, const std::string& name, int device) {
  for (const auto& [what, pointer] : std::initializer_list<std::pair<const char*, const void*>>{
           {"source", p.source.rows}, {"factor", p.source.factor}, {"target", p.target.rows},
           {"target's factor", p.target.factor}, {"bias", p.bias}, {"offset", p.offset}, {"t", p.t},
           {"coefficients", p.coefficients}, {"partial", p.partial}, {"ticket", p.ticket}, {"dv", p.dv},
           {"cleared", p.cleared}})
    expect_memory(what, pointer, device);
  expect_mixing(p.mixing, device);
  if ((name.find("ELb1E") != std::string::npos) != (p.mixing.ids != nullptr))
    throw std::runtime_error("the kernel of rows with ids, and no ids, or the other way round");
  if (static_cast<unsigned>(p.onto) > 2 || p.rows <= 0 || p.source.features < 0)
    throw std::runtime_error("a structure that makes no sense");
}

void expect_pointers(const Launch& launch) {
  const int device = launch.context->device;
  const KernelState& kernel = *launch.kernel;
  if (kernel.name.find("11rows_kernel") != std::string::npos) {
    expect_rows(block_as<tinylora::RowsArguments>(kernel, launch.arguments), kernel.name, device);
  } else if (kernel.name.find("12parts_kernel") != std::string::npos) {
    const auto& p = block_as<tinylora::PartsArguments>(kernel, launch.arguments);
    for (int i = 0; i < p.parts; ++i) expect_rows(p.part[i], kernel.name, device);
  } else if (kernel.name.find("16bank_grad_kernel") != std::string::npos) {
    const auto& p = block_as<tinylora::BankGradArguments>(kernel, launch.arguments);
    expect_memory("a", p.a, device);
    expect_memory("t", p.t, device);
    expect_memory("dv", p.dv, device);
    expect_mixing(p.mixing, device);
  } else {
    const auto& p = block_as<tinylora::RightArguments>(kernel, launch.arguments);
    expect_memory("weight", p.weight, device);
    expect_memory("basis", p.basis, device);
    expect_memory("right", p.right, device);
    expect_memory("samples", p.samples, device);
  }
}

// What the launch does, on the emulator.
int execute(const Launch& launch) {
  const auto found = emulator::kernels().find(launch.kernel->name);
  if (found == emulator::kernels().end()) return refuse(kNotFound, launch.kernel->name + ": not in the emulator");
  try {
    expect_pointers(launch);
    emulator::run(launch.grid, launch.block, [&] { found->second(launch.arguments.data()); });
  } catch (const std::exception& fault) {
    return refuse(kLaunchFailed, launch.kernel->name + ": " + fault.what());
  }
  if (launch.kernel->name.find("11rows_kernel") != std::string::npos) {
    const auto& p = *reinterpret_cast<const tinylora::RowsArguments*>(launch.arguments.data());
    if (p.ticket && *p.ticket) return refuse(kLaunchFailed, launch.kernel->name + ": the ticket is not zero");
  }
  return 0;
}

// A ticket of the module is one stream's, or that of one launch which was captured. (One in scratch is set to zero first.)
int expect_own_ticket(const Launch& launch, const StreamState* stream) {
  const uint32_t* ticket = nullptr;
  const char* const arguments = launch.arguments.data();
  if (launch.kernel->name.find("11rows_kernel") != std::string::npos)
    ticket = reinterpret_cast<const tinylora::RowsArguments*>(arguments)->ticket;
  if (launch.kernel->name.find("12parts_kernel") != std::string::npos)
    ticket = reinterpret_cast<const tinylora::PartsArguments*>(arguments)->part[0].ticket;
  const auto holds = [&](const auto& variable) {
    const std::vector<uint32_t>& words = variable.second;
    return ticket >= words.data() && ticket < words.data() + words.size();
  };
  const auto& variables = launch.kernel->library->variables;
  if (!ticket || std::none_of(variables.begin(), variables.end(), holds)) return 0;
  const auto owner = std::make_pair(stream ? stream->id : 1 + launch.context->device, stream && stream->capturing);
  const auto [known, fresh] = d.ticket_owners.emplace(ticket, owner);
  if (!fresh && (owner.second || known->second != owner))
    return refuse(kLaunchFailed, launch.kernel->name + ": the ticket of another launch that may run beside it");
  return 0;
}

// Now, or when the graph of the stream is run.
int do_or_record(StreamState* stream, std::function<int()> work) {
  if (!stream || !stream->capturing) return work();
  stream->recorded.push_back([work] { work(); });
  return 0;
}

int cuInit(unsigned flags) {
  BEGIN("cuInit");
  if (flags) return refuse(kInvalidValue, "cuInit: flags");
  std::stringstream cards(*environment("STANDIN_CARDS") ? environment("STANDIN_CARDS") : "90");
  for (std::string card; d.cards.size() < 16 && std::getline(cards, card, ',') && !d.initialised;)
    d.cards.push_back(std::stoi(card));
  d.initialised = true;
  for (size_t i = d.primaries.size(); i < d.cards.size(); ++i)
    d.primaries.emplace_back(new ContextState{static_cast<int>(i)});
  return 0;
}
int cuGetErrorName(Result error, const char** text) {
  const auto found = kErrorNames.find(error);
  *text = found == kErrorNames.end() ? nullptr : found->second;
  return *text ? 0 : kInvalidValue;
}
int cuGetErrorString(Result error, const char** text) {
  *text = kErrorNames.count(error) ? "as the stand-in says" : nullptr;
  return *text ? 0 : kInvalidValue;
}
int cuDeviceGet(Ordinal* device, int ordinal) {
  BEGIN("cuDeviceGet");
  if (ordinal < 0 || ordinal >= static_cast<int>(d.cards.size())) return refuse(kInvalidDevice, "cuDeviceGet: no such device");
  *device = ordinal;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, Ordinal device) {
  BEGIN("cuDeviceGetAttribute");
  switch (attribute) {
    case kMultiprocessors: *value = 2; return 0;
    case kMajor: *value = d.cards.at(device) / 10; return 0;
    case kMinor: *value = d.cards.at(device) % 10; return 0;
  }
  return refuse(kInvalidValue, "cuDeviceGetAttribute: attribute " + std::to_string(attribute));
}
int cuDevicePrimaryCtxRetain(Context* context, Ordinal device) {
  BEGIN("cuDevicePrimaryCtxRetain");
  *context = reinterpret_cast<Context>(d.primaries.at(device).get());
  return 0;
}
int cuCtxGetCurrent(Context* context) {
  BEGIN("cuCtxGetCurrent");
  *context = reinterpret_cast<Context>(current());
  return 0;
}
int cuCtxGetDevice(Ordinal* device) {
  BEGIN("cuCtxGetDevice", true);
  *device = current()->device;
  return 0;
}
int cuCtxPushCurrent(Context context) {
  BEGIN("cuCtxPushCurrent");
  ContextState* const state = known<ContextState>(d.primaries, context);
  if (!state) return refuse(kInvalidContext, "cuCtxPushCurrent: not a context");
  stack.push_back(state);
  return 0;
}
int cuCtxPopCurrent(Context* context) {
  BEGIN("cuCtxPopCurrent", true);
  *context = reinterpret_cast<Context>(current());
  stack.pop_back();
  return 0;
}
int cuStreamIsCapturing(StreamHandle handle, int* status) {
  BEGIN("cuStreamIsCapturing", true);
  StreamState* stream = nullptr;
  if (const int error = stream_of("cuStreamIsCapturing", handle, &stream)) return error;
  *status = stream && stream->capturing;
  return 0;
}
int cuStreamGetId(StreamHandle handle, unsigned long long* id) {
  BEGIN("cuStreamGetId", true);
  StreamState* stream = nullptr;
  if (const int error = stream_of("cuStreamGetId", handle, &stream)) return error;
  *id = stream ? stream->id : 1 + current()->device;
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  BEGIN("cuThreadExchangeStreamCaptureMode");
  if (*mode < 0 || *mode > kRelaxed) return refuse(kInvalidValue, "cuThreadExchangeStreamCaptureMode: no such mode");
  std::swap(*mode, capture_mode);
  return 0;
}
int cuLibraryLoadData(Library* library, const void* image, int*, void**, unsigned jit_count, int*, void**, unsigned count) {
  BEGIN("cuLibraryLoadData", true);
  if (const int error = unsafe("cuLibraryLoadData")) return error;
  if (jit_count || count) return refuse(kInvalidValue, "cuLibraryLoadData: options");
  auto state = std::make_unique<LibraryState>();
  try {
    state->facts = read_image(image);
  } catch (const std::exception& error) {
    return refuse(kInvalidImage, std::string("cuLibraryLoadData: ") + error.what());
  }
  *library = reinterpret_cast<Library>(state.get());
  d.libraries.push_back(std::move(state));
  return 0;
}
int cuLibraryGetKernel(KernelHandle* kernel, Library library, const char* name) {
  BEGIN("cuLibraryGetKernel");
  LibraryState* const state = known<LibraryState>(d.libraries, library);
  if (!state) return refuse(kInvalidHandle, "cuLibraryGetKernel: not a library");
  const auto found = state->facts.kernels.find(name);
  if (found == state->facts.kernels.end()) return refuse(kNotFound, std::string("cuLibraryGetKernel: no ") + name);
  auto& one = state->kernels[name];
  if (!one) one.reset(new KernelState{state, name, found->second, {}});
  *kernel = reinterpret_cast<KernelHandle>(one.get());
  return 0;
}
int cuLibraryGetGlobal(Address* address, size_t* bytes, Library library, const char* name) {
  BEGIN("cuLibraryGetGlobal", true);
  if (const int error = unsafe("cuLibraryGetGlobal")) return error;
  LibraryState* const state = known<LibraryState>(d.libraries, library);
  if (!state) return refuse(kInvalidHandle, "cuLibraryGetGlobal: not a library");
  const auto found = state->facts.variables.find(name);
  if (found == state->facts.variables.end()) return refuse(kNotFound, std::string("cuLibraryGetGlobal: no ") + name);
  std::vector<uint32_t>& words = state->variables[{name, current()}];
  words.resize(found->second / 4);
  d.memory[reinterpret_cast<const char*>(words.data())] = {*bytes = found->second, current()->device};
  *address = reinterpret_cast<Address>(words.data());
  return 0;
}
KernelState* known_kernel(const void* handle) {
  for (const auto& library : d.libraries)
    for (const auto& [name, kernel] : library->kernels)
      if (kernel.get() == handle) return kernel.get();
  return nullptr;
}
// The kernel in the current context, which its image has to fit.
int load(const char* call, KernelState* kernel) {
  if (kernel->loaded.count(current())) return 0;
  if (const int error = unsafe(call)) return error;
  const Facts& facts = kernel->library->facts;
  const int card = d.cards[current()->device];
  if (facts.architecture > card || (!facts.ptx && facts.architecture / 10 != card / 10))
    return refuse(kNoBinary, std::string(call) + ": code for " + std::to_string(facts.architecture) + " on " + std::to_string(card));
  kernel->loaded.insert(current());
  return 0;
}
int cuKernelGetFunction(Function* function, KernelHandle handle) {
  BEGIN("cuKernelGetFunction", true);
  KernelState* const kernel = known_kernel(handle);
  if (!kernel) return refuse(kInvalidHandle, "cuKernelGetFunction: not a kernel");
  if (const int error = load("cuKernelGetFunction", kernel)) return error;
  d.functions.emplace_back(new FunctionState{kernel, current()});
  *function = reinterpret_cast<Function>(d.functions.back().get());
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function handle, int threads, size_t shared) {
  BEGIN("cuOccupancyMaxActiveBlocksPerMultiprocessor", true);
  FunctionState* const function = known<FunctionState>(d.functions, handle);
  if (!function) return refuse(kInvalidHandle, "cuOccupancyMaxActiveBlocksPerMultiprocessor: not a function");
  if (function->context != current())
    return refuse(kInvalidContext, "cuOccupancyMaxActiveBlocksPerMultiprocessor: a function of another context");
  const KernelFacts& facts = function->kernel->facts;
  if (threads < 1 || threads > static_cast<int>(facts.most_threads) || shared)
    return refuse(kInvalidValue, "cuOccupancyMaxActiveBlocksPerMultiprocessor: " + std::to_string(threads) + " threads");
  *blocks = 2;
  return 0;
}
int cuLaunchKernel(Function handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, StreamHandle stream_handle, void** parameters, void** extra) {
  BEGIN("cuLaunchKernel", true);
  StreamState* stream = nullptr;
  if (const int error = stream_of("cuLaunchKernel", stream_handle, &stream)) return error;
  KernelState* const kernel = known_kernel(handle);
  if (!kernel) return refuse(kInvalidHandle, "cuLaunchKernel: not a kernel");
  if (const int error = load("cuLaunchKernel", kernel)) return error;
  const KernelFacts& facts = kernel->facts;
  const uint64_t threads = uint64_t(block_x) * block_y * block_z;
  if (!threads || threads > std::min(facts.most_threads, 1024u) || block_z > 64 || !grid_x || !grid_y || !grid_z ||
      grid_x > 0x7fffffffu || grid_y > 65535 || grid_z > 65535)
    return refuse(kInvalidValue, kernel->name + ": a grid of " + std::to_string(grid_x) + " blocks of " +
                                     std::to_string(threads) + " threads, compiled for " + std::to_string(facts.most_threads));
  if (threads * facts.registers > 65536 || facts.shared + shared > 48 << 10)
    return refuse(kLaunchOutOfResources, kernel->name + ": registers or shared memory");
  if (!parameters || extra) return refuse(kInvalidValue, kernel->name + ": parameters");
  const char* const block = static_cast<const char*>(parameters[0]);
  Launch launch{kernel, current(), {block, block + facts.parameter_bytes}, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}};
  if (const int error = expect_own_ticket(launch, stream)) return error;
  d.launched.push_back(kernel->name);
  if (*environment("STANDIN_IDLE")) return 0;
  return do_or_record(stream, [launch] { return execute(launch); });
}
int cuMemsetD32Async(Address address, unsigned value, size_t count, StreamHandle stream_handle) {
  BEGIN("cuMemsetD32Async", true);
  StreamState* stream = nullptr;
  if (const int error = stream_of("cuMemsetD32Async", stream_handle, &stream)) return error;
  auto* const words = reinterpret_cast<uint32_t*>(address);
  try {
    if (!words || !count) throw std::runtime_error("nothing");
    expect_memory("the first word", words, current()->device);
    expect_memory("the last word", words + count - 1, current()->device);
  } catch (const std::exception& error) {
    return refuse(kInvalidValue, std::string("cuMemsetD32Async: ") + error.what());
  }
  return do_or_record(stream, [=] { std::fill_n(words, count, value); return 0; });
}

}  // namespace
}  // namespace standin

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* found) {
  using namespace standin;
  static const std::map<std::string, void*> all = {
#define NAMED(function, parameters) {#function, reinterpret_cast<void*>(static_cast<Result(*) parameters>(function))},
      TINYLORA_DRIVER_FUNCTIONS(NAMED)
#undef NAMED
  };
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  const auto at = all.find(name);
  const int newest = *environment("STANDIN_VERSION") ? std::atoi(environment("STANDIN_VERSION")) : 12000;
  *function = nullptr;
  if (found) *found = 1;
  if (flags || at == all.end() || version > newest || environment("STANDIN_MISSING") == std::string(name)) return kNotFound;
  *function = at->second;
  if (found) *found = 0;
  return 0;
}
EXPORT int cuDriverGetVersion(int* version) {
  *version = *standin::environment("STANDIN_VERSION") ? std::atoi(standin::environment("STANDIN_VERSION")) : 12000;
  return 0;
}

// What the tests ask, and what stands in for the CUDA runtime under torch.
EXPORT void* standin_allocate(int device, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(standin::d.mutex);
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes ? bytes : 1)) std::abort();
  std::memset(memory, 0xff, bytes);  // NaN
  standin::d.memory[static_cast<char*>(memory)] = {bytes, device, standin::capturing_somewhere()};
  return memory;
}
EXPORT void standin_free(void* memory) {
  const std::lock_guard<std::recursive_mutex> lock(standin::d.mutex);
  const auto found = standin::d.memory.find(static_cast<char*>(memory));
  if (found == standin::d.memory.end() || found->second.of_graph) return;
  // Not given to others yet: a launch of a graph that still has it is seen.
  auto& freed = standin::d.freed;
  freed.emplace_back(memory, found->second.bytes);
  standin::d.memory.erase(found);
  for (standin::d.bytes_freed += freed.back().second; standin::d.bytes_freed > (size_t(1) << 28); freed.pop_front()) {
    std::free(freed.front().first);
    standin::d.bytes_freed -= freed.front().second;
  }
}
EXPORT int standin_devices() { return standin::cuInit(0) ? 0 : static_cast<int>(standin::d.cards.size()); }
EXPORT void standin_set_device(int device) {  // as cudaSetDevice: its primary context is the thread's
  standin::cuInit(0);
  standin::stack.assign(1, standin::d.primaries.at(device).get());
}
EXPORT void* standin_stream(int device) {
  standin::cuInit(0);
  const std::lock_guard<std::recursive_mutex> lock(standin::d.mutex);
  auto& all = standin::d.streams;
  all.emplace_back(new standin::StreamState{standin::d.primaries.at(device).get(), 100 + all.size(), false, {}});
  return all.back().get();
}
EXPORT void standin_capture(void* stream, int on) { static_cast<standin::StreamState*>(stream)->capturing = on; }
EXPORT int standin_record(void* stream, const std::function<void()>* work) {  // of torch's; whether it is captured
  if (!stream || !static_cast<standin::StreamState*>(stream)->capturing) return 0;
  static_cast<standin::StreamState*>(stream)->recorded.push_back(*work);
  return 1;
}
EXPORT int standin_replay(void* stream) {  // how many nodes the graph has
  auto& recorded = static_cast<standin::StreamState*>(stream)->recorded;
  for (const auto& work : recorded) work();
  return static_cast<int>(recorded.size());
}
EXPORT int standin_calls(const char* name) { return standin::d.calls[name]; }
EXPORT const char* standin_launched() {
  static std::string text;
  text.clear();
  for (const std::string& name : standin::d.launched) text += name + "\n";
  return text.c_str();
}
EXPORT const char* standin_report() { return standin::d.report.c_str(); }
