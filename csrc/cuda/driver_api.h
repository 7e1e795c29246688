// The part of NVIDIA's cuda.h that is used, as CUDA 12.0 has it: its functions by name and signature. They are found at
// run time, so that one library loads beside any driver and any CUDA, and where there is none.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tinylora::driver {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int kVersion = 12000;             // of the functions: 1000 * major + 10 * minor
constexpr const char* kOldestDriver = "525";  // that has them

using Result = int;  // CUresult and other enumerations
using Ordinal = int;  // CUdevice
using Address = unsigned long long;  // CUdeviceptr
using Context = struct ContextOfDriver*;
using Library = struct LibraryOfDriver*;
using KernelHandle = struct KernelOfDriver*;  // CUkernel: of no context; cuLaunchKernel takes it for a CUfunction
using Function = struct FunctionOfDriver*;
using StreamHandle = struct StreamOfDriver*;

constexpr Result kSuccess = 0;
enum Attribute : int { kMultiprocessors = 16, kMajor = 75, kMinor = 76 };  // CU_DEVICE_ATTRIBUTE_*
enum CaptureStatus : int { kNotCapturing = 0 };                             // CU_STREAM_CAPTURE_STATUS_*
enum CaptureMode : int { kRelaxed = 2 };                                    // CU_STREAM_CAPTURE_MODE_*

// F(name, parameters)
#define TINYLORA_DRIVER_FUNCTIONS(F)                                                                                 \
  F(cuInit, (unsigned flags))                                                                                        \
  F(cuGetErrorName, (Result error, const char** text))                                                               \
  F(cuGetErrorString, (Result error, const char** text))                                                             \
  F(cuDeviceGet, (Ordinal* device, int ordinal))                                                                     \
  F(cuDeviceGetAttribute, (int* value, int attribute, Ordinal device))                                               \
  F(cuDevicePrimaryCtxRetain, (Context* context, Ordinal device))                                                    \
  F(cuCtxGetCurrent, (Context* context))                                                                             \
  F(cuCtxGetDevice, (Ordinal* device))                                                                               \
  F(cuCtxPushCurrent, (Context context))                                                                             \
  F(cuCtxPopCurrent, (Context* context))                                                                             \
  F(cuStreamIsCapturing, (StreamHandle stream, int* status))                                                         \
  F(cuStreamGetId, (StreamHandle stream, unsigned long long* id))                                                    \
  F(cuThreadExchangeStreamCaptureMode, (int* mode))                                                                  \
  F(cuLibraryLoadData, (Library* library, const void* image, int* jit_options, void** jit_values, unsigned jit_count, \
                        int* options, void** values, unsigned count))                                                \
  F(cuLibraryGetKernel, (KernelHandle* kernel, Library library, const char* name))                                   \
  F(cuLibraryGetGlobal, (Address* address, size_t* bytes, Library library, const char* name))                        \
  F(cuKernelGetFunction, (Function* function, KernelHandle kernel))                                                  \
  F(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int* blocks, Function function, int threads, size_t shared))       \
  F(cuLaunchKernel, (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,         \
                     unsigned block_y, unsigned block_z, unsigned shared, StreamHandle stream, void** parameters,    \
                     void** extra))                                                                                  \
  F(cuMemsetD32Async, (Address address, unsigned value, size_t count, StreamHandle stream))

// Finds each of them: cuGetProcAddress_v2, itself of CUDA 12.0.
using GetProcAddress = Result (*)(const char* name, void** function, int version, uint64_t flags, int* found);

}  // namespace tinylora::driver
