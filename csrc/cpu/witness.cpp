// base/witness.py: whether a weight still holds the numbers it held. Called at every call of a layer that keeps B^T.
#include <cstdint>
#include <cstring>

// `runs` runs of `run_bytes` bytes: run i begins offsets[i] numbers of `bytes` bytes from `weight`.
extern "C" __attribute__((visibility("default"))) bool tinylora_same_numbers(const int64_t* offsets,
                                                                             const char* numbers, int64_t runs,
                                                                             int64_t run_bytes, int64_t bytes,
                                                                             const char* weight) {
  for (int64_t i = 0; i < runs; ++i) {
    if (std::memcmp(weight + offsets[i] * bytes, numbers + i * run_bytes, run_bytes) != 0) return false;
  }
  return true;
}
