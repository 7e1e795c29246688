// Small kernels, each with one bug that a GPU would let pass, and the same kernel without it (-DPLANT=0).
// test_ptx_harness.py holds the list of what the interpreter must say about each.
#if PLANT
#define BUG(wrong, right) wrong
#else
#define BUG(wrong, right) right
#endif
#define KERNEL extern "C" __global__ void
constexpr int kThreads = 64;  // every kernel runs on 2 blocks of 64 threads, n = 120 floats

KERNEL global_out_of_bounds(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (BUG(i <= n, i < n)) y[i] = 2 * x[i];
}

KERNEL shared_out_of_bounds(const float* x, float* y, int n) {
  __shared__ float row[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) y[i] = row[BUG(threadIdx.x + 1, threadIdx.x ^ 1)];
}

KERNEL missing_barrier(const float* x, float* y, int n) {
  __shared__ float row[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = i < n ? x[i] : 0;
  BUG(, __syncthreads());
  if (i < n) y[i] = row[threadIdx.x ^ 33];
}

KERNEL missing_warp_barrier(const float* x, float* y, int n) {
  __shared__ float row[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = i < n ? x[i] : 0;
  BUG(, __syncwarp());
  if (i < n) y[i] = row[threadIdx.x ^ 1];
}

KERNEL write_after_read(const float* x, float* y, int n) {
  __shared__ float first[1];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x == 0) first[0] = x[i];
  __syncthreads();
  const float a = first[0];
  BUG(, __syncthreads());
  if (threadIdx.x == 40) first[0] = 7;
  __syncthreads();
  if (i < n) y[i] = a + first[0];
}

KERNEL two_writers(const float* x, float* y, int n) {
  __shared__ float row[kThreads];
  row[BUG(threadIdx.x / 2, threadIdx.x)] = threadIdx.x;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + row[threadIdx.x / 2];
}

KERNEL divergent_barrier(const float* x, float* y, int n) {
  __shared__ float row[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = threadIdx.x;
  if (BUG(i < n - 60, n > 0)) __syncthreads();  // torn within a warp
  if (i < n) y[i] = x[i] + row[threadIdx.x];
}

KERNEL barrier_without_a_warp(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (BUG(threadIdx.x >= 32, false)) return;  // a whole warp leaves
  __syncthreads();
  if (i < n) y[i] = x[i];
}

KERNEL divergent_shuffle(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < n ? x[i] : 0;
  for (int step = 16; step; step /= 2)
    if (BUG(threadIdx.x % 32 < step, n > 0)) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (i < n) y[i] = sum;
}

KERNEL shuffle_from_absent_lane(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float a = i < n ? x[i] : 0;
  if (threadIdx.x % 32 < 16) a += __shfl_xor_sync(0x0000ffffu, a, BUG(16, 8));
  if (i < n) y[i] = a;
}

KERNEL unordered_blocks(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
  if (threadIdx.x == 0) BUG(y[n] += 1, atomicAdd(y + n, 1));  // y has n + 1 elements, the last one 0
}

// partial sums, added up by whichever block finishes last; y[n..n+1] partial, counter in y[n+2]
KERNEL missing_fence(const float* x, float* y, int n) {
  __shared__ bool last;
  unsigned* counter = reinterpret_cast<unsigned*>(y + n + 2);
  if (threadIdx.x == 0) {
    y[n + blockIdx.x] = x[blockIdx.x];
    BUG(, __threadfence());
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) y[0] = __ldcg(y + n) + __ldcg(y + n + 1);
}

KERNEL uninitialised_shared(const float* x, float* y, int n) {
  __shared__ float row[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < BUG(kThreads - 1, kThreads)) row[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (i < n) y[i] = x[i] + row[kThreads - 1 - threadIdx.x];
}

KERNEL uninitialised_output(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + BUG(y[i], 0);  // y comes from torch.empty
}

KERNEL misaligned_vector(const float* x, float* y, int n) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i + BUG(1, 0) + 4 <= n) *reinterpret_cast<float4*>(y + i) = *reinterpret_cast<const float4*>(x + i + BUG(1, 0));
}

KERNEL writes_input(float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) BUG(x[i] = 0, y[i] = x[i]);
}

KERNEL stale_cache(const float* __restrict__ x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];  // the launch passes x = y where the bug is planted: x is read through ld.global.nc
}

KERNEL spills(const float* x, float* y, int n) {
  float row[8];
  for (int k = 0; k < 8; ++k) row[k] = x[k];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = row[BUG(n * i % 8, 3)];  // an index known only at run time sends the array to local memory
}

KERNEL uncoalesced(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[BUG(i % 8 * 15 + i / 8, i)];
}

KERNEL reads_twice(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + BUG(__ldcg(x + n - 1 - i), 1);
}

KERNEL traps(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= BUG(n, 1000)) __trap();
  if (i < n) y[i] = x[i];
}
