// Layers that read one x (q, k and v; gate and up) sum their dx where it is made: each adds its product to what those before
// it have left, where autograd would write it, read it and add it in a pass of its own. Included by node.cpp; node.py hands
// each dx to autograd.
//
// Between the layers and what x came from stands one node, Siblings, made by the first of them in forward. A layer joins it
// when its x has the gradient edge that the node stands before: that is what makes two dx one sum, so nothing is learned of
// the model, and no order, hook, copy or change of x can be taken for another. To autograd it is a node like any: it runs
// when all layers of this backward pass have run, hands the sum on, and x's hooks see what they always saw. Layers save
// what they saved, none keeps x, and the first is held by none: the thread that runs forward remembers it weakly.
namespace {

struct Siblings : torch::autograd::Node {
  std::string name() const override { return "TinyLoRASiblings (C++)"; }

  // The sum of this backward pass so far; undefined at first, and until it is put back.
  Tensor take() {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sums.find(torch::autograd::get_current_graph_task_id());
    if (found == sums.end()) return Tensor();
    Tensor sum = std::move(found->second);
    sums.erase(found);
    return sum;
  }

  void put(Tensor&& sum) {
    std::lock_guard<std::mutex> lock(mutex_);
    sums[torch::autograd::get_current_graph_task_id()] = std::move(sum);
  }

  variable_list apply(variable_list&& grads) override {
    const Tensor sum = take();
    if (!sum.defined()) return {grads[0]};
    // from layers whose gradients are to be differentiated again, or that a hook watches
    return {grads[0].defined() ? grads[0] + sum : sum};
  }

 private:
  std::map<int, Tensor> sums;  // one for each backward pass under way: an aborted one leaves its own behind
};

constexpr int64_t kNever = INT64_MAX;

// Numbers of a dx on the CPU from which on layers share its sum. The node costs 3 us, more than to add what is shorter.
std::atomic<int64_t> shared_from = [] {
  const char* const setting = std::getenv("TINYLORA_SIBLINGS");
  return setting && std::strcmp(setting, "0") == 0 ? kNever : int64_t(1) << 13;
}();

// Torch's pointer to a node: std::shared_ptr up to some release, its own counted pointer from then on.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class N>
NodePointer new_node(N*& node) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    NodePointer pointer(node = new N, [](auto* old) { deleteNode(old); });  // torch's: without deep recursion
    return pointer;
  } else {
    auto pointer = c10::make_intrusive<N>();
    node = pointer.get();
    return pointer;
  }
}

template <class N>
std::weak_ptr<N> weak(const std::shared_ptr<N>& pointer) { return pointer; }
template <class N>
c10::weak_intrusive_ptr<N> weak(const c10::intrusive_ptr<N>& pointer) { return c10::weak_intrusive_ptr<N>(pointer); }

bool pays_off(const Tensor& x, const Tensor& weight) {
  const int64_t from = shared_from;
  if (weight.device().type() != c10::DeviceType::CPU) return from != kNever;
  // oneDNN's products of 16 bits pay more for adding to what is there than the sum costs (rules.py)
  return weight.itemsize() >= 4 && x.numel() >= from;
}

// On this stream the layers before it wrote what it adds to.
bool is_current_stream(const c10::Stream& stream) {
  return stream.device_type() == c10::DeviceType::CPU ||
         c10::impl::VirtualGuardImpl(stream.device_type()).getStream(stream.device()) == stream;
}

// The node between a layer and what its x came from, of which `edge` is made the way to it; null: the layer hands its dx on.
Siblings* siblings_of(const Tensor& x, torch::autograd::Edge& edge, const Tensor& weight) {
  thread_local std::optional<decltype(weak(NodePointer()))> last;  // that a layer of this thread made
  if (!edge.is_valid() || !pays_off(x, weight)) return nullptr;
  NodePointer found = last ? last->lock() : NodePointer();
  const auto joins = [&] {
    const auto& known = found->input_metadata(0);
    return found->next_edge(0) == edge && known.is_same_shape(x) && known.options().dtype() == x.dtype() &&
           is_current_stream(known.stream());
  };
  if (!found || !joins()) {
    Siblings* made = nullptr;
    found = new_node(made);
    found->add_next_edge(edge);
    found->add_input_metadata(x);
    last.emplace(weak(found));
  }
  auto* const siblings = static_cast<Siblings*>(found.get());
  edge = {std::move(found), 0};
  return siblings;
}

}  // namespace
