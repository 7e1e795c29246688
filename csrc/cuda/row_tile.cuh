// The rows of one team: loaded, multiplied with the basis, updated and stored, a packet at a time.
#pragma once
#include "kernel_arguments.h"
#include "element.cuh"
#include "launch_plan.h"

namespace tinylora {

// The rows from a team's first one to the end, in memory.
template <class T>
struct RowBlock {
  const T* source;
  T* target;                             // null: not written
  int64_t source_stride, target_stride;  // in elements
  int rows;                              // fewer than the tile's, or none, at the end
  int columns;                           // D
};

template <class T>
__device__ __forceinline__ RowBlock<T> row_block(const RowsArguments& p, int row) {
  T* const target = static_cast<T*>(p.target);
  return {static_cast<const T*>(p.source) + row * p.source_stride, target ? target + row * p.target_stride : nullptr,
          p.source_stride, p.target_stride, p.rows - row, p.columns};
}

// The stride of the basis, hidden from the compiler at each use: otherwise it keeps the addresses of all R rows of the
// basis from one packet to the next, and for R = 8 spills some.
__device__ __forceinline__ int hidden(int stride) {
  asm volatile("" : "+r"(stride));
  return stride;
}

// rows x vectors packets of one thread. From column `start` on a warp covers vectors * 32 consecutive packets of a row,
// and lane l holds packet l of each 32: its packets lie a constant step apart, so one address serves them all.
template <class T, int R, Tile TILE>
struct RowTile {
  static constexpr TileShape shape = kTileShape<TILE, sizeof(T)>;
  static constexpr int ROWS = shape.rows, W = shape.width, kStep = kWarp * W;
  Packet<T, W> packet[ROWS][shape.vectors];

  static __device__ __forceinline__ int span() { return blockDim.x * shape.vectors * W; }
  static __device__ __forceinline__ int first_column(int start) {
    return start + (threadIdx.x / kWarp * shape.vectors * kWarp + threadIdx.x % kWarp) * W;
  }

  __device__ __forceinline__ void load(const RowBlock<T>& block, int start) {
    const int first = first_column(start), left = block.columns - first;
    const T* const source = block.source + first;
#pragma unroll
    for (int v = 0; v < shape.vectors; ++v) {
      const bool inside = v * kStep < left;
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        packet[r][v] = inside && r < block.rows ? Packet<T, W>::load(source + r * block.source_stride + v * kStep)
                                                : Packet<T, W>::zero();
    }
  }

  // dot[r, j] += sum_c x[r, c] basis[j, c]
  __device__ __forceinline__ void dot(const float* basis, int columns, int start, float* dot) const {
    const int first = first_column(start), left = columns - first;
    basis += first;
#pragma unroll
    for (int v = 0; v < shape.vectors; ++v) {
      if (v * kStep < left) {
        const int stride = hidden(columns);
        float x[ROWS][W];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) packet[r][v].unpack(x[r]);
#pragma unroll
        for (int j = 0; j < R; ++j) {
          float u[W];
          load_basis(basis + int64_t(j) * stride + v * kStep, u);
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int w = 0; w < W; ++w) dot[r * R + j] = fmaf(x[r][w], u[w], dot[r * R + j]);
        }
      }
    }
  }

  // x[r, c] += sum_j gain[r, j] basis[j, c], rounded once, and stored. Bit r of `bare`: row r keeps its bits.
  __device__ __forceinline__ void add_and_store(const RowBlock<T>& block, const float* basis, int start,
                                                const float* gain, unsigned bare) const {
    const int first = first_column(start), left = block.columns - first;
    basis += first;
    T* const target = block.target + first;
#pragma unroll
    for (int v = 0; v < shape.vectors; ++v) {
      if (v * kStep < left) {
        const int stride = hidden(block.columns);
        float x[ROWS][W];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) packet[r][v].unpack(x[r]);
#pragma unroll
        for (int j = 0; j < R; ++j) {
          float u[W];
          load_basis(basis + int64_t(j) * stride + v * kStep, u);
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int w = 0; w < W; ++w) x[r][w] = fmaf(gain[r * R + j], u[w], x[r][w]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const Packet<T, W> out = bare >> r & 1 ? packet[r][v] : Packet<T, W>::pack(x[r]);
          if (r < block.rows) out.store(target + r * block.target_stride + v * kStep);
        }
      }
    }
  }
};

}  // namespace tinylora
