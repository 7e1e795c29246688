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
  static Reg load_one(const float* p) { return _mm256_loadu_ps(p); }
  static void store_one(float* p, Reg x) { _mm256_storeu_ps(p, x); }
};

struct DoubleFormat : Double4Lanes {
  static Reg load_one(const double* p) { return _mm256_loadu_pd(p); }
  static void store_one(double* p, Reg x) { _mm256_storeu_pd(p, x); }
};

struct BFloat16Format : Float8Lanes {
  static Reg load_one(const BFloat16* p) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
  }
  // To nearest, ties to even: add 0x7fff and the last bit that stays. NaN stays NaN.
  static void store_one(BFloat16* p, Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
};

struct HalfFormat : Float8Lanes {
  static Reg load_one(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_one(Half* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

#include "cpu/lanes_by_one.inl"
#include "cpu/rows.inl"

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels{"avx2", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}};
  return kernels;
}

}  // namespace tinylora::cpu
