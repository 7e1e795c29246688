// Compiled without any instruction set flag: runs on every CPU the compiler targets (SSE2 on x86-64, NEON on aarch64).
// Registers of 16 bytes through the vector extension that gcc and clang share.
#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

constexpr int kAccumulators = 8;

template <class T, int Width>
struct VectorLanes {
  using Acc = T;
  static constexpr int kWidth = Width;
  typedef T Reg __attribute__((vector_size(Width * sizeof(T))));
  static Reg fill(T x) { return x - Reg{}; }
  static Reg multiply(Reg a, Reg b) { return a * b; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return a * b + c; }
  static T sum(Reg a) {
    T total = a[0];
    for (int i = 1; i < Width; ++i) total += a[i];
    return total;
  }
  static Reg load_one(const T* p) {
    Reg x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void store_one(T* p, Reg x) { __builtin_memcpy(p, &x, sizeof x); }
};

using FloatFormat = VectorLanes<float, 4>;
using DoubleFormat = VectorLanes<double, 2>;

float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

float widen(BFloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }

// To nearest, ties to even: add 0x7fff and the last bit that stays. NaN stays NaN.
void narrow(float x, BFloat16& out) {
  const uint32_t bits = bits_of_float(x);
  out.bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Half: 1 sign, 5 exponent (bias 15), 10 fraction bits. Scaling by 2^112 moves the bias from 15 to 127 and normalises
// subnormal numbers; exponent 31 (infinity, NaN) is set to 255 by hand.
float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t scaled = bits_of_float(float_from_bits(magnitude) * 0x1p112f);
  return float_from_bits(sign | ((x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : scaled));
}

void narrow(float x, Half& out) {
  const uint32_t sign = (bits_of_float(x) >> 16) & 0x8000;
  const uint32_t magnitude = bits_of_float(x) & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 the spacing is 2^-24, that of floats in [0.5, 1): adding 0.5 rounds to it.
    half = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out.bits = sign | half;
}

template <class T>
struct NarrowFormat : FloatFormat {
  static Reg load_one(const T* p) {
    Reg x;
    for (int i = 0; i < kWidth; ++i) x[i] = widen(p[i]);
    return x;
  }
  static void store_one(T* p, Reg x) {
    for (int i = 0; i < kWidth; ++i) narrow(x[i], p[i]);
  }
};

using BFloat16Format = NarrowFormat<BFloat16>;
using HalfFormat = NarrowFormat<Half>;

#include "cpu/lanes_by_one.inl"
#include "cpu/rows.inl"

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kernels{"portable", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}};
  return kernels;
}

}  // namespace tinylora::cpu
