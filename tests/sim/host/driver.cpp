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

void read_settings() {
  emulator::Settings& settings = emulator::settings();
  settings.order = static_cast<emulator::Order>(read_number());
  settings.seed = static_cast<unsigned>(read_number());
  settings.multiprocessors = static_cast<int>(read_number());
  settings.resident = static_cast<int>(read_number());
}

void check_ticket() {
  const unsigned* const ticket = emulator::settings().ticket;
  if (ticket && *ticket) throw emulator::Fault("a ticket is left at " + std::to_string(*ticket));
}

// As csrc/cuda/update.cpp: `onto` says which op it is, together with what is given.
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
  read_settings();
  const auto stream = reinterpret_cast<Stream>(static_cast<uintptr_t>(capturing));

  const Buffer source = Buffer::from_input(skew), target = Buffer::from_input(skew), bias = Buffer::from_input(bias_skew);
  const Buffer factor = Buffer::from_input(0), other = Buffer::from_input(0), v = Buffer::from_input(0);
  const Buffer projection = Buffer::from_input(0), offset = Buffer::from_input(0), ids = Buffer::from_input(0);
  const Buffer t_input = Buffer::from_input(0);
  p.source.rows = source.as<void>();
  p.source.factor = factor.as<float>();
  p.source.factor_stride = p.source.features;
  p.target.factor_stride = p.target.features;
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
  check_ticket();
  source.write();
  target.write();
  coefficients.write();
  dv.write();
}

// update_parts, or with `transposed` its backward pass, as csrc/cuda/update.cpp.
void run_parts_case() {
  const bool transposed = read_number(), writes = read_number(), capturing = read_number();
  const Element element = static_cast<Element>(read_number());
  const int rank = static_cast<int>(read_number());
  PartsArguments all{};
  all.parts = static_cast<int32_t>(read_number());
  all.groups = static_cast<int32_t>(read_number());
  RowsArguments p{};  // what all parts have in common
  p.transposed = transposed;
  p.rows = static_cast<int32_t>(read_number());
  const int64_t stride = read_number();
  const int32_t inputs = static_cast<int32_t>(read_number());
  const int64_t input_stride = read_number();
  p.mixing.numbers = static_cast<int32_t>(read_number());
  p.mixing.adapters = static_cast<int32_t>(read_number());
  p.mixing.rows_per_id = static_cast<int32_t>(read_number());
  p.mixing.wide_ids = read_number();
  p.mixing.elementwise = read_number();
  const int bytes = element_bytes(element);
  const size_t skew = read_number() * bytes, bias_skew = read_number() * bytes;
  read_settings();
  const auto stream = reinterpret_cast<Stream>(static_cast<uintptr_t>(capturing));
  std::vector<int32_t> ends;
  for (int i = 0; i < all.parts; ++i) {
    ends.push_back(static_cast<int32_t>(read_number()));
    all.group[i] = static_cast<int32_t>(read_number());
  }
  const int32_t width = ends.back();

  const Buffer y = Buffer::from_input(skew), bias = Buffer::from_input(bias_skew), basis = Buffer::from_input(0);
  const Buffer v = Buffer::from_input(0), projection = Buffer::from_input(0), offset = Buffer::from_input(0);
  const Buffer x = Buffer::from_input(0), right = Buffer::from_input(0), ids = Buffer::from_input(0);
  const Buffer t_input = Buffer::from_input(0);
  const Buffer g0(transposed && writes ? size_t(p.rows) * width * bytes : 0, skew);
  const Buffer coefficients(transposed ? 0 : size_t(all.parts) * p.rows * rank * sizeof(float), 0);
  p.mixing.ids = ids.as<void>();
  const int64_t numbers = int64_t(p.mixing.adapters) * p.mixing.numbers;
  const int64_t entries = (p.mixing.elementwise ? 1 : p.mixing.numbers) * int64_t(rank) * rank;
  for (int i = 0; i < all.parts; ++i) {
    const int32_t begin = i ? ends[i - 1] : 0, features = ends[i] - begin;
    RowsArguments& part = all.part[i] = p;
    part.mixing.v = v.as<float>() + all.group[i] * numbers;
    part.mixing.projection = projection.as<float>() + i * entries;
    part.source = {y.as<char>() + int64_t(begin) * bytes, stride, basis.as<float>() + begin, features, width};
    part.target = part.source;
    part.onto = Onto::Source;
    if (transposed) {
      part.target.rows = writes ? g0.as<char>() + int64_t(begin) * bytes : nullptr;
      part.target.stride = width;
      continue;
    }
    part.only_finite = !inputs;
    if (inputs) {
      part.source = {x.as<void>(), input_stride, right.as<float>() + int64_t(i) * rank * inputs, inputs, inputs};
      part.onto = Onto::Target;
    }
    part.bias = bias.as<char>() ? bias.as<char>() + int64_t(begin) * bytes : nullptr;
    part.offset = offset.as<float>() ? offset.as<float>() + i * rank : nullptr;
    part.coefficients = coefficients.as<float>() + int64_t(i) * p.rows * rank;
  }
  const float* const t = t_input.as<float>();
  const Device device(0);
  const LaunchPlan plan = plan_parts(device, element, rank, all);
  const Buffer dv(t ? sizeof(float) * all.groups * numbers : 0, 0);
  const Buffer scratch(t ? scratch_words(rank, plan, all) * 4 : 0, 0);
  if (t) {
    run_parts_and_gradient(device, element, rank, plan, all, t, dv.as<float>(), scratch.as<float>(), stream);
  } else {
    run_parts(device, element, rank, plan, all, stream);
  }
  check_ticket();
  y.write();
  g0.write();
  coefficients.write();
  dv.write();
}

}  // namespace

int main() {
  try {
    read_number() ? run_parts_case() : run_case();
  } catch (const emulator::Fault& fault) {
    std::fprintf(stderr, "fault: %s\n", fault.what());
    return 3;
  }
}
