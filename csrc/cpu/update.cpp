// Prologue (M), one parallel region over rows, epilogue (dv).
#include "cpu/update.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <deque>
#include <optional>
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

int64_t chunk_count(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

// Beside other work a region's threads wait for a core, and its end for them: milliseconds for an update of microseconds. A
// wait longer than this thread alone would have taken says so, and for so many times its length updates of at most that
// size go without: of a crowded machine's time the attempts take 1 in so many, and a quiet one never comes here.
class Crowd {
 public:
  using Nanoseconds = std::chrono::nanoseconds;
  bool is_worth_waiting_for(int64_t elements) const {
    return elements > elements_.load(std::memory_order_relaxed) || now() >= until_.load(std::memory_order_relaxed);
  }
  // Whether the next region is to be measured: the clock of a thread takes half a microsecond to read.
  bool suspected() const { return took_.load(std::memory_order_relaxed) > kLong; }
  // A region that took so long, in which `others` do as much as this thread, which worked for so long where that is known.
  void note(int64_t elements, int64_t others, int64_t took, std::optional<int64_t> worked) {
    took_.store(took, std::memory_order_relaxed);
    if (!worked || took - *worked < std::max(kLong, others * *worked)) return;
    elements_.store(elements, std::memory_order_relaxed);
    until_.store(now() + kRepaid * took, std::memory_order_relaxed);
  }
  static int64_t now() { return Nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }
  // Of this thread on a core: what it would have taken had nobody stood in its way.
  static int64_t worked() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec time;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec * 1'000'000'000 + time.tv_nsec;
#endif
    return now();
  }

 private:
  static constexpr int64_t kRepaid = 32, kLong = 300'000;  // ns; the threads of a quiet machine wake within that
  std::atomic<int64_t> took_{0}, elements_{0}, until_{0};
};
Crowd crowd;

// body(first chunk, last chunk), in one parallel region or, for little work or beside other work, on this thread.
//
// parallel_for gives the first thread the first half of the rows, and that is where the matrix product before it left
// them: by the latency of each cache line (2 threads, Zen 4) MKL's float32 products of 8 to 512 rows, oneDNN's bfloat16
// products of 128 and 512 rows 576 wide and torch's elementwise ops all divide their output so. oneDNN divides columns
// instead where rows are few for the width (8 x 576, 128 x 1536). To follow it there the threads would have to meet
// between s and y, and parallel_for does not promise that they run at the same time.
template <class Body>
void for_chunks(int64_t rows, int64_t width, const Body& body) {
  const int64_t chunks = chunk_count(rows), elements = rows * width;
  if (chunks <= 1 || elements < kSerialElements || !crowd.is_worth_waiting_for(elements)) {
    body(0, chunks);
    return;
  }
  const bool suspected = crowd.suspected();
  int64_t share = chunks;
  std::optional<int64_t> worked;
  const int64_t begun = Crowd::now();
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    const bool measured = first == 0 && suspected;  // the first share is this thread's
    const int64_t before = measured ? Crowd::worked() : 0;
    body(first, last);
    if (first == 0) share = last;
    if (measured) worked = Crowd::worked() - before;
  });
  crowd.note(elements, (chunks - 1) / share, Crowd::now() - begun, worked);
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
  int64_t factor_stride;
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
    job_.basis_stride = call.basis_stride;
    job_.addend = target.addend;
    job_.addend_stride = target.addend_stride;
    job_.bias = target.bias;
    job_.dst = target.dst;
    job_.dst_stride = target.dst_stride;
    job_.dst_features = target.features;
    job_.factor = target.factor;
    job_.factor_stride = target.factor_stride;
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

  // Of these chunks.
  void rows(const Arguments& call, int64_t first, int64_t last) const {
    const RowsKernel kernel = kernels().rows[static_cast<int>(call.dtype)];
    kernel(job_, first * kChunkRows, std::min(last * kChunkRows, call.rows));
  }
  int64_t width() const { return std::max(job_.features, job_.dst_features); }

 private:
  RowsJob job_{};
  Scratch<Acc, 64> mixing_;  // [S, r, r]
  Scratch<Acc, 1> gains_;
};

// a = g U of every row, the job with M^T, and dM, chunk by chunk.
template <class Acc>
class Backward {
 public:
  Backward(const Arguments& call, const Target& target, const UsedAdapters& used, bool need_dv)
      : coefficients_(call.rows * call.rank),
        by_chunk_(need_dv && !call.ids.data),
        partial_(by_chunk_ ? chunk_count(call.rows) * call.rank * call.rank : 0),
        job_(call, target, used, /*transposed=*/true, coefficients_.data()) {}

  int64_t width() const { return job_.width(); }

  void rows(const Arguments& call, int64_t first, int64_t last) {
    job_.rows(call, first, last);
    const int64_t r = call.rank, square = r * r;
    for (int64_t c = first; by_chunk_ && c < last; ++c) {
      double* d_mixing = partial_.data() + c * square;
      std::fill_n(d_mixing, square, 0.0);
      add_outer_products(coefficients_.data(), static_cast<const Acc*>(call.t), r, c * kChunkRows,
                         std::min((c + 1) * kChunkRows, call.rows), d_mixing);
    }
  }

  // dv += <P'_i, a^T t>, after all rows.
  void add_gradient(const Arguments& call, const UsedAdapters& used, Acc* dv) {
    const int64_t r = call.rank, square = r * r;
    Scratch<double, 64> d_mixing(used.count * square);  // dM [S, r, r]
    std::fill_n(d_mixing.data(), used.count * square, 0.0);
    for (int64_t c = 0; by_chunk_ && c < chunk_count(call.rows); ++c) {
      for (int64_t e = 0; e < square; ++e) d_mixing[e] += partial_[c * square + e];
    }
    for (int64_t i = 0; i < call.ids.count; ++i) {
      const int64_t begin = i * call.ids.rows_per_id, end = begin + call.ids.rows_per_id;
      const int64_t slot = used.slots()[i];
      if (slot < 0) continue;
      add_outer_products(coefficients_.data(), static_cast<const Acc*>(call.t), r, begin, end,
                         d_mixing.data() + slot * square);
    }
    contract_backward<Acc>(call, used, d_mixing.data(), dv);
  }

 private:
  Scratch<Acc, 512> coefficients_;  // a [N, r]
  bool by_chunk_;
  Scratch<double, 128> partial_;  // dM of each chunk
  Job<Acc> job_;
};

template <class Acc>
void forward_as(const Arguments& call, const Target& target, void* t) {
  const UsedAdapters used(call);
  const Job<Acc> job(call, target, used, /*transposed=*/false, t);
  for_chunks(call.rows, job.width(), [&](int64_t first, int64_t last) { job.rows(call, first, last); });
}

template <class Acc>
void backward_as(const Arguments& call, const Target& target, void* dv) {
  const UsedAdapters used(call);
  Backward<Acc> pass(call, target, used, /*need_dv=*/dv);
  for_chunks(call.rows, pass.width(), [&](int64_t first, int64_t last) { pass.rows(call, first, last); });
  if (!dv) return;
  std::fill_n(static_cast<Acc*>(dv), call.adapters * call.numbers, Acc(0));
  pass.add_gradient(call, used, static_cast<Acc*>(dv));
}

// Chunk by chunk, all parts of one while its rows are in cache: passes [k], each with rows(call, first, last).
template <class Pass>
void for_parts(const std::vector<Part>& parts, std::deque<Pass>& passes) {
  int64_t width = 0;
  for (const Pass& pass : passes) width += pass.width();
  for_chunks(parts[0].call.rows, width, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      for (size_t p = 0; p < parts.size(); ++p) passes[p].rows(parts[p].call, c, c + 1);
    }
  });
}

template <class Acc>
void forward_parts_as(const std::vector<Part>& parts, void* t) {
  const UsedAdapters used(parts[0].call);
  std::deque<Job<Acc>> jobs;
  for (const Part& part : parts) {
    const OtherSide& y = part.out;
    const Target target{y.activation, y.stride, y.bias, y.activation, y.stride, y.features, y.factor, y.factor_stride};
    Acc* own_t = static_cast<Acc*>(t) + jobs.size() * part.call.rows * part.call.rank;
    jobs.emplace_back(part.call, target, used, /*transposed=*/false, own_t);
  }
  for_parts(parts, jobs);
}

template <class Acc>
void backward_parts_as(const std::vector<Part>& parts, int64_t features, void* g0, int64_t groups, void* dv) {
  constexpr int64_t bytes_of[] = {4, 2, 2, 8};  // by Dtype
  const Arguments& any = parts[0].call;
  const UsedAdapters used(any);
  std::deque<Backward<Acc>> passes;
  for (const Part& part : parts) {
    const int64_t skipped = part.begin * bytes_of[static_cast<int>(any.dtype)];
    void* dst = g0 ? static_cast<char*>(g0) + skipped : nullptr;
    const Arguments& call = part.call;
    passes.emplace_back(call, Target{call.activation, call.stride, nullptr, dst, features, call.features, call.basis,
                                     call.basis_stride}, used,
                        /*need_dv=*/dv);
  }
  for_parts(parts, passes);
  if (!dv) return;
  const int64_t numbers = any.adapters * any.numbers;
  std::fill_n(static_cast<Acc*>(dv), groups * numbers, Acc(0));
  for (size_t p = 0; p < parts.size(); ++p) {
    passes[p].add_gradient(parts[p].call, used, static_cast<Acc*>(dv) + parts[p].group * numbers);
  }
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
  const Target y{call.activation, call.stride,   call.bias,  call.activation,
                 call.stride,     call.features, call.basis, call.basis_stride};
  forward(call, y, t);
}

void update_backward(const Arguments& call, void* g0, void* dv) {
  expect_writes(call, g0, call.features, call.features);
  backward(call, {call.activation, call.stride, nullptr, g0, call.features, call.features, call.basis, call.basis_stride},
           dv);
}

void update_parts(const std::vector<Part>& parts, void* t) {
  parts[0].call.dtype == Dtype::float64 ? forward_parts_as<double>(parts, t) : forward_parts_as<float>(parts, t);
}

void update_parts_backward(const std::vector<Part>& parts, int64_t features, void* g0, int64_t groups, void* dv) {
  const Arguments& any = parts[0].call;
  expect_writes(any, g0, features, features);
  any.dtype == Dtype::float64 ? backward_parts_as<double>(parts, features, g0, groups, dv)
                              : backward_parts_as<float>(parts, features, g0, groups, dv);
}

void low_rank(const Arguments& call, const OtherSide& y, void* t) {
  expect_writes(call, y.activation, y.stride, y.features);
  forward(call, {y.bias, 0, nullptr, y.activation, y.stride, y.features, y.factor, y.factor_stride}, t);
}

void update_input_grad(const Arguments& call, const OtherSide& dx, bool add, void* dv) {
  if (!add) expect_writes(call, dx.activation, dx.stride, dx.features);
  const void* const addend = add ? dx.activation : nullptr;
  backward(call, {addend, dx.stride, nullptr, dx.activation, dx.stride, dx.features, dx.factor, dx.factor_stride},
           dv);
}

}  // namespace tinylora::cpu
