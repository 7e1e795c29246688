// Compiled with -mavx512bf16 on top of the flags of avx512.cpp: bfloat16 rows, narrowed by one instruction. That
// instruction treats subnormal numbers as zero, as torch's own bfloat16 matrix multiplication does on such a CPU.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

#include "cpu/avx512.inl"

struct BFloat16Format {
  static __m512 widen(__m256i packed) { return widen_bfloat16(packed); }
  static __m512i narrow(__m512 low, __m512 high) {
    const __m512bh packed = _mm512_cvtne2ps_pbh(high, low);
    __m512i bits;
    __builtin_memcpy(&bits, &packed, sizeof bits);
    return bits;
  }
};

template <>
struct Lanes<BFloat16> : Lanes16<BFloat16, BFloat16Format> {};

#include "cpu/rows.inl"

}  // namespace

void avx512_bf16_rows(const RowsJob& job, int64_t begin, int64_t end) { rows<BFloat16>(job, begin, end); }

}  // namespace tinylora::cpu
