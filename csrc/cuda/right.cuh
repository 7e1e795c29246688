// B^T = U^T W kept beside a weight that somebody may write into unseen (through weight.data): compared at each use on a
// sample of the weight, computed again where that differs. One launch, no synchronisation, so that graphs can hold it.
//
// A block has 64 columns of W, 256 samples of them in as many bands of rows, and nothing to do with other blocks.
#pragma once
#include "element.cuh"
#include "kernel_arguments.h"
#include "reduce.cuh"

namespace tinylora {

// The bits of a sample, of one element in the thread's band of rows; columns by the golden ratio.
template <class T>
__device__ __forceinline__ unsigned sample_of(const RightArguments& p, int first) {
  const unsigned golden = 0x9e3779b9u * threadIdx.x;
  const int64_t row = (int64_t(threadIdx.x) * p.rows + (uint64_t(golden) * p.rows >> 32)) / kRightThreads;
  const int column = min(first + static_cast<int>(golden >> 26), p.columns - 1);
  const T element = static_cast<const T*>(p.weight)[row * p.row_stride + column * p.column_stride];
  if constexpr (sizeof(T) == 4) {
    return bits_as<unsigned>(element);
  } else {
    return bits_as<unsigned short>(element);
  }
}

template <class T, int R>
__global__ void __launch_bounds__(kRightThreads) refresh_right_kernel(const RightArguments p) {
  constexpr int kWarps = kRightThreads / kWarp;
  TL_SHARED(float, sums, kWarps * R * kRightColumns);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, first = blockIdx.x * kRightColumns;
  unsigned* const kept = p.samples + blockIdx.x * kRightThreads + threadIdx.x;
  const unsigned sample = sample_of<T>(p, first);
  if (!__syncthreads_or(p.force || *kept != sample)) return;

  // B^T[j, c] = sum_d U^T[j, d] W[d, c], every eighth row a warp's
  float sum[R][2] = {};
#pragma unroll 4
  for (int d = warp; d < p.rows; d += kWarps) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = min(first + i * kWarp + lane, p.columns - 1);
      const float w = to_float(static_cast<const T*>(p.weight)[d * p.row_stride + column * p.column_stride]);
#pragma unroll
      for (int j = 0; j < R; ++j) sum[j][i] = fmaf(__ldg(p.basis + int64_t(j) * p.rows + d), w, sum[j][i]);
    }
  }
#pragma unroll
  for (int j = 0; j < R; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) sums[(warp * R + j) * kRightColumns + i * kWarp + lane] = sum[j][i];
  __syncthreads();
  for (int i = threadIdx.x; i < R * kRightColumns; i += kRightThreads) {
    const int column = first + i % kRightColumns;
    if (column < p.columns)
      p.right[int64_t(i / kRightColumns) * p.columns + column] = column_sum(sums + i, kWarps, R * kRightColumns);
  }
  __threadfence();  // B^T is visible everywhere before samples say so: another stream may take it at their word
  __syncthreads();
  *kept = sample;
}

}  // namespace tinylora
