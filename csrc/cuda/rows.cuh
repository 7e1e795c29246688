// The kernel of both directions: a small projection of every row, and the row updated by it.
//
//     forward    t = y U - c     y  = y + (t M^T) U^T     in place
//     backward   a = g U         g0 = g + (a M) U^T       into g0, or not at all
//
// A block has blockDim.y teams of blockDim.x threads. A team holds the rows of a tile in registers between the dot
// products and the update, so that a row is read from memory once and written once.
#pragma once
#include "mixing.cuh"
#include "row_tile.cuh"

namespace tinylora {

// What one team keeps in shared memory.
struct Team {
  float* sums;     // [warps, rows * R] dot products, a line for each warp
  float* mixing;   // M [R, R], one for the block, or [rows, R, R] with adapter ids
  float* gain;     // [rows, R]
  int* held;       // [rows] whose M that is
  unsigned* bare;  // one bit for each row without an adapter
};

// Adapter ids: the team's first warp writes the M of each row, unless `held` says it is there already from the last
// tile. Returns the rows without an adapter, one bit each. An id out of range ends the launch.
template <int R, int ROWS>
__device__ __forceinline__ unsigned mix_rows(const RowsArguments& p, int row, const Team& team) {
  unsigned bare = 0;
#pragma unroll 1
  for (int r = 0; r < ROWS; ++r) {
    const int64_t id = row + r < p.rows ? adapter_of(p.mixing, row + r) : kBare;
    if (id < kBare || id >= p.mixing.adapters) __trap();
    if (id == kBare) bare |= 1u << r;
    if (id == kBare || id == team.held[r] || !p.target) continue;
    store_entries<R>(contract<R, 1>(p.mixing, p.mixing.v + id * p.mixing.numbers, 0, 1), team.mixing + r * R * R);
    __syncwarp();  // every lane has compared
    if (threadIdx.x == 0) team.held[r] = int(id);
  }
  __syncwarp();
  return bare;
}

// The team's first warp: lane l takes coefficient j = l % R of row r = l / R, writes it and turns it into a gain.
template <int R, int ROWS>
__device__ __forceinline__ void finish_rows(const RowsArguments& p, int row, const Team& team, unsigned bare) {
  constexpr int C = ROWS * R;
  const int lane = threadIdx.x % C, r = lane / R, j = lane % R;
  // t_j = sum_c y_c U[c, j] - c_j
  float t = column_sum(team.sums + lane, blockDim.x / kWarp, C);
  if (p.offset) t -= p.offset[j];
  if (p.coefficients && threadIdx.x < C && row + r < p.rows) p.coefficients[int64_t(row + r) * R + j] = t;
  if (!p.target) return;
  // forward: gain_j = sum_k M[j, k] t_k      backward: gain_j = sum_k M[k, j] a_k
  const float* M = team.mixing + (p.mixing.ids ? r * R * R : 0);
  float gain = 0.0f;
#pragma unroll
  for (int k = 0; k < R; ++k) {
    const float t_k = __shfl_sync(kAllLanes, t, r * R + k);
    if (!(bare >> r & 1)) gain = fmaf(p.transposed ? M[k * R + j] : M[j * R + k], t_k, gain);
  }
  if (threadIdx.x < C) team.gain[lane] = gain;
  if (threadIdx.x == 0) *team.bare = bare;
}

template <class T, int R, Tile TILE>
__global__ void __launch_bounds__(kTileShape<TILE, sizeof(T)>.threads, 1) rows_kernel(const RowsArguments p) {
  constexpr TileShape shape = kTileShape<TILE, sizeof(T)>;
  constexpr int ROWS = shape.rows, C = ROWS * R;
  TL_SHARED(float, sums, kWarp * (C > R * R ? C : R * R));
  TL_SHARED(float, mixing, kMaxTeams * ROWS * R * R);
  TL_SHARED(float, gain, kMaxTeams * C);
  TL_SHARED(int, held, kMaxTeams * ROWS);
  TL_SHARED(unsigned, bare, kMaxTeams);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, index = threadIdx.y;
  const Team team = {sums + index * (blockDim.x / kWarp) * C, mixing + (p.mixing.ids ? index * ROWS * R * R : 0),
                     gain + index * C, held + index * ROWS, bare + index};

  const int thread = (blockIdx.x * blockDim.y + index) * blockDim.x + threadIdx.x;
  for (int i = thread; i < p.ticket_count; i += gridDim.x * blockDim.y * blockDim.x) p.tickets[i] = 0;
  if (threadIdx.x < ROWS) team.held[threadIdx.x] = kBare;
  if (p.target && !p.mixing.ids) contract_block<R>(p.mixing, sums, mixing);
  __syncthreads();

  for (int i = 0; i < p.tiles_per_block; ++i) {
    const int first = (blockIdx.x * p.tiles_per_block + i) * blockDim.y * ROWS;  // row of the block's first team
    if (first >= p.rows) break;
    const int row = first + index * ROWS;
    const RowBlock<T> block = row_block<T>(p, row);
    RowTile<T, R, TILE> tile;
    float dot[C] = {};
    int start = 0;
    do {
      tile.load(block, start);
      tile.dot(p.basis, p.columns, start, dot);
      start += tile.span();
    } while (!shape.resident && start < p.columns);

    const float sum = warp_sums(dot);
    if (lane < C) team.sums[warp * C + lane] = sum;
    const unsigned bare_rows = p.mixing.ids && warp == 0 ? mix_rows<R, ROWS>(p, row, team) : 0;
    __syncthreads();
    if (warp == 0) finish_rows<R, ROWS>(p, row, team, bare_rows);
    __syncthreads();
    if (!p.target) continue;

    start = 0;
    do {
      if (!shape.resident) tile.load(block, start);
      tile.add_and_store(block, p.basis, start, team.gain, *team.bare);
      start += tile.span();
    } while (!shape.resident && start < p.columns);
  }
}

}  // namespace tinylora
