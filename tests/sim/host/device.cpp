// csrc/cuda/device.h, answered by the emulator: a card that its settings describe, and launches that run at once.
#include "device.h"

#include "emulator.h"

namespace tinylora {

struct Device::Card {
  uint32_t ticket = 0;
};

Device::Device(int) : card_(*[] { static Card card; return &card; }()), pushed_(false) {
  emulator::settings().ticket = &card_.ticket;
}
Device::~Device() = default;

int Device::multiprocessors() const { return emulator::settings().multiprocessors; }
int Device::resident_blocks(const Kernel&, int) const { return emulator::settings().resident; }

// A stream that is not null is being captured.
uint32_t* Device::ticket(const Kernel&, Stream stream) const { return stream ? nullptr : &card_.ticket; }

void Device::clear(void* words, int64_t count, Stream) const { std::memset(words, 0, 4 * count); }

void Device::launch(const Kernel& kernel, Extent grid, Extent block, Stream, const void* arguments) const {
  const auto found = emulator::kernels().find(kernel.name());
  if (found == emulator::kernels().end()) throw emulator::Fault(kernel.name() + " is not compiled in");
  emulator::run({grid.x, grid.y}, {block.x, block.y}, [&] { found->second(arguments); });
}

}  // namespace tinylora
