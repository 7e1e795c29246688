// The two ways these kernels are compiled: by nvcc for a GPU, by a host compiler for the emulator of tests/sim/host.
// Everything else in this folder is plain CUDA C++ that both accept.
#pragma once
#ifdef TINYLORA_EMULATE
#include "emulator.h"  // defines the two macros below
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define TL_SHARED(T, name, count) __shared__ T name[count]
#define TL_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
