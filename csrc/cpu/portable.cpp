// Compiled without any instruction set flag: runs on every CPU the compiler targets.
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
  static void load(const T* p, Reg& low, Reg& high) {
    __builtin_memcpy(&low, p, sizeof low);
    __builtin_memcpy(&high, p + Width, sizeof high);
  }
  static void store(T* p, Reg low, Reg high) {
    __builtin_memcpy(p, &low, sizeof low);
    __builtin_memcpy(p + Width, &high, sizeof high);
  }
  static void load_basis(const T* p, Reg& low, Reg& high) { load(p, low, high); }
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

// Half: 1 sign, 5 exponent (bias 15), 10 fraction bits. Scaling by 2^112 moves the bias from 15 to 127 and normalises
// subnormal numbers; exponent 31 (infinity, NaN) is set to 255 by hand.
float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t scaled = bits_of_float(float_from_bits(magnitude) * 0x1p112f);
  return float_from_bits(sign | ((x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : scaled));
}

Half narrow(float x) {
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
  return Half{static_cast<uint16_t>(sign | half)};
}

struct HalfFormat : FloatFormat {
  static void load(const Half* p, Reg& low, Reg& high) {
    low = Reg{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
    high = Reg{widen(p[4]), widen(p[5]), widen(p[6]), widen(p[7])};
  }
  static void store(Half* p, Reg low, Reg high) {
    for (int i = 0; i < kWidth; ++i) {
      p[i] = narrow(low[i]);
      p[kWidth + i] = narrow(high[i]);
    }
  }
};

// Even and odd lanes, as in avx512.inl.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even lane is taken from the lower half of a word");
struct BFloat16Format : FloatFormat {
  typedef uint32_t Words __attribute__((vector_size(kWidth * sizeof(uint32_t))));
  static void load(const BFloat16* p, Reg& even, Reg& odd) {
    Words packed;
    __builtin_memcpy(&packed, p, sizeof packed);
    even = (Reg)(packed << 16);
    odd = (Reg)(packed & 0xffff0000);
  }
  // To nearest, ties to even: add 0x7fff and the last bit that stays. NaN stays NaN.
  static Words round(Reg x) {
    const Words bits = (Words)x, nan = (Words)(x != x);
    return (~nan & (bits + 0x7fff + ((bits >> 16) & 1))) | (nan & 0x7fc00000);
  }
  static void store(BFloat16* p, Reg even, Reg odd) {
    const Words packed = (round(even) >> 16) | (round(odd) & 0xffff0000);
    __builtin_memcpy(p, &packed, sizeof packed);
  }
  static void load_basis(const float* p, Reg& even, Reg& odd) {
    Reg low, high;
    FloatFormat::load(p, low, high);
    even = Reg{low[0], low[2], high[0], high[2]};
    odd = Reg{low[1], low[3], high[1], high[3]};
  }
};

#include "cpu/parts_by_buffer.inl"
#include "cpu/rows.inl"

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kernels{"portable", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}, nullptr};
  return kernels;
}

}  // namespace tinylora::cpu
