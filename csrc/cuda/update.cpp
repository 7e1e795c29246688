#include "cuda/update.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

// Torch's. Weak: a torch without CUDA has no such function, and the library must load beside it all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace tinylora::cuda {
namespace {

Stream current_stream(int device) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error("tinylora: this torch has no CUDA; install a CUDA build of torch");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("tinylora: torch did not give its current CUDA stream");
  }
  return stream;
}

Element element_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return Element::Float32;
    case Dtype::bfloat16: return Element::BFloat16;
    case Dtype::float16: return Element::Float16;
    default:
      throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16 activations, found float64; "
                                  "use the reference backend");
  }
}

void at_most(const char* what, int64_t count, int64_t limit, const char* fix) {
  if (count <= limit) return;
  throw std::invalid_argument(std::string(what) + ": the CUDA kernels take at most " + std::to_string(limit) +
                              ", found " + std::to_string(count) + "; " + fix);
}

int rank_of(int64_t rank) {
  if (!supported_rank(rank)) {
    throw std::invalid_argument("basis: the CUDA kernels take ranks 1, 2, 4 and 8, found " + std::to_string(rank) +
                                "; use the triton or the reference backend");
  }
  return static_cast<int>(rank);
}

// Where a call runs.
struct Place {
  Element element;
  int rank;
  Device device;
  Stream stream;

  explicit Place(const Arguments& call)
      : element(element_of(call.dtype)), rank(rank_of(call.rank)), device(call.device), stream(current_stream(call.device)) {}
};

float* words(const Scratch& scratch, int64_t count) {
  void* const memory = scratch.allocate(scratch.owner, count);
  if (!memory) throw std::runtime_error("tinylora: no memory for " + std::to_string(4 * count) + " bytes of scratch");
  return static_cast<float*>(memory);
}

// What the ops have in common: the rows that are read. Refuses what the kernels cannot count in 32 bits.
RowsArguments rows_arguments(const Arguments& call) {
  rank_of(call.rank);
  at_most("features", call.features, kMaxExtent, "use the reference backend");
  at_most("rows", call.rows, kMaxExtent, "split the batch");
  at_most("numbers of the projection", call.numbers * call.rank * call.rank, INT32_MAX, "use the reference backend");
  at_most("adapters", call.adapters, INT32_MAX, "use the reference backend");
  RowsArguments p{};
  p.source = {call.activation, call.stride, static_cast<const float*>(call.basis), static_cast<int32_t>(call.features),
              static_cast<int32_t>(call.basis_stride)};
  p.rows = static_cast<int32_t>(call.rows);
  p.offset = static_cast<const float*>(call.offset);
  p.mixing.v = static_cast<const float*>(call.v);
  p.mixing.projection = static_cast<const float*>(call.projection);
  p.mixing.ids = call.ids.data;
  p.mixing.rows_per_id = static_cast<int32_t>(call.ids.rows_per_id);
  p.mixing.adapters = static_cast<int32_t>(call.adapters);
  p.mixing.numbers = static_cast<int32_t>(call.numbers);
  p.mixing.elementwise = call.elementwise;
  p.mixing.wide_ids = call.ids.is_int64;
  return p;
}

Side side_of(const OtherSide& out) {
  at_most("features", out.features, kMaxExtent, "use the reference backend");
  return {out.activation, out.stride, static_cast<const float*>(out.factor), static_cast<int32_t>(out.features),
          static_cast<int32_t>(out.factor_stride)};
}

// Coefficients t [N, R] of the rows of `p`, and its target written.
void forward(const Arguments& call, RowsArguments p, void* t) {
  const Place at(call);
  p.coefficients = static_cast<float*>(t);
  run_rows(at.device, at.element, at.rank, plan_rows(at.device, at.element, at.rank, p), p, at.stream);
}

// dv where it is wanted, and the target of `p` written.
void backward(const Arguments& call, RowsArguments p, void* dv, const Scratch& scratch) {
  if (!dv && !p.target.rows) return;
  const Place at(call);
  const LaunchPlan plan = plan_rows(at.device, at.element, at.rank, p);
  p.transposed = true;
  if (!dv) return run_rows(at.device, at.element, at.rank, plan, p, at.stream);
  run_rows_and_gradient(at.device, at.element, at.rank, plan, p, static_cast<const float*>(call.t),
                        static_cast<float*>(dv), words(scratch, scratch_words(at.rank, plan, p)), at.stream);
}

// What both directions of a fused projection have in common.
PartsArguments parts_arguments(const std::vector<Part>& parts, int64_t groups) {
  at_most("parts", static_cast<int64_t>(parts.size()), kMaxParts, "use the triton or the reference backend");
  at_most("numbers of v", groups * parts[0].call.adapters * parts[0].call.numbers, INT32_MAX, "use the reference backend");
  PartsArguments all{};
  all.parts = static_cast<int32_t>(parts.size());
  all.groups = static_cast<int32_t>(groups);
  for (int i = 0; i < all.parts; ++i) {
    all.part[i] = rows_arguments(parts[i].call);
    all.group[i] = static_cast<int32_t>(parts[i].group);
  }
  return all;
}

}  // namespace

void update(const Arguments& call, void* t) {
  RowsArguments p = rows_arguments(call);
  p.target = p.source;
  p.onto = Onto::Source;
  p.bias = call.bias;
  p.only_finite = true;
  forward(call, p, t);
}

void update_backward(const Arguments& call, void* g0, void* dv, const Scratch& scratch) {
  RowsArguments p = rows_arguments(call);
  p.target = {g0, call.features, p.source.factor, p.source.features, p.source.factor_stride};
  p.onto = Onto::Source;
  backward(call, p, dv, scratch);
}

void low_rank(const Arguments& call, const OtherSide& y, void* t) {
  RowsArguments p = rows_arguments(call);
  p.target = side_of(y);
  p.onto = Onto::Nothing;
  p.bias = y.bias;
  forward(call, p, t);
}

void update_input_grad(const Arguments& call, const OtherSide& dx, bool add, void* dv, const Scratch& scratch) {
  RowsArguments p = rows_arguments(call);
  p.target = side_of(dx);
  p.onto = add ? Onto::Target : Onto::Nothing;
  backward(call, p, dv, scratch);
}

void update_parts(const std::vector<Part>& parts, void* t) {
  const Arguments& call = parts[0].call;
  PartsArguments all = parts_arguments(parts, /*groups=*/1);  // v is only read
  for (int i = 0; i < all.parts; ++i) {
    RowsArguments& p = all.part[i];
    p.target = side_of(parts[i].out);
    p.onto = parts[i].of_input ? Onto::Target : Onto::Source;
    p.bias = parts[i].out.bias;
    p.only_finite = !parts[i].of_input;
    p.coefficients = static_cast<float*>(t) + i * call.rows * call.rank;
  }
  const Place at(call);
  const LaunchPlan plan = plan_parts(at.device, at.element, at.rank, all);
  run_parts(at.device, at.element, at.rank, plan, all, at.stream);
}

void update_parts_backward(const std::vector<Part>& parts, int64_t features, void* g0, int64_t groups, void* dv,
                           const Scratch& scratch) {
  const Arguments& call = parts[0].call;
  PartsArguments all = parts_arguments(parts, groups);
  const int bytes = element_bytes(element_of(call.dtype));
  for (int i = 0; i < all.parts; ++i) {
    RowsArguments& p = all.part[i];
    p.target = p.source;
    p.target.rows = g0 ? static_cast<char*>(g0) + parts[i].begin * bytes : nullptr;
    p.target.stride = features;
    p.onto = Onto::Source;
    p.transposed = true;
  }
  if (!dv && !g0) return;
  const Place at(call);
  const LaunchPlan plan = plan_parts(at.device, at.element, at.rank, all);
  if (!dv) return run_parts(at.device, at.element, at.rank, plan, all, at.stream);
  run_parts_and_gradient(at.device, at.element, at.rank, plan, all, static_cast<const float*>(call.t),
                         static_cast<float*>(dv), words(scratch, scratch_words(at.rank, plan, all)), at.stream);
}

void refresh_right(const KeptRight& kept, bool force) {
  at_most("features", std::max(kept.rows, kept.columns), kMaxExtent, "use the reference backend");
  const RightArguments p = {kept.weight, kept.row_stride, kept.column_stride, static_cast<const float*>(kept.basis),
                            static_cast<float*>(kept.right), static_cast<uint32_t*>(kept.samples),
                            static_cast<int32_t>(kept.rows), static_cast<int32_t>(kept.columns), force};
  const Element element = element_of(kept.dtype);
  const int rank = rank_of(kept.rank);
  const Device device(kept.device);
  run_refresh_right(device, element, rank, p, current_stream(kept.device));
}

}  // namespace tinylora::cuda
