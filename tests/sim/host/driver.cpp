// One call of one op on the emulated GPU: the case comes in through standard input, the results leave through standard
// output (see emulator.py for the format). Exit status 3 and a line on standard error if the launch faults.
//
// The kernels of the element types and ranks that are wanted are linked to it, and csrc/cuda/launch.cpp, unchanged.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulator.h"
#include "launch.h"

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

// As csrc/cuda/ops.cu: `onto` says which op it is, together with what is given.
void run_case() {
  const bool transposed = read_number(), stays = read_number(), capturing = read_number();
  const Onto onto = static_cast<Onto>(read_number());
  const Element element = static_cast<Element>(read_number());
  const int rank = static_cast<int>(read_number());
  RowsArguments p{};
  p.onto = onto;
  p.transposed = transposed;
  p.only_finite = stays;
  p.rows = static_cast<int32_t>(read_number());
  p.source.features = static_cast<int32_t>(read_number());
  p.source.stride = read_number();
  p.target.features = static_cast<int32_t>(read_number());
  p.target.stride = read_number();
  p.mixing.numbers = static_cast<int32_t>(read_number());
  p.mixing.adapters = static_cast<int32_t>(read_number());
  p.mixing.rows_per_id = static_cast<int32_t>(read_number());
  p.mixing.wide_ids = read_number();
  p.mixing.elementwise = read_number();
  const size_t skew = read_number() * element_bytes(element), bias_skew = read_number() * element_bytes(element);
  emulator::settings().order = static_cast<emulator::Order>(read_number());
  emulator::settings().seed = static_cast<unsigned>(read_number());
  emulator::settings().multiprocessors = static_cast<int>(read_number());
  emulator::settings().resident = static_cast<int>(read_number());
  const auto stream = reinterpret_cast<Stream>(static_cast<uintptr_t>(capturing));

  const Buffer source = Buffer::from_input(skew), target = Buffer::from_input(skew), bias = Buffer::from_input(bias_skew);
  const Buffer factor = Buffer::from_input(0), other = Buffer::from_input(0), v = Buffer::from_input(0);
  const Buffer projection = Buffer::from_input(0), offset = Buffer::from_input(0), ids = Buffer::from_input(0);
  const Buffer t_input = Buffer::from_input(0);
  p.source.rows = source.as<void>();
  p.source.factor = factor.as<float>();
  p.target.rows = stays ? p.source.rows : target.as<void>();
  p.target.factor = onto == Onto::Source ? p.source.factor : other.as<float>();
  p.bias = bias.as<void>();
  p.offset = offset.as<float>();
  p.mixing.v = v.as<float>();
  p.mixing.projection = projection.as<float>();
  p.mixing.ids = ids.as<void>();

  const float* const t = t_input.as<float>();
  const Device device(0);
  const LaunchPlan plan = plan_rows(device, element, rank, p);
  const Buffer coefficients(transposed ? 0 : size_t(p.rows) * rank * sizeof(float), 0);
  const Buffer dv(t ? sizeof(float) * p.mixing.adapters * p.mixing.numbers : 0, 0);
  const Buffer scratch(t ? scratch_words(rank, plan, p) * 4 : 0, 0);
  if (!transposed) {
    p.coefficients = coefficients.as<float>();
    run_rows(device, element, rank, plan, p, stream);
  } else if (!t) {
    run_rows(device, element, rank, plan, p, stream);
  } else {
    run_rows_and_gradient(device, element, rank, plan, p, t, dv.as<float>(), scratch.as<float>(), stream);
  }
  const unsigned* const ticket = emulator::settings().ticket;
  if (ticket && *ticket) throw emulator::Fault("a ticket is left at " + std::to_string(*ticket));
  source.write();
  target.write();
  coefficients.write();
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
