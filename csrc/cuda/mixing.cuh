// The mixing matrix M = sum_i v_i P'_i  [R, R], or M = v * P' for LoRA-XS, its gradient, and whose v a row uses.
#pragma once
#include "kernel_arguments.h"
#include "reduce.cuh"

namespace tinylora {

constexpr int kBare = -1;  // the id of a row without an adapter

__device__ __forceinline__ int64_t id_at(const Mixing& m, int i) {
  return m.wide_ids ? global(static_cast<const int64_t*>(m.ids) + i) : global(static_cast<const int*>(m.ids) + i);
}
__device__ __forceinline__ int64_t adapter_of(const Mixing& m, int row) { return id_at(m, row / m.rows_per_id); }

// One of `warps` warps sums its share of M = sum_i v_i P'_i. The flat projection [u * R * R] is read once, in order;
// since R * R divides 32, or 32 divides it, a lane always meets the same entries.
template <int R, int UNROLL>
__device__ __forceinline__ Entries<R> contract(const Mixing& m, const float* v, int warp, int warps) {
  constexpr int count = Entries<R>::count;
  const int lane = threadIdx.x % kWarp;
  const int total = (m.elementwise ? 1 : m.numbers) * R * R;
  Entries<R> sum{};
#pragma unroll UNROLL
  for (int base = warp * kWarp * count; base < total; base += warps * kWarp * count) {
#pragma unroll
    for (int q = 0; q < count; ++q) {
      const int i = base + q * kWarp + lane;
      const int number = m.elementwise ? i : i / (R * R);
      if (i < total) sum.value[q] = fmaf(__ldg(v + number), __ldg(m.projection + i), sum.value[q]);
    }
  }
  if constexpr (R * R < kWarp) sum.value[0] = sum_lanes_apart<R * R>(sum.value[0]);
  return sum;
}

// dv_i = <P'_i, dM>, or for LoRA-XS dv = P' * dM, by all threads of the block; added to what is there, or not.
template <int R>
__device__ __forceinline__ void contract_gradient(const Mixing& m, const float* dM, float* dv, bool adds, int thread,
                                                  int threads) {
  for (int i = thread; i < m.numbers; i += threads) {
    float total = 0.0f;
    if (m.elementwise) {
      total = m.projection[i] * dM[i];
    } else {
#pragma unroll
      for (int e = 0; e < R * R; ++e) total = fmaf(m.projection[int64_t(i) * R * R + e], dM[e], total);
    }
    global(dv + i) = adds ? global(dv + i) + total : total;
  }
}

}  // namespace tinylora
