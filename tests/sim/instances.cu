// The row kernels of one element type and the dv kernels, instantiated: -DELEMENT=float "-DRANKS=RANK(2) RANK(8)".
#include "rows.cuh"
#include "vector_grad.cuh"

#define ROWS(R, TILE) \
  template __global__ void tinylora::rows_kernel<ELEMENT, R, tinylora::Tile::TILE>(const tinylora::RowsArguments);
#define RANK(R)                                                                                                 \
  ROWS(R, Short) ROWS(R, Medium) ROWS(R, Long) ROWS(R, Scalar) ROWS(R, Stream) ROWS(R, StreamScalar)            \
  template __global__ void tinylora::vector_grad_kernel<R>(const tinylora::VectorGradArguments);
RANKS
