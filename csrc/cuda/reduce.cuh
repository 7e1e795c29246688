// Sums over a warp in a fixed order.
#pragma once
#include "launch_plan.h"
#include "port.h"

namespace tinylora {

constexpr unsigned kAllLanes = 0xffffffffu;

// Lanes that differ in bit HALF of their number trade values: one keeps the upper half of them, the other the lower.
template <int HALF, int C>
__device__ __forceinline__ void trade_halves(float (&x)[C]) {
  if constexpr (HALF >= 1) {
    const bool upper = (threadIdx.x & HALF) != 0;
#pragma unroll
    for (int c = 0; c < HALF; ++c) {
      const float keep = upper ? x[c + HALF] : x[c];
      const float give = upper ? x[c] : x[c + HALF];
      x[c] = keep + __shfl_xor_sync(kAllLanes, give, HALF);
    }
    trade_halves<HALF / 2>(x);
  }
}

// Sums each of C values (C a power of two up to 32) over the lanes of a warp; lane l returns the sum of value l % C.
// About C + 5 - log2(C) shuffles, where summing the values one by one takes 5 C.
template <int C>
__device__ __forceinline__ float warp_sums(float (&x)[C]) {
  trade_halves<C / 2>(x);
#pragma unroll
  for (int step = C; step < kWarp; step *= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], step);
  return x[0];
}

// The sum of one column of a [count, stride] table, top to bottom.
__device__ __forceinline__ float column_sum(const float* column, int count, int stride) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < count; ++i) sum += column[i * stride];
  return sum;
}

}  // namespace tinylora
