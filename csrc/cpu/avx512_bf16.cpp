// Compiled with -mavx512bf16 on top of the flags of avx512.cpp: bfloat16 rows, narrowed by one instruction. That
// instruction treats subnormal numbers as zero, as torch's own bfloat16 matrix multiplication does on such a CPU.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

#include "cpu/avx512.inl"

struct BFloat16Format {
  static __m512i narrow(__m512 even, __m512 odd) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(odd, even);  // the 16 even ones, then the 16 odd ones
    __m512i bits;
    __builtin_memcpy(&bits, &rounded, sizeof bits);
    // word 2 i <- i, word 2 i + 1 <- 16 + i
    const __m512i even_words = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i odd_words = _mm512_slli_epi32(_mm512_add_epi32(even_words, _mm512_set1_epi32(16)), 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(even_words, odd_words), bits);
  }
};

template <>
struct Lanes<BFloat16> : EvenOddLanes<BFloat16Format> {};

#include "cpu/rows.inl"

}  // namespace

void avx512_bf16_rows(const RowsJob& job, int64_t begin, int64_t end) { rows<BFloat16>(job, begin, end); }

}  // namespace tinylora::cpu
