// The row kernels of one element type and the kernels of a bank, instantiated: -DELEMENT=float "-DRANKS=RANK(2) RANK(8)".
#include "bank_grad.cuh"
#include "rows.cuh"

#define ROWS(R, TILE, IDS) \
  template __global__ void tinylora::rows_kernel<ELEMENT, R, tinylora::Tile::TILE, IDS>(const tinylora::RowsArguments);
#define TILES(R, IDS) ROWS(R, Few, IDS) ROWS(R, Short, IDS) ROWS(R, Medium, IDS) ROWS(R, Long, IDS) ROWS(R, Stream, IDS) ROWS(R, Scalar, IDS)
#define RANK(R)                    \
  TILES(R, false) TILES(R, true)   \
  template __global__ void tinylora::bank_grad_kernel<R>(const tinylora::BankGradArguments);
RANKS
