// The launches of an op, given raw device pointers. No allocation and no synchronisation.
#pragma once
#include "device.h"
#include "kernel_arguments.h"
#include "launch_plan.h"

namespace tinylora {

// The launch of what `arguments` describe.
LaunchPlan plan_rows(const Device& device, Element element, int rank, const RowsArguments& arguments);

// `arguments` without the shares of the blocks, which follow from the plan.
void run_rows(const Device& device, Element element, int rank, const LaunchPlan& plan, RowsArguments arguments,
              Stream stream);

// The same and dv, from t [N, R], in the same launch; with adapter ids in a second one. `arguments` without what only dv
// needs; its target is null where no gradient of the input is wanted. `scratch` has as many 4-byte words as
// scratch_words says.
void run_rows_and_gradient(const Device& device, Element element, int rank, const LaunchPlan& plan,
                           RowsArguments arguments, const float* t, float* dv, float* scratch, Stream stream);
int64_t scratch_words(int rank, const LaunchPlan& plan, const RowsArguments& arguments);

// The same for the parts of a fused projection: the launch, written into the arguments as well; coefficients [k, N, R]
// where they are given, t [k, N, R], dv [G, K, u].
LaunchPlan plan_parts(const Device& device, Element element, int rank, PartsArguments& arguments);
void run_parts(const Device& device, Element element, int rank, const LaunchPlan& plan, const PartsArguments& arguments,
               Stream stream);
void run_parts_and_gradient(const Device& device, Element element, int rank, const LaunchPlan& plan,
                            PartsArguments& arguments, const float* t, float* dv, float* scratch, Stream stream);
int64_t scratch_words(int rank, const LaunchPlan& plan, const PartsArguments& arguments);

// One launch; `samples` has a row for every kRightColumns columns.
void run_refresh_right(const Device& device, Element element, int rank, const RightArguments& arguments, Stream stream);

}  // namespace tinylora
