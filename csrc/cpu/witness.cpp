// base/witness.py: whether a weight still holds the numbers it held. Called at every call of a layer that keeps B^T.
#include <cstdint>
#include <cstring>

// `count` numbers of `bytes` bytes each, at these offsets in elements from `weight`.
extern "C" __attribute__((visibility("default"))) int tinylora_same_numbers(const char* weight, const int64_t* offsets,
                                                                            const char* numbers, int64_t count,
                                                                            int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::memcmp(weight + offsets[i] * bytes, numbers + i * bytes, bytes) != 0) return 0;
  }
  return 1;
}
