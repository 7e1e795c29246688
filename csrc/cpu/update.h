// The ops on the CPU, given checked arguments.
#pragma once

#include "common/arguments.h"

namespace tinylora::cpu {

// t = y0 U - c;  y = y0 + (t M^T) U^T.  t: Acc [N, r], out.  std::out_of_range for an id outside [-1, K), y untouched.
void update(const Arguments& call, void* t);

// a = g U;  g0 = g + (a M) U^T;  dv_i = <P'_i, a^T t>.  g0 [N, D] contiguous or null; dv: Acc [K, u] or null.
void update_backward(const Arguments& call, void* g0, void* dv);

// a = g U;  dx += (a M) B^T;  dv_i = <P'_i, a^T t>: the same past the frozen weight, for dx = g W. dv as above.
void update_input_grad(const Arguments& call, const InputGrad& dx, void* dv);

}  // namespace tinylora::cpu
