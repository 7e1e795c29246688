#include "launch.h"

namespace tinylora {
namespace {

bool aligned_rows(const RowsArguments& p, int element_bytes) {
  const int64_t packet = 16 / element_bytes;
  const auto on_16_bytes = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool strides = p.rows == 1 || (p.source_stride % packet == 0 && p.target_stride % packet == 0);
  return strides && p.columns % packet == 0 && on_16_bytes(p.source) && on_16_bytes(p.target) && on_16_bytes(p.basis);
}

void launch(Element element, int rank, RowsArguments p, cudaStream_t stream) {
  const int bytes = element_bytes(element);
  const Plan plan = plan_rows(p.rows, p.columns, bytes, aligned_rows(p, bytes));
  p.tiles_per_block = plan.tiles_per_block;
  switch (element) {
    case Element::Float32: return launch_rows<float>(rank, plan, p, stream);
    case Element::BFloat16: return launch_rows<__nv_bfloat16>(rank, plan, p, stream);
    case Element::Float16: return launch_rows<__half>(rank, plan, p, stream);
  }
}

// a [N, R], partial sums [K, chunks, R * R] and tickets [K], one after another.
struct Workspace {
  int32_t chunks;
  int64_t partial, tickets, end;  // in 4-byte words

  Workspace(int rank, int64_t rows, int64_t adapters)
      : chunks(static_cast<int32_t>(ceil_div(rows, kRowsPerChunk))),
        partial(rows * rank),
        tickets(partial + adapters * chunks * rank * rank),
        end(tickets + adapters) {}
};

}  // namespace

int64_t workspace_words(int rank, int64_t rows, int64_t adapters) { return Workspace(rank, rows, adapters).end; }

void run_update(Element element, int rank, RowsArguments p, cudaStream_t stream) {
  if (p.rows > 0) launch(element, rank, p, stream);
}

void run_update_backward(Element element, int rank, RowsArguments p, const float* t, float* dv, void* workspace,
                         cudaStream_t stream) {
  p.transposed = true;
  if (dv == nullptr) {
    if (p.rows > 0 && p.target) launch(element, rank, p, stream);
    return;
  }
  const int32_t adapters = p.mixing.adapters;
  if (p.rows == 0) {  // an empty sum
    cudaMemsetAsync(dv, 0, sizeof(float) * adapters * p.mixing.numbers, stream);
    return;
  }
  const Workspace layout(rank, p.rows, adapters);
  float* const words = static_cast<float*>(workspace);
  p.coefficients = words;
  p.tickets = reinterpret_cast<uint32_t*>(words + layout.tickets);
  p.ticket_count = adapters;
  launch(element, rank, p, stream);
  launch_vector_grad(rank, {words, t, words + layout.partial, p.tickets, dv, p.rows, layout.chunks, p.mixing}, stream);
}

}  // namespace tinylora
