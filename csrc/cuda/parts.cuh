// The rows kernel over several calls at once: update_parts and its backward pass in one launch.
//
//     t_p = y0_p U_p - c_p  or  x B_p    y_p = y0_p + b_p + (t_p M_p^T) U_p^T
//     a_p = g_p U_p                      g0_p = g_p + (a_p M_p) U_p^T          dv_i = sum_p <P'_{p,i}, a_p^T t_p>
//
// A block belongs to one part and takes rows of it as a block of the rows kernel does. Blocks are as long as the widest
// part wants them; of a narrower one they hold more teams.
#pragma once
#include "rows.cuh"

namespace tinylora {

// Teams of as many warps as the part says in a block of one row of threads. A warp left over is a team of its own that has
// no rows.
struct PartPlace {
  const RowsArguments& p;

  __device__ __forceinline__ int teams() const { return min(block_warps() / p.warps, kMaxTeams); }
  __device__ __forceinline__ bool left_over() const { return threadIdx.x / kWarp >= teams() * p.warps; }
  __device__ __forceinline__ int warps() const { return left_over() ? 1 : p.warps; }
  __device__ __forceinline__ int warp() const { return left_over() ? 0 : threadIdx.x / kWarp % p.warps; }
  __device__ __forceinline__ int team() const { return threadIdx.x / kWarp / warps(); }
  __device__ __forceinline__ int rows(int left, int most) const { return left_over() ? 0 : min(max(left, 0), most); }
};

// The part's arguments wait in shared memory: by a number that is known at run time alone they would fill registers.
template <class T, int R, Tile TILE, bool IDS>
__global__ void __launch_bounds__(kTileShape<TILE, sizeof(T)>.threads, 1)
    parts_kernel(const __grid_constant__ PartsArguments all) {
  constexpr int kSumsOfBlock = kSums<T, R, TILE>, RR = R * R, kWords = sizeof(RowsArguments) / sizeof(int);
  TL_SHARED(float, sums, kSumsOfBlock);
  TL_SHARED(float, dM, RR);
  TL_SHARED(bool, last, 1);
  TL_SHARED(RowsArguments, own, 1);
  const int thread = block_thread(), threads = block_threads();
  int part = 0;
  while (int(blockIdx.x) >= all.first_block[part + 1]) ++part;
  for (int i = thread; i < kWords; i += threads)
    reinterpret_cast<int*>(own)[i] = reinterpret_cast<const int*>(&all.part[part])[i];
  __syncthreads();
  const RowsArguments& p = *own;
  const PartPlace place{p};
  Entries<R> team_dM{};
  pass_rows<T, R, TILE, IDS>(p, place, blockIdx.x - all.first_block[part], sums, team_dM);
  if (IDS || !p.t) return;  // of a bank's rows, bank_grad_kernel
  if (!leave_block_gradient(p, place, team_dM, sums, last)) return;

  const int numbers = p.mixing.numbers;
  for (int g = 0; g < all.groups; ++g)
    for (int i = thread; i < numbers; i += threads) global(p.dv + g * numbers + i) = 0.0f;  // by the thread that adds to it
  for (int q = 0; q < all.parts; ++q) {
    sum_blocks<R, kSumsOfBlock / RR>(p.partial, all.first_block[q], all.first_block[q + 1], sums, dM);
    contract_gradient<R>(all.part[q].mixing, dM, p.dv + all.group[q] * numbers, /*adds=*/true, thread, threads);
  }
}

}  // namespace tinylora
