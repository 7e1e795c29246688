// What depends on the compiler of the kernels: NVRTC or nvcc for a GPU, a host compiler for the emulator of
// tests/sim/host. Everything else in the device code is plain CUDA C++ that all of them accept, without any header of
// CUDA's: a machine that has NVRTC alone compiles it.
#pragma once
#ifdef TINYLORA_EMULATE
#include "emulator.h"  // the same, in C++
#else
#define TL_SHARED(T, name, count) __shared__ T name[count]

namespace tinylora {

__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// To nearest even.
__device__ __forceinline__ unsigned short half_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

#if __CUDA_ARCH__ >= 800
#define TL_PAIRS  // two floats are rounded by one instruction, the second operand into the lower half
__device__ __forceinline__ unsigned half_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ unsigned bfloat16_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

}  // namespace tinylora
#endif
