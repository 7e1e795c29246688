// The kernel of all four ops: the coefficients of every row on one side of the frozen layer, and a term of rank R made of
// them for a row of the same or of the other side.
//
//     update              t = y0 U - c    y  = y0 + b + (t M^T) U^T      in place
//     update_backward     a = g U         g0 = g + (a M) U^T             into g0, or not at all
//     low_rank            t = x B         y  = b + (t M^T) U^T
//     update_input_grad   a = g U         dx (+)= (a M) B^T
//
// and, backward, dM = a^T t and dv_i = <P'_i, dM>.
//
// A block has blockDim.y teams of blockDim.x threads. A team takes the rows of a tile at a time; where it updates the rows
// that it read, they stay in registers, read from memory once and written once. One barrier a tile: every warp finishes
// the coefficients for itself.
#pragma once
#include "mixing.cuh"
#include "row_tile.cuh"

namespace tinylora {

// Adapter ids: warp w of a team writes the M of its rows w, w + warps, ... into `mixing` [ROWS, R, R], unless `held` says
// it is there already from two tiles ago. An id out of range ends the launch: update.h.
template <int R, int ROWS, class PLACE>
__device__ __forceinline__ void mix_rows(const RowsArguments& p, const PLACE& place, int row, int rows, float* mixing,
                                         int* held) {
#pragma unroll 1
  for (int r = place.warp(); r < ROWS && r < rows; r += place.warps()) {
    const int64_t id = adapter_of(p.mixing, row + r);
    if (id < kBare || id >= p.mixing.adapters) __trap();
    if (id == kBare || id == held[r] || !p.target.rows) continue;
    contract<R, 1>(p.mixing, p.mixing.v + id * p.mixing.numbers, 0, 1).store(mixing + r * R * R);
    __syncwarp();  // every lane has compared
    if (threadIdx.x % kWarp == 0) held[r] = static_cast<int>(id);
  }
}

// The coefficients over the elements that are finite, an element at a time: where one in a thousand launches comes by.
// `sums` [warps, ROWS * R]; lane l returns coefficient l % R of row l / R.
template <class T, int R, int ROWS, class PLACE>
__device__ __forceinline__ float finite_coefficients(const RowBlock<T>& source, const PLACE& place, float* sums) {
  const int lane = threadIdx.x % kWarp, warp = place.warp();
#pragma unroll 1
  for (int r = 0; r < ROWS; ++r) {
    float dot[R] = {};
#pragma unroll 1
    for (int c = warp * kWarp + lane; c < source.features && r < source.rows; c += place.warps() * kWarp) {
      const float x = to_float(load_element(source.first + r * source.stride + c));
      if (!is_finite(x)) continue;
#pragma unroll
      for (int j = 0; j < R; ++j) dot[j] = fmaf(x, __ldg(source.factor + int64_t(j) * source.factor_stride + c), dot[j]);
    }
    const float sum = warp_sums(dot);
    if (lane < R) sums[(warp * ROWS + r) * R + summed_by<R>(lane)] = sum;
  }
  __syncthreads();
  return column_sum(sums + lane % (ROWS * R), place.warps(), ROWS * R);
}

// dM[j, k] += sum_r a[r, j] t[r, k], from lanes that hold coefficient l % R of row l / R.
template <int R, int ROWS>
__device__ __forceinline__ void add_outer_products(float a, float t, Entries<R>& dM) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int q = 0; q < Entries<R>::count; ++q) {
      const int e = (threadIdx.x % kWarp + q * kWarp) % (R * R);
      const float a_j = __shfl_sync(kAllLanes, a, r * R + e / R);
      dM.value[q] = fmaf(a_j, __shfl_sync(kAllLanes, t, r * R + e % R), dM.value[q]);
    }
  }
}

// Whether this block is the last of the grid to leave its dM, the sum of those of its teams, in `partial` [blocks, R * R].
template <int R, class PLACE>
__device__ __forceinline__ bool leave_block_gradient(const RowsArguments& p, const PLACE& place, const Entries<R>& team_dM,
                                                     float* sums, bool* last) {
  constexpr int RR = R * R;
  const int thread = block_thread();
  __syncthreads();  // nobody reads the sums of the last tile any more
  if (place.warp() == 0 && place.team() < place.teams()) team_dM.store(sums + place.team() * RR);
  __syncthreads();
  if (thread < RR) global(p.partial + blockIdx.x * RR + thread) = column_sum(sums + thread, place.teams(), RR);
  __syncthreads();  // the block's dM is written
  if (thread == 0) {
    __threadfence();  // the block's dM is visible everywhere before its ticket is drawn
    *last = gridDim.x == 1 || atomicInc(p.ticket, gridDim.x - 1) == gridDim.x - 1;  // the last one leaves it at zero
    __threadfence();  // and those of the blocks that drew before are visible here
  }
  __syncthreads();
  return *last;
}

// dM [R, R] of the blocks from `first` to `end`, added up by all threads of one: the same sums in the same order whichever
// block it is. `sums` [GROUPS, R * R] and `dM` are in shared memory.
template <int R, int GROUPS>
__device__ __forceinline__ void sum_blocks(const float* partial, int first, int end, float* sums, float* dM) {
  constexpr int RR = R * R;
  static_assert(GROUPS >= kMaxTeams, "room for the dM of every team");
  const int thread = block_thread(), entry = thread % RR, group = thread / RR;
  const int groups = min(block_threads() / RR, GROUPS);
  float sum = 0.0f;
#pragma unroll 8
  for (int i = first + group; group < groups && i < end; i += groups) sum += __ldcg(partial + i * RR + entry);
  if (group < groups) sums[thread] = sum;
  __syncthreads();
  if (thread < RR) {
    float total = 0.0f;
    for (int g = 0; g < groups; ++g) total += sums[g * RR + thread];
    dM[thread] = total;
  }
  __syncthreads();
}

// Blocks of a multiprocessor at once, at least, which bounds the registers of a thread: 80 for three of 256 threads.
TL_BOTH constexpr int blocks_at_once(Tile tile, int element_bytes, int rank, bool ids) {
#ifdef __CUDA_ARCH__
  constexpr int kArchitecture = __CUDA_ARCH__;
#else
  constexpr int kArchitecture = 0;
#endif
  if (element_bytes == 4 || tile == Tile::Few || rank == 8) return 1;
  if (tile == Tile::Long) return kArchitecture >= (ids ? 1000 : 900) && rank <= 2 ? 2 : 1;
  return kArchitecture < 1000 && rank <= 2 ? 3 : 2;  // from sm_100 on two sums are one instruction on pairs of registers
}

// Floats of shared memory for the sums of a block: of two tiles, and as many for finite_coefficients.
template <class T, int R, Tile TILE>
constexpr int kSums = 3 * kMaxWarps * kTileShape<TILE, sizeof(T)>.rows * R;

// The rows of block `block` of those that share them out, and what its teams sum of dM.
template <class T, int R, Tile TILE, bool IDS, class PLACE>
__device__ __forceinline__ void pass_rows(const RowsArguments& p, const PLACE& place, int block, float* sums,
                                          Entries<R>& team_dM) {
  constexpr TileShape shape = kTileShape<TILE, sizeof(T)>;
  constexpr int ROWS = shape.rows, C = ROWS * R, RR = R * R;
  static_assert(C <= kWarp, "a lane for every coefficient of a tile");
  // Two tiles are under way at once: a warp may write for the next one what another still reads for this one.
  TL_SHARED(float, mixing, IDS ? 2 * kMaxTeams * C * R : kMaxWarps * RR);  // [2, teams, ROWS] M; or a share of M each warp
  TL_SHARED(int, held, IDS ? 2 * kMaxTeams * ROWS : 1);                    // [2, teams, ROWS] whose M that is
  const int warps = place.warps(), warp = place.warp(), team = place.team(), lane = threadIdx.x % kWarp;
  const int r = lane % C / R, j = lane % R;                   // lane l has coefficient j of row r
  const int begin = block * p.share + min(block, p.longer), end = begin + p.share + (block < p.longer);
  float M[R] = {};  // row j of M; transposed: column j
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
       i < p.cleared_count; i += int64_t(gridDim.x) * blockDim.y * blockDim.x)
    global(p.cleared + i) = 0.0f;
  if constexpr (IDS) {
    for (int i = block_thread(); i < 2 * kMaxTeams * ROWS; i += block_threads()) held[i] = kBare;
    __syncthreads();
  }

  for (int first = begin, half = 0; first < end; first += place.teams() * ROWS, half ^= 1) {
    const int row = first + team * ROWS, rows = place.rows(end - row, ROWS);
    const RowBlock<T> source(p.source, row, rows);
    RowTile<T, R, TILE, PLACE> tile(place);
    if constexpr (shape.resident) tile.load(source, 0);
    const float t = !IDS && p.t && r < rows ? __ldg(p.t + int64_t(row + r) * R + j) : 0.0f;
    // M = sum_i v_i P'_i, while the rows are on their way
    float* const matrices = mixing + (half * kMaxTeams + team) * C * R;  // [ROWS, R, R]
    if constexpr (IDS) {
      mix_rows<R, ROWS>(p, place, row, rows, matrices, held + (half * kMaxTeams + team) * ROWS);
    } else if (first == begin) {
      contract<R, 4>(p.mixing, p.mixing.v, block_warp(place), block_warps()).store(mixing + block_warp(place) * RR);
    }

    // t = y U - c
    float dot[C] = {};
    if constexpr (shape.resident) {
      tile.dot(source, 0, dot);
    } else {
#pragma unroll 1
      for (int start = 0; start < source.features; start += tile.span()) {
        tile.load(source, start);
        tile.dot(source, start, dot);
      }
    }
    const float sum = warp_sums(dot), offset = p.offset ? __ldg(p.offset + j) : 0.0f;
    float* const team_sums = sums + (half * kMaxWarps + team * warps) * C;  // [warps, C]
    if (lane < C) team_sums[warp * C + summed_by<C>(lane)] = sum;
    const bool unsound = __syncthreads_or(p.only_finite && !is_finite(sum));
    float coefficient = column_sum(team_sums + lane % C, warps, C);
    if (unsound) {
      const float finite = finite_coefficients<T, R, ROWS>(source, place, sums + (2 * kMaxWarps + team * warps) * C);
      const unsigned mask = __ballot_sync(kAllLanes, !is_finite(coefficient));
      if (mask >> r * R & ((1u << R) - 1)) coefficient = finite;  // the other rows keep their bits
    }
    coefficient -= offset;
    if (p.coefficients && warp == 0 && lane < C && r < rows) global(p.coefficients + int64_t(row + r) * R + j) = coefficient;
    if constexpr (!IDS) {
      if (p.t && warp == 0) add_outer_products<R, ROWS>(coefficient, t, team_dM);
    }
    if (!p.target.rows) continue;

    // forward: gain_j = sum_k M[j, k] t_k      backward: gain_j = sum_k M[k, j] a_k
    const int corner = p.transposed ? j : j * R, step = p.transposed ? R : 1;  // of the entries of M that the gain takes
    bool bare = false;
    if constexpr (IDS) {
      bare = r >= rows || adapter_of(p.mixing, row + r) == kBare;
#pragma unroll
      for (int k = 0; k < R; ++k) M[k] = bare ? 0.0f : matrices[r * RR + corner + k * step];
    } else if (first == begin) {
#pragma unroll
      for (int k = 0; k < R; ++k) M[k] = column_sum(mixing + corner + k * step, block_warps(), RR);
    }
    float gain = 0.0f, gains[C];
#pragma unroll
    for (int k = 0; k < R; ++k) gain = fmaf(M[k], __shfl_sync(kAllLanes, coefficient, r * R + k), gain);
#pragma unroll
    for (int i = 0; i < C; ++i) gains[i] = __shfl_sync(kAllLanes, bare ? 0.0f : gain, i);
    const unsigned bare_lanes = IDS ? __ballot_sync(kAllLanes, bare) : 0;

    // y = y0 + b + (t M^T) U^T
    const RowBlock<T> target(p.target, row, rows);
    const T* const bias = static_cast<const T*>(p.bias);
    if constexpr (shape.resident) {
      tile.add_and_store(target, 0, bias, gains, bare_lanes);
    } else {
      RowBlock<T> onto = target;
      if (p.onto == Onto::Source) onto.first = source.first, onto.stride = source.stride;
#pragma unroll 1
      for (int start = 0; start < target.features; start += tile.span()) {
        if (p.onto == Onto::Nothing) {
          tile.clear();
        } else {
          tile.load(onto, start);
        }
        tile.add_and_store(target, start, bias, gains, bare_lanes);
      }
    }
  }

}

template <class T, int R, Tile TILE, bool IDS>
__global__ void __launch_bounds__(kTileShape<TILE, sizeof(T)>.threads, blocks_at_once(TILE, sizeof(T), R, IDS))
    rows_kernel(const RowsArguments p) {
  constexpr int kSumsOfBlock = kSums<T, R, TILE>, RR = R * R;
  TL_SHARED(float, sums, kSumsOfBlock);
  TL_SHARED(float, dM, RR);
  TL_SHARED(bool, last, 1);
  Entries<R> team_dM{};
  pass_rows<T, R, TILE, IDS>(p, Place{}, blockIdx.x, sums, team_dM);
  if (IDS || !p.t) return;  // of a bank's rows, bank_grad_kernel
  if (!leave_block_gradient(p, Place{}, team_dM, sums, last)) return;
  sum_blocks<R, kSumsOfBlock / RR>(p.partial, 0, gridDim.x, sums, dM);
  contract_gradient<R>(p.mixing, dM, p.dv, /*adds=*/false, block_thread(), block_threads());
}

}  // namespace tinylora
