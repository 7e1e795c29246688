// What the kernels are given: plain structures, passed by value, shared with the host code and the simulators.
#pragma once
#include <cstdint>

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

struct RowsArguments {
  const void* source;       // [N, D]
  void* target;             // [N, D]: the source itself, or null to leave the rows alone and only compute coefficients
  int64_t source_stride;    // from row to row, in elements
  int64_t target_stride;
  int32_t rows;             // N
  int32_t columns;          // D
  int32_t tiles_per_block;
  int32_t ticket_count;
  const float* basis;       // [R, D]
  const float* offset;      // [R], or null
  float* coefficients;      // t or a  [N, R], or null
  uint32_t* tickets;        // [ticket_count], set to zero on the way for the kernel that follows
  Mixing mixing;
  bool transposed;          // gain = coefficients M instead of coefficients M^T
};

struct VectorGradArguments {
  const float* a;           // [N, R]
  const float* t;           // [N, R]
  float* partial;           // [K, chunks, R * R]
  uint32_t* tickets;        // [K], zero
  float* dv;                // [u] or [K, u]
  int32_t rows;             // N
  int32_t chunks;
  Mixing mixing;            // v is not used
};

}  // namespace tinylora
