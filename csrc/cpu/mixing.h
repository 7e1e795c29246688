// The r x r side of the method: the mixing matrix M from the trained numbers, and back.
#pragma once

#include <cstdint>
#include <vector>

#include "common/arguments.h"

namespace tinylora::cpu {

// M of each adapter, [K, r, r]: sum_i v_i P'_i, or projection * v. `transposed` gives M^T.
template <class Acc>
void contract(const Arguments& call, bool transposed, Acc* mixing);

// dv of each adapter from its dM, [K, r, r] -> [K, u]: <P'_i, dM>, or projection * dM.
template <class Acc>
void contract_backward(const Arguments& call, const double* d_mixing, Acc* dv);

// dM += a^T t over rows [begin, end), in row order. a, t [N, r]; d_mixing [r, r].
template <class Acc>
void add_outer_products(const Acc* a, const Acc* t, int64_t rank, int64_t begin, int64_t end, double* d_mixing);

}  // namespace tinylora::cpu
