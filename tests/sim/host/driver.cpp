// One call of one op on the emulated GPU: the case comes in through standard input, the results leave through standard
// output (see emulator.py for the format). Exit status 3 and a line on standard error if the launch faults.
//
// RANKS and ELEMENTS list what is compiled in, so that a mutant of the kernels builds in seconds. launch.cu and
// vector_grad.cu are compiled beside this file, unchanged.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulator.h"
#include "launch_rows.cuh"

namespace tinylora {

template <class T>
void launch_built(int rank, const Plan& plan, const RowsArguments& arguments, cudaStream_t stream) {
  const auto try_rank = [&](auto r) {
    if (rank == r.value) launch_rank<T, r.value>(plan, arguments, stream);
  };
  const auto try_ranks = [&](auto... ranks) { (try_rank(ranks), ...); };
  try_ranks(RANKS);
}
#define BUILD(T)                                                                                                  \
  template <>                                                                                                     \
  void launch_rows<T>(int rank, const Plan& plan, const RowsArguments& arguments, cudaStream_t stream) {          \
    launch_built<T>(rank, plan, arguments, stream);                                                               \
  }
#define LEAVE_OUT(T)                                                                                              \
  template <>                                                                                                     \
  void launch_rows<T>(int, const Plan&, const RowsArguments&, cudaStream_t) {                                     \
    throw emulator::Fault("this driver was built without that element type");                                    \
  }
ELEMENTS

}  // namespace tinylora

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

namespace {

using namespace tinylora;

void read_exactly(void* data, size_t bytes) {
  if (std::fread(data, 1, bytes, stdin) != bytes) std::exit(4);
}
int64_t read_number() {
  int64_t value = 0;
  read_exactly(&value, sizeof value);
  return value;
}
void write_exactly(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, stdout) != bytes) std::exit(4);
}

// Device memory: of the exact size, `skew` bytes past a 16-byte boundary, NaN wherever nothing was copied in.
class Buffer {
 public:
  Buffer(size_t bytes, size_t skew) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes + skew)) std::exit(4);
    memory_.reset(static_cast<char*>(memory));
    data_ = memory_.get() + skew;
    std::memset(data_, 0xff, bytes);
  }
  static Buffer from_input(size_t skew) {
    const int64_t bytes = read_number();
    Buffer buffer(bytes < 0 ? 0 : bytes, skew);
    buffer.given_ = bytes >= 0;
    if (buffer.given_) read_exactly(buffer.data_, buffer.bytes_);
    return buffer;
  }
  template <class T>
  T* as() const {
    return given_ ? reinterpret_cast<T*>(data_) : nullptr;
  }
  void write() const { write_exactly(data_, bytes_); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  char* data_ = nullptr;
  size_t bytes_;
  bool given_ = true;
};

void run_case() {
  const bool backward = read_number(), need_input_grad = read_number();
  const Element element = static_cast<Element>(read_number());
  const int rank = static_cast<int>(read_number());
  RowsArguments p{};
  p.rows = static_cast<int32_t>(read_number());
  p.columns = static_cast<int32_t>(read_number());
  p.source_stride = read_number();
  p.mixing.numbers = static_cast<int32_t>(read_number());
  p.mixing.adapters = static_cast<int32_t>(read_number());
  p.mixing.rows_per_id = static_cast<int32_t>(read_number());
  p.mixing.wide_ids = read_number();
  p.mixing.elementwise = read_number();
  const size_t skew = read_number() * element_bytes(element);
  emulator::settings().order = static_cast<emulator::Order>(read_number());
  emulator::settings().seed = static_cast<unsigned>(read_number());

  const Buffer source = Buffer::from_input(skew), basis = Buffer::from_input(0), v = Buffer::from_input(0);
  const Buffer projection = Buffer::from_input(0), offset = Buffer::from_input(0), ids = Buffer::from_input(0);
  const Buffer t_input = Buffer::from_input(0);
  p.source = source.as<void>();
  p.basis = basis.as<float>();
  p.offset = offset.as<float>();
  p.mixing.v = v.as<float>();
  p.mixing.projection = projection.as<float>();
  p.mixing.ids = ids.as<void>();

  if (!backward) {
    const Buffer t(size_t(p.rows) * rank * sizeof(float), 0);
    p.target = source.as<void>();
    p.target_stride = p.source_stride;
    p.coefficients = t.as<float>();
    run_update(element, rank, p, nullptr);
    source.write();
    t.write();
    return;
  }
  const float* const t = t_input.as<float>();
  const Buffer g0(need_input_grad ? size_t(p.rows) * p.columns * element_bytes(element) : 0, 0);
  const Buffer dv(t ? sizeof(float) * p.mixing.adapters * p.mixing.numbers : 0, 0);
  const Buffer workspace(t ? workspace_words(rank, p.rows, p.mixing.adapters) * 4 : 0, 0);
  p.target = need_input_grad ? g0.as<void>() : nullptr;
  p.target_stride = p.columns;
  run_update_backward(element, rank, p, t, t ? dv.as<float>() : nullptr, workspace.as<void>(), nullptr);
  source.write();
  g0.write();
  dv.write();
}

}  // namespace

int main() {
  try {
    run_case();
  } catch (const emulator::Fault& fault) {
    std::fprintf(stderr, "fault: %s\n", fault.what());
    return 3;
  }
}
