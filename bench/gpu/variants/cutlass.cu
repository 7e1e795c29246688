// d = x W^T + gains U^T forward, d = g W + gains B^T backward: a product of CUTLASS's for Hopper whose epilogue, a tree
// of visitors, adds the term of rank r to the sums before they are rounded, once.
//
//     x [N, k], w [n, k] forward or [k, n] backward, d [N, n]: ELEMENT, sums in fp32
//     gains [r, N], factor [r, n]: fp32, a row for each j: a visitor takes a column or a row of unit stride
//
// cutlass.py compiles this once for each CONFIG: 4 products each, for two layouts of W, with the term and without.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

#ifndef ELEMENT
#define ELEMENT cutlass::bfloat16_t
#endif
#ifndef RANK
#define RANK 2
#endif
#ifndef CONFIG
#define CONFIG 0
#endif

namespace tinylora {
namespace {

namespace collective = cutlass::gemm::collective;
namespace epilogue = cutlass::epilogue;
namespace fusion = cutlass::epilogue::fusion;
using cute::_1;
using cute::_2;
using Element = ELEMENT;
using RowMajor = cutlass::layout::RowMajor;
constexpr int kPacket = 16 / sizeof(Element);  // elements of a 16-byte access: n and k must be multiples of it
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// How a product is cut up. Cooperative: two groups of warps share a tile; ping-pong: each has a tile of its own, so
// that one's epilogue, the term with it, runs beside the other's main loop.
template <int ROWS, int COLUMNS, class MAINLOOP, class EPILOGUE>
struct Config {
  using Tile = cute::Shape<cute::Int<ROWS>, cute::Int<COLUMNS>, cute::Int<64>>;
  using Cluster = cute::Shape<_2, _1, _1>;
  using Mainloop = MAINLOOP;
  using Epilogue = EPILOGUE;
};
#if CONFIG == 0
#define NAME tinylora_product_128x256
using Chosen = Config<128, 256, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                      epilogue::TmaWarpSpecializedCooperative>;
#elif CONFIG == 1
#define NAME tinylora_product_256x128
using Chosen = Config<256, 128, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                      epilogue::TmaWarpSpecializedCooperative>;
#else
#define NAME tinylora_product_64x256
using Chosen = Config<64, 256, cutlass::gemm::KernelTmaWarpSpecializedPingpong, epilogue::TmaWarpSpecialized>;
#endif

// sum_{j < J} gains_j factor_j + acc, as visitors: gains_j runs down a tile's rows, factor_j along its columns.
template <class TILE, int J>
struct Term {
  using Gain = fusion::Sm90ColBroadcast<0, TILE, float>;
  using Factor = fusion::Sm90RowBroadcast<0, TILE, float>;
  using Out = std::conditional_t<J == RANK, Element, float>;  // rounded by the last
  using MultiplyAdd = fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Out, float, kRound>;
  using Below = Term<TILE, J - 1>;
  using Tree = fusion::Sm90EVT<MultiplyAdd, Gain, Factor, typename Below::Tree>;

  static typename Tree::Arguments arguments(const float* gains, const float* factor, int64_t rows, int64_t n) {
    return {{gains + (J - 1) * rows}, {factor + (J - 1) * n}, Below::arguments(gains, factor, rows, n), {}};
  }
};

template <class TILE>
struct Term<TILE, 0> {
  using Tree = fusion::Sm90AccFetch;
  static typename Tree::Arguments arguments(const float*, const float*, int64_t, int64_t) { return {}; }
};

struct Operands {
  const void *x, *w;
  void* d;
  const float *gains, *factor;
  int rows, n, k, multiprocessors, swizzle;
};

// 0; or which step refused: -1 a shape or an address, -2 it would want a workspace, -3 preparing, -4 the launch.
template <class LAYOUT, bool TERM>
int run(const Operands& o, cudaStream_t stream) {
  using Bare = fusion::LinearCombination<Element, float, void, float>;
  using WithTerm = Term<typename Chosen::Tile, RANK>;
  using Fusion = std::conditional_t<TERM, typename WithTerm::Tree, Bare>;
  using Epilogue = typename epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Chosen::Tile, typename Chosen::Cluster,
      epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kPacket, Element, RowMajor, kPacket,
      typename Chosen::Epilogue, Fusion>::CollectiveOp;
  using Mainloop = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kPacket, Element, LAYOUT, kPacket, float,
      typename Chosen::Tile, typename Chosen::Cluster,
      collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      typename Chosen::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Product = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  const auto packed = [](auto stride, int lines, int length) {
    return cutlass::make_cute_packed_stride(stride, cute::make_shape(lines, length, 1));
  };
  typename Product::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {o.rows, o.n, o.k, 1},
      {static_cast<const Element*>(o.x), packed(typename Kernel::StrideA{}, o.rows, o.k),
       static_cast<const Element*>(o.w), packed(typename Kernel::StrideB{}, o.n, o.k)},
      {{}, nullptr, {}, static_cast<Element*>(o.d), packed(typename Kernel::StrideD{}, o.rows, o.n)}};
  if constexpr (TERM) {
    arguments.epilogue.thread = WithTerm::arguments(o.gains, o.factor, o.rows, o.n);
  } else {
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = 0.0f;
  }
  arguments.hw_info.sm_count = o.multiprocessors;
  arguments.scheduler.max_swizzle_size = o.swizzle;
  if (Product::can_implement(arguments) != cutlass::Status::kSuccess) return -1;
  if (Product::get_workspace_size(arguments) != 0) return -2;
  Product product;
  if (product.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return -3;
  return product.run(stream) == cutlass::Status::kSuccess ? 0 : -4;
}

}  // namespace
}  // namespace tinylora

// forward: W is [n, k], and else [k, n]. The term needs gains and factor, the bare product neither.
extern "C" int NAME(int forward, int term, const void* x, const void* w, void* d, const float* gains,
                    const float* factor, int rows, int n, int k, int multiprocessors, int swizzle, void* stream) {
  const tinylora::Operands operands{x, w, d, gains, factor, rows, n, k, multiprocessors, swizzle};
  const auto on = static_cast<cudaStream_t>(stream);
  using Forward = cutlass::layout::ColumnMajor;
  using Backward = cutlass::layout::RowMajor;
  if (forward) return term ? tinylora::run<Forward, true>(operands, on) : tinylora::run<Forward, false>(operands, on);
  return term ? tinylora::run<Backward, true>(operands, on) : tinylora::run<Backward, false>(operands, on);
}
