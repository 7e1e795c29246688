// Compiled with -mavx512f,bw,dq,vl; called only where the CPU has them.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

#include "cpu/avx512.inl"

struct BFloat16Format {
  static __m512 widen(__m256i packed) { return widen_bfloat16(packed); }
  // To nearest, ties to even: add 0x7fff and the last bit that stays. NaN stays NaN.
  static __m256i narrow(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  static __m512i narrow(__m512 low, __m512 high) { return join(narrow(low), narrow(high)); }
};

struct HalfFormat {
  static __m512 widen(__m256i packed) { return _mm512_cvtph_ps(packed); }
  static __m256i narrow(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m512i narrow(__m512 low, __m512 high) { return join(narrow(low), narrow(high)); }
};

template <>
struct Lanes<BFloat16> : Lanes16<BFloat16, BFloat16Format> {};
template <>
struct Lanes<Half> : Lanes16<Half, HalfFormat> {};

#include "cpu/rows.inl"

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels{"avx512", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}};
  return kernels;
}

}  // namespace tinylora::cpu
