// The CPU kernels past the dispatcher (ops/native/kernels.h), for a call that nobody watches, of tensors whose numbers lie
// where the tensor says. Any other goes through the op, which comes to the same kernel. Included by node.cpp.
namespace {

using tinylora::CpuKernels;
using tinylora::Dtype;
using tinylora::Status;
using tinylora::TensorView;

std::atomic<const CpuKernels*> cpu_kernels = nullptr;  // the native library's, where it runs here

// Modes that want to see the ops: Python is a TorchDispatchMode.
bool dispatch_is_watched() {
  constexpr c10::DispatchKeySet watchers{
      c10::DispatchKey::Python, c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
      c10::DispatchKey::FuncTorchDynamicLayerBackMode, c10::DispatchKey::Tracer};
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(watchers);
}

// On the CPU; no subclass, no wrapper, nothing that is still to be conjugated.
bool is_plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet usual{c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU};
  return (tensor.key_set().raw_repr() & ~usual.raw_repr()) == 0;
}
bool is_plain(const Maybe& tensor) { return !tensor || is_plain(*tensor); }

// The kernels for a call on rows [..., D] and a basis [r, D]; null: it is the op's.
template <class... Others>
const CpuKernels* kernels_for(const Tensor& rows, const Tensor& basis, const Others&... others) {
  const CpuKernels* const kernels = cpu_kernels.load(std::memory_order_relaxed);
  const bool direct = kernels && is_plain(rows) && is_plain(basis) && (is_plain(others) && ...) && rows.dim() > 0 &&
                      rows.size(-1) > 0 && basis.dim() == 2 && !dispatch_is_watched() && !at::hasCallbacks();
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
  return {data, tensor.sizes().data(), tensor.strides().data(), tensor.dim(), dtype_of(tensor), /*device=*/-1};
}
TensorView view(const Tensor& tensor) { return view_of(tensor, const_cast<void*>(tensor.const_data_ptr())); }
TensorView written(const Tensor& tensor) { return view_of(tensor, tensor.mutable_data_ptr()); }

struct MaybeView {
  explicit MaybeView(const Maybe& tensor) : given(tensor.has_value()) {
    if (given) view = ::view(*tensor);
  }
  operator const TensorView*() const { return given ? &view : nullptr; }

  bool given;
  TensorView view;
};

// As the dispatcher would: no mode that fills what is new, since a kernel writes all of it.
Tensor empty_of(c10::IntArrayRef sizes, const Tensor& like) { return at::detail::empty_cpu(sizes, like.options()); }

// Coefficients of these rows by a factor of rank r, in its dtype [N, r].
Tensor empty_coefficients(const Tensor& rows, const Tensor& factor) {
  return empty_of({rows.numel() / rows.size(-1), factor.size(0)}, factor);
}

void throw_unless_ok(const CpuKernels* kernels, Status status) {
  switch (status) {
    case Status::ok: return;
    case Status::value_error: throw std::invalid_argument(kernels->last_error());
    case Status::index_error: throw std::out_of_range(kernels->last_error());
    default: throw std::runtime_error(kernels->last_error());
  }
}

}  // namespace
