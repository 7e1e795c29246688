// The three element types, and packets of them as they travel between memory and registers.
#pragma once
#include "port.h"
#include "reduce.cuh"

namespace tinylora {

// Bits of the 16-bit types; what they mean is in the conversions below. BFloat16: the upper half of a float.
struct BFloat16 { unsigned short bits; };
struct Half { unsigned short bits; };

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

__device__ __forceinline__ bool is_finite(float x) { return (bits_as<unsigned>(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return bits_as<float>(unsigned(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) { return half_to_float(x.bits); }

// The upper half of a float, rounded to nearest even: by hand, where no instruction does it.
__device__ __forceinline__ unsigned bfloat16_bits(float x) {
  const unsigned bits = bits_as<unsigned>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // NaN
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
#ifndef TL_PAIRS
__device__ __forceinline__ unsigned bfloat16_pair(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}
__device__ __forceinline__ unsigned half_pair(float low, float high) {
  return half_bits(low) | unsigned(half_bits(high)) << 16;
}
#endif

// Rounds to nearest even, as torch does.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {static_cast<unsigned short>(bfloat16_pair(x, 0.0f))};
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) { return {half_bits(x)}; }

// One 32-bit register of a packet: a single float, or a pair of 16-bit elements, low half first.
template <class T>
struct Word;
template <>
struct Word<float> {
  static constexpr int count = 1;
  static __device__ __forceinline__ void unpack(unsigned word, float* x) { x[0] = bits_as<float>(word); }
  static __device__ __forceinline__ unsigned pack(const float* x) { return bits_as<unsigned>(x[0]); }
};
template <>
struct Word<BFloat16> {
  static constexpr int count = 2;
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    x[0] = bits_as<float>(word << 16);  // a bfloat16 is the upper half of a float
    x[1] = bits_as<float>(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned pack(const float* x) { return bfloat16_pair(x[0], x[1]); }
};
template <>
struct Word<Half> {
  static constexpr int count = 2;
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    x[0] = half_to_float(static_cast<unsigned short>(word));
    x[1] = half_to_float(static_cast<unsigned short>(word >> 16));
  }
  static __device__ __forceinline__ unsigned pack(const float* x) { return half_pair(x[0], x[1]); }
};

// The registers of a packet, as one access.
template <int WORDS>
struct Access;
template <>
struct Access<2> { using Type = uint2; };
template <>
struct Access<4> { using Type = uint4; };

__device__ __forceinline__ float load_element(const float* p) { return __ldcg(p); }
template <class T>
__device__ __forceinline__ T load_element(const T* p) { return {__ldcg(&p->bits)}; }

// W consecutive elements of a row. Rows are read once, so they pass by L1 (.cg) and leave it to the factors.
template <class T, int W>
struct Packet {
  static constexpr int kWords = W * sizeof(T) / 4;
  using Bits = typename Access<kWords>::Type;
  Bits bits;

  static __device__ __forceinline__ Packet zero() { return {Bits{}}; }
  static __device__ __forceinline__ Packet load(const T* p) { return {__ldcg(reinterpret_cast<const Bits*>(p))}; }
  __device__ __forceinline__ void store(T* p) const { global(reinterpret_cast<Bits*>(p)) = bits; }

  __device__ __forceinline__ void unpack(float (&x)[W]) const {
    constexpr int n = Word<T>::count;
    Word<T>::unpack(bits.x, x);
    Word<T>::unpack(bits.y, x + n);
    if constexpr (kWords == 4) {
      Word<T>::unpack(bits.z, x + 2 * n);
      Word<T>::unpack(bits.w, x + 3 * n);
    }
  }
  static __device__ __forceinline__ Packet pack(const float (&x)[W]) {
    constexpr int n = Word<T>::count;
    if constexpr (kWords == 4) {
      return {{Word<T>::pack(x), Word<T>::pack(x + n), Word<T>::pack(x + 2 * n), Word<T>::pack(x + 3 * n)}};
    } else {
      return {{Word<T>::pack(x), Word<T>::pack(x + n)}};
    }
  }
};

template <class T>
struct Packet<T, 1> {
  T value;

  static __device__ __forceinline__ Packet zero() { return {from_float<T>(0.0f)}; }
  static __device__ __forceinline__ Packet load(const T* p) { return {load_element(p)}; }
  __device__ __forceinline__ void store(T* p) const { global(p) = value; }
  __device__ __forceinline__ void unpack(float (&x)[1]) const { x[0] = to_float(value); }
  static __device__ __forceinline__ Packet pack(const float (&x)[1]) { return {from_float<T>(x[0])}; }
};

// W consecutive floats of a factor, through the read-only cache: neighbouring rows use the same ones. Zeros past the end.
template <int W>
__device__ __forceinline__ void load_factor(const float* p, bool inside, float (&x)[W]) {
  if constexpr (W == 1) {
    x[0] = inside ? __ldg(p) : 0.0f;
  } else {
    static_assert(W == 4, "a whole line for a warp");
    const float4 four = inside ? __ldg(reinterpret_cast<const float4*>(p)) : float4{};
    x[0] = four.x;
    x[1] = four.y;
    x[2] = four.z;
    x[3] = four.w;
  }
}

}  // namespace tinylora
