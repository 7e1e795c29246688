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

// 32 numbers of 16 bits in one register; `Format` widens half of them and narrows two halves.
template <class T, class Format>
struct Lanes16 : Float16Lanes {
  static void widen(__m512i packed, Reg& low, Reg& high) {
    low = Format::widen(_mm512_castsi512_si256(packed));
    high = Format::widen(_mm512_extracti64x4_epi64(packed, 1));
  }
  static void load(const T* p, Reg& low, Reg& high) { widen(_mm512_loadu_si512(p), low, high); }
  static void load_part(const T* p, int64_t n, Reg& low, Reg& high) {
    widen(_mm512_maskz_loadu_epi16(first_lanes(n), p), low, high);
  }
  static void store(T* p, Reg low, Reg high) { _mm512_storeu_si512(p, Format::narrow(low, high)); }
  static void store_part(T* p, int64_t n, Reg low, Reg high) {
    _mm512_mask_storeu_epi16(p, first_lanes(n), Format::narrow(low, high));
  }
};

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline __m512 widen_bfloat16(__m256i packed) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
}
