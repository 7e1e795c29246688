// dv of a bank, from the two coefficient tables: dM = a^T t over the rows of an adapter, dv_i = <P'_i, dM>.
//
// One block sums all rows of an adapter, id by id, in a fixed order, and the parts of its tie group one after the other. Where there are more adapters than ids, a block is an
// id's, and only the first of an adapter sums: what the launch costs depends on the rows, not on the size of the bank.
#pragma once
#include "mixing.cuh"

namespace tinylora {

// dM[j, k] = sum_n a[n, j] t[n, k] over the thread's rows of the adapter: a group of threads takes an id, and each of them
// some of the id's rows.
template <int R>
__device__ __forceinline__ void outer_products(const BankGradArguments& p, int part, int64_t adapter,
                                               float (&sum)[R * R]) {
  const int rows = p.mixing.rows_per_id;
  int group = 1;  // threads
  while (group < rows && group < kBankThreads) group *= 2;
#pragma unroll 4
  for (int i = threadIdx.x / group; i < p.ids; i += kBankThreads / group) {
    if (id_at(p.mixing, i) != adapter) continue;
    for (int n = threadIdx.x % group; n < rows; n += group) {
      const int64_t row = int64_t(part) * p.rows + int64_t(i) * rows + n;
      const float *a = p.a + row * R, *t = p.t + row * R;
#pragma unroll
      for (int j = 0; j < R; ++j)
#pragma unroll
        for (int k = 0; k < R; ++k) sum[j * R + k] = fmaf(__ldg(a + j), __ldg(t + k), sum[j * R + k]);
    }
  }
}

template <int R>
__global__ void __launch_bounds__(kBankThreads, 1) bank_grad_kernel(const BankGradArguments p) {
  constexpr int RR = R * R, kGroup = RR < kWarp ? RR : kWarp;  // numbers that one call of warp_sums takes
  constexpr int kWarps = kBankThreads / kWarp;
  TL_SHARED(float, sums, kWarps * RR);
  TL_SHARED(float, dM, RR);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t adapter = blockIdx.x;
  if (p.mixing.adapters > p.ids) {
    adapter = id_at(p.mixing, blockIdx.x);
    bool found = adapter == kBare;
    for (int i = threadIdx.x; i < int(blockIdx.x); i += kBankThreads) found |= id_at(p.mixing, i) == adapter;
    if (__syncthreads_or(found)) return;  // nothing to sum, or an earlier block does
  }

  Mixing mixing = p.mixing;
  float* const dv = p.dv + (int64_t(blockIdx.y) * mixing.adapters + adapter) * mixing.numbers;
  for (int i = threadIdx.x; i < mixing.numbers; i += kBankThreads) dv[i] = 0.0f;
  for (int part = 0; part < p.parts; ++part) {
    if (p.group[part] != int(blockIdx.y)) continue;
    float sum[RR] = {};
    outer_products<R>(p, part, adapter, sum);
#pragma unroll
    for (int g = 0; g < RR; g += kGroup) {
      float group[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) group[i] = sum[g + i];
      const float total = warp_sums(group);
      if (lane < kGroup) sums[warp * RR + g + summed_by<kGroup>(lane)] = total;
    }
    __syncthreads();
    if (threadIdx.x < RR) dM[threadIdx.x] = column_sum(sums + threadIdx.x, kWarps, RR);
    __syncthreads();
    mixing.projection = p.mixing.projection + int64_t(part) * (mixing.elementwise ? 1 : mixing.numbers) * RR;
    contract_gradient<R>(mixing, dM, dv, /*adds=*/true, threadIdx.x, kBankThreads);
  }
}

}  // namespace tinylora
