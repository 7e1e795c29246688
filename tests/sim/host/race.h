// An exact race detector. Kernels are compiled with -fsanitize=thread, which makes g++ report every load and store; the
// reports go to race.cpp instead of the ThreadSanitizer runtime, because the happens-before of a GPU is not pthreads'.
//
// Two accesses to one byte, at least one of them a write and not both atomic, must be ordered:
//   same thread; same block, with a barrier between them; same warp, with a __syncwarp between them; or different
//   blocks, where the first is followed by fence, atomic and the second preceded by atomic, fence on the same address.
// Without EMULATE_RACES all of this is empty.
#pragma once
#include <cstddef>
#include <string>

namespace race {
#ifdef EMULATE_RACES
void begin(const char* stacks, const char* stacks_end);  // a launch; accesses to the fibers' own stacks are private
std::string end();                                       // what was found, or empty
void enter(unsigned block, unsigned thread);             // from here on this thread runs
void leave();
void barrier(unsigned block);
void sync_warp();
void fence();
void atomic(const void* address, size_t bytes);
void forget(const void* address, size_t bytes);          // memory that ends with the block
#else
inline void begin(const char*, const char*) {}
inline std::string end() { return {}; }
inline void enter(unsigned, unsigned) {}
inline void leave() {}
inline void barrier(unsigned) {}
inline void sync_warp() {}
inline void fence() {}
inline void atomic(const void*, size_t) {}
inline void forget(const void*, size_t) {}
#endif
}  // namespace race
