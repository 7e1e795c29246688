// Every kernel of one element type and rank: what NVRTC is given, with -DTINYLORA_ELEMENT=tinylora::BFloat16 and
// -DTINYLORA_RANK=2. kernel.cpp has the names under which they are found.
#include "bank_grad.cuh"
#include "parts.cuh"
#include "right.cuh"
#include "rows.cuh"

namespace tinylora {

#define ROWS(TILE)                                                                                       \
  template __global__ void rows_kernel<TINYLORA_ELEMENT, TINYLORA_RANK, Tile::TILE, false>(RowsArguments); \
  template __global__ void rows_kernel<TINYLORA_ELEMENT, TINYLORA_RANK, Tile::TILE, true>(RowsArguments);  \
  template __global__ void parts_kernel<TINYLORA_ELEMENT, TINYLORA_RANK, Tile::TILE, false>(               \
      const __grid_constant__ PartsArguments);                                                             \
  template __global__ void parts_kernel<TINYLORA_ELEMENT, TINYLORA_RANK, Tile::TILE, true>(                \
      const __grid_constant__ PartsArguments);
ROWS(Few)
ROWS(Short)
ROWS(Medium)
ROWS(Long)
ROWS(Stream)
ROWS(Scalar)
#undef ROWS
template __global__ void bank_grad_kernel<TINYLORA_RANK>(BankGradArguments);
template __global__ void refresh_right_kernel<TINYLORA_ELEMENT, TINYLORA_RANK>(RightArguments);

#ifdef __CUDACC__
__device__ uint32_t tickets[kStreamTickets + kGraphTickets];  // each zero before and after every launch: Device::ticket
#endif

}  // namespace tinylora
