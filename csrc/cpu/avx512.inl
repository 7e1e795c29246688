// Lanes<T> on AVX-512 F, BW, DQ, VL: what avx512.cpp and avx512_bf16.cpp share. Included inside an anonymous namespace.

constexpr int kAccumulators = 16;

struct Float16Lanes {
  using Acc = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static Reg fill(float x) { return _mm512_set1_ps(x); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
};

struct Double8Lanes {
  using Acc = double;
  using Reg = __m512d;
  static constexpr int kWidth = 8;
  static Reg fill(double x) { return _mm512_set1_pd(x); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static double sum(Reg a) { return _mm512_reduce_add_pd(a); }
};

// The first n of 32 lanes.
inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

template <class T>
struct Lanes;

template <>
struct Lanes<float> : Float16Lanes {
  static void load_basis(const float* p, Reg& low, Reg& high) { load(p, low, high); }
  static void load_basis_part(const float* p, int64_t n, Reg& low, Reg& high) { load_part(p, n, low, high); }
  static void load(const float* p, Reg& low, Reg& high) {
    low = _mm512_loadu_ps(p);
    high = _mm512_loadu_ps(p + 16);
  }
  static void load_part(const float* p, int64_t n, Reg& low, Reg& high) {
    low = _mm512_maskz_loadu_ps(first_lanes(n), p);
    high = _mm512_maskz_loadu_ps(first_lanes(n) >> 16, p + 16);
  }
  static void store(float* p, Reg low, Reg high) {
    _mm512_storeu_ps(p, low);
    _mm512_storeu_ps(p + 16, high);
  }
  static void store_part(float* p, int64_t n, Reg low, Reg high) {
    _mm512_mask_storeu_ps(p, first_lanes(n), low);
    _mm512_mask_storeu_ps(p + 16, first_lanes(n) >> 16, high);
  }
};

template <>
struct Lanes<double> : Double8Lanes {
  static void load_basis(const double* p, Reg& low, Reg& high) { load(p, low, high); }
  static void load_basis_part(const double* p, int64_t n, Reg& low, Reg& high) { load_part(p, n, low, high); }
  static void load(const double* p, Reg& low, Reg& high) {
    low = _mm512_loadu_pd(p);
    high = _mm512_loadu_pd(p + 8);
  }
  static void load_part(const double* p, int64_t n, Reg& low, Reg& high) {
    low = _mm512_maskz_loadu_pd(first_lanes(n), p);
    high = _mm512_maskz_loadu_pd(first_lanes(n) >> 8, p + 8);
  }
  static void store(double* p, Reg low, Reg high) {
    _mm512_storeu_pd(p, low);
    _mm512_storeu_pd(p + 8, high);
  }
  static void store_part(double* p, int64_t n, Reg low, Reg high) {
    _mm512_mask_storeu_pd(p, first_lanes(n), low);
    _mm512_mask_storeu_pd(p + 8, first_lanes(n) >> 8, high);
  }
};

// bfloat16 is the upper half of a float. 32 of them seen as 16 words of 32 bits: the even ones sit in the lower halves,
// the odd ones are floats already once the lower half is cleared. So registers hold even and odd lanes here, one
// instruction each, and the basis is put into that order where it is loaded, once for several rows.
template <class Format>
struct EvenOddLanes : Float16Lanes {
  static void widen(__m512i packed, Reg& even, Reg& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(packed, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(packed, _mm512_set1_epi32(0xffff0000)));
  }
  static void load(const BFloat16* p, Reg& even, Reg& odd) { widen(_mm512_loadu_si512(p), even, odd); }
  static void load_part(const BFloat16* p, int64_t n, Reg& even, Reg& odd) {
    widen(_mm512_maskz_loadu_epi16(first_lanes(n), p), even, odd);
  }
  static void store(BFloat16* p, Reg even, Reg odd) { _mm512_storeu_si512(p, Format::narrow(even, odd)); }
  static void store_part(BFloat16* p, int64_t n, Reg even, Reg odd) {
    _mm512_mask_storeu_epi16(p, first_lanes(n), Format::narrow(even, odd));
  }
  static void sort(Reg& low, Reg& high) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const Reg first = low;
    low = _mm512_permutex2var_ps(first, even, high);
    high = _mm512_permutex2var_ps(first, odd, high);
  }
  static void load_basis(const float* p, Reg& even, Reg& odd) {
    Lanes<float>::load(p, even, odd);
    sort(even, odd);
  }
  static void load_basis_part(const float* p, int64_t n, Reg& even, Reg& odd) {
    Lanes<float>::load_part(p, n, even, odd);
    sort(even, odd);
  }
};
