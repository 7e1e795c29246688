// Two small kernels with one bug each, chosen by number, to prove that the emulator reports what it should.
// Number 0 is clean. Usage: bugs NUMBER; exit status 3 and a line on standard error for a fault, 5 for a wrong result.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulator.h"

namespace {

enum Bug : int {
  kNone, kReadPastEnd, kWritePastEnd, kSharedPastEnd, kNoBarrier, kNoBarrierBeforeReuse, kDivergentBarrier,
  kDivergentShuffle, kShuffleAfterExit, kMisaligned, kUnorderedSum, kNoFence, kUninitialised, kNoSyncWarp,
  kIndexOverflow, kWrongLane, kTwoBarriers
};

constexpr int kThreads = 64, kColumns = 100;

// out[row] = sum of a row of x [rows, kColumns], one block a row.
template <int BUG>
__global__ void sum_rows(const float* x, float* out, int rows) {
  TL_SHARED(float, partial, kThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  if (BUG == kShuffleAfterExit && threadIdx.x == 5) return;
  float sum = 0;
  const int end = BUG == kReadPastEnd && row == rows - 1 ? kColumns + 1 : kColumns;
  for (int i = threadIdx.x; i < end; i += kThreads) sum += x[row * kColumns + i];
  for (int step = 16; step > 0; step /= 2) {
    if (BUG == kDivergentShuffle && lane >= step) continue;
    const unsigned mask = BUG == kWrongLane ? 0x0000ffffu : 0xffffffffu;
    if (BUG == kWrongLane && lane >= 16) continue;
    sum += __shfl_xor_sync(mask, sum, BUG == kWrongLane ? 16 : step);
  }
  if (lane == 0 && !(BUG == kUninitialised && warp == 1)) partial[BUG == kSharedPastEnd ? warp + 1 : warp] = sum;
  if (BUG == kDivergentBarrier) {
    if (warp == 0) __syncthreads();
  } else if (BUG == kTwoBarriers) {
    if (warp == 0) __syncthreads();
    else
      __syncthreads();
  } else if (BUG != kNoBarrier) {
    __syncthreads();
  }
  const float total = partial[0] + partial[1];
  if (BUG == kNoBarrierBeforeReuse && threadIdx.x == 40) partial[0] = 0;
  if (BUG == kNoSyncWarp) {  // lanes of one warp hand over a value through memory
    TL_SHARED(float, handover, 32);
    if (warp == 0) handover[lane] = total;
    if (threadIdx.x == 0) out[row] = handover[31];
    return;
  }
  if (threadIdx.x == 0) out[BUG == kWritePastEnd ? row + 1 : row] = total;
  if (BUG == kIndexOverflow && threadIdx.x == 0) out[row] += static_cast<float>((row + 1) * 0x7fffffff & 1);
}

// total = the sum of part, one element a block; the last block to draw a ticket adds them up.
template <int BUG>
__global__ void last_block_sums(const float* part, float* scratch, unsigned* ticket, float* total) {
  if (threadIdx.x != 0) return;
  if (BUG == kUnorderedSum) {
    *total += part[blockIdx.x];
    return;
  }
  scratch[blockIdx.x] = part[blockIdx.x];
  if (BUG != kNoFence) __threadfence();
  const bool last = atomicInc(ticket, gridDim.x - 1) + 1 == gridDim.x;
  if (BUG != kNoFence) __threadfence();
  if (!last) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += scratch[i];
  *total = sum;
}

template <class T>
T* device(size_t count, size_t skew = 0) {
  return reinterpret_cast<T*>(static_cast<char*>(std::malloc(count * sizeof(T) + skew)) + skew);
}

template <int BUG>
int check() {
  constexpr int rows = 3;
  float* const x = device<float>(rows * kColumns, BUG == kMisaligned ? 2 : 0);
  float *const out = device<float>(rows), *const scratch = device<float>(rows), *const total = device<float>(1);
  unsigned* const ticket = device<unsigned>(1);
  for (int i = 0; i < rows * kColumns; ++i) {
    const float value = static_cast<float>(i % 7);
    std::memcpy(reinterpret_cast<char*>(x) + i * sizeof(float), &value, sizeof value);
  }
  *ticket = 0;
  *total = 0;
  emulator::launch(sum_rows<BUG>, dim3(rows), dim3(kThreads), x, out, rows);
  emulator::launch(last_block_sums<BUG>, dim3(rows), dim3(32), out, scratch, ticket, total);
  float expected = 0;
  for (int i = 0; i < rows * kColumns; ++i) expected += static_cast<float>(i % 7);
  if (*total != expected) {
    std::fprintf(stderr, "wrong result: %g instead of %g\n", *total, expected);
    return 5;
  }
  return 0;
}

template <int... BUGS>
int choose(int bug, std::integer_sequence<int, BUGS...>) {
  int status = 4;
  ((bug == BUGS ? void(status = check<BUGS>()) : void()), ...);
  return status;
}

}  // namespace

int main(int, char** argv) {
  try {
    return choose(std::atoi(argv[1]), std::make_integer_sequence<int, kTwoBarriers + 1>());
  } catch (const emulator::Fault& fault) {
    std::fprintf(stderr, "fault: %s\n", fault.what());
    return 3;
  }
}
