// Compiled with -march=armv8.2-a+sve+bf16 -msve-vector-bits=256; called only where the CPU has both and its registers are
// of that many bits. Parts of a row are moved under a mask.
#include <arm_sve.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

constexpr int kAccumulators = 16;

typedef svfloat32_t Float8 __attribute__((arm_sve_vector_bits(256)));
typedef svfloat64_t Double4 __attribute__((arm_sve_vector_bits(256)));
typedef svuint32_t Word8 __attribute__((arm_sve_vector_bits(256)));
typedef svbool_t Mask __attribute__((arm_sve_vector_bits(256)));

struct Float8Lanes {
  using Acc = float;
  using Reg = Float8;
  static constexpr int kWidth = 8;
  static Mask every() { return svptrue_b32(); }
  static Mask first_lanes(int64_t n) { return svwhilelt_b32_s64(0, n); }
  static Reg fill(float x) { return svdup_f32(x); }
  static Reg multiply(Reg a, Reg b) { return svmul_f32_x(every(), a, b); }
  static Reg add(Reg a, Reg b) { return svadd_f32_x(every(), a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return svmla_f32_x(every(), c, a, b); }
  static float sum(Reg a) { return svaddv_f32(every(), a); }
};

struct Double4Lanes {
  using Acc = double;
  using Reg = Double4;
  static constexpr int kWidth = 4;
  static Mask every() { return svptrue_b64(); }
  static Mask first_lanes(int64_t n) { return svwhilelt_b64_s64(0, n); }
  static Reg fill(double x) { return svdup_f64(x); }
  static Reg multiply(Reg a, Reg b) { return svmul_f64_x(every(), a, b); }
  static Reg add(Reg a, Reg b) { return svadd_f64_x(every(), a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return svmla_f64_x(every(), c, a, b); }
  static double sum(Reg a) { return svaddv_f64(every(), a); }
};

// One register under a mask, by the type of the numbers in memory: a load widens, a store narrows.
inline Float8 get(Mask mask, const float* p) { return svld1_f32(mask, p); }
inline Double4 get(Mask mask, const double* p) { return svld1_f64(mask, p); }
inline Word8 get_words(Mask mask, const void* p) { return svld1uh_u32(mask, static_cast<const uint16_t*>(p)); }
inline Float8 get(Mask mask, const BFloat16* p) {  // the upper half of a float
  return svreinterpret_f32_u32(svlsl_n_u32_x(svptrue_b32(), get_words(mask, p), 16));
}
inline Float8 get(Mask mask, const Half* p) {
  return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_u32(get_words(mask, p)));
}
inline void put(Mask mask, float* p, Float8 x) { svst1_f32(mask, p, x); }
inline void put(Mask mask, double* p, Double4 x) { svst1_f64(mask, p, x); }
inline void put_words(Mask mask, void* p, Word8 x) { svst1h_u32(mask, static_cast<uint16_t*>(p), x); }
inline void put(Mask mask, BFloat16* p, Float8 x) {
  put_words(mask, p, svreinterpret_u32_bf16(svcvt_bf16_f32_x(svptrue_b32(), x)));
}
inline void put(Mask mask, Half* p, Float8 x) {
  put_words(mask, p, svreinterpret_u32_f16(svcvt_f16_f32_x(svptrue_b32(), x)));
}

template <class T, class Base>
struct MaskedLanes : Base {
  using Acc = typename Base::Acc;
  using Reg = typename Base::Reg;
  using Base::every, Base::first_lanes, Base::kWidth;
  template <class Number>
  static void load(const Number* p, Reg& low, Reg& high) {
    low = get(every(), p);
    high = get(every(), p + kWidth);
  }
  template <class Number>
  static void load_part(const Number* p, int64_t n, Reg& low, Reg& high) {
    low = get(first_lanes(n), p);
    high = get(first_lanes(n - kWidth), p + kWidth);
  }
  static void store(T* p, Reg low, Reg high) {
    put(every(), p, low);
    put(every(), p + kWidth, high);
  }
  static void store_part(T* p, int64_t n, Reg low, Reg high) {
    put(first_lanes(n), p, low);
    put(first_lanes(n - kWidth), p + kWidth, high);
  }
  static void load_basis(const Acc* p, Reg& low, Reg& high) { load(p, low, high); }
  static void load_basis_part(const Acc* p, int64_t n, Reg& low, Reg& high) { load_part(p, n, low, high); }
};

template <class T>
struct Lanes : MaskedLanes<T, Float8Lanes> {};
template <>
struct Lanes<double> : MaskedLanes<double, Double4Lanes> {};

#include "cpu/rows.inl"
#include "cpu/products.inl"

}  // namespace

const Kernels& sve256_kernels() {
  static constexpr ProductsKernel of_dtype[] = {products<OrderedFloat>, products<BFloat16>, products<OrderedHalf>};
  static constexpr Kernels kernels{"sve256", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}, of_dtype};
  return kernels;
}

}  // namespace tinylora::cpu
