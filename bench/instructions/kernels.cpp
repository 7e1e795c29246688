// Calls one CPU kernel a number of times, without torch: linked with the objects that a wheel was linked from.
//     kernels ISA rows DTYPE N D r REPEATS        update in place, one adapter
//     kernels ISA products DTYPE N D p REPEATS    both products of a weight with p vectors
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/isa.h"

namespace cpu = tinylora::cpu;

namespace {

constexpr int64_t kBytes[] = {4, 2, 2, 8};  // by Dtype

void rows(int dtype, int64_t n, int64_t d, int64_t r, int repeats) {
  // Zeros: what is executed does not depend on the numbers as long as they are finite. Large enough for either Acc.
  std::vector<char> y(n * d * kBytes[dtype]), basis(r * d * 8), mixing(r * r * 8), t(n * r * 8), gains(n * r * 8);
  cpu::RowsJob job{};
  job.src = job.addend = job.dst = y.data();
  job.src_stride = job.addend_stride = job.dst_stride = job.features = job.dst_features = d;
  job.basis = job.factor = basis.data();
  job.rank = r;
  job.mixing = mixing.data();
  job.coefficients = t.data();
  job.gains = cpu::is_specialised(r) ? nullptr : gains.data();
  job.finite_only = true;
  for (int i = 0; i < repeats; ++i) cpu::kernels().rows[dtype](job, 0, n);
}

void products(int dtype, int64_t n, int64_t d, int64_t p, int repeats) {
  const int64_t padded = (d + cpu::kProductsStep - 1) / cpu::kProductsStep * cpu::kProductsStep;
  std::vector<char> w(n * d * kBytes[dtype]);
  std::vector<float> x(p * d), y(n * p), sums(p * padded);
  for (int i = 0; i < repeats; ++i) {
    cpu::kernels().products[dtype]({w.data(), d, n, d, x.data(), p, y.data(), sums.data(), padded});
  }
}

}  // namespace

int main(int, char** argv) {
  if (!cpu::use_isa(argv[1])) return std::fprintf(stderr, "%s: not on this CPU\n", argv[1]), 1;
  const auto run = std::strcmp(argv[2], "rows") == 0 ? rows : products;
  run(std::atoi(argv[3]), std::atoll(argv[4]), std::atoll(argv[5]), std::atoll(argv[6]), std::atoi(argv[7]));
}
