// Host side of the CUDA backend: the launches of an op, given raw device pointers. No allocation and no synchronisation.
#pragma once
#include "kernel_arguments.h"
#include "launch_plan.h"
#include "port.h"

namespace tinylora {

enum class Element : int { Float32, BFloat16, Float16 };

inline int element_bytes(Element element) { return element == Element::Float32 ? 4 : 2; }
inline bool supported_rank(int64_t rank) { return rank == 1 || rank == 2 || rank == 4 || rank == 8; }

// The kernels of one element type (rows_*.cu), and the one that turns the coefficients of a bank's rows into dv.
using RowsKernel = void (*)(RowsArguments);
template <class T>
RowsKernel rows_kernel_of(int rank, Tile tile, bool ids);
void launch_bank_grad(int rank, int blocks, const BankGradArguments& arguments, cudaStream_t stream);

// The launch on the current device of what `arguments` describe.
LaunchPlan plan_rows(Element element, int rank, const RowsArguments& arguments);

// `arguments` without the shares of the blocks, which follow from the plan.
void run_rows(Element element, int rank, const LaunchPlan& plan, RowsArguments arguments, cudaStream_t stream);

// The same and dv, from t [N, R], in the same launch; with adapter ids in a second one. `arguments` without what only dv
// needs; its target is null where no gradient of the input is wanted. `scratch` has as many 4-byte words as scratch_words says.
void run_rows_and_gradient(Element element, int rank, const LaunchPlan& plan, RowsArguments arguments, const float* t,
                           float* dv, float* scratch, cudaStream_t stream);
int64_t scratch_words(int rank, const LaunchPlan& plan, const RowsArguments& arguments);

// One launch; `samples` has a row for every kRightColumns columns.
void run_refresh_right(Element element, int rank, const RightArguments& arguments, cudaStream_t stream);

}  // namespace tinylora
