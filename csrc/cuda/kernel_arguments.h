// What the kernels are given: plain structures, passed by value, shared with the host code and the simulators.
#pragma once
#include "integers.h"

namespace tinylora {

// M = sum_i v_i P'_i  [R, R], or M = v * P' for LoRA-XS, and whose v a row uses.
struct Mixing {
  const float* v;           // [u], or [K, u] with adapter ids
  const float* projection;  // [u, R, R], or [R, R] where elementwise
  const void* ids;          // [N / rows_per_id] int32 or int64; null: every row uses the one v
  int32_t rows_per_id;
  int32_t adapters;         // K
  int32_t numbers;          // u
  bool elementwise;         // LoRA-XS
  bool wide_ids;            // int64
};

// Rows on one side of the frozen layer, and the singular factor of that side.
struct Side {
  void* rows;           // [N, features]
  int64_t stride;       // from row to row, in elements
  const float* factor;  // [R, features]: U^T or B^T
  int32_t features;     // D or E
  int32_t factor_stride;  // from row to row of the factor: features, but for a part of a wider one
};

// What the term of rank r is added to.
enum class Onto : int32_t { Source, Target, Nothing };

struct RowsArguments {
  Side source;          // multiplied with its factor: the coefficients
  Side target;          // is given the gains times its factor; rows null: nothing is written
  Onto onto;            // Source: both sides have the same factor
  int32_t rows;         // N
  int32_t share;        // rows of a block, and one more for each of the first `longer` blocks
  int32_t longer;
  const void* bias;     // [features of the target], or null
  const float* offset;  // [R], or null
  float* coefficients;  // t or a [N, R], written; or null
  const float* t;       // [N, R], for dM = a^T t; or null
  float* partial;       // dM of each block [blocks, R * R], where t is given
  uint32_t* ticket;     // zero before the launch and after it, where t is given
  float* dv;            // [u], written where t is given
  float* cleared;       // [cleared_count] set to zero on the way for the kernel that follows; or null
  int64_t cleared_count;
  Mixing mixing;
  bool transposed;      // gains = a M instead of t M^T
  bool only_finite;     // elements that are not finite count as zero in the coefficients
  int32_t warps;        // of a team, in a launch of several parts
};

constexpr int kMaxParts = 16;  // of one launch: 4 KB of arguments

// Several calls in one launch, each over rows of its own: the parts of a fused projection.
struct PartsArguments {
  RowsArguments part[kMaxParts];       // partial, ticket, dv and cleared are those of the launch in all of them
  int32_t first_block[kMaxParts + 1];  // of each part, and the end
  int32_t group[kMaxParts];            // tie group: whose dv
  int32_t parts;                       // k
  int32_t groups;                      // G
};

struct BankGradArguments {
  const float* a;            // [k, N, R]
  const float* t;            // [k, N, R]
  float* dv;                 // [G, K, u]; zero where there are more adapters than ids
  int32_t rows;              // N
  int32_t ids;               // B
  int32_t parts;             // k: 1 but for a fused projection, whose P' is [k, u, R, R]
  int32_t group[kMaxParts];  // tie group of each part
  Mixing mixing;             // v is not used
};

struct RightArguments {
  const void* weight;     // W [D, E], any strides
  int64_t row_stride, column_stride;
  const float* basis;     // U^T [R, D]
  float* right;           // B^T [R, E], as it was computed last
  uint32_t* samples;      // [blocks, 256] of the W that it was computed from
  int32_t rows, columns;  // D, E
  bool force;             // it was never computed
};

}  // namespace tinylora
