// Lanes<T> on AVX-512 F, BW, DQ, VL: what avx512.cpp and avx512_bf16.cpp share. Included inside an anonymous namespace.

constexpr int kAccumulators = 16;

// The first n of 32 lanes.
inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

inline void load32(const float* p, __m512& low, __m512& high) {
  low = _mm512_loadu_ps(p);
  high = _mm512_loadu_ps(p + 16);
}

inline void load32_part(const float* p, int64_t n, __m512& low, __m512& high) {
  low = _mm512_maskz_loadu_ps(first_lanes(n), p);
  high = _mm512_maskz_loadu_ps(first_lanes(n) >> 16, p + 16);
}

struct Float16Lanes {
  using Acc = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static Reg fill(float x) { return _mm512_set1_ps(x); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  static void load_basis(const float* p, Reg& low, Reg& high) { load32(p, low, high); }
  static void load_basis_part(const float* p, int64_t n, Reg& low, Reg& high) { load32_part(p, n, low, high); }
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

template <class T>
struct Lanes;

template <>
struct Lanes<float> : Float16Lanes {
  static void load(const float* p, Reg& low, Reg& high) { load32(p, low, high); }
  static void load_part(const float* p, int64_t n, Reg& low, Reg& high) { load32_part(p, n, low, high); }
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
