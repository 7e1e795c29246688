// The ops on NVIDIA GPUs, given checked arguments: kernels on torch's current stream of the device.
#pragma once

#include "common/arguments.h"

namespace tinylora::cuda {

// As cpu/update.h has them, but for an id outside [-1, K): nobody waits for the GPU to look at ids, and one ends the
// launch that meets it (rows.cuh). The call has returned by then; CUDA's error comes from a later one, and the process
// has lost the GPU.
void update(const Arguments& call, void* t);
void update_backward(const Arguments& call, void* g0, void* dv, const Scratch& scratch);
void update_parts(const std::vector<Part>& parts, void* t);
void update_parts_backward(const std::vector<Part>& parts, int64_t features, void* g0, int64_t groups, void* dv,
                           const Scratch& scratch);
void low_rank(const Arguments& call, const OtherSide& y, void* t);
void update_input_grad(const Arguments& call, const OtherSide& dx, bool add, void* dv, const Scratch& scratch);

// B^T = U^T W where samples of W say that it is another, or by force.
void refresh_right(const KeptRight& kept, bool force);

}  // namespace tinylora::cuda
