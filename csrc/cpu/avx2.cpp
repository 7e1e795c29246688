// Compiled with -mavx2 -mfma -mf16c; called only where the CPU has them.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

constexpr int kAccumulators = 8;

struct Float8Lanes {
  using Acc = float;
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static Reg fill(float x) { return _mm256_set1_ps(x); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Reg a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
};

struct Double4Lanes {
  using Acc = double;
  using Reg = __m256d;
  static constexpr int kWidth = 4;
  static Reg fill(double x) { return _mm256_set1_pd(x); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static double sum(Reg a) {
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }
};

struct FloatFormat : Float8Lanes {
  static void load(const float* p, Reg& low, Reg& high) {
    low = _mm256_loadu_ps(p);
    high = _mm256_loadu_ps(p + 8);
  }
  static void store(float* p, Reg low, Reg high) {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  static void load_basis(const float* p, Reg& low, Reg& high) { load(p, low, high); }
};

struct DoubleFormat : Double4Lanes {
  static void load(const double* p, Reg& low, Reg& high) {
    low = _mm256_loadu_pd(p);
    high = _mm256_loadu_pd(p + 4);
  }
  static void store(double* p, Reg low, Reg high) {
    _mm256_storeu_pd(p, low);
    _mm256_storeu_pd(p + 4, high);
  }
  static void load_basis(const double* p, Reg& low, Reg& high) { load(p, low, high); }
};

struct HalfFormat : Float8Lanes {
  static void load(const Half* p, Reg& low, Reg& high) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
  }
  static void store(Half* p, Reg low, Reg high) {
    const __m128i first = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
    const __m128i second = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(second, first));
  }
  static void load_basis(const float* p, Reg& low, Reg& high) { FloatFormat::load(p, low, high); }
};

// Even and odd lanes, as in avx512.inl.
struct BFloat16Format : Float8Lanes {
  static void load(const BFloat16* p, Reg& even, Reg& odd) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(packed, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(packed, _mm256_set1_epi32(0xffff0000)));
  }
  // To nearest, ties to even: add 0x7fff and the last bit that stays. NaN stays NaN.
  static __m256i round(Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  }
  static void store(BFloat16* p, Reg even, Reg odd) {
    const __m256i packed = _mm256_blend_epi16(_mm256_srli_epi32(round(even), 16), round(odd), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  static Reg across(Reg x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); }
  static void load_basis(const float* p, Reg& even, Reg& odd) {
    Reg low, high;
    FloatFormat::load(p, low, high);
    even = across(_mm256_shuffle_ps(low, high, 0x88));
    odd = across(_mm256_shuffle_ps(low, high, 0xdd));
  }
};

#include "cpu/parts_by_buffer.inl"
#include "cpu/rows.inl"
#include "cpu/products.inl"

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr ProductsKernel of_dtype[] = {products<OrderedFloat>, products<BFloat16>, products<OrderedHalf>};
  static constexpr Kernels kernels{"avx2", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}, of_dtype};
  return kernels;
}

}  // namespace tinylora::cpu
