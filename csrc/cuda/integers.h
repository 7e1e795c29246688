// What host and device code have in common: int32_t and its like, for NVRTC has no headers, and functions that a compiler
// evaluates for either.
#pragma once
#ifdef __CUDACC__
#define TL_BOTH __host__ __device__
#else
#define TL_BOTH
#endif
#ifdef __CUDACC_RTC__
namespace tinylora {
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
}  // namespace tinylora
#else
#include <cstdint>
#endif
