// The fixed random matrices P, bit for bit the definition in tinylora_kernels/method/philox.py (which documents the
// counter layout and the algorithms). Header only; the same source on host, CUDA and HIP.
//
// Bits must not depend on the compiler: every double operation below is rounded on its own. On a device the _rn
// intrinsics promise that; on the host each result passes through a volatile, which no optimisation level or
// architecture flag turns into a fused multiply-add. P is made once per module, so its cost does not matter.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define TINYLORA_HOST_DEVICE __host__ __device__ inline
#else
#define TINYLORA_HOST_DEVICE inline
#endif

namespace tinylora {

enum Stream : uint32_t { kStreamProjection = 0, kStreamVector = 1, kStreamSolver = 2, kStreamSketch = 3 };

struct Words {
  uint32_t w[4];
};

namespace exact {

#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
TINYLORA_HOST_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
TINYLORA_HOST_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
TINYLORA_HOST_DEVICE double div(double a, double b) { return __ddiv_rn(a, b); }
TINYLORA_HOST_DEVICE double root(double a) { return __dsqrt_rn(a); }
TINYLORA_HOST_DEVICE float round_to_float(double a) { return __double2float_rn(a); }
#else
TINYLORA_HOST_DEVICE double once(volatile double a) { return a; }
TINYLORA_HOST_DEVICE double add(double a, double b) { return once(a + b); }
TINYLORA_HOST_DEVICE double mul(double a, double b) { return once(a * b); }
TINYLORA_HOST_DEVICE double div(double a, double b) { return once(a / b); }
TINYLORA_HOST_DEVICE double root(double a) { return once(std::sqrt(a)); }
TINYLORA_HOST_DEVICE float round_to_float(double a) { return static_cast<float>(a); }
#endif

// c[0] + c[1] x + ... by Horner's rule
template <int N>
TINYLORA_HOST_DEVICE double polynomial(const double (&c)[N], double x) {
  double value = c[N - 1];
  for (int i = N - 2; i >= 0; --i) value = add(mul(value, x), c[i]);
  return value;
}

// Natural logarithm of p > 0: p = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
TINYLORA_HOST_DEVICE double log(double p) {
  const double ln2 = 0.6931471805599453, sqrt_half = 0.7071067811865476;
  const double series[12] = {1.0,        1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,  1.0 / 9.0,  1.0 / 11.0,
                             1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0};
  int e = 0;
  double m = std::frexp(p, &e);
  if (m < sqrt_half) {
    m = m + m;
    e -= 1;
  }
  const double s = div(add(m, -1.0), add(m, 1.0));
  return add(mul(static_cast<double>(e), ln2), mul(mul(2.0, s), polynomial(series, mul(s, s))));
}

}  // namespace exact

// Philox4x32-10 (Salmon et al., SC 2011).
TINYLORA_HOST_DEVICE Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c.w[0];
    const uint64_t p1 = 0xCD9E8D57ull * c.w[2];
    c = Words{{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Word `word` of row `row` of one stream.
TINYLORA_HOST_DEVICE uint32_t random_word(uint64_t seed, uint32_t index, uint32_t row, uint32_t word, Stream stream) {
  const Words counter{{word / 4, row, index, static_cast<uint32_t>(stream)}};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)).w[word % 4];
}

// N(0, 1) from a 32-bit word: the inverse normal distribution function, AS 241 (Wichura 1988).
TINYLORA_HOST_DEVICE double normal_from_word(uint32_t word) {
  const double centre_p[8] = {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
                              1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                              3.3430575583588128105e4, 2.5090809287301226727e3};
  const double centre_q[8] = {1.0,
                              4.2313330701600911252e1,
                              6.8718700749205790830e2,
                              5.3941960214247511077e3,
                              2.1213794301586595867e4,
                              3.9307895800092710610e4,
                              2.8729085735721942674e4,
                              5.2264952788528545610e3};
  const double tail_p[8] = {1.42343711074968357734e0,  4.63033784615654529590e0,  5.76949722146069140550e0,
                            3.64784832476320460504e0,  1.27045825245236838258e0,  2.41780725177450611770e-1,
                            2.27238449892691845833e-2, 7.74545014278341407640e-4};
  const double tail_q[8] = {1.0,
                            2.05319162663775882187e0,
                            1.67638483018380384940e0,
                            6.89767334985100004550e-1,
                            1.48103976427480074590e-1,
                            1.51986665636164571966e-2,
                            5.47593808499534494600e-4,
                            1.05075007164441684324e-9};
  using namespace exact;
  const double q = (static_cast<double>(word) + 0.5) * 0x1p-32 - 0.5;  // exact
  const double magnitude = q < 0 ? -q : q;
  if (magnitude <= 0.425) {
    const double x = add(0.180625, -mul(q, q));
    return div(mul(q, polynomial(centre_p, x)), polynomial(centre_q, x));
  }
  const double x = add(root(-exact::log(0.5 - magnitude)), -1.6);
  const double z = div(polynomial(tail_p, x), polynomial(tail_q, x));
  return q < 0 ? -z : z;
}

// P_i[j, k] of a module: fp32, N(0, 1/r).
TINYLORA_HOST_DEVICE float projection_entry(uint64_t seed, uint32_t index, uint32_t i, uint32_t j, uint32_t k,
                                            uint32_t r) {
  const double z = normal_from_word(random_word(seed, index, i, j * r + k, kStreamProjection));
  return exact::round_to_float(exact::div(z, exact::root(static_cast<double>(r))));
}

}  // namespace tinylora
