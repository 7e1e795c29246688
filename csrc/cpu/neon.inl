// Formats on NEON, which every aarch64 has, all but bfloat16's: what neon.cpp and neon_bf16.cpp share. Included inside an
// anonymous namespace.

constexpr int kAccumulators = 16;

struct Float4Lanes {
  using Acc = float;
  using Reg = float32x4_t;
  static constexpr int kWidth = 4;
  static Reg fill(float x) { return vdupq_n_f32(x); }
  static Reg multiply(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static float sum(Reg a) { return vaddvq_f32(a); }
  static void load_basis(const float* p, Reg& low, Reg& high) {
    low = vld1q_f32(p);
    high = vld1q_f32(p + 4);
  }
};

struct FloatFormat : Float4Lanes {
  static void load(const float* p, Reg& low, Reg& high) { load_basis(p, low, high); }
  static void store(float* p, Reg low, Reg high) {
    vst1q_f32(p, low);
    vst1q_f32(p + 4, high);
  }
};

struct DoubleFormat {
  using Acc = double;
  using Reg = float64x2_t;
  static constexpr int kWidth = 2;
  static Reg fill(double x) { return vdupq_n_f64(x); }
  static Reg multiply(Reg a, Reg b) { return vmulq_f64(a, b); }
  static Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static double sum(Reg a) { return vaddvq_f64(a); }
  static void load(const double* p, Reg& low, Reg& high) {
    low = vld1q_f64(p);
    high = vld1q_f64(p + 2);
  }
  static void store(double* p, Reg low, Reg high) {
    vst1q_f64(p, low);
    vst1q_f64(p + 2, high);
  }
  static void load_basis(const double* p, Reg& low, Reg& high) { load(p, low, high); }
};

// 8 numbers of 16 bits as they lie in one register, in order: widening either half of it is one instruction.
inline uint16x8_t load8(const void* p) { return vld1q_u16(static_cast<const uint16_t*>(p)); }
inline void store8(void* p, uint16x8_t packed) { vst1q_u16(static_cast<uint16_t*>(p), packed); }

struct HalfFormat : Float4Lanes {
  static void load(const Half* p, Reg& low, Reg& high) {
    const float16x8_t packed = vreinterpretq_f16_u16(load8(p));
    low = vcvt_f32_f16(vget_low_f16(packed));
    high = vcvt_high_f32_f16(packed);
  }
  static void store(Half* p, Reg low, Reg high) {
    store8(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high)));
  }
};

// bfloat16 is the upper half of a float.
struct WideBFloat16 : Float4Lanes {
  static void load(const BFloat16* p, Reg& low, Reg& high) {
    const uint16x8_t packed = load8(p);
    low = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(packed), 16));
    high = vreinterpretq_f32_u32(vshll_high_n_u16(packed, 16));
  }
};
