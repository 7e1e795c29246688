// The ops on the CPU, given checked arguments.
#pragma once

#include "common/arguments.h"

namespace tinylora::cpu {

// t = y0 U - c;  y = y0 + (t M^T) U^T.  t: Acc [N, r], out.  std::out_of_range for an id outside [-1, K), y untouched.
void update(const Arguments& call, void* t);

// a = g U;  g0 = g + (a M) U^T;  dv_i = <P'_i, a^T t>.  g0 [N, D] contiguous or null; dv: Acc [K, u] or null.
void update_backward(const Arguments& call, void* g0, void* dv);

// The same for every part of a fused projection, in one parallel region.  t: Acc [k, N, r], out;
// dv: Acc [G, K, u] or null, summed over the parts of a tie group;  g0 [N, D] contiguous or null.
void update_parts(const std::vector<Part>& parts, void* t);
void update_parts_backward(const std::vector<Part>& parts, int64_t features, void* g0, int64_t groups, void* dv);

// Around the product of a frozen linear layer.
// t = x B;  y = b + (t M^T) U^T, to which x W^T is to be added.
void low_rank(const Arguments& call, const OtherSide& y, void* t);
// a = g U;  dx += (a M) B^T where g W is in it, else dx = (a M) B^T, to which it is to be added;  dv as above.
void update_input_grad(const Arguments& call, const OtherSide& dx, bool add, void* dv);

}  // namespace tinylora::cpu
