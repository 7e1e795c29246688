// Both products of rows of a weight with a few vectors, for the factorisation; called through ctypes, without the GIL.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kernels.h"

// 1 if the kernels in use have these products, 0 where torch's own are faster: those without wide registers.
extern "C" __attribute__((visibility("default"))) int tinylora_has_products() {
  return tinylora::cpu::kernels().products != nullptr;
}

// Y [count, vectors] and S [vectors, padded_width] of W [count, width], given by its first element and row stride.
// dtype: 0 float32, 1 bfloat16, 2 float16. The caller has checked every argument and that there are such products. On the
// thread that calls.
extern "C" __attribute__((visibility("default"))) void tinylora_products(int dtype, const void* rows, int64_t stride,
                                                                         int64_t count, int64_t width, const float* x,
                                                                         int64_t vectors, float* y, float* sums,
                                                                         int64_t padded_width) {
  tinylora::cpu::kernels().products[dtype]({rows, stride, count, width, x, vectors, y, sums, padded_width});
}
