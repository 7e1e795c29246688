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
    if (id >= 0 && (adapters_.empty() || adapters_.back() != id)) adapters_.push_back(id);
  }
  std::sort(adapters_.begin(), adapters_.end());
  adapters_.erase(std::unique(adapters_.begin(), adapters_.end()), adapters_.end());
  count = static_cast<int64_t>(adapters_.size());
  for (int64_t& slot : slots_) {
    if (slot >= 0) slot = std::lower_bound(adapters_.begin(), adapters_.end(), slot) - adapters_.begin();
  }
}

template <class Acc>
void contract(const Arguments& call, const UsedAdapters& used, bool transposed, Acc* mixing) {
  const int64_t r = call.rank, u = call.trained, square = r * r;
  const Acc* projection = static_cast<const Acc*>(call.projection);
  for (int64_t s = 0; s < used.count; ++s, mixing += square) {
    const Acc* v = static_cast<const Acc*>(call.v) + used.adapter(s) * u;
    for (int64_t row = 0; row < r; ++row) {
      for (int64_t column = 0; column < r; ++column) {
        const int64_t e = row * r + column;
        double sum = 0;
        if (call.elementwise) {
          sum = double(projection[e]) * v[e];
        } else {
          for (int64_t i = 0; i < u; ++i) sum += double(v[i]) * projection[i * square + e];
        }
        mixing[transposed ? column * r + row : e] = static_cast<Acc>(sum);
      }
    }
  }
}

template <class Acc>
void contract_backward(const Arguments& call, const UsedAdapters& used, const double* d_mixing, Acc* all_dv) {
  const int64_t u = call.trained, square = call.rank * call.rank;
  const Acc* projection = static_cast<const Acc*>(call.projection);
  if (used.count < call.adapters) std::fill_n(all_dv, call.adapters * u, Acc(0));
  for (int64_t s = 0; s < used.count; ++s, d_mixing += square) {
    Acc* dv = all_dv + used.adapter(s) * u;
    for (int64_t i = 0; i < u; ++i) {
      if (call.elementwise) {
        dv[i] = static_cast<Acc>(projection[i] * d_mixing[i]);
        continue;
      }
      double sum = 0;
      for (int64_t e = 0; e < square; ++e) sum += projection[i * square + e] * d_mixing[e];
      dv[i] = static_cast<Acc>(sum);
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
