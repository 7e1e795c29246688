// Compiled without any instruction set flag: NEON belongs to every aarch64.
#include <arm_neon.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

#include "cpu/neon.inl"

struct BFloat16Format : WideBFloat16 {
  // To nearest, ties to even: add 0x7fff and the last bit that stays, and keep the upper half. NaN stays NaN.
  static uint32x4_t before_cut(uint32x4_t bits) {
    return vaddq_u32(vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
  }
  static void store(BFloat16* p, Reg low, Reg high) {
    const uint32x4_t first = vreinterpretq_u32_f32(low), second = vreinterpretq_u32_f32(high);
    const uint16x4_t cut = vaddhn_u32(first, before_cut(first));
    const uint16x8_t rounded = vaddhn_high_u32(cut, second, before_cut(second));
    const uint16x8_t number = vuzp1q_u16(vreinterpretq_u16_u32(vceqq_f32(low, low)),
                                         vreinterpretq_u16_u32(vceqq_f32(high, high)));
    store8(p, vbslq_u16(number, rounded, vdupq_n_u16(0x7fc0)));
  }
};

#include "cpu/parts_by_buffer.inl"
#include "cpu/rows.inl"
#include "cpu/products.inl"

}  // namespace

const Kernels& neon_kernels() {
  static constexpr ProductsKernel of_dtype[] = {products<OrderedFloat>, products<BFloat16>, products<OrderedHalf>};
  static constexpr Kernels kernels{"neon", {rows<float>, rows<BFloat16>, rows<Half>, rows<double>}, of_dtype};
  return kernels;
}

}  // namespace tinylora::cpu
