// What the launchers ask of a GPU. driver.cpp answers through NVIDIA's driver, each simulator of tests/sim in its own way.
#pragma once
#include <cstddef>

#include "kernel.h"

namespace tinylora {

using Stream = void*;  // CUstream, which is a cudaStream_t

struct Extent {
  unsigned x, y = 1;
};

// A GPU that is the current one of this thread as long as the object lives. Throws std::runtime_error, one line that
// names the call of the driver and what it said.
class Device {
 public:
  explicit Device(int index);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int multiprocessors() const;
  int resident_blocks(const Kernel& kernel, int threads) const;  // that a multiprocessor runs at once

  // A counter in device memory that is zero before and after every launch of the kernel's module, and that no two
  // launches use at once: those of a stream follow one another. A launch that is captured has one to itself, for its
  // graph may run beside anything but itself. Null where there are no more.
  uint32_t* ticket(const Kernel& kernel, Stream stream) const;

  void clear(void* words, int64_t count, Stream stream) const;  // 4-byte words set to zero
  void launch(const Kernel& kernel, Extent grid, Extent block, Stream stream, const void* arguments) const;

 private:
  struct Card;
  Card& card_;
  bool pushed_;
};

}  // namespace tinylora
