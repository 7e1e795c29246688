// The mixing matrix M = sum_i v_i P'_i  [R, R], or M = v * P' for LoRA-XS, and which adapter a row belongs to.
#pragma once
#include "kernel_arguments.h"
#include "reduce.cuh"

namespace tinylora {

constexpr int kBare = -1;  // the id of a row without an adapter

__device__ __forceinline__ int64_t adapter_of(const Mixing& m, int row) {
  const int i = row / m.rows_per_id;
  return m.wide_ids ? static_cast<const int64_t*>(m.ids)[i] : static_cast<const int*>(m.ids)[i];
}

// The entries of M [R, R] that a lane holds: lane l those numbered l + 32 q; where M is smaller than a warp, every
// R * R lanes repeat them.
template <int R>
struct Entries {
  static constexpr int count = (R * R + kWarp - 1) / kWarp;
  float value[count];
};

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
#pragma unroll
  for (int step = R * R; step < kWarp; step *= 2) sum.value[0] += __shfl_xor_sync(kAllLanes, sum.value[0], step);
  return sum;
}

// Writes the entries of one matrix, [R, R] row by row.
template <int R>
__device__ __forceinline__ void store_entries(const Entries<R>& entries, float* matrix) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int q = 0; q < Entries<R>::count; ++q)
    if (q * kWarp + lane < R * R) matrix[q * kWarp + lane] = entries.value[q];
}

// All warps of the block together: matrix [R, R] in shared memory, scratch [warps, R * R]. The caller's next
// barrier makes it visible.
template <int R>
__device__ __forceinline__ void contract_block(const Mixing& m, float* scratch, float* matrix) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warp = thread / kWarp, warps = blockDim.x * blockDim.y / kWarp;
  store_entries<R>(contract<R, 4>(m, m.v, warp, warps), scratch + warp * R * R);
  __syncthreads();
  if (thread < R * R) matrix[thread] = column_sum(scratch + thread, warps, R * R);
}

}  // namespace tinylora
