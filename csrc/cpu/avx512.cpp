// Compiled with -mavx512f,bw,dq,vl; called only where the CPU has them.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

#include "cpu/avx512.inl"

struct BFloat16Format {
  // To nearest, ties to even: add 0x7fff and the last bit that stays. NaN stays NaN.
  static __m512i round(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  }
  static __m512i narrow(__m512 even, __m512 odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(round(even), 16), round(odd));
  }
};

template <>
struct Lanes<BFloat16> : EvenOddLanes<BFloat16Format> {};

template <>
struct Lanes<Half> : Float16Lanes {
  static void widen(__m512i packed, Reg& low, Reg& high) {
    low = _mm512_cvtph_ps(_mm512_castsi512_si256(packed));
    high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(packed, 1));
  }
  static __m512i narrow(Reg low, Reg high) {
    const __m256i first = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i second = _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }
  static void load(const Half* p, Reg& low, Reg& high) { widen(_mm512_loadu_si512(p), low, high); }
  static void load_part(const Half* p, int64_t n, Reg& low, Reg& high) {
    widen(_mm512_maskz_loadu_epi16(first_lanes(n), p), low, high);
  }
  static void store(Half* p, Reg low, Reg high) { _mm512_storeu_si512(p, narrow(low, high)); }
  static void store_part(Half* p, int64_t n, Reg low, Reg high) {
    _mm512_mask_storeu_epi16(p, first_lanes(n), narrow(low, high));
  }
  static void load_basis(const float* p, Reg& low, Reg& high) { Lanes<float>::load(p, low, high); }
  static void load_basis_part(const float* p, int64_t n, Reg& low, Reg& high) {
    Lanes<float>::load_part(p, n, low, high);
  }
};

#include "cpu/rows.inl"
#include "cpu/products.inl"

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr ProductsKernel of_dtype[] = {products<OrderedFloat>, products<BFloat16>, products<OrderedHalf>};
  static constexpr Kernels kernels{"avx512", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}, of_dtype};
  return kernels;
}

}  // namespace tinylora::cpu
