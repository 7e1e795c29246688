// The kernels past the dispatcher (ops/native/kernels.h), for a call that nobody watches, of tensors whose numbers lie
// where the tensor says. Any other goes through the op, which comes to the same kernel. Included by node.cpp.
namespace {

using tinylora::Dtype;
using tinylora::Kernels;
using tinylora::Scratch;
using tinylora::Status;
using tinylora::TensorView;

// The native library's, where they run here.
std::atomic<const Kernels*> cpu_kernels = nullptr;
std::atomic<const Kernels*> cuda_kernels = nullptr;

// Modes that want to see the ops: Python is a TorchDispatchMode.
bool dispatch_is_watched() {
  constexpr c10::DispatchKeySet watchers{
      c10::DispatchKey::Python, c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
      c10::DispatchKey::FuncTorchDynamicLayerBackMode, c10::DispatchKey::Tracer};
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(watchers);
}

// Of tensors whose kernels are at hand.
c10::DispatchKeySet usual_keys(bool on_cpu) {
  constexpr c10::DispatchKeySet cpu{c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                    c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU};
  constexpr c10::DispatchKeySet cuda{c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                     c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA};
  return on_cpu ? cpu : cuda;
}

// No subclass, no wrapper, nothing that is still to be conjugated.
bool is_plain(const Tensor& tensor, c10::DispatchKeySet usual) {
  return (tensor.key_set().raw_repr() & ~usual.raw_repr()) == 0;
}
bool is_plain(const Maybe& tensor, c10::DispatchKeySet usual) { return !tensor || is_plain(*tensor, usual); }

// The kernels for a call on rows [..., D] and a basis [r, D]; null: it is the op's.
template <class... Others>
const Kernels* kernels_for(const Tensor& rows, const Tensor& basis, const Others&... others) {
  const bool on_cpu = rows.is_cpu();
  const Kernels* const kernels = (on_cpu ? cpu_kernels : cuda_kernels).load(std::memory_order_relaxed);
  const c10::DispatchKeySet usual = usual_keys(on_cpu);
  const bool direct = kernels && is_plain(rows, usual) && is_plain(basis, usual) && (is_plain(others, usual) && ...) &&
                      rows.dim() > 0 && rows.size(-1) > 0 && basis.dim() == 2 && !dispatch_is_watched() &&
                      !at::hasCallbacks();
  return direct ? kernels : nullptr;  // callbacks: of a profiler
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    case at::kDouble: return Dtype::float64;
    case at::kInt: return Dtype::int32;
    case at::kLong: return Dtype::int64;
    default: return Dtype::other;
  }
}

TensorView view_of(const Tensor& tensor, void* data) {
  const int32_t device = tensor.is_cpu() ? -1 : tensor.get_device();
  return {data, tensor.sizes().data(), tensor.strides().data(), tensor.dim(), dtype_of(tensor), device};
}
TensorView view(const Tensor& tensor) { return view_of(tensor, const_cast<void*>(tensor.const_data_ptr())); }
TensorView written(const Tensor& tensor) { return view_of(tensor, tensor.mutable_data_ptr()); }

// Of an output that was allocated; null: nobody wants it.
void* address(const Tensor& output) { return output.defined() ? output.mutable_data_ptr() : nullptr; }

struct MaybeView {
  explicit MaybeView(const Maybe& tensor) : given(tensor.has_value()) {
    if (given) view = ::view(*tensor);
  }
  operator const TensorView*() const { return given ? &view : nullptr; }

  bool given;
  TensorView view;
};

// As the dispatcher would, where the kernels run: no mode that fills what is new, since a kernel writes all of it.
Tensor empty_of(c10::IntArrayRef sizes, const at::TensorOptions& like) {
  if (like.device().is_cpu()) return at::detail::empty_cpu(sizes, like);
  return at::_ops::empty_memory_format::redispatch(c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                                   c10::fromIntArrayRefSlow(sizes), c10::typeMetaToScalarType(like.dtype()),
                                                   like.layout(), like.device(), std::nullopt, std::nullopt);
}

// Coefficients of these rows by a factor of rank r, in its dtype [N, r].
Tensor empty_coefficients(const Tensor& rows, const Tensor& factor) {
  return empty_of({rows.numel() / rows.size(-1), factor.size(0)}, factor.options());
}

// Of a call on a device; what torch had to say is kept while the kernels' own words pass through the library.
struct ScratchTensor {
  const Tensor& like;
  Tensor held{};
  std::exception_ptr refusal{};

  operator Scratch() { return {allocate, this}; }

  static void* allocate(void* owner, int64_t words) {
    auto& self = *static_cast<ScratchTensor*>(owner);
    try {
      self.held = empty_of({words}, self.like.options().dtype(at::kFloat));
      return self.held.mutable_data_ptr();
    } catch (...) {
      self.refusal = std::current_exception();
      return nullptr;
    }
  }
};

void throw_unless_ok(const Kernels* kernels, Status status) {
  switch (status) {
    case Status::ok: return;
    case Status::value_error: throw std::invalid_argument(kernels->last_error());
    case Status::index_error: throw std::out_of_range(kernels->last_error());
    default: throw std::runtime_error(kernels->last_error());
  }
}

void throw_unless_ok(const Kernels* kernels, Status status, const ScratchTensor& scratch) {
  if (scratch.refusal) std::rethrow_exception(scratch.refusal);
  throw_unless_ok(kernels, status);
}

}  // namespace
