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
Kernel parts_kernel_of(Element element, int rank, const LaunchPlan& plan, const PartsArguments& all) {
  return {Kind::Parts, element, rank, plan.tile, all.part[0].mixing.ids != nullptr};
}

// The ticket of a launch that sums over blocks: the device's, or a word of its scratch, set to zero first.
uint32_t* ticket_for(const Device& device, const Kernel& kernel, const LaunchPlan& plan, float* word, Stream stream) {
  if (plan.blocks == 1) return nullptr;
  if (uint32_t* const ticket = device.ticket(kernel, stream)) return ticket;
  device.clear(word, 1, stream);
  return reinterpret_cast<uint32_t*>(word);
}

void sum_bank(const Device& device, Element element, int rank, int groups, const BankGradArguments& bank, Stream stream) {
  const Extent grid{unsigned(std::min(bank.ids, bank.mixing.adapters)), unsigned(groups)}, block{kBankThreads};
  device.launch({Kind::BankGrad, element, rank}, grid, block, stream, &bank);
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
    float* const word = scratch + scratch_words(rank, plan, p) - 1;
    p.ticket = ticket_for(device, rows_kernel_of(element, rank, plan, p), plan, word, stream);
    return run_rows(device, element, rank, plan, p, stream);
  }
  const int ids = p.rows / p.mixing.rows_per_id;
  p.coefficients = scratch;
  if (p.mixing.adapters > ids) {
    p.cleared = dv;
    p.cleared_count = numbers;
  }
  run_rows(device, element, rank, plan, p, stream);
  sum_bank(device, element, rank, 1, {scratch, t, dv, p.rows, ids, 1, {0}, p.mixing}, stream);
}

LaunchPlan plan_parts(const Device& device, Element element, int rank, PartsArguments& all) {
  const int bytes = element_bytes(element), processors = device.multiprocessors();
  const RowsArguments& first = all.part[0];
  const bool stays = first.onto == Onto::Source && first.target.rows;
  bool every_aligned = true;
  int32_t widest = 0;
  for (int i = 0; i < all.parts; ++i) {
    every_aligned = every_aligned && aligned(all.part[i], bytes);
    widest = std::max(widest, all.part[i].source.features);
  }
  LaunchPlan plan = plan_tile(widest, bytes, every_aligned, stays, int64_t(first.rows) * all.parts <= processors);
  plan.team *= plan.teams;  // of a block: how its warps make teams is up to the part
  plan.teams = 1;
  const TileShape shape = tile_shape(plan.tile, bytes);
  int64_t wanted[kMaxParts], wanted_by_all = 0;
  for (int i = 0; i < all.parts; ++i) {
    all.part[i].warps = team_warps(all.part[i].source.features, shape);
    const int teams = std::min(plan.team / kWarp / all.part[i].warps, kMaxTeams);
    wanted_by_all += wanted[i] = wanted_blocks(first.rows, teams * shape.rows, processors);
  }
  const int resident = processors * device.resident_blocks(parts_kernel_of(element, rank, plan, all), plan.team);
  for (int i = 0; i < all.parts; ++i) {
    const int blocks = share(wanted[i], wanted_by_all, resident);
    all.first_block[i] = plan.blocks;
    all.part[i].share = blocks ? first.rows / blocks : 0;
    all.part[i].longer = blocks ? first.rows % blocks : 0;
    plan.blocks += blocks;
  }
  all.first_block[all.parts] = plan.blocks;
  return plan;
}

void run_parts(const Device& device, Element element, int rank, const LaunchPlan& plan, const PartsArguments& all,
               Stream stream) {
  if (plan.blocks == 0) return;
  const Extent grid{unsigned(plan.blocks)}, block{unsigned(plan.team), unsigned(plan.teams)};
  device.launch(parts_kernel_of(element, rank, plan, all), grid, block, stream, &all);
}

int64_t scratch_words(int rank, const LaunchPlan& plan, const PartsArguments& all) {
  return all.part[0].mixing.ids ? all.parts * int64_t(all.part[0].rows) * rank : scratch_words(rank, plan, all.part[0]);
}

void run_parts_and_gradient(const Device& device, Element element, int rank, const LaunchPlan& plan, PartsArguments& all,
                            const float* t, float* dv, float* scratch, Stream stream) {
  const RowsArguments& first = all.part[0];
  const int64_t numbers = int64_t(all.groups) * first.mixing.adapters * first.mixing.numbers;
  if (plan.blocks == 0) {  // an empty sum
    if (numbers > 0) device.clear(dv, numbers, stream);
    return;
  }
  const int64_t coefficients = int64_t(first.rows) * rank;
  if (!first.mixing.ids) {
    float* const word = scratch + scratch_words(rank, plan, all) - 1;
    uint32_t* const ticket = ticket_for(device, parts_kernel_of(element, rank, plan, all), plan, word, stream);
    for (int i = 0; i < all.parts; ++i) {
      RowsArguments& p = all.part[i];
      p.t = t + i * coefficients;
      p.dv = dv;
      p.partial = scratch;
      p.ticket = ticket;
    }
    return run_parts(device, element, rank, plan, all, stream);
  }
  BankGradArguments bank = {scratch, t, dv, first.rows, first.rows / first.mixing.rows_per_id, all.parts, {}, first.mixing};
  for (int i = 0; i < all.parts; ++i) {
    RowsArguments& p = all.part[i];
    p.coefficients = scratch + i * coefficients;
    if (p.mixing.adapters > bank.ids) {
      p.cleared = dv;
      p.cleared_count = numbers;
    }
    bank.group[i] = all.group[i];
  }
  run_parts(device, element, rank, plan, all, stream);
  sum_bank(device, element, rank, all.groups, bank, stream);
}

void run_refresh_right(const Device& device, Element element, int rank, const RightArguments& p, Stream stream) {
  if (p.rows == 0 || p.columns == 0) return;
  const Extent grid{unsigned(ceil_div(p.columns, kRightColumns))}, block{kRightThreads};
  device.launch({Kind::RefreshRight, element, rank}, grid, block, stream, &p);
}

}  // namespace tinylora
