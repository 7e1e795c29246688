#include "launch.h"

namespace tinylora {
namespace {

using Kind = Kernel::Kind;

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

Kernel rows_kernel_of(Element element, int rank, const LaunchPlan& plan, const RowsArguments& p) {
  return {Kind::Rows, element, rank, plan.tile, p.mixing.ids != nullptr};
}

}  // namespace

LaunchPlan plan_rows(const Device& device, Element element, int rank, const RowsArguments& p) {
  const int bytes = element_bytes(element), processors = device.multiprocessors();
  const bool stays = p.onto == Onto::Source && p.target.rows;
  LaunchPlan plan = plan_tile(p.source.features, bytes, aligned(p, bytes), stays, p.rows <= processors);
  const int rows = plan.teams * tile_shape(plan.tile, bytes).rows;
  const int resident = device.resident_blocks(rows_kernel_of(element, rank, plan, p), plan.team * plan.teams);
  plan.blocks = spread(p.rows, rows, processors, processors * resident);
  return plan;
}

void run_rows(const Device& device, Element element, int rank, const LaunchPlan& plan, RowsArguments p, Stream stream) {
  if (plan.blocks == 0) return;
  p.share = p.rows / plan.blocks;
  p.longer = p.rows % plan.blocks;
  const Extent grid{unsigned(plan.blocks)}, block{unsigned(plan.team), unsigned(plan.teams)};
  device.launch(rows_kernel_of(element, rank, plan, p), grid, block, stream, &p);
}

// With ids: a [N, R]. Without: the dM of every block, and a ticket.
int64_t scratch_words(int rank, const LaunchPlan& plan, const RowsArguments& p) {
  return p.mixing.ids ? int64_t(p.rows) * rank : int64_t(plan.blocks) * rank * rank + 1;
}

void run_rows_and_gradient(const Device& device, Element element, int rank, const LaunchPlan& plan, RowsArguments p,
                           const float* t, float* dv, float* scratch, Stream stream) {
  const int64_t numbers = int64_t(p.mixing.adapters) * p.mixing.numbers;
  if (plan.blocks == 0) {  // an empty sum
    if (numbers > 0) device.clear(dv, numbers, stream);
    return;
  }
  if (!p.mixing.ids) {
    p.t = t;
    p.dv = dv;
    p.partial = scratch;
    if (plan.blocks > 1) p.ticket = device.ticket(rows_kernel_of(element, rank, plan, p), stream);
    if (plan.blocks > 1 && !p.ticket) {
      p.ticket = reinterpret_cast<uint32_t*>(scratch) + scratch_words(rank, plan, p) - 1;
      device.clear(p.ticket, 1, stream);
    }
    return run_rows(device, element, rank, plan, p, stream);
  }
  const int ids = p.rows / p.mixing.rows_per_id;
  p.coefficients = scratch;
  if (p.mixing.adapters > ids) {
    p.cleared = dv;
    p.cleared_count = numbers;
  }
  run_rows(device, element, rank, plan, p, stream);
  const BankGradArguments bank{scratch, t, dv, p.rows, ids, p.mixing};
  const Extent grid{unsigned(std::min(ids, p.mixing.adapters))}, block{kBankThreads};
  device.launch({Kind::BankGrad, element, rank}, grid, block, stream, &bank);
}

void run_refresh_right(const Device& device, Element element, int rank, const RightArguments& p, Stream stream) {
  if (p.rows == 0 || p.columns == 0) return;
  const Extent grid{unsigned(ceil_div(p.columns, kRightColumns))}, block{kRightThreads};
  device.launch({Kind::RefreshRight, element, rank}, grid, block, stream, &p);
}

}  // namespace tinylora
