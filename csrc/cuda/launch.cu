#include "launch.h"

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace tinylora {
namespace {

constexpr int kDevices = 16;   // whose numbers are remembered
constexpr int kTickets = 256;  // streams that have a ticket of their own

int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

int multiprocessors(int device) {
  static std::atomic<int> known[kDevices];
  if (device < kDevices && known[device]) return known[device];
  int count = 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (device < kDevices) known[device] = count;
  return count;
}

RowsKernel kernel_of(Element element, int rank, Tile tile, bool ids) {
  switch (element) {
    case Element::Float32: return rows_kernel_of<float>(rank, tile, ids);
    case Element::BFloat16: return rows_kernel_of<__nv_bfloat16>(rank, tile, ids);
    default: return rows_kernel_of<__half>(rank, tile, ids);
  }
}

// Blocks of these threads that a multiprocessor runs at once. Asked of the runtime once: it takes a microsecond.
int resident_blocks(Element element, int rank, Tile tile, bool ids, int threads, int device) {
  static std::atomic<int8_t> known[kDevices][3][4][6][2][kMaxWarps + 1];
  const int power = rank == 1 ? 0 : rank == 2 ? 1 : rank == 4 ? 2 : 3;
  std::atomic<int8_t>& seen =
      known[device % kDevices][static_cast<int>(element)][power][static_cast<int>(tile)][ids][threads / kWarp];
  if (device < kDevices && seen) return seen;
  int blocks = 1;
  const auto* const kernel = reinterpret_cast<const void*>(kernel_of(element, rank, tile, ids));
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  blocks = std::max(blocks, 1);
  if (device < kDevices) seen = static_cast<int8_t>(blocks);
  return blocks;
}

bool aligned_side(const Side& side, int rows, int element_bytes) {
  const auto starts_on = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  return side.features % 4 == 0 && (rows == 1 || side.stride % 4 == 0) && starts_on(side.rows, 4 * element_bytes) &&
         starts_on(side.factor, 16);
}

bool aligned(const RowsArguments& p, int element_bytes) {
  const bool bias = reinterpret_cast<uintptr_t>(p.bias) % (4 * element_bytes) == 0;
  return bias && aligned_side(p.source, p.rows, element_bytes) &&
         (!p.target.rows || aligned_side(p.target, p.rows, element_bytes));
}

// A counter in device memory that is zero before and after every launch, and that no two launches use at once: those of a
// stream follow one another. Null where the stream is being captured, for a graph may run beside anything, and where there
// are more streams than tickets.
__device__ uint32_t tickets[kTickets];
uint32_t* ticket_of(cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, uint32_t*> known;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
  unsigned long long id = 0;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone) return nullptr;
  if (cudaStreamGetId(stream, &id) != cudaSuccess) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(current_device(), id);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() == kTickets) return nullptr;
  void* first = nullptr;
  if (cudaGetSymbolAddress(&first, tickets) != cudaSuccess) return nullptr;
  return known[key] = static_cast<uint32_t*>(first) + known.size();
}

}  // namespace

LaunchPlan plan_rows(Element element, int rank, const RowsArguments& p) {
  const int device = current_device(), bytes = element_bytes(element), processors = multiprocessors(device);
  const bool stays = p.onto == Onto::Source && p.target.rows;
  LaunchPlan plan = plan_tile(p.source.features, bytes, aligned(p, bytes), stays, p.rows <= processors);
  const int rows = plan.teams * tile_shape(plan.tile, bytes).rows;
  const int resident = resident_blocks(element, rank, plan.tile, p.mixing.ids, plan.team * plan.teams, device);
  plan.blocks = spread(p.rows, rows, processors, processors * resident);
  return plan;
}

void run_rows(Element element, int rank, const LaunchPlan& plan, RowsArguments p, cudaStream_t stream) {
  if (plan.blocks == 0) return;
  p.share = p.rows / plan.blocks;
  p.longer = p.rows % plan.blocks;
  const RowsKernel kernel = kernel_of(element, rank, plan.tile, p.mixing.ids);
  TL_LAUNCH(kernel, dim3(plan.blocks), dim3(plan.team, plan.teams), stream, p);
}

// With ids: a [N, R]. Without: the dM of every block, and a ticket.
int64_t scratch_words(int rank, const LaunchPlan& plan, const RowsArguments& p) {
  return p.mixing.ids ? int64_t(p.rows) * rank : int64_t(plan.blocks) * rank * rank + 1;
}

void run_rows_and_gradient(Element element, int rank, const LaunchPlan& plan, RowsArguments p, const float* t, float* dv,
                           float* scratch, cudaStream_t stream) {
  const int64_t numbers = int64_t(p.mixing.adapters) * p.mixing.numbers;
  if (plan.blocks == 0) {  // an empty sum
    cudaMemsetAsync(dv, 0, sizeof(float) * numbers, stream);
    return;
  }
  if (!p.mixing.ids) {
    p.t = t;
    p.dv = dv;
    p.partial = scratch;
    p.ticket = plan.blocks > 1 ? ticket_of(stream) : nullptr;
    if (plan.blocks > 1 && !p.ticket) {
      p.ticket = reinterpret_cast<uint32_t*>(scratch) + scratch_words(rank, plan, p) - 1;
      cudaMemsetAsync(p.ticket, 0, sizeof(uint32_t), stream);
    }
    return run_rows(element, rank, plan, p, stream);
  }
  const int ids = p.rows / p.mixing.rows_per_id;
  p.coefficients = scratch;
  if (p.mixing.adapters > ids) {
    p.cleared = dv;
    p.cleared_count = numbers;
  }
  run_rows(element, rank, plan, p, stream);
  launch_bank_grad(rank, std::min(ids, p.mixing.adapters), {scratch, t, dv, p.rows, ids, p.mixing}, stream);
}

}  // namespace tinylora
