// Compiled with -mavx512f,bw,dq,vl; called only where the CPU has them.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

#include "cpu/avx512.inl"

// 32 numbers of 16 bits as they lie in one register; Format widens and narrows them.
template <class T, class Format>
struct PackedLanes : Float16Lanes {
  static void load(const T* p, Reg& low, Reg& high) { Format::widen(_mm512_loadu_si512(p), low, high); }
  static void load_part(const T* p, int64_t n, Reg& low, Reg& high) {
    Format::widen(_mm512_maskz_loadu_epi16(first_lanes(n), p), low, high);
  }
  static void store(T* p, Reg low, Reg high) { _mm512_storeu_si512(p, Format::narrow(low, high)); }
  static void store_part(T* p, int64_t n, Reg low, Reg high) {
    _mm512_mask_storeu_epi16(p, first_lanes(n), Format::narrow(low, high));
  }
};

// bfloat16 is the upper half of a float. 32 of them seen as 16 words of 32 bits: the even ones sit in the lower halves,
// the odd ones are floats already once the lower half is cleared. So registers hold even and odd lanes here, one
// instruction each, and the basis is put into that order where it is loaded, once for several rows.
struct EvenOddBFloat16 {
  static void widen(__m512i packed, __m512& even, __m512& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(packed, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(packed, _mm512_set1_epi32(0xffff0000)));
  }
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
struct Lanes<BFloat16> : PackedLanes<BFloat16, EvenOddBFloat16> {
  static void sort(Reg& low, Reg& high) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const Reg first = low;
    low = _mm512_permutex2var_ps(first, even, high);
    high = _mm512_permutex2var_ps(first, odd, high);
  }
  static void load_basis(const float* p, Reg& even, Reg& odd) {
    load32(p, even, odd);
    sort(even, odd);
  }
  static void load_basis_part(const float* p, int64_t n, Reg& even, Reg& odd) {
    load32_part(p, n, even, odd);
    sort(even, odd);
  }
};

struct InOrderHalf {
  static void widen(__m512i packed, __m512& low, __m512& high) {
    low = _mm512_cvtph_ps(_mm512_castsi512_si256(packed));
    high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(packed, 1));
  }
  static __m512i narrow(__m512 low, __m512 high) {
    const __m256i first = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i second = _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }
};

template <>
struct Lanes<Half> : PackedLanes<Half, InOrderHalf> {};

#include "cpu/rows.inl"
#include "cpu/products.inl"

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr ProductsKernel of_dtype[] = {products<OrderedFloat>, products<BFloat16>, products<OrderedHalf>};
  static constexpr Kernels kernels{"avx512", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}, of_dtype};
  return kernels;
}

}  // namespace tinylora::cpu
