// Host side of the CUDA backend: one call of each op, given raw device pointers. No allocation and no synchronisation.
#pragma once
#include "kernel_arguments.h"
#include "launch_plan.h"
#include "port.h"

namespace tinylora {

enum class Element : int { Float32, BFloat16, Float16 };

inline int element_bytes(Element element) { return element == Element::Float32 ? 4 : 2; }
inline bool supported_rank(int64_t rank) { return rank == 1 || rank == 2 || rank == 4 || rank == 8; }

// The kernels of one element type (rows_*.cu), and the one that turns coefficients into dv (vector_grad.cu).
template <class T>
void launch_rows(int rank, const Plan& plan, const RowsArguments& arguments, cudaStream_t stream);
void launch_vector_grad(int rank, const VectorGradArguments& arguments, cudaStream_t stream);

// Scratch that run_update_backward needs when it computes dv, in 4-byte words.
int64_t workspace_words(int rank, int64_t rows, int64_t adapters);

// One launch. `arguments` without tiles_per_block, which the plan decides.
void run_update(Element element, int rank, RowsArguments arguments, cudaStream_t stream);

// One launch, and a second one for dv unless that is null. `arguments` without coefficients and tickets, which lie in
// the workspace; target is null where no input gradient is wanted.
void run_update_backward(Element element, int rank, RowsArguments arguments, const float* t, float* dv, void* workspace,
                         cudaStream_t stream);

}  // namespace tinylora
