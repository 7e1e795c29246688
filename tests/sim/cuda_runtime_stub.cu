// The package's own launchers on a CUDA runtime without a GPU: what they launch goes to a callback instead.
//
// nvcc compiles csrc/cuda unmodified, so grid, block, kernel and arguments are what a GPU would get. Compiled once per
// element type (-DTINYLORA_ELEMENT, a number of enum class Element).
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "launch.h"

// Only the element type asked for is compiled.
#define ABSENT(T) \
  template <>     \
  RowsKernel rows_kernel_of<T>(int, Tile, bool) { std::abort(); }
namespace tinylora {
#if TINYLORA_ELEMENT != 0
ABSENT(float)
#endif
#if TINYLORA_ELEMENT != 1
ABSENT(__nv_bfloat16)
#endif
#if TINYLORA_ELEMENT != 2
ABSENT(__half)
#endif
}  // namespace tinylora

#include "bank_grad.cu"
#include "launch.cu"
#include "right.cu"
#if TINYLORA_ELEMENT == 0
#include "rows_f32.cu"
#elif TINYLORA_ELEMENT == 1
#include "rows_bf16.cu"
#else
#include "rows_f16.cu"
#endif

#ifndef __CUDA_ARCH__  // the runtime lives on the host
namespace {
using Callback = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                          void** arguments);
Callback on_launch = nullptr;
int card[2] = {2, 2};  // multiprocessors, and blocks that each of them runs at once
struct Configuration { dim3 grid, block; size_t shared; cudaStream_t stream; } pending;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
}  // namespace

extern "C" {
// What nvcc's generated code calls to register kernels and to launch one.
void** __cudaRegisterFatBinary(void*) { static void* handle = nullptr; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<cudaStream_t*>(stream) = pending.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const unsigned grids[] = {grid.x, grid.y, grid.z}, blocks[] = {block.x, block.y, block.z};
  on_launch(kernels()[kernel].c_str(), grids, blocks, shared, arguments);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  memset(data, value, bytes);
  return cudaSuccess;
}

// What launch.cu asks of the runtime, for the card that the tests describe.
cudaError_t cudaGetDevice(int* device) {
  *device = 99;  // none whose numbers are remembered
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = card[0];
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = card[1];
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 1;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = const_cast<void*>(symbol);
  return cudaSuccess;
}

// What the tests call: one op, as csrc/cuda/ops.cu. `scratch` is allocated by the caller, as many words as are asked for.
void simulate_card(int multiprocessors, int resident) {
  card[0] = multiprocessors;
  card[1] = resident;
}
void simulate_on_launch(Callback callback) { on_launch = callback; }
int64_t simulate_scratch_words(int element, int rank, const tinylora::RowsArguments* p) {
  const auto plan = tinylora::plan_rows(static_cast<tinylora::Element>(element), rank, *p);
  return tinylora::scratch_words(rank, plan, *p);
}
void simulate_rows(int element, int rank, const tinylora::RowsArguments* p, const float* t, float* dv, float* scratch,
                   int capturing) {
  const auto stream = reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(capturing));
  const auto kind = static_cast<tinylora::Element>(element);
  const auto plan = tinylora::plan_rows(kind, rank, *p);
  if (dv) {
    tinylora::run_rows_and_gradient(kind, rank, plan, *p, t, dv, scratch, stream);
  } else {
    tinylora::run_rows(kind, rank, plan, *p, stream);
  }
}
void simulate_refresh_right(int element, int rank, const tinylora::RightArguments* p) {
  tinylora::run_refresh_right(static_cast<tinylora::Element>(element), rank, *p, nullptr);
}
}
#endif
