// tinylora::linear: a frozen linear layer and its update, y = x W^T + b + (t M^T) U^T, as one node of autograd in C++. What
// build.py says of it holds; node.py is its twin in Python.
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../ops/native/kernels.h"

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;

}  // namespace

#include "direct.inl"

namespace {

// [..., D] -> [..., width], contents undefined.
Tensor empty_rows(const Tensor& like, int64_t width) {
  c10::SmallVector<int64_t, 5> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = width;
  return is_plain(like, usual_keys(like.is_cpu())) ? empty_of(sizes, like.options()) : at::empty(sizes, like.options());
}

// One of the package's own ops, looked up once.
template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor update(Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection, const Maybe& bias,
              const Maybe& adapter_ids) {
  if (const auto* kernels = kernels_for(y, basis, v, projection, bias, adapter_ids)) {
    Tensor t = empty_coefficients(y, basis);
    throw_unless_ok(kernels, kernels->update(written(y), view(basis), view(v), view(projection), MaybeView(bias),
                                             MaybeView(adapter_ids), t.mutable_data_ptr()));
    return t;
  }
  static const auto call = op<Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&,
                                     const Maybe&)>("tinylora::update");
  return call.call(y, basis, v, projection, /*offset=*/std::nullopt, bias, adapter_ids);
}

std::tuple<Tensor, Tensor> update_backward(const Tensor& g, const Tensor& basis, const Tensor& v,
                                           const Tensor& projection, const Maybe& t, const Maybe& adapter_ids,
                                           bool need_input_grad) {
  if (const auto* kernels = kernels_for(g, basis, v, projection, t, adapter_ids)) {
    const Tensor g0 = need_input_grad ? empty_rows(g, g.size(-1)) : Tensor();
    const Tensor dv = t ? empty_of(v.sizes(), v.options()) : Tensor();
    ScratchTensor scratch{g};
    const Status status = kernels->update_backward(view(g), view(basis), view(v), view(projection), MaybeView(t),
                                                   MaybeView(adapter_ids), address(g0), address(dv), scratch);
    throw_unless_ok(kernels, status, scratch);
    return {g0, dv};
  }
  static const auto call =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                                    const Maybe&, bool)>("tinylora::update_backward");
  return call.call(g, basis, v, projection, t, adapter_ids, need_input_grad);
}

std::tuple<Tensor, Tensor> low_rank(const Tensor& x, const Tensor& right, const Tensor& basis, const Tensor& v,
                                    const Tensor& projection, const Maybe& bias, const Maybe& adapter_ids) {
  if (const auto* kernels = kernels_for(x, right, basis, v, projection, bias, adapter_ids); kernels && basis.dim() == 2) {
    const Tensor y = empty_rows(x, basis.size(1)), t = empty_coefficients(x, right);
    throw_unless_ok(kernels, kernels->low_rank(view(x), view(right), view(basis), view(v), view(projection),
                                               MaybeView(bias), MaybeView(adapter_ids), y.mutable_data_ptr(),
                                               t.mutable_data_ptr()));
    return {y, t};
  }
  static const auto call =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                    const Maybe&, const Maybe&)>("tinylora::low_rank");
  return call.call(x, right, basis, v, projection, bias, adapter_ids);
}

// B^T of the weight as it is now, where samples of it say that it is another.
void refresh_right(Tensor& right, Tensor& samples, const Tensor& weight, const Tensor& basis) {
  static const auto call = op<void(Tensor&, Tensor&, const Tensor&, const Tensor&, bool)>("tinylora::refresh_right");
  call.call(right, samples, weight, basis, /*force=*/false);
}

Tensor update_input_grad(Tensor& dx, const Tensor& right, const Tensor& g, const Tensor& basis, const Tensor& v,
                         const Tensor& projection, const Maybe& t, const Maybe& adapter_ids, bool add) {
  if (const auto* kernels = kernels_for(g, basis, dx, right, v, projection, t, adapter_ids)) {
    const Tensor dv = t ? empty_of(v.sizes(), v.options()) : Tensor();
    ScratchTensor scratch{g};
    const Status status = kernels->update_input_grad(written(dx), view(right), view(g), view(basis), view(v),
                                                     view(projection), MaybeView(t), MaybeView(adapter_ids), add,
                                                     address(dv), scratch);
    throw_unless_ok(kernels, status, scratch);
    return dv;
  }
  static const auto call =
      op<Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                const Maybe&, bool)>("tinylora::update_input_grad");
  return call.call(dx, right, g, basis, v, projection, t, adapter_ids, add);
}

using Ints = c10::IntArrayRef;

Tensor update_parts(Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection, const Maybe& bias,
                    const Maybe& adapter_ids, Ints ends, Ints groups) {
  const int64_t parts = ends.size();
  if (const auto* kernels = kernels_for(y, basis, v, projection, bias, adapter_ids); kernels && parts == int64_t(groups.size())) {
    Tensor t = empty_of({parts, y.numel() / y.size(-1), basis.size(0)}, basis.options());
    throw_unless_ok(kernels, kernels->update_parts(written(y), view(basis), view(v), view(projection), MaybeView(bias),
                                                   MaybeView(adapter_ids), parts, ends.data(), groups.data(),
                                                   t.mutable_data_ptr()));
    return t;
  }
  static const auto call =
      op<Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                const Maybe&, const Maybe&, Ints, Ints)>("tinylora::update_parts");
  return call.call(y, basis, v, projection, /*offset=*/std::nullopt, bias, /*x=*/std::nullopt, /*right=*/std::nullopt,
                   adapter_ids, ends, groups);
}

std::tuple<Tensor, Tensor> update_parts_backward(const Tensor& g, const Tensor& basis, const Tensor& v,
                                                 const Tensor& projection, const Maybe& t, const Maybe& adapter_ids,
                                                 Ints ends, Ints groups, bool need_input_grad) {
  const int64_t parts = ends.size();
  if (const auto* kernels = kernels_for(g, basis, v, projection, t, adapter_ids); kernels && parts == int64_t(groups.size())) {
    const Tensor g0 = need_input_grad ? empty_rows(g, g.size(-1)) : Tensor();
    const Tensor dv = t ? empty_of(v.sizes(), v.options()) : Tensor();
    ScratchTensor scratch{g};
    const Status status = kernels->update_parts_backward(view(g), view(basis), view(v), view(projection), MaybeView(t),
                                                         MaybeView(adapter_ids), parts, ends.data(), groups.data(),
                                                         address(g0), address(dv), scratch);
    throw_unless_ok(kernels, status, scratch);
    return {g0, dv};
  }
  static const auto call =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                                    const Maybe&, Ints, Ints, bool)>("tinylora::update_parts_backward");
  return call.call(g, basis, v, projection, t, adapter_ids, ends, groups, need_input_grad);
}

// Bits of an order; rules.py decides them and says why.
enum Order : int64_t { kLastForward = 1, kPastWeight = 2, kLastBackward = 4 };
constexpr int64_t kGpuRows = 512;  // of a call whose product comes last; rules.py has the same

// total += rows @ matrix over the last dimension; total and rows are contiguous.
void add_product(const Tensor& total, const Tensor& rows, const Tensor& matrix) {
  if (total.dim() == 2) {
    total.addmm_(rows, matrix);
  } else {
    total.view({-1, total.size(-1)}).addmm_(rows.view({-1, rows.size(-1)}), matrix);
  }
}

// Of a fused layer whose update goes part by part: method/parts.py's PartFactors.
struct Parts {
  Tensor basis;       // [r, out]
  Tensor projection;  // [k, u, r, r]
  std::vector<int64_t> ends;
  std::vector<int64_t> groups = std::vector<int64_t>(ends.size());  // one v for all
};

// What a call holds still: node.py's FrozenLinear, but for the backend. A plan, its calls and their nodes share one: to take
// and drop a reference to each tensor is eight fetches from memory, twice a call, right after a product.
struct Frozen {
  Tensor weight;      // [out, in]
  Maybe bias;         // [out]
  Tensor basis;       // [r, out]
  Tensor projection;  // [u, r, r] or [r, r]
  Maybe adapter_ids;  // [B]
  Maybe right;        // [r, in]
  Maybe samples;      // [blocks, 256], of the weight that `right` is of
  int64_t order;
  std::optional<Parts> parts;

  // Of a call with these rows, x or g.
  int64_t order_for(const Tensor& rows) const {
    return !samples || rows.numel() >= kGpuRows * rows.size(-1) ? order : 0;
  }
};
using SharedFrozen = std::shared_ptr<const Frozen>;

// The updated output, fresh and contiguous; also t [N, r].
std::tuple<Tensor, Tensor> run(const Tensor& input, const Tensor& v, const Frozen& f) {
  const int64_t order = f.order_for(input);
  if (order && f.samples) {
    Tensor right = *f.right, samples = *f.samples;
    refresh_right(right, samples, f.weight, f.basis);
  }
  if (order & kLastForward) {
    const Tensor x = input.contiguous();
    // y = b + (t M^T) U^T + x W^T
    auto [y, t] = low_rank(x, *f.right, f.basis, v, f.projection, f.bias, f.adapter_ids);
    add_product(y, x, f.weight.t());
    return {y, t};
  }
  Tensor y = at::linear(input, f.weight).contiguous();
  if (f.parts) {
    const auto& [basis, projection, ends, groups] = *f.parts;
    return {y, update_parts(y, basis, v.unsqueeze(0), projection, f.bias, f.adapter_ids, ends, groups)};
  }
  Tensor t = update(y, f.basis, v, f.projection, f.bias, f.adapter_ids);
  return {y, t};
}

// Products here are those of the dtypes at hand, whatever autocast is on around a call or a backward pass.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

// As its header has it: Tensor::_fw_grad would take the long way, which is cold.
bool has_tangent(const Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  return meta && meta->fw_grad_;
}

// Whether a gradient is one of many (is_grads_batched, vectorize=True) or has a tangent: kernels would not see them.
bool is_taken_apart(const Tensor& grad) {
  constexpr c10::DispatchKeySet wrappers{c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::FuncTorchGradWrapper};
  return grad.defined() && (grad.key_set().has_any(wrappers) || has_tangent(grad));
}

// Gradients in plain operations, for those that are differentiated again or taken apart: reference.py's project, gains,
// vector_gradient. In operations that torch has batching rules for: flatten and unflatten it has none for.
namespace plain {

Tensor project(const Tensor& rows, const Tensor& basis) {
  return rows.reshape({-1, basis.size(1)}).to(basis.scalar_type()).matmul(basis.t());
}

// P' [u, r, r] -> [u, r * r]
Tensor rows_of(const Tensor& projection) { return projection.reshape({projection.size(0), -1}); }

// M of the one adapter [r, r], or of each row's [N, r, r]; and the ids of the rows [N].
std::tuple<Tensor, Tensor> mixing(const Tensor& v, const Tensor& projection, const Maybe& adapter_ids, int64_t rows) {
  const auto contract = [&](const Tensor& vectors) {
    const int64_t r = projection.size(-1);
    const Tensor flat =
        projection.dim() == 3 ? vectors.matmul(rows_of(projection)) : vectors * projection.reshape(-1);
    auto sizes = flat.sizes().vec();
    sizes.back() = r;
    sizes.push_back(r);
    return flat.reshape(sizes);
  };
  if (!adapter_ids) return {contract(v), Tensor()};
  const Tensor ids =
      adapter_ids->to(at::kLong).repeat_interleave(rows / std::max<int64_t>(adapter_ids->numel(), 1));
  return {contract(v.index_select(0, ids.clamp_min(0))), ids};
}

// a M
Tensor gains(const Tensor& a, const Tensor& v, const Tensor& projection, const Maybe& adapter_ids) {
  const auto [M, ids] = mixing(v, projection, adapter_ids, a.size(0));
  if (!adapter_ids) return a.matmul(M);
  const Tensor all = M.transpose(-1, -2).matmul(a.unsqueeze(-1)).squeeze(-1);
  return at::where(ids.ge(0).unsqueeze(-1), all, at::zeros_like(all));
}

// dv_i = <P'_i, a^T t>
Tensor vector_gradient(const Tensor& a, const Tensor& t, const Tensor& v, const Tensor& projection,
                       const Maybe& adapter_ids) {
  const auto contract_backward = [&](const Tensor& d_mixing) {
    auto sizes = d_mixing.sizes().vec();
    sizes.pop_back();
    sizes.back() = d_mixing.size(-1) * d_mixing.size(-1);
    const Tensor flat = d_mixing.reshape(sizes);
    return projection.dim() == 3 ? flat.matmul(rows_of(projection).t()) : flat * projection.reshape(-1);
  };
  if (!adapter_ids) return contract_backward(a.t().matmul(t));
  const Tensor ids =
      adapter_ids->to(at::kLong).repeat_interleave(a.size(0) / std::max<int64_t>(adapter_ids->numel(), 1));
  const Tensor keep = ids.ge(0).nonzero().squeeze(1);
  const Tensor outer = a.index_select(0, keep).unsqueeze(-1) * t.index_select(0, keep).unsqueeze(-2);
  return at::zeros_like(v).index_add(0, ids.index_select(0, keep), contract_backward(outer));
}

}  // namespace plain

#include "siblings.inl"

// Gradients into x and v; W and b are frozen. Saves t, r numbers a row, and refers to v, W and U, with which B^T and the
// factors of parts are written (plan.py: take_factors). Gradients of gradients find their way through the history of t
// (ops/autograd.py), which makes t the node's second output. It becomes one where a history is asked for, in the first
// backward pass: from the start, it would cost the engine an allocation at every call.
//
// A node by hand: torch::autograd::Function keeps maps and lists on the heap for what any function might want, and that has
// to be made and found again around every product.
struct TinyLoRALinear : torch::autograd::Node {
  SavedVariable t;  // where v wants a gradient
  Siblings* siblings = nullptr;  // at the end of the first edge, or null: dx is handed to autograd
  Tensor v;
  SharedFrozen frozen;
  int64_t v_version, weight_version, basis_version;
  bool released = false;

  std::string name() const override { return "TinyLoRALinear (C++)"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    t.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    const Tensor of_t = grads.size() > 1 ? grads[1] : Tensor();
    if (!grads[0].defined() && !of_t.defined()) return variable_list(2);
    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    const Tensor saved = t.unpack();  // a checkpoint runs forward again here, with autograd
    expect_version("v", v, v_version);
    expect_version("the frozen weight", frozen->weight, weight_version);
    expect_version("its basis", frozen->basis, basis_version);
    return of_t.defined() || at::GradMode::is_enabled() || is_taken_apart(grads[0])
               ? differentiable(grads[0], of_t, saved)
               : gradients(grads[0], saved);
  }

  variable_list gradients(const Tensor& grad, const Tensor& saved) {
    const auto& [weight, bias, basis, projection, adapter_ids, right, samples, planned_order, parts] = *frozen;
    const int64_t order = frozen->order_for(grad);
    at::AutoDispatchBelowADInplaceOrView below;
    const Maybe maybe_t = saved.defined() ? Maybe(saved) : std::nullopt;
    const bool need_dx = task_should_compute_output(0);
    const Tensor g = grad.contiguous();  // expanded gradients (sum, mean) have stride 0
    // A hook is shown this layer's dx, and so is who calls the node by hand.
    const bool shared = siblings && need_dx && post_hooks().empty() && torch::autograd::get_current_graph_task_id() >= 0;
    Siblings* const others = shared ? siblings : nullptr;
    Tensor dx = others ? others->take() : Tensor();
    const bool more = dx.defined();  // the sum of those before, to be added to
    Tensor dv;
    if (need_dx && order & kPastWeight) {
      const bool last = order & kLastBackward && !more;
      // dx (+)= (a M) B^T + g W
      if (last) dx = empty_rows(g, weight.size(1));
      else if (more) add_product(dx, g, weight);
      else dx = at::matmul(g, weight);
      dv = update_input_grad(dx, *right, g, basis, v, projection, maybe_t, adapter_ids, !last);
      if (last) add_product(dx, g, weight);
    } else {
      Tensor g0;
      if (parts) {
        std::tie(g0, dv) = update_parts_backward(g, parts->basis, v.unsqueeze(0), parts->projection, maybe_t, adapter_ids,
                                                 parts->ends, parts->groups, need_dx);
        if (maybe_t) dv = dv[0];
      } else {
        std::tie(g0, dv) = update_backward(g, basis, v, projection, maybe_t, adapter_ids, need_dx);
      }
      // dx (+)= g0 W
      if (more) add_product(dx, g0, weight);
      else if (need_dx) dx = at::matmul(g0, weight);
    }
    if (others) others->put(std::move(dx));  // and leaves dx undefined
    return {dx, maybe_t ? dv : Tensor()};
  }

  // t [k, N, r] of parts as that of one update of the rank of all of them: method/parts.py's block_coefficients.
  Tensor as_one(const Tensor& t) const {
    if (!frozen->parts || !t.defined()) return t;
    const Tensor flat = t.transpose(0, 1).reshape({t.size(1), t.size(0) * t.size(2)});
    return at::constant_pad_nd(flat, {0, frozen->basis.size(0) - flat.size(1)});
  }

  // g_t [N, r] is what came to t.
  variable_list differentiable(const Tensor& grad, const Tensor& of_t, const Tensor& saved) {
    const Tensor g_t = as_one(of_t);
    const Tensor g = grad.defined() ? grad : input_metadata(0).zeros_like();
    Tensor own_t;
    if (saved.defined()) {
      own_t = saved.detach();
      if (at::GradMode::is_enabled()) {
        const uint32_t output = num_inputs() > 1 ? 1 : add_input_metadata(own_t);
        torch::autograd::impl::set_gradient_edge(own_t, {getptr(), output});
      }
      own_t = as_one(own_t);
    }
    const Tensor a = plain::project(g, frozen->basis);
    Tensor gains = plain::gains(a, v, frozen->projection, frozen->adapter_ids);
    if (g_t.defined()) gains = gains + g_t;
    // dx = (g + (a M + g_t) U^T) W
    const Tensor delta = gains.matmul(frozen->basis).view(g.sizes());
    const Tensor g0 = (g.to(delta.scalar_type()) + delta).to(g.scalar_type());
    return {task_should_compute_output(0) ? g0.matmul(frozen->weight) : Tensor(),
            own_t.defined() ? plain::vector_gradient(a, own_t, v, frozen->projection, frozen->adapter_ids) : Tensor()};
  }

  static int64_t version_of(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

  static void expect_version(const char* name, const Tensor& tensor, int64_t expected) {
    const int64_t version = version_of(tensor);
    TORCH_CHECK(version == expected,
                "one of the variables needed for gradient computation has been modified by an inplace operation: ", name,
                " ", tensor.sizes(), " is at version ", version, "; expected version ", expected, " instead.");
  }
};

Tensor linear_with_autograd(const Tensor& x, const Tensor& v, const SharedFrozen& frozen) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const auto below = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return run(x, v, *frozen);
  };
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || v.requires_grad())) return std::get<0>(below());
  torch::autograd::edge_list edges = torch::autograd::collect_next_edges(x, v);
  Siblings* const siblings = siblings_of(x, edges[0], frozen->weight);
  TinyLoRALinear* node = nullptr;
  const auto pointer = new_node(node);
  node->siblings = siblings;
  node->set_next_edges(std::move(edges));
  auto [y, t] = below();
  node->frozen = frozen;
  node->v = v;
  node->v_version = TinyLoRALinear::version_of(v);
  node->weight_version = TinyLoRALinear::version_of(frozen->weight);
  node->basis_version = TinyLoRALinear::version_of(frozen->basis);
  torch::autograd::set_history(y, pointer);
  if (v.requires_grad()) node->t = SavedVariable(t, /*is_output=*/false);
  return y;
}

std::optional<Parts> parts_of(const Maybe& basis, const Maybe& projection, Ints ends) {
  return basis ? std::optional(Parts{*basis, *projection, ends.vec()}) : std::nullopt;
}

Tensor linear_op(const Tensor& x, const Tensor& v, const Tensor& weight, const Maybe& bias, const Tensor& basis,
                 const Tensor& projection, const Maybe& adapter_ids, const Maybe& right, const Maybe& samples,
                 int64_t order, const Maybe& part_basis, const Maybe& part_projection, Ints ends) {
  const Frozen frozen{weight, bias, basis, projection, adapter_ids, right, samples, order,
                      parts_of(part_basis, part_projection, ends)};
  return linear_with_autograd(x, v, std::make_shared<const Frozen>(frozen));
}

Tensor linear_alone(const Tensor& x, const Tensor& v, const Tensor& weight, const Maybe& bias, const Tensor& basis,
                    const Tensor& projection, const Maybe& adapter_ids, const Maybe& right, const Maybe& samples,
                    int64_t order, const Maybe& part_basis, const Maybe& part_projection, Ints ends) {
  return std::get<0>(run(x, v, {weight, bias, basis, projection, adapter_ids, right, samples, order,
                                parts_of(part_basis, part_projection, ends)}));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tinylora, m) {
  m.def(
      "linear(Tensor x, Tensor v, Tensor weight, Tensor? bias, Tensor basis, Tensor projection, Tensor? adapter_ids, "
      "Tensor? right, Tensor? samples, int order, Tensor? part_basis, Tensor? part_projection, int[] ends) -> Tensor");
}

TORCH_LIBRARY_IMPL(tinylora, AutogradCPU, m) { m.impl("linear", linear_op); }
TORCH_LIBRARY_IMPL(tinylora, CPU, m) { m.impl("linear", linear_alone); }  // inference mode
TORCH_LIBRARY_IMPL(tinylora, AutogradCUDA, m) { m.impl("linear", linear_op); }
TORCH_LIBRARY_IMPL(tinylora, CUDA, m) { m.impl("linear", linear_alone); }

// The ops have no derivatives: what is called by itself refuses tangents, and gradients at the backward pass. It would drop
// the former without a word.
TORCH_LIBRARY_IMPL(tinylora, Autograd, m) {
  for (const char* name : {"update", "updated", "update_backward", "low_rank", "update_input_grad", "update_parts",
                           "update_parts_backward", "refresh_right"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

#include "plan.inl"
