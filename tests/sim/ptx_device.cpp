// csrc/cuda/device.h without a GPU: what is launched goes to a callback, which runs the PTX of that kernel. Linked with the
// package's own launchers, and called from cuda_gpu.py as csrc/cuda/update.cpp calls them.
#include "device.h"

#include <cstring>
#include <utility>

#include "launch.h"

namespace {
using Callback = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, const void* arguments);
Callback on_launch = nullptr;
int card[2] = {2, 2};  // multiprocessors, and blocks that each of them runs at once
uint32_t ticket_zero = 0;
}  // namespace

namespace tinylora {

struct Device::Card {};

Device::Device(int) : card_(*[] { static Card only; return &only; }()), pushed_(false) {}
Device::~Device() = default;
int Device::multiprocessors() const { return card[0]; }
int Device::resident_blocks(const Kernel&, int) const { return card[1]; }

// A stream that is not null is being captured.
uint32_t* Device::ticket(const Kernel&, Stream stream) const { return stream ? nullptr : &ticket_zero; }

void Device::clear(void* words, int64_t count, Stream) const { std::memset(words, 0, 4 * count); }

void Device::launch(const Kernel& kernel, Extent grid, Extent block, Stream, const void* arguments) const {
  const unsigned grids[] = {grid.x, grid.y, 1}, blocks[] = {block.x, block.y, 1};
  on_launch(kernel.name().c_str(), grids, blocks, arguments);
}

}  // namespace tinylora

using namespace tinylora;

// One op. `scratch` is allocated by the caller, as many words as are asked for.
extern "C" {
void simulate_card(int multiprocessors, int resident) {
  card[0] = multiprocessors;
  card[1] = resident;
}
void simulate_on_launch(Callback callback) { on_launch = callback; }
// What the last op left in the ticket of the stream, which is zero from now on.
uint32_t simulate_take_ticket() { return std::exchange(ticket_zero, 0); }
int64_t simulate_scratch_words(int element, int rank, const RowsArguments* p) {
  const Device device(0);
  return scratch_words(rank, plan_rows(device, static_cast<Element>(element), rank, *p), *p);
}
void simulate_rows(int element, int rank, const RowsArguments* p, const float* t, float* dv, float* scratch,
                   int capturing) {
  const Device device(0);
  const auto stream = reinterpret_cast<Stream>(static_cast<uintptr_t>(capturing));
  const auto kind = static_cast<Element>(element);
  const LaunchPlan plan = plan_rows(device, kind, rank, *p);
  if (dv) {
    run_rows_and_gradient(device, kind, rank, plan, *p, t, dv, scratch, stream);
  } else {
    run_rows(device, kind, rank, plan, *p, stream);
  }
}
int64_t simulate_parts_scratch_words(int element, int rank, PartsArguments* p) {
  const LaunchPlan plan = plan_parts(Device(0), static_cast<Element>(element), rank, *p);
  return scratch_words(rank, plan, *p);
}
void simulate_parts(int element, int rank, PartsArguments* p, const float* t, float* dv, float* scratch, int capturing) {
  const Device device(0);
  const auto stream = reinterpret_cast<Stream>(static_cast<uintptr_t>(capturing));
  const auto kind = static_cast<Element>(element);
  const LaunchPlan plan = plan_parts(device, kind, rank, *p);
  if (dv) {
    run_parts_and_gradient(device, kind, rank, plan, *p, t, dv, scratch, stream);
  } else {
    run_parts(device, kind, rank, plan, *p, stream);
  }
}
void simulate_refresh_right(int element, int rank, const RightArguments* p) {
  run_refresh_right(Device(0), static_cast<Element>(element), rank, *p, nullptr);
}
}
