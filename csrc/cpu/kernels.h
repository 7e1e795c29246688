// What a kernel needs to know about a call, and the table that each instruction set fills with its kernels.
#pragma once

#include <cstdint>

namespace tinylora::cpu {

// 16-bit floating point numbers as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// One pass over rows, both directions of the method, s being their coefficients and z their gains:
//     s = x U - c        z = s K^T        dst = addend + bias + z F
// forward:    x = y0, s = t, K = M,   addend = dst = x (in place),  F = U^T;
// backward:   x = g,  s = a, K = M^T, c = 0,  addend = g, dst = g0, F = U^T;
// and around the product of a frozen linear layer, B^T = U^T W:
// forward:    U = B, c = 0,  addend = bias,  F = U^T;
// backward:   x = g,  s = a, K = M^T, c = 0,  addend = 0, dst = dx, F = B^T.
// Acc is double for float64 rows, float otherwise.
struct RowsJob {
  const void* src;      // x [N, D]
  int64_t src_stride;   // elements between row starts
  int64_t features;     // D
  const void* basis;    // Acc U^T [r, D]
  int64_t basis_stride; // elements between its rows
  const void* addend;   // [N, E], or null for zero
  int64_t addend_stride;  // 0: one row for all
  const void* bias;     // [E], or null for zero; only beside an addend
  void* dst;            // [N, E]: the addend itself, disjoint from it, or null: s alone is wanted
  int64_t dst_stride;
  int64_t dst_features; // E
  const void* factor;   // Acc F [r, E]
  int64_t factor_stride;
  int64_t rank;         // r
  const void* offset;   // Acc c [r], or null for zero
  const void* mixing;   // Acc K [S, r, r], one for each adapter in use
  const int64_t* slot_of_id;  // [B] index into mixing, or -1: dst = addend for these rows; null: every row has adapter 0
  int64_t rows_per_id;  // row n has id n / rows_per_id
  void* coefficients;   // Acc s [N, r], out
  void* gains;          // Acc z [N, r], scratch; null for ranks 1, 2, 4 and 8, which keep it in registers
  bool finite_only;     // elements of x that are not finite count as zero in s
};

// The ranks with a kernel of their own.
inline bool is_specialised(int64_t rank) { return rank == 1 || rank == 2 || rank == 4 || rank == 8; }

// Rows [begin, end). A row's result depends on that row alone, not on its neighbours, the range or the thread.
using RowsKernel = void (*)(const RowsJob& job, int64_t begin, int64_t end);

// Both products of rows of W with vectors x, float32 sums:  Y = W X^T,  S = Y^T W  (subspace.py).
struct ProductsJob {
  const void* rows;      // W [N, D]
  int64_t stride;        // elements between row starts
  int64_t count;         // N
  int64_t width;         // D
  const float* x;        // X [p, D]
  int64_t vectors;       // p, a multiple of 4
  float* y;              // Y [N, p], out
  float* sums;           // S [p, padded width], zero at first, out; beyond D undefined
  int64_t padded_width;  // D and what makes it a multiple of kProductsStep
};

constexpr int64_t kProductsTile = 16;  // rows that are still in cache for the second product
constexpr int64_t kProductsStep = 32;

using ProductsKernel = void (*)(const ProductsJob& job);

struct Kernels {
  const char* isa;
  RowsKernel rows[4];              // indexed by Dtype: float32, bfloat16, float16, float64
  const ProductsKernel* products;  // the same, without float64; null where torch's own products are faster
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
void avx512_bf16_rows(const RowsJob& job, int64_t begin, int64_t end);  // bfloat16 rows on AVX-512 BF16
#elif defined(__aarch64__)
const Kernels& neon_kernels();
void neon_bf16_rows(const RowsJob& job, int64_t begin, int64_t end);  // bfloat16 rows on Armv8.2 BF16
const Kernels& sve256_kernels();                                      // Linux alone
#endif

}  // namespace tinylora::cpu
