// The r x r side of the method: the mixing matrix M from the trained numbers, and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/arguments.h"

namespace tinylora::cpu {

// A buffer on the stack for the usual sizes, on the heap beyond; contents undefined.
template <class T, size_t Small>
class Scratch {
 public:
  explicit Scratch(size_t size) : heap_(size > Small ? new T[size] : nullptr) {}
  T* data() { return heap_ ? heap_.get() : stack_; }
  T& operator[](size_t i) { return data()[i]; }

 private:
  T stack_[Small];
  std::unique_ptr<T[]> heap_;
};

// The adapters that the rows of one call belong to. A table of a million vectors costs what its used rows cost.
class UsedAdapters {
 public:
  // Throws std::out_of_range (IndexError in Python) for an id outside [-1, K).
  explicit UsedAdapters(const Arguments& call);

  int64_t count = 1;                                                                   // S; without ids, adapter 0
  int64_t adapter(int64_t slot) const { return adapters_.empty() ? 0 : adapters_[slot]; }  // slot -> row of v
  // The slot of each id, [B], -1 for the bare base; null where the call has no ids.
  const int64_t* slots() const { return slots_.empty() ? nullptr : slots_.data(); }

 private:
  // Up to this many adapters for each id, a pass over all of them is cheaper than sorting the ids.
  static constexpr int64_t kMarked = 4;
  void mark(int64_t adapters);
  void sort();

  std::vector<int64_t> adapters_;  // ascending
  std::vector<int64_t> slots_;
};

// M of each used adapter, [S, r, r]: sum_i v_i P'_i, or projection * v. `transposed` gives M^T.
template <class Acc>
void contract(const Arguments& call, const UsedAdapters& used, bool transposed, Acc* mixing);

// dv [K, u] += of the dM of each used adapter, [S, r, r]: <P'_i, dM>, or projection * dM.
template <class Acc>
void contract_backward(const Arguments& call, const UsedAdapters& used, const double* d_mixing, Acc* dv);

// dM += a^T t over rows [begin, end), in row order. a, t [N, r]; d_mixing [r, r].
template <class Acc>
void add_outer_products(const Acc* a, const Acc* t, int64_t rank, int64_t begin, int64_t end, double* d_mixing);

}  // namespace tinylora::cpu
