// CUDA C++ compiled by g++ and run on the CPU, one fiber per CUDA thread: the vocabulary that the kernels use.
//
// A barrier or a warp operation suspends the fiber until the threads it waits for have arrived; between two of them a
// thread runs alone. Shared memory is poisoned with NaN and has its exact size: AddressSanitizer sees its edges.
// What the kernels need beyond plain C++ is here; what they do not use is not.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y = 1, z = 1;
  constexpr dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// What a launch ends with when a thread does something it must not; the message names the line.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { Forward, Reverse, Random };  // of blocks, and of the threads in a block

struct Settings {
  Order order = Order::Forward;
  unsigned seed = 1;
  int multiprocessors = 2;  // of the card, each of which runs this many blocks at once:
  int resident = 2;
  const unsigned* ticket = nullptr;  // the first that was handed out
};
Settings& settings();

// Runs `thread` once for every thread of the grid. Throws Fault.
void run(dim3 grid, dim3 block, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments&&... arguments) {
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  run(grid, block, [&] { std::apply(kernel, values); });
}

// Kernels by the name under which a GPU would have them (kernels.cpp): what a thread of one does, given its arguments.
using Body = std::function<void(const void* arguments)>;
std::map<std::string, Body>& kernels();
template <class Arguments>
Body body_of(void (*kernel)(Arguments)) {
  return [kernel](const void* arguments) { kernel(*static_cast<const Arguments*>(arguments)); };
}

// Below: called by kernels, on the fiber of the current thread.
uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();
void barrier(int line);
bool barrier_or(bool holds, int line);  // whether it holds in any thread of the block
uint64_t exchange(unsigned mask, uint64_t value, unsigned source_lane, int line);  // the source lane's value
unsigned ballot(unsigned mask, bool holds, int line);
void sync_warp(unsigned mask, int line);
void* shared(const void* key, size_t bytes);
void fence();
unsigned atomic_inc(unsigned* address, unsigned limit);
[[noreturn]] void trap(int line);

template <class V>
V shuffle(unsigned mask, V value, unsigned source_lane, int line) {
  static_assert(sizeof(V) <= 8, "a shuffle moves at most 8 bytes here");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source_lane % 32, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned lane() {
  return (thread_index().x + block_size().x * (thread_index().y + block_size().y * thread_index().z)) % 32;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
#define __grid_constant__
#define TL_SHARED(T, name, count)      \
  static const char name##_identity = 0; \
  T* const name = static_cast<T*>(emulator::shared(&name##_identity, sizeof(T) * (count)))

#define __builtin_assume(...)
inline void __syncthreads(int line = __builtin_LINE()) { emulator::barrier(line); }
inline int __syncthreads_or(int holds, int line = __builtin_LINE()) { return emulator::barrier_or(holds, line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { emulator::sync_warp(mask, line); }
template <class V>
V __shfl_sync(unsigned mask, V value, int source, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, static_cast<unsigned>(source), line);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, emulator::lane() ^ static_cast<unsigned>(bits), line);
}
inline unsigned __ballot_sync(unsigned mask, int holds, int line = __builtin_LINE()) {
  return emulator::ballot(mask, holds, line);
}
inline void __threadfence() { emulator::fence(); }
inline unsigned atomicInc(unsigned* address, unsigned limit) { return emulator::atomic_inc(address, limit); }
inline void __trap(int line = __builtin_LINE()) { emulator::trap(line); }
template <class V>
V __ldg(const V* address) { return *address; }
template <class V>
V __ldcg(const V* address) { return *address; }
using std::max;
using std::min;

namespace tinylora {
inline float half_to_float(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned short half_bits(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
}  // namespace tinylora
