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
  void launch_rows<T>(int, const Plan&, const RowsArguments&, cudaStream_t) { std::abort(); }
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

#include "launch.cu"
#include "vector_grad.cu"
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

// What the tests call.
void simulate_on_launch(Callback callback) { on_launch = callback; }
void simulate_update(int element, int rank, const tinylora::RowsArguments* p) {
  tinylora::run_update(static_cast<tinylora::Element>(element), rank, *p, nullptr);
}
void simulate_update_backward(int element, int rank, const tinylora::RowsArguments* p, const float* t, float* dv,
                              void* workspace) {
  tinylora::run_update_backward(static_cast<tinylora::Element>(element), rank, *p, t, dv, workspace, nullptr);
}
int64_t simulate_workspace_words(int rank, int64_t rows, int64_t adapters) {
  return tinylora::workspace_words(rank, rows, adapters);
}
}
#endif
