// The three element types, and packets of them as they travel between memory and registers.
#pragma once
#include <cstring>
#include <type_traits>

#include "port.h"

namespace tinylora {

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

__device__ __forceinline__ bool is_finite(float x) { return (bits_as<unsigned>(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Rounds to nearest even, as torch does.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

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
struct Word<__nv_bfloat16> {
  static constexpr int count = 2;
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    x[0] = bits_as<float>(word << 16);  // a bfloat16 is the upper half of a float
    x[1] = bits_as<float>(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned pack(const float* x) {
    return bits_as<unsigned>(__floats2bfloat162_rn(x[0], x[1]));
  }
};
template <>
struct Word<__half> {
  static constexpr int count = 2;
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    const float2 pair = __half22float2(bits_as<__half2>(word));
    x[0] = pair.x;
    x[1] = pair.y;
  }
  static __device__ __forceinline__ unsigned pack(const float* x) {
    return bits_as<unsigned>(__floats2half2_rn(x[0], x[1]));
  }
};

// W consecutive elements of a row. Rows are read once, so they pass by L1 (.cg) and leave it to the factors.
template <class T, int W>
struct Packet {
  static constexpr int kWords = W * sizeof(T) / 4;
  using Bits = std::conditional_t<kWords == 4, uint4, uint2>;
  static_assert(kWords == 4 || kWords == 2, "a packet is 16 bytes, 8 bytes or one element");
  Bits bits;

  static __device__ __forceinline__ Packet zero() { return {Bits{}}; }
  static __device__ __forceinline__ Packet load(const T* p) { return {__ldcg(reinterpret_cast<const Bits*>(p))}; }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Bits*>(p) = bits; }

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
  static __device__ __forceinline__ Packet load(const T* p) { return {__ldcg(p)}; }
  __device__ __forceinline__ void store(T* p) const { *p = value; }
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
