// Prologue (M), one parallel region over rows, epilogue (dv).
#include "cpu/update.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/mixing.h"

namespace tinylora::cpu {
namespace {

// Work is shared out, and dM summed, in chunks of this many rows: fixed, so that no sum depends on the thread count.
constexpr int64_t kChunkRows = 16;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 15;

// A buffer on the stack for the usual sizes, on the heap beyond; contents undefined.
template <class T, size_t Small>
class Scratch {
 public:
  explicit Scratch(size_t size) : heap_(size > Small ? new T[size] : nullptr) {}
  T* data() { return heap_ ? heap_.get() : stack_; }

 private:
  T stack_[Small];
  std::unique_ptr<T[]> heap_;
};

int64_t chunk_count(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

// body(first chunk, last chunk), in one parallel region or, for little work, on this thread.
//
// parallel_for gives the first thread the first half of the rows, and that is where the matrix product before it left
// them: by the latency of each cache line (2 threads, Zen 4) MKL's float32 products of 8 to 512 rows, oneDNN's bfloat16
// products of 128 and 512 rows 576 wide and torch's elementwise ops all divide their output so. oneDNN divides columns
// instead where rows are few for the width (8 x 576, 128 x 1536). To follow it there the threads would have to meet
// between s and y, and parallel_for does not promise that they run at the same time.
template <class Body>
void for_chunks(const Arguments& call, const Body& body) {
  const int64_t chunks = chunk_count(call.count);
  if (chunks <= 1 || call.count * call.width < kSerialElements) {
    body(0, chunks);
  } else {
    torch::stable::parallel_for(0, chunks, 1, body);
  }
}

// A fresh block this large comes from the system a page at a time, each page an interrupt and zeroed as it is first
// written: several times the cost of the update. In pages of 2 MB it is a fraction of that. A wish, not a need:
// whatever the system answers, the result is the same.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t least = size_t{4} << 20, page = size_t{1} << 12;
  if (bytes < least) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class Acc>
void update_as(const Arguments& call, void* t) {
  const UsedAdapters used(call);
  Scratch<Acc, 64> mixing(used.count * call.rank * call.rank);  // M [S, r, r]
  contract<Acc>(call, used, /*transposed=*/false, mixing.data());
  RowsJob job{};
  job.src = job.addend = job.dst = call.rows;
  job.src_stride = job.addend_stride = job.dst_stride = call.stride;
  job.width = job.dst_width = call.width;
  job.rank = call.rank;
  job.basis = job.factor = call.basis;
  job.offset = call.offset;
  job.mixing = mixing.data();
  job.slot_of_id = used.slots();
  job.rows_per_id = call.ids.rows_per_id;
  job.projected = t;
  Scratch<Acc, 1> scratch(is_specialised(call.rank) ? 0 : call.count * call.rank);
  job.scratch = scratch.data();
  const RowsKernel kernel = kernels().rows[static_cast<int>(call.dtype)];
  for_chunks(call, [&](int64_t first, int64_t last) {
    kernel(job, first * kChunkRows, std::min(last * kChunkRows, call.count));
  });
}

// What the backward pass adds (a M) F to, and F: g and U^T make g0, dx and B^T = U^T W make the rest of dx.
struct Target {
  const void* addend;  // g, or dx
  int64_t addend_stride;
  void* dst;           // g0, or dx; null: dv alone is wanted
  int64_t dst_stride;
  int64_t width;       // E
  const void* factor;  // Acc F [r, E]
};

template <class Acc>
void update_backward_as(const Arguments& call, const Target& target, void* dv) {
  const int64_t r = call.rank, square = r * r, chunks = chunk_count(call.count);
  const UsedAdapters used(call);
  Scratch<Acc, 64> mixing(used.count * square);  // M^T [S, r, r]
  contract<Acc>(call, used, /*transposed=*/true, mixing.data());
  Scratch<Acc, 512> projected(call.count * r);  // a [N, r]
  RowsJob job{};
  job.src = call.rows;
  job.src_stride = call.stride;
  job.width = call.width;
  job.basis = call.basis;
  job.addend = target.addend;
  job.addend_stride = target.addend_stride;
  job.dst = target.dst;
  job.dst_stride = target.dst_stride;
  job.dst_width = target.width;
  job.factor = target.factor;
  job.rank = r;
  job.mixing = mixing.data();
  job.slot_of_id = used.slots();
  job.rows_per_id = call.ids.rows_per_id;
  job.projected = projected.data();
  Scratch<Acc, 1> scratch(is_specialised(r) ? 0 : call.count * r);
  job.scratch = scratch.data();
  const Acc* a = projected.data();
  const Acc* t = static_cast<const Acc*>(call.t);
  const bool by_chunk = dv && !call.ids.data;
  Scratch<double, 128> partial(by_chunk ? chunks * square : 0);  // dM of each chunk
  const RowsKernel kernel = kernels().rows[static_cast<int>(call.dtype)];
  for_chunks(call, [&](int64_t first, int64_t last) {
    kernel(job, first * kChunkRows, std::min(last * kChunkRows, call.count));
    for (int64_t c = first; by_chunk && c < last; ++c) {
      double* d_mixing = partial.data() + c * square;
      std::fill_n(d_mixing, square, 0.0);
      add_outer_products(a, t, r, c * kChunkRows, std::min((c + 1) * kChunkRows, call.count), d_mixing);
    }
  });
  if (!dv) return;

  std::vector<double> d_mixing(used.count * square, 0.0);  // dM [S, r, r]
  for (int64_t c = 0; by_chunk && c < chunks; ++c) {
    for (int64_t e = 0; e < square; ++e) d_mixing[e] += partial.data()[c * square + e];
  }
  for (int64_t i = 0; i < call.ids.count; ++i) {
    const int64_t begin = i * call.ids.rows_per_id, end = begin + call.ids.rows_per_id;
    const int64_t slot = used.slots()[i];
    if (slot >= 0) add_outer_products(a, t, r, begin, end, d_mixing.data() + slot * square);
  }
  contract_backward<Acc>(call, used, d_mixing.data(), static_cast<Acc*>(dv));
}

}  // namespace

void update(const Arguments& call, void* t) {
  call.dtype == Dtype::float64 ? update_as<double>(call, t) : update_as<float>(call, t);
}

void update_backward(const Arguments& call, void* g0, void* dv) {
  constexpr size_t bytes_of[] = {4, 2, 2, 8};  // by Dtype
  if (g0) prefer_huge_pages(g0, call.count * call.width * bytes_of[static_cast<int>(call.dtype)]);
  const Target target{call.rows, call.stride, g0, call.width, call.width, call.basis};
  call.dtype == Dtype::float64 ? update_backward_as<double>(call, target, dv)
                               : update_backward_as<float>(call, target, dv);
}

void update_input_grad(const Arguments& call, const InputGrad& dx, void* dv) {
  const Target target{dx.rows, dx.stride, dx.rows, dx.stride, dx.width, dx.right};
  call.dtype == Dtype::float64 ? update_backward_as<double>(call, target, dv)
                               : update_backward_as<float>(call, target, dv);
}

}  // namespace tinylora::cpu
