// dv from the two coefficient tables: dM = a^T t over the rows of an adapter, dv_i = <P'_i, dM>.
//
// A block sums kRowsPerChunk rows of one adapter; the last block of that adapter to finish adds the chunks up in order.
// Every sum is over a fixed set in a fixed order, so dv has the same bits on every run and every card.
#pragma once
#include "mixing.cuh"

namespace tinylora {

// dM[j, k] = sum_n a[n, j] t[n, k] over this thread's rows of the chunk that belong to the adapter.
template <int R>
__device__ __forceinline__ void outer_products(const VectorGradArguments& p, int chunk, int adapter,
                                               float (&sum)[R * R]) {
  const int end = min((chunk + 1) * kRowsPerChunk, p.rows);
  for (int n = chunk * kRowsPerChunk + threadIdx.x; n < end; n += kVectorGradThreads) {
    if (p.mixing.ids && adapter_of(p.mixing, n) != adapter) continue;
    const float *a = p.a + int64_t(n) * R, *t = p.t + int64_t(n) * R;
#pragma unroll
    for (int j = 0; j < R; ++j)
#pragma unroll
      for (int k = 0; k < R; ++k) sum[j * R + k] = fmaf(__ldg(a + j), __ldg(t + k), sum[j * R + k]);
  }
}

template <int R>
__global__ void __launch_bounds__(kVectorGradThreads) vector_grad_kernel(const VectorGradArguments p) {
  constexpr int RR = R * R, kGroup = RR < kWarp ? RR : kWarp;  // numbers that one call of warp_sums takes
  constexpr int kWarps = kVectorGradThreads / kWarp;
  TL_SHARED(float, sums, kWarps * RR);
  TL_SHARED(float, dM, RR);
  TL_SHARED(bool, last, 1);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int adapter = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  float* const partial = p.partial + int64_t(adapter) * p.chunks * RR;  // [chunks, R * R]

  float sum[RR] = {};
  outer_products<R>(p, chunk, adapter, sum);
#pragma unroll
  for (int g = 0; g < RR; g += kGroup) {
    float group[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group[i] = sum[g + i];
    const float total = warp_sums(group);
    if (lane < kGroup) sums[warp * RR + g + lane] = total;
  }
  __syncthreads();
  if (threadIdx.x < RR) partial[chunk * RR + threadIdx.x] = column_sum(sums + threadIdx.x, kWarps, RR);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // the block's partial sum is visible everywhere before its ticket is drawn
    last[0] = atomicAdd(p.tickets + adapter, 1u) + 1 == unsigned(p.chunks);
    __threadfence();  // and those of the blocks that drew before are visible here
  }
  __syncthreads();
  if (!last[0]) return;

  if (threadIdx.x < RR) {
    float total = 0.0f;
    for (int c = 0; c < p.chunks; ++c) total += __ldcg(partial + c * RR + threadIdx.x);
    dM[threadIdx.x] = total;
  }
  __syncthreads();
  // dv_i = <P'_i, dM>, or for LoRA-XS dv = P' * dM
  for (int i = threadIdx.x; i < p.mixing.numbers; i += kVectorGradThreads) {
    float total = 0.0f;
    if (p.mixing.elementwise) {
      total = p.mixing.projection[i] * dM[i];
    } else {
#pragma unroll
      for (int e = 0; e < RR; ++e) total = fmaf(p.mixing.projection[int64_t(i) * RR + e], dM[e], total);
    }
    p.dv[int64_t(adapter) * p.mixing.numbers + i] = total;
  }
}

}  // namespace tinylora
