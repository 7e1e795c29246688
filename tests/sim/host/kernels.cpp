// csrc/cuda/kernels.cu compiled for the emulator, and its kernels under the names that the host code asks for.
#include "kernels.cu"

#include "kernel.h"

namespace tinylora {
namespace {

template <class T>
constexpr Element kElement = Element::Float32;
template <>
constexpr Element kElement<BFloat16> = Element::BFloat16;
template <>
constexpr Element kElement<Half> = Element::Float16;

using Kind = Kernel::Kind;
using T = TINYLORA_ELEMENT;
constexpr int R = TINYLORA_RANK;

template <class Arguments>
void add(const Kernel& kernel, void (*function)(Arguments)) {
  emulator::kernels()[kernel.name()] = emulator::body_of(function);
}
template <Tile TILE>
void add_rows() {
  add({Kind::Rows, kElement<T>, R, TILE, false}, rows_kernel<T, R, TILE, false>);
  add({Kind::Rows, kElement<T>, R, TILE, true}, rows_kernel<T, R, TILE, true>);
  add({Kind::Parts, kElement<T>, R, TILE, false}, parts_kernel<T, R, TILE, false>);
  add({Kind::Parts, kElement<T>, R, TILE, true}, parts_kernel<T, R, TILE, true>);
}

const bool added = [] {
  add_rows<Tile::Few>();
  add_rows<Tile::Short>();
  add_rows<Tile::Medium>();
  add_rows<Tile::Long>();
  add_rows<Tile::Stream>();
  add_rows<Tile::Scalar>();
  add({Kind::BankGrad, kElement<T>, R}, bank_grad_kernel<R>);
  add({Kind::RefreshRight, kElement<T>, R}, refresh_right_kernel<T, R>);
  return true;
}();

}  // namespace
}  // namespace tinylora
