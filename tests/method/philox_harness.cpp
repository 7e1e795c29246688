// C entry points around philox.h, compiled by test_philox.py and called through ctypes.
#include "philox.h"

extern "C" {

void philox_block(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const tinylora::Words in{{counter[0], counter[1], counter[2], counter[3]}};
  const tinylora::Words result = tinylora::philox4x32(in, key[0], key[1]);
  for (int i = 0; i < 4; ++i) out[i] = result.w[i];
}

void normals(const uint32_t* words, int64_t count, double* out) {
  for (int64_t n = 0; n < count; ++n) out[n] = tinylora::normal_from_word(words[n]);
}

void projection(uint64_t seed, uint32_t index, uint32_t u, uint32_t r, float* out) {
  for (uint32_t i = 0; i < u; ++i)
    for (uint32_t j = 0; j < r; ++j)
      for (uint32_t k = 0; k < r; ++k) *out++ = tinylora::projection_entry(seed, index, i, j, k, r);
}
}
