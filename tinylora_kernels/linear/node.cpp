// tinylora::linear: a frozen linear layer and its update, y = x W^T + b + (t M^T) U^T, as one node of autograd in C++. What
// build.py says of it holds; node.py is its twin in Python.
#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;

// One of the package's own ops, looked up once.
template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor update(Tensor& y, const Tensor& basis, const Tensor& v, const Tensor& projection, const Maybe& offset,
              const Maybe& adapter_ids) {
  static const auto call =
      op<Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&)>("tinylora::update");
  return call.call(y, basis, v, projection, offset, adapter_ids);
}

std::tuple<Tensor, Tensor> update_backward(const Tensor& g, const Tensor& basis, const Tensor& v,
                                           const Tensor& projection, const Maybe& t, const Maybe& adapter_ids,
                                           bool need_input_grad) {
  static const auto call =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                                    const Maybe&, bool)>("tinylora::update_backward");
  return call.call(g, basis, v, projection, t, adapter_ids, need_input_grad);
}

std::tuple<Tensor, Tensor> low_rank(const Tensor& x, const Tensor& right, const Tensor& basis, const Tensor& v,
                                    const Tensor& projection, const Maybe& bias, const Maybe& adapter_ids) {
  static const auto call =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                    const Maybe&, const Maybe&)>("tinylora::low_rank");
  return call.call(x, right, basis, v, projection, bias, adapter_ids);
}

Tensor update_input_grad(Tensor& dx, const Tensor& right, const Tensor& g, const Tensor& basis, const Tensor& v,
                         const Tensor& projection, const Maybe& t, const Maybe& adapter_ids, bool add) {
  static const auto call =
      op<Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                const Maybe&, bool)>("tinylora::update_input_grad");
  return call.call(dx, right, g, basis, v, projection, t, adapter_ids, add);
}

// Bits of an order; rules.py decides them and says why.
enum Order : int64_t { kLastForward = 1, kPastWeight = 2, kLastBackward = 4 };

// total += rows @ matrix over the last dimension; total and rows are contiguous.
void add_product(const Tensor& total, const Tensor& rows, const Tensor& matrix) {
  if (total.dim() == 2) {
    total.addmm_(rows, matrix);
  } else {
    total.view({-1, total.size(-1)}).addmm_(rows.view({-1, rows.size(-1)}), matrix);
  }
}

// [..., D] -> [..., width], contents undefined.
Tensor empty_rows(const Tensor& like, int64_t width) {
  c10::SmallVector<int64_t, 5> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = width;
  return at::empty(sizes, like.options());
}

// The updated output, fresh and contiguous; also t [N, r].
std::tuple<Tensor, Tensor> run(const Tensor& input, const Tensor& v, const Tensor& weight, const Maybe& bias,
                               const Tensor& basis, const Tensor& projection, const Maybe& offset,
                               const Maybe& adapter_ids, const Maybe& right, int64_t order) {
  if (order & kLastForward) {
    const Tensor x = input.contiguous();
    // y = b + (t M^T) U^T + x W^T
    auto [y, t] = low_rank(x, *right, basis, v, projection, bias, adapter_ids);
    add_product(y, x, weight.t());
    return {y, t};
  }
  Tensor y = at::linear(input, weight, bias).contiguous();
  Tensor t = update(y, basis, v, projection, offset, adapter_ids);
  return {y, t};
}

// Gradients into x and v; W and b are frozen. Saves t, r numbers a row, and refers to v and W.
//
// A node by hand: torch::autograd::Function keeps maps and lists on the heap for what any function might want, and that has
// to be made and found again around every product.
struct TinyLoRALinear : torch::autograd::Node {
  SavedVariable t;  // where v wants a gradient
  Tensor v, weight, basis, projection;
  Maybe adapter_ids, right;
  int64_t order, v_version, weight_version;
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
    variable_list both(2);
    if (!grads[0].defined()) return both;
    both = gradients(grads[0]);
    if (at::GradMode::is_enabled() && grads[0].requires_grad()) both = differentiable_once(std::move(both));
    return both;
  }

  variable_list gradients(const Tensor& grad) {
    const Tensor saved = t.unpack();  // a checkpoint runs forward again here, with autograd
    expect_version("v", v, v_version);
    expect_version("the frozen weight", weight, weight_version);
    at::AutoDispatchBelowADInplaceOrView below;
    const Maybe maybe_t = saved.defined() ? Maybe(saved) : std::nullopt;
    const bool need_dx = task_should_compute_output(0);
    const Tensor g = grad.contiguous();  // expanded gradients (sum, mean) have stride 0
    if (need_dx && order & kPastWeight) {
      const bool last = order & kLastBackward;
      // dx = (a M) B^T + g W
      Tensor dx = last ? empty_rows(g, weight.size(1)) : at::matmul(g, weight);
      Tensor dv = update_input_grad(dx, *right, g, basis, v, projection, maybe_t, adapter_ids, !last);
      if (last) add_product(dx, g, weight);
      return {dx, maybe_t ? dv : Tensor()};
    }
    auto [g0, dv] = update_backward(g, basis, v, projection, maybe_t, adapter_ids, need_dx);
    // dx = g0 W
    return {need_dx ? at::matmul(g0, weight) : Tensor(), maybe_t ? dv : Tensor()};
  }

  static void expect_version(const char* name, const Tensor& tensor, int64_t expected) {
    TORCH_CHECK(tensor._version() == expected,
                "one of the variables needed for gradient computation has been modified by an inplace operation: ", name,
                " ", tensor.sizes(), " is at version ", tensor._version(), "; expected version ", expected, " instead.");
  }

  // create_graph=True: second derivatives are an error, not zero.
  static variable_list differentiable_once(variable_list results) {
    for (Tensor& result : results) {
      if (result.defined()) result = result.detach().requires_grad_();
    }
    const auto error = std::make_shared<torch::autograd::DelayedError>(
        "trying to differentiate twice a function that was marked with @once_differentiable", results.size());
    return (*error)(std::move(results));
  }
};

// Torch's pointer to a node: std::shared_ptr up to some release, its own counted pointer from then on.
template <class N, class Pointer = decltype(torch::autograd::Edge::function)>
Pointer new_node(N*& node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    Pointer pointer(node = new N, [](auto* old) { deleteNode(old); });  // torch's: without deep recursion
    return pointer;
  } else {
    auto pointer = c10::make_intrusive<N>();
    node = pointer.get();
    return pointer;
  }
}

Tensor linear_with_autograd(const Tensor& x, const Tensor& v, const Tensor& weight, const Maybe& bias,
                            const Tensor& basis, const Tensor& projection, const Maybe& offset,
                            const Maybe& adapter_ids, const Maybe& right, int64_t order) {
  const auto below = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return run(x, v, weight, bias, basis, projection, offset, adapter_ids, right, order);
  };
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || v.requires_grad())) return std::get<0>(below());
  TinyLoRALinear* node = nullptr;
  const auto pointer = new_node(node);
  node->set_next_edges(torch::autograd::collect_next_edges(x, v));
  auto [y, t] = below();
  if (v.requires_grad()) node->t = SavedVariable(t, /*is_output=*/false);
  node->v = v;
  node->v_version = v._version();
  node->weight = weight;
  node->weight_version = weight._version();
  node->basis = basis;
  node->projection = projection;
  node->adapter_ids = adapter_ids;
  node->right = right;
  node->order = order;
  torch::autograd::set_history(y, pointer);
  return y;
}

Tensor linear_alone(const Tensor& x, const Tensor& v, const Tensor& weight, const Maybe& bias, const Tensor& basis,
                    const Tensor& projection, const Maybe& offset, const Maybe& adapter_ids, const Maybe& right,
                    int64_t order) {
  return std::get<0>(run(x, v, weight, bias, basis, projection, offset, adapter_ids, right, order));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tinylora, m) {
  m.def(
      "linear(Tensor x, Tensor v, Tensor weight, Tensor? bias, Tensor basis, Tensor projection, Tensor? offset, "
      "Tensor? adapter_ids, Tensor? right, int order) -> Tensor");
}

TORCH_LIBRARY_IMPL(tinylora, AutogradCPU, m) { m.impl("linear", linear_with_autograd); }
TORCH_LIBRARY_IMPL(tinylora, CPU, m) { m.impl("linear", linear_alone); }  // inference mode

#include "plan.inl"
