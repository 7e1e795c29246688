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
void for_chunks(int64_t rows, int64_t width, const Body& body) {
  const int64_t chunks = chunk_count(rows);
  if (chunks <= 1 || rows * width < kSerialElements) {
    body(0, chunks);
  } else {
    torch::stable::parallel_for(0, chunks, 1, body);
  }
}

// A fresh block this large comes from the system a page at a time, each page an interrupt and zeroed as it is first
// written: several times the cost of the update. In pages of 2 MB it is a fraction of that, once: malloc keeps the block
// for the next call. Beyond 32 MB (its DEFAULT_MMAP_THRESHOLD_MAX) it does not, and huge pages would be made anew at every
// call; a virtual machine that reports free ones to its host even has to get them back from there, slower than 4 KB ones.
// A wish, not a need: whatever the system answers, the result is the same.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t least = size_t{4} << 20, most = size_t{32} << 20, page = size_t{1} << 12;
  if (bytes < least || bytes > most) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// dst = addend + z F, the part of a job beyond the projection.
struct Target {
  const void* addend;      // [N, E], [1, E] with stride 0 (a bias), or null for zero
  int64_t addend_stride;
  const void* bias;        // [E] beside an addend, or null
  void* dst;               // [N, E]: the addend itself or disjoint from it; null: s alone is wanted
  int64_t dst_stride;
  int64_t features;        // E
  const void* factor;      // Acc F [r, E]
};

// M or M^T of every adapter in use, and the job that runs them over the rows; s goes to `coefficients`.
template <class Acc>
class Job {
 public:
  Job(const Arguments& call, const Target& target, const UsedAdapters& used, bool transposed, void* coefficients)
      : mixing_(used.count * call.rank * call.rank), gains_(is_specialised(call.rank) ? 0 : call.rows * call.rank) {
    contract<Acc>(call, used, transposed, mixing_.data());
    job_.src = call.activation;
    job_.src_stride = call.stride;
    job_.features = call.features;
    job_.basis = call.basis;
    job_.addend = target.addend;
    job_.addend_stride = target.addend_stride;
    job_.bias = target.bias;
    job_.dst = target.dst;
    job_.dst_stride = target.dst_stride;
    job_.dst_features = target.features;
    job_.factor = target.factor;
    job_.rank = call.rank;
    job_.offset = call.offset;
    job_.mixing = mixing_.data();
    job_.slot_of_id = used.slots();
    job_.rows_per_id = call.ids.rows_per_id;
    job_.coefficients = coefficients;
    job_.gains = gains_.data();
    job_.finite_only = target.dst == call.activation;  // y0; what is not finite in a gradient is nobody's to hide
  }
  Job(const Job&) = delete;  // job_ points into the others

  // after(first chunk, last chunk) once these are done, on the same thread.
  template <class After>
  void run(const Arguments& call, const After& after) {
    const RowsKernel kernel = kernels().rows[static_cast<int>(call.dtype)];
    for_chunks(call.rows, std::max(call.features, job_.dst_features), [&](int64_t first, int64_t last) {
      kernel(job_, first * kChunkRows, std::min(last * kChunkRows, call.rows));
      after(first, last);
    });
  }

 private:
  RowsJob job_{};
  Scratch<Acc, 64> mixing_;  // [S, r, r]
  Scratch<Acc, 1> gains_;
};

template <class Acc>
void forward_as(const Arguments& call, const Target& target, void* t) {
  const UsedAdapters used(call);
  Job<Acc> job(call, target, used, /*transposed=*/false, t);
  job.run(call, [](int64_t, int64_t) {});
}

template <class Acc>
void backward_as(const Arguments& call, const Target& target, void* dv) {
  const int64_t r = call.rank, square = r * r, chunks = chunk_count(call.rows);
  const UsedAdapters used(call);
  Scratch<Acc, 512> coefficients(call.rows * r);  // a [N, r]
  Job<Acc> job(call, target, used, /*transposed=*/true, coefficients.data());
  const Acc* a = coefficients.data();
  const Acc* t = static_cast<const Acc*>(call.t);
  const bool by_chunk = dv && !call.ids.data;
  Scratch<double, 128> partial(by_chunk ? chunks * square : 0);  // dM of each chunk
  job.run(call, [&](int64_t first, int64_t last) {
    for (int64_t c = first; by_chunk && c < last; ++c) {
      double* d_mixing = partial.data() + c * square;
      std::fill_n(d_mixing, square, 0.0);
      add_outer_products(a, t, r, c * kChunkRows, std::min((c + 1) * kChunkRows, call.rows), d_mixing);
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

void forward(const Arguments& call, const Target& target, void* t) {
  call.dtype == Dtype::float64 ? forward_as<double>(call, target, t) : forward_as<float>(call, target, t);
}

void backward(const Arguments& call, const Target& target, void* dv) {
  call.dtype == Dtype::float64 ? backward_as<double>(call, target, dv) : backward_as<float>(call, target, dv);
}

// Rows [N, width] without gaps that nothing has been written to yet.
void expect_writes(const Arguments& call, void* rows, int64_t stride, int64_t features) {
  constexpr size_t bytes_of[] = {4, 2, 2, 8};  // by Dtype
  if (rows && stride == features) prefer_huge_pages(rows, call.rows * features * bytes_of[static_cast<int>(call.dtype)]);
}

}  // namespace

void update(const Arguments& call, void* t) {
  const Target y{call.activation, call.stride, call.bias, call.activation, call.stride, call.features, call.basis};
  forward(call, y, t);
}

void update_backward(const Arguments& call, void* g0, void* dv) {
  expect_writes(call, g0, call.features, call.features);
  backward(call, {call.activation, call.stride, nullptr, g0, call.features, call.features, call.basis}, dv);
}

void low_rank(const Arguments& call, const OtherSide& y, void* t) {
  expect_writes(call, y.activation, y.stride, y.features);
  forward(call, {y.bias, 0, nullptr, y.activation, y.stride, y.features, y.factor}, t);
}

void update_input_grad(const Arguments& call, const OtherSide& dx, bool add, void* dv) {
  if (!add) expect_writes(call, dx.activation, dx.stride, dx.features);
  const void* const addend = add ? dx.activation : nullptr;
  backward(call, {addend, dx.stride, nullptr, dx.activation, dx.stride, dx.features, dx.factor}, dv);
}

}  // namespace tinylora::cpu
