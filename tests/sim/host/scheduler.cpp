// The scheduler of the emulator. Never instrumented for races itself: it reports what the kernels do to race.h.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "race.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define TELL_ASAN(call) call
#else
#define TELL_ASAN(call)
#endif

namespace emulator {
namespace {

constexpr size_t kStack = 128 << 10;
enum class State { Ready, AtBarrier, InWarp, Done };

struct Thread {
  ucontext_t context;
  uint3 index;
  unsigned number, warp, lane;  // number: position in the block
  unsigned generation = 0;      // warp operations done: picks one of two exchange buffers
  State state = State::Ready;
  int line = 0;                 // where it waits
  char* stack = nullptr;
  void* asan = nullptr;
};

struct Warp {
  uint64_t slot[2][32];
  unsigned arrived = 0, exited = 0, mask = 0;
  int line = 0;
};

struct SharedArray {
  const void* key;
  char* memory;
  size_t bytes;
};

struct Machine {
  Settings settings;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  SharedArray shared[16];
  int shared_count = 0;
  uint3 block, block_size, grid_size;
  unsigned block_number = 0, live = 0, waiting = 0;
  bool vote = false, outcome = false;  // of the threads at the barrier, and of the last one
  Thread* current = nullptr;
  ucontext_t main;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  void* main_asan = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
} m;

void to_main(bool for_good) {
  Thread& self = *m.current;
  (void)for_good;
  TELL_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &self.asan, m.main_stack, m.main_stack_size));
  swapcontext(&self.context, &m.main);
  TELL_ASAN(__sanitizer_finish_switch_fiber(self.asan, nullptr, nullptr));
}

void to_thread(Thread& thread) {
  m.current = &thread;
  race::enter(m.block_number, thread.number);
  TELL_ASAN(__sanitizer_start_switch_fiber(&m.main_asan, thread.stack, kStack));
  swapcontext(&m.main, &thread.context);
  TELL_ASAN(__sanitizer_finish_switch_fiber(m.main_asan, nullptr, nullptr));
  race::leave();
}

template <class... Values>
[[noreturn]] void fail(const char* format, Values... values) {
  char text[256];
  std::snprintf(text, sizeof text, format, values...);
  if (m.error.empty()) m.error = "block " + std::to_string(m.block_number) + ": " + text;
  to_main(true);
  __builtin_unreachable();  // a failed launch resumes no thread
}

void entry() {
  TELL_ASAN(__sanitizer_finish_switch_fiber(nullptr, &m.main_stack, &m.main_stack_size));
  (*m.body)();
  Thread& self = *m.current;
  self.state = State::Done;
  --m.live;
  m.warps[self.warp].exited |= 1u << self.lane;
  to_main(true);
}

char* new_stacks(size_t threads) {
  void* memory = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw Fault("no memory for the stacks of a block");
  return static_cast<char*>(memory);
}

void prepare_block(unsigned number, unsigned count, char* stacks) {
  m.block_number = number;
  m.block = {number % m.grid_size.x, number / m.grid_size.x % m.grid_size.y, number / m.grid_size.x / m.grid_size.y};
  m.live = count;
  m.waiting = 0;
  m.warps.assign((count + 31) / 32, Warp{});
  if (count % 32) m.warps.back().exited = ~0u << count % 32;
  m.threads.assign(count, Thread{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = m.threads[i];
    t.number = i;
    t.warp = i / 32;
    t.lane = i % 32;
    t.index = {i % m.block_size.x, i / m.block_size.x % m.block_size.y, i / m.block_size.x / m.block_size.y};
    t.stack = stacks + i * kStack;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, entry, 0);
  }
}

// Everybody who still runs is at the barrier: let them go, unless somebody left before it.
void open_barrier() {
  if (m.live != m.threads.size()) {
    int line = 0;
    for (const Thread& t : m.threads)
      if (t.state == State::AtBarrier) line = t.line;
    m.error = "block " + std::to_string(m.block_number) + ": " + std::to_string(m.threads.size() - m.live) +
              " threads left the kernel while " + std::to_string(m.live) + " wait at the barrier in line " +
              std::to_string(line);
  }
  m.waiting = 0;
  m.outcome = m.vote;
  m.vote = false;
  for (Thread& t : m.threads)
    if (t.state == State::AtBarrier) t.state = State::Ready;
  race::barrier(m.block_number);
}

void run_block(std::mt19937& random) {
  std::vector<unsigned> order(m.threads.size());
  std::iota(order.begin(), order.end(), 0u);
  if (m.settings.order == Order::Reverse) std::reverse(order.begin(), order.end());
  while (m.live && m.error.empty()) {
    if (m.settings.order == Order::Random) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (unsigned i : order) {
      if (m.threads[i].state != State::Ready) continue;
      to_thread(m.threads[i]);
      progress = true;
      if (!m.error.empty()) return;
    }
    if (m.waiting && m.waiting == m.live) {
      open_barrier();
    } else if (!progress) {
      m.error = "block " + std::to_string(m.block_number) + ": deadlock, " + std::to_string(m.waiting) + " of " +
                std::to_string(m.live) + " running threads wait at a barrier, the rest in warp operations";
    }
  }
}

}  // namespace

Settings& settings() { return m.settings; }
std::map<std::string, Body>& kernels() {
  static std::map<std::string, Body> all;
  return all;
}
uint3 thread_index() { return m.current->index; }
uint3 block_index() { return m.block; }
uint3 block_size() { return m.block_size; }
uint3 grid_size() { return m.grid_size; }

void* shared(const void* key, size_t bytes) {
  for (int i = 0; i < m.shared_count; ++i)
    if (m.shared[i].key == key) return m.shared[i].memory;
  if (m.shared_count == 16) fail("more than 16 shared arrays");
  char* const memory = static_cast<char*>(std::malloc(bytes));
  std::memset(memory, 0xff, bytes);  // NaN, whatever the type
  m.shared[m.shared_count++] = {key, memory, bytes};
  return memory;
}

void barrier(int line) {
  for (const Thread& other : m.threads)
    if (other.state == State::AtBarrier && other.line != line)
      fail("threads %u and %u wait at different barriers (lines %d and %d)", other.number, m.current->number,
           other.line, line);
  ++m.waiting;
  m.current->state = State::AtBarrier;
  m.current->line = line;
  to_main(false);
}

bool barrier_or(bool holds, int line) {
  m.vote |= holds;
  barrier(line);
  return m.outcome;
}

// The values of all lanes of the mask.
const uint64_t* meet(unsigned mask, uint64_t value, int line) {
  Thread& self = *m.current;
  Warp& warp = m.warps[self.warp];
  if (!(mask >> self.lane & 1)) fail("line %d: thread %u is not in its own mask %08x", line, self.number, mask);
  if (mask & warp.exited) fail("line %d: the mask %08x of thread %u names lanes that left", line, mask, self.number);
  if (warp.arrived && (warp.mask != mask || warp.line != line))
    fail("lanes of one warp meet in different operations (lines %d and %d)", warp.line, line);
  uint64_t* const slot = warp.slot[self.generation++ % 2];
  slot[self.lane] = value;
  warp.mask = mask;
  warp.line = line;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    for (Thread& other : m.threads)
      if (other.warp == self.warp && other.state == State::InWarp) other.state = State::Ready;
  } else {
    self.state = State::InWarp;
    to_main(false);
  }
  return slot;
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source_lane, int line) {
  if (!(mask >> source_lane & 1))
    fail("line %d: thread %u reads lane %u outside its mask", line, m.current->number, source_lane);
  return meet(mask, value, line)[source_lane];
}

unsigned ballot(unsigned mask, bool holds, int line) {
  const uint64_t* const votes = meet(mask, holds, line);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && votes[lane]) result |= 1u << lane;
  return result;
}

void sync_warp(unsigned mask, int line) {
  exchange(mask, 0, m.current->lane, line);
  race::sync_warp();
}

void fence() { race::fence(); }

unsigned atomic_inc(unsigned* address, unsigned limit) {
  race::atomic(address, sizeof *address);
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

void trap(int line) { fail("trap in line %d, thread %u", line, m.current->number); }

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const unsigned count = block.x * block.y * block.z;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (count == 0 || count > 1024 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw Fault("invalid launch: " + std::to_string(blocks) + " blocks of " + std::to_string(count) + " threads");
  }
  m.block_size = {block.x, block.y, block.z};
  m.grid_size = {grid.x, grid.y, grid.z};
  m.body = &thread;
  m.error.clear();
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937 random(m.settings.seed);
  if (m.settings.order == Order::Reverse) std::reverse(order.begin(), order.end());
  if (m.settings.order == Order::Random) std::shuffle(order.begin(), order.end(), random);

  char* const stacks = new_stacks(count);
  race::begin(stacks, stacks + count * kStack);
  for (unsigned number : order) {
    prepare_block(number, count, stacks);
    run_block(random);
    for (; m.shared_count; --m.shared_count) {
      race::forget(m.shared[m.shared_count - 1].memory, m.shared[m.shared_count - 1].bytes);
      std::free(m.shared[m.shared_count - 1].memory);
    }
    if (!m.error.empty()) break;
  }
  munmap(stacks, count * kStack);
  const std::string races = race::end();
  if (m.error.empty()) m.error = races;
  if (!m.error.empty()) throw Fault(m.error);
}

}  // namespace emulator
