#include "race.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <unordered_map>
#include <vector>

namespace race {
namespace {

struct Access {
  unsigned block, thread;
  unsigned phase, warp_phase;  // barriers of the block, __syncwarps of the thread so far
  uint64_t time;
  bool atomic;
  const void* where;           // return address
};

struct Cell {  // one byte
  bool written = false;
  Access write{};
  std::vector<Access> reads;   // since the write; in each block only those after its last barrier
};

// A fence beside an atomic operation: it publishes (fence first) or collects (atomic first).
struct Handover {
  const void* address;
  unsigned thread, phase;      // of the fence
  uint64_t fence, atomic;      // times
};

struct ThreadClock {
  unsigned warp_phase = 0;
  uint64_t last_fence = 0;
  unsigned fence_phase = 0;
  const void* atomic_address = nullptr;  // of the last atomic operation, until a fence follows
  uint64_t atomic_time = 0;
};

struct BlockClock {
  unsigned phase = 0;
  std::map<unsigned, ThreadClock> threads;
  std::vector<Handover> published, collected;
};

struct Detector {
  bool running = false;
  const char *stacks = nullptr, *stacks_end = nullptr;
  unsigned block = 0, thread = 0;
  uint64_t now = 0;
  std::unordered_map<uintptr_t, Cell> cells;
  std::map<unsigned, BlockClock> blocks;
  std::map<std::pair<const void*, const void*>, std::string> found;
} d;

bool happens_before(const Handover& fence, const Access& access) {
  return fence.fence < access.time && (fence.thread == access.thread || fence.phase < access.phase);
}
bool happens_after(const Handover& fence, const Access& access) {
  return fence.fence > access.time && (fence.thread == access.thread || fence.phase > access.phase);
}

bool ordered(const Access& first, const Access& second) {
  if (first.block == second.block) {
    if (first.thread == second.thread || first.phase < second.phase) return true;
    return first.thread / 32 == second.thread / 32 && first.warp_phase < second.warp_phase;
  }
  for (const Handover& out : d.blocks[first.block].published) {
    if (!happens_after(out, first)) continue;
    for (const Handover& in : d.blocks[second.block].collected)
      if (in.address == out.address && in.atomic > out.atomic && happens_before(in, second)) return true;
  }
  return false;
}

uintptr_t offset(const void* where) {
  Dl_info info;
  const uintptr_t address = reinterpret_cast<uintptr_t>(where);
  return dladdr(where, &info) ? address - reinterpret_cast<uintptr_t>(info.dli_fbase) : address;
}

void require_order(const Access& first, const Access& second, const char* kinds) {
  if ((first.atomic && second.atomic) || ordered(first, second)) return;
  std::string& text = d.found[{first.where, second.where}];
  if (!text.empty()) return;
  char line[240];
  std::snprintf(line, sizeof line, "race, %s, %s: block %u thread %u (at %lx) and block %u thread %u (at %lx)", kinds,
                first.block == second.block ? "same block" : "different blocks", first.block, first.thread,
                static_cast<unsigned long>(offset(first.where)), second.block, second.thread,
                static_cast<unsigned long>(offset(second.where)));
  text = line;
}

void note_read(Cell& cell, const Access& access) {
  if (cell.written) require_order(cell.write, access, "write then read");
  auto settled = [&](const Access& old) {
    return old.block == access.block && (old.thread == access.thread || old.phase < access.phase);
  };
  cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), settled), cell.reads.end());
  cell.reads.push_back(access);
}

void note_write(Cell& cell, const Access& access) {
  if (cell.written) require_order(cell.write, access, "write then write");
  for (const Access& read : cell.reads) require_order(read, access, "read then write");
  cell.reads.clear();
  cell.written = true;
  cell.write = access;
}

bool watched(const void* address) {
  return d.running && !(address >= d.stacks && address < d.stacks_end);
}

void require_alignment(const void* address, size_t bytes, const void* where) {
  if (watched(address) && reinterpret_cast<uintptr_t>(address) % bytes)
    d.found[{where, nullptr}] = "misaligned access of " + std::to_string(bytes) + " bytes";
}

void note(const void* address, size_t bytes, bool write, bool atomic, const void* where) {
  if (!watched(address)) return;
  const char* const p = static_cast<const char*>(address);
  const BlockClock& block = d.blocks[d.block];
  const auto clock = block.threads.find(d.thread);
  const unsigned warp_phase = clock == block.threads.end() ? 0 : clock->second.warp_phase;
  const Access access = {d.block, d.thread, block.phase, warp_phase, ++d.now, atomic, where};
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = d.cells[reinterpret_cast<uintptr_t>(p) + i];
    write ? note_write(cell, access) : note_read(cell, access);
  }
}

}  // namespace

void begin(const char* stacks, const char* stacks_end) {
  d = Detector{};
  d.stacks = stacks;
  d.stacks_end = stacks_end;
}

std::string end() {
  std::string text;
  for (const auto& [places, line] : d.found) text += (text.empty() ? "" : "\n") + line;
  return text;
}

void enter(unsigned block, unsigned thread) {
  d.block = block;
  d.thread = thread;
  d.running = true;
}
void leave() { d.running = false; }
void barrier(unsigned block) { ++d.blocks[block].phase; }
void sync_warp() { ++d.blocks[d.block].threads[d.thread].warp_phase; }

void fence() {
  BlockClock& block = d.blocks[d.block];
  ThreadClock& self = block.threads[d.thread];
  self.last_fence = ++d.now;
  self.fence_phase = block.phase;
  if (self.atomic_address)
    block.collected.push_back({self.atomic_address, d.thread, block.phase, d.now, self.atomic_time});
  self.atomic_address = nullptr;
}

void atomic(const void* address, size_t bytes) {
  note(address, bytes, true, true, __builtin_return_address(0));
  BlockClock& block = d.blocks[d.block];
  ThreadClock& self = block.threads[d.thread];
  self.atomic_address = address;
  self.atomic_time = ++d.now;
  if (self.last_fence) block.published.push_back({address, d.thread, self.fence_phase, self.last_fence, d.now});
}

void forget(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) d.cells.erase(reinterpret_cast<uintptr_t>(address) + i);
}

}  // namespace race

// What g++ calls with -fsanitize=thread.
#define HERE __builtin_return_address(0)
#define ACCESS(kind, bytes, write)                                                                        \
  void __tsan_##kind##bytes(void* p) {                                                                    \
    race::require_alignment(p, bytes, HERE);                                                              \
    race::note(p, bytes, write, false, HERE);                                                             \
  }                                                                                                       \
  void __tsan_unaligned_##kind##bytes(void* p) { race::note(p, bytes, write, false, HERE); }
#define ACCESSES(bytes) ACCESS(read, bytes, false) ACCESS(write, bytes, true)
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long bytes) { race::note(p, bytes, false, false, HERE); }
void __tsan_write_range(void* p, unsigned long bytes) { race::note(p, bytes, true, false, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
