// Sums of a handful of terms: accumulated in double, so that their error is that of one rounding to Acc.
#include "cpu/mixing.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tinylora::cpu {

UsedAdapters::UsedAdapters(const Arguments& call) {
  if (!call.ids.data) return;
  slots_.resize(call.ids.count);
  for (int64_t i = 0; i < call.ids.count; ++i) {
    const int64_t id = slots_[i] = call.ids[i];
    if (id < -1 || id >= call.adapters) {
      throw std::out_of_range("adapter_ids: expected -1 or an id below " + std::to_string(call.adapters) + ", found " +
                              std::to_string(id) + " at position " + std::to_string(i));
    }
  }
  call.adapters <= kMarked * call.ids.count ? mark(call.adapters) : sort();
  count = static_cast<int64_t>(adapters_.size());
}

void UsedAdapters::mark(int64_t adapters) {
  std::vector<int64_t> slot_of(adapters, -1);
  for (int64_t id : slots_) {
    if (id >= 0) slot_of[id] = 0;
  }
  for (int64_t id = 0; id < adapters; ++id) {
    if (slot_of[id] < 0) continue;
    slot_of[id] = static_cast<int64_t>(adapters_.size());
    adapters_.push_back(id);
  }
  for (int64_t& slot : slots_) {
    if (slot >= 0) slot = slot_of[slot];
  }
}

void UsedAdapters::sort() {
  for (int64_t id : slots_) {
    if (id >= 0) adapters_.push_back(id);
  }
  std::sort(adapters_.begin(), adapters_.end());
  adapters_.erase(std::unique(adapters_.begin(), adapters_.end()), adapters_.end());
  for (int64_t& slot : slots_) {
    if (slot >= 0) slot = std::lower_bound(adapters_.begin(), adapters_.end(), slot) - adapters_.begin();
  }
}

namespace {

// sum[e] = sum_i v_i P'_i[e], e < square. The sums run side by side, each in the order of i: one alone would wait for
// every addition. Square: r r where it is known, else 0.
template <int Square, class Acc>
void contract_one(const Acc* v, const Acc* projection, int64_t u, int64_t square, double* sum) {
  if constexpr (Square > 0) square = Square;
  double local[Square > 0 ? Square : 1];  // in registers
  double* s = Square > 0 ? local : sum;
  std::fill_n(s, square, 0.0);
  for (int64_t i = 0; i < u; ++i, projection += square) {
    for (int64_t e = 0; e < square; ++e) s[e] += double(v[i]) * projection[e];
  }
  if (Square > 0) std::copy_n(s, square, sum);
}

// dv_i += <P'_i, dM>, i < u; each sum in the order of e.
template <int Square, class Acc>
void contract_backward_one(const double* d_mixing, const Acc* projection, int64_t u, int64_t square, Acc* dv) {
  if constexpr (Square > 0) square = Square;
  for (int64_t i = 0; i < u; ++i, projection += square) {
    double sum = 0;
    for (int64_t e = 0; e < square; ++e) sum += projection[e] * d_mixing[e];
    dv[i] += static_cast<Acc>(sum);
  }
}

}  // namespace

template <class Acc>
void contract(const Arguments& call, const UsedAdapters& used, bool transposed, Acc* mixing) {
  const int64_t r = call.rank, u = call.numbers, square = r * r;
  const Acc* projection = static_cast<const Acc*>(call.projection);
  const auto one = r == 1 ? contract_one<1, Acc> : r == 2 ? contract_one<4, Acc> : contract_one<0, Acc>;
  Scratch<double, 64> sum(square);
  for (int64_t s = 0; s < used.count; ++s, mixing += square) {
    const Acc* v = static_cast<const Acc*>(call.v) + used.adapter(s) * u;
    if (call.elementwise) {
      for (int64_t e = 0; e < square; ++e) sum[e] = double(projection[e]) * v[e];
    } else {
      one(v, projection, u, square, sum.data());
    }
    for (int64_t e = 0; e < square; ++e) {
      mixing[transposed ? e % r * r + e / r : e] = static_cast<Acc>(sum[e]);
    }
  }
}

template <class Acc>
void contract_backward(const Arguments& call, const UsedAdapters& used, const double* d_mixing, Acc* all_dv) {
  const int64_t r = call.rank, u = call.numbers, square = r * r;
  const Acc* projection = static_cast<const Acc*>(call.projection);
  const auto one = r == 1   ? contract_backward_one<1, Acc>
                   : r == 2 ? contract_backward_one<4, Acc>
                            : contract_backward_one<0, Acc>;
  for (int64_t s = 0; s < used.count; ++s, d_mixing += square) {
    Acc* dv = all_dv + used.adapter(s) * u;
    if (call.elementwise) {
      for (int64_t i = 0; i < u; ++i) dv[i] += static_cast<Acc>(projection[i] * d_mixing[i]);
    } else {
      one(d_mixing, projection, u, square, dv);
    }
  }
}

namespace {

template <int R, class Acc>
void add_outer_products_fixed(const Acc* a, const Acc* t, int64_t begin, int64_t end, double* d_mixing) {
  double sum[R * R] = {};
  for (int64_t n = begin; n < end; ++n) {
    for (int j = 0; j < R; ++j) {
      for (int k = 0; k < R; ++k) sum[j * R + k] += double(a[n * R + j]) * t[n * R + k];
    }
  }
  for (int e = 0; e < R * R; ++e) d_mixing[e] += sum[e];
}

}  // namespace

template <class Acc>
void add_outer_products(const Acc* a, const Acc* t, int64_t rank, int64_t begin, int64_t end, double* d_mixing) {
  switch (rank) {
    case 1: return add_outer_products_fixed<1>(a, t, begin, end, d_mixing);
    case 2: return add_outer_products_fixed<2>(a, t, begin, end, d_mixing);
    case 4: return add_outer_products_fixed<4>(a, t, begin, end, d_mixing);
    case 8: return add_outer_products_fixed<8>(a, t, begin, end, d_mixing);
  }
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t k = 0; k < rank; ++k) d_mixing[j * rank + k] += double(a[n * rank + j]) * t[n * rank + k];
    }
  }
}

template void contract<float>(const Arguments&, const UsedAdapters&, bool, float*);
template void contract<double>(const Arguments&, const UsedAdapters&, bool, double*);
template void contract_backward<float>(const Arguments&, const UsedAdapters&, const double*, float*);
template void contract_backward<double>(const Arguments&, const UsedAdapters&, const double*, double*);
template void add_outer_products<float>(const float*, const float*, int64_t, int64_t, int64_t, double*);
template void add_outer_products<double>(const double*, const double*, int64_t, int64_t, int64_t, double*);

}  // namespace tinylora::cpu
