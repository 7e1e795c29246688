// Compiled with -march=armv8.2-a+bf16; called only where the CPU has it: bfloat16 rows, narrowed by one instruction a
// register. It rounds as neon.cpp does, subnormal numbers too.
#include <arm_neon.h>

#include "cpu/kernels.h"

namespace tinylora::cpu {
namespace {

#include "cpu/neon.inl"

struct BFloat16Format : WideBFloat16 {
  static void store(BFloat16* p, Reg low, Reg high) {
    store8(p, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high)));
  }
};

#include "cpu/parts_by_buffer.inl"
#include "cpu/rows.inl"

}  // namespace

void neon_bf16_rows(const RowsJob& job, int64_t begin, int64_t end) { rows<BFloat16>(job, begin, end); }

}  // namespace tinylora::cpu
