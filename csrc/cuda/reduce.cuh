// Sums over lanes, warps and blocks, in a fixed order.
#pragma once
#include "tiles.h"
#include "port.h"

namespace tinylora {

// *p, said to be global memory wherever the pointer was kept.
template <class T>
__device__ __forceinline__ T& global(T* p) {
  __builtin_assume(__isGlobal(p));
  return *p;
}

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the lanes l, l + C, l + 2 C ... of a warp, in all of them.
template <int C>
__device__ __forceinline__ float sum_lanes_apart(float x) {
#pragma unroll
  for (int step = C; step < kWarp; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Sums each of C values (C a power of two up to 32) over the lanes of a warp; lane l returns the sum of value
// summed_by<C>(l). Lanes trade: one keeps one half of the values, its neighbour the other. About C + 5 - log2(C) shuffles,
// where summing the values one by one takes 5 C; in one order whatever C is, so that a row's bits do not depend on how many
// are summed beside it.
template <int C, int HALF = C / 2, int BIT = 1>
__device__ __forceinline__ float warp_sums(float (&x)[C]) {
  if constexpr (HALF == 0) {
    return sum_lanes_apart<C>(x[0]);
  } else {
    const bool upper = (threadIdx.x & BIT) != 0;
#pragma unroll
    for (int c = 0; c < HALF; ++c) {
      const float keep = upper ? x[c + HALF] : x[c];
      const float give = upper ? x[c] : x[c + HALF];
      x[c] = keep + __shfl_xor_sync(kAllLanes, give, BIT);
    }
    return warp_sums<C, HALF / 2, BIT * 2>(x);
  }
}
template <int C, int HALF = C / 2, int BIT = 1>
__device__ __forceinline__ int summed_by(int lane) {
  if constexpr (HALF == 0) {
    return 0;
  } else {
    return (lane & BIT ? HALF : 0) + summed_by<C, HALF / 2, BIT * 2>(lane);
  }
}

// The sum of one column of a [count, stride] table, top to bottom.
__device__ __forceinline__ float column_sum(const float* column, int count, int stride) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum += column[i * stride];
  return sum;
}

// dM [R, R] as the lanes of a warp hold it, and M: lane l holds entries l + 32 q; where there are fewer than 32, every R * R
// lanes repeat them.
template <int R>
struct Entries {
  static constexpr int count = (R * R + kWarp - 1) / kWarp;
  float value[count];

  // Row by row into one matrix.
  __device__ __forceinline__ void store(float* matrix) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int q = 0; q < count; ++q)
      if (q * kWarp + lane < R * R) matrix[q * kWarp + lane] = value[q];
  }
};

}  // namespace tinylora
