// The rows of one team: loaded, multiplied with a factor, updated and stored, a packet at a time.
#pragma once
#include "element.cuh"
#include "kernel_arguments.h"
#include "tiles.h"

namespace tinylora {

// A team's rows of one side, in memory.
template <class T>
struct RowBlock {
  T* first;      // null: not written
  int64_t stride;
  int rows;      // fewer than the tile's, or none, at the end
  int features;
  const float* factor;
  int factor_stride;

  __device__ __forceinline__ RowBlock(Side side, int row, int rows)
      : first(side.rows ? static_cast<T*>(side.rows) + row * side.stride : nullptr),
        stride(side.stride), rows(rows), features(side.features), factor(side.factor), factor_stride(side.factor_stride) {}
};

// Where a thread is in a block of blockDim.y teams of blockDim.x threads. Nothing is kept in registers.
struct Place {
  static __device__ __forceinline__ int warps() { return blockDim.x / kWarp; }  // of a team
  static __device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }  // in it
  static __device__ __forceinline__ int teams() { return blockDim.y; }
  static __device__ __forceinline__ int team() { return threadIdx.y; }
  static __device__ __forceinline__ int rows(int left, int most) { return min(max(left, 0), most); }  // of the team's tile
};

template <class PLACE>
__device__ __forceinline__ int block_warp(const PLACE& place) { return place.team() * place.warps() + place.warp(); }
__device__ __forceinline__ int block_warps() { return blockDim.x * blockDim.y / kWarp; }
__device__ __forceinline__ int block_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int block_threads() { return blockDim.x * blockDim.y; }

// The stride of a factor, hidden from the compiler at each use: otherwise it keeps the addresses of all R rows of the
// factor from one packet to the next, and for R = 8 spills some.
__device__ __forceinline__ int hidden(int stride) {
  asm volatile("" : "+r"(stride));
  return stride;
}

// rows x vectors packets of one thread. From column `start` on a warp covers vectors * 32 consecutive packets of a row,
// and lane l holds packet l of each 32: its packets lie a constant step apart, so one address serves them all.
template <class T, int R, Tile TILE, class PLACE>
struct RowTile {
  static constexpr TileShape shape = kTileShape<TILE, sizeof(T)>;
  static constexpr int ROWS = shape.rows, V = shape.vectors, W = shape.width, kStep = kWarp * W;
  static constexpr bool kHeld = TILE == Tile::Few && R <= 2;  // the factor's packets are in registers too, read once
  static constexpr int kGroup = kHeld ? V : TILE == Tile::Few && R == 4 ? 2 : 1;  // packets whose factors are asked for at once
  PLACE place;
  Packet<T, W> packet[ROWS][V];
  float held[kHeld ? V : 1][R][W];

  explicit __device__ __forceinline__ RowTile(const PLACE& place) : place(place) {}

  __device__ __forceinline__ int span() const { return place.warps() * kWarp * V * W; }
  __device__ __forceinline__ int first_column(int start) const {
    return start + (place.warp() * V * kWarp + threadIdx.x % kWarp) * W;
  }

  __device__ __forceinline__ void load(const RowBlock<T>& block, int start) {
    const int first = first_column(start), left = block.features - first;
    const T* const source = block.first + first;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool inside = v * kStep < left;
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        packet[r][v] = inside && r < block.rows ? Packet<T, W>::load(source + r * block.stride + v * kStep)
                                                : Packet<T, W>::zero();
    }
    if constexpr (kHeld) load_factors<V>(block.factor + first, left, block.factor_stride, held);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) packet[r][v] = Packet<T, W>::zero();
  }

  // dot[r, j] += sum_c x[r, c] factor[j, c]
  __device__ __forceinline__ void dot(const RowBlock<T>& block, int start, float* dot) const {
    for_packets(block, start, [&](int v, const float(&u)[R][W]) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float x[W];
        packet[r][v].unpack(x);
#pragma unroll
        for (int j = 0; j < R; ++j)
#pragma unroll
          for (int w = 0; w < W; ++w) dot[r * R + j] = fmaf(x[w], u[j][w], dot[r * R + j]);
      }
    });
  }

  // x[r, c] + bias[c] + sum_j gains[r, j] factor[j, c], rounded once, and stored. Bit r R of `bare`: row r has no adapter,
  // and without a bias keeps its bits.
  __device__ __forceinline__ void add_and_store(const RowBlock<T>& block, int start, const T* bias, const float* gains,
                                                unsigned bare) const {
    const int first = first_column(start), left = block.features - first;
    T* const target = block.first + first;
    for_packets(block, start, [&](int v, const float(&u)[R][W]) {
      const bool inside = v * kStep < left;
      float b[W] = {};
      if (bias && inside) Packet<T, W>::load(bias + first + v * kStep).unpack(b);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float x[W];
        packet[r][v].unpack(x);
#pragma unroll
        for (int w = 0; w < W; ++w) x[w] = bias ? x[w] + b[w] : x[w];
#pragma unroll
        for (int j = 0; j < R; ++j)
#pragma unroll
          for (int w = 0; w < W; ++w) x[w] = fmaf(gains[r * R + j], u[j][w], x[w]);
        const Packet<T, W> out = (bare >> r * R & 1) && !bias ? packet[r][v] : Packet<T, W>::pack(x);
        if (inside && r < block.rows) out.store(target + r * block.stride + v * kStep);
      }
    });
  }

 private:
  // use(v, the factor's packet v), a group of packets at a time.
  template <class Use>
  __device__ __forceinline__ void for_packets(const RowBlock<T>& block, int start, const Use& use) const {
    const int first = first_column(start), left = block.features - first;
#pragma unroll
    for (int g = 0; g < V; g += kGroup) {
      if (g * kStep >= left) continue;
      if constexpr (kHeld) {
#pragma unroll
        for (int v = 0; v < V; ++v) use(v, held[v]);
      } else {
        float u[kGroup][R][W];
        load_factors<kGroup>(block.factor + first + g * kStep, left - g * kStep, hidden(block.factor_stride), u);
#pragma unroll
        for (int i = 0; i < kGroup && g + i < V; ++i) use(g + i, u[i]);
      }
    }
  }

  template <int COUNT>
  static __device__ __forceinline__ void load_factors(const float* factor, int left, int stride, float (&u)[COUNT][R][W]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j) load_factor(factor + int64_t(j) * stride + i * kStep, i * kStep < left, u[i][j]);
  }
};

}  // namespace tinylora
