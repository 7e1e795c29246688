// A torch without CUDA, given "cuda" devices: those of the stand-in driver, whose memory is host memory. Its current
// device is the driver's current context, as with the CUDA runtime. To be loaded before torch, which asks for its hooks
// once; unknown operations run on the CPU, on the same memory, and are recorded where their stream is captured.
#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <functional>

extern "C" {
void* standin_allocate(int device, size_t bytes);
void standin_free(void* memory);
int standin_devices();
void standin_set_device(int device);
void* standin_stream(int device);
int standin_record(void* stream, const std::function<void()>* work);
}

namespace {

using at::Tensor;
constexpr auto kCUDA = c10::DeviceType::CUDA;

thread_local int device_now = 0;
thread_local void* stream_now[16] = {};
std::atomic<int> allocations_until_refusal = -1;  // negative: none is refused

void set_device(int device) {
  if (device == device_now) return;  // torch's own shortcut: a fresh thread of device 0 gets no context
  device_now = device;
  standin_set_device(device);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard(c10::DeviceType = kCUDA) {}
  c10::DeviceType type() const override { return kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const int before = device_now;
    set_device(device.index());
    return {kCUDA, static_cast<c10::DeviceIndex>(before)};
  }
  c10::Device getDevice() const override { return {kCUDA, static_cast<c10::DeviceIndex>(device_now)}; }
  void setDevice(c10::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { set_device(device.index()); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, reinterpret_cast<c10::StreamId>(stream_now[device.index()]));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    stream_now[stream.device_index()] = reinterpret_cast<void*>(stream.id());
    return before;
  }
  // Everything is done when it is asked for, or all of it in a replay's order.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(standin_devices()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : at::CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(standin_devices()); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(device_now); }
};

Tensor new_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, c10::ScalarType dtype, c10::Device device) {
  TORCH_CHECK_WITH(OutOfMemoryError, allocations_until_refusal < 0 || allocations_until_refusal--, "CUDA out of memory.");
  int64_t count = 1;
  for (size_t i = 0; i < sizes.size(); ++i) count = sizes[i] ? count + (sizes[i] - 1) * strides[i] : 0;
  void* const memory = standin_allocate(device.index(), std::max<int64_t>(count, 0) * c10::elementSize(dtype));
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  return at::from_blob(memory, sizes, strides, standin_free, options, device);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  c10::Device where = device.value_or(c10::Device(kCUDA, device_now));
  if (!where.has_index()) where = {kCUDA, static_cast<c10::DeviceIndex>(device_now)};
  return new_tensor(sizes, strides, dtype.value_or(at::kFloat), where);
}

// The same memory as a tensor of the CPU; without the history that the tensor has, or gets.
Tensor on_cpu(const Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [keep = tensor.storage()](void*) {},
                       tensor.options().device(at::kCPU), at::kCPU);
}

Tensor to_gpu(const Tensor& tensor, int64_t device) {
  Tensor out = new_tensor(tensor.sizes(), tensor.strides(), tensor.scalar_type(),
                          {kCUDA, static_cast<c10::DeviceIndex>(device)});
  on_cpu(out).copy_(tensor);
  return out;
}

Tensor empty(at::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
             std::optional<c10::Device> device, std::optional<bool> pinned, std::optional<c10::MemoryFormat>) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t i = int64_t(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  return empty_strided(sizes, strides, dtype, layout, device, pinned);
}

Tensor as_cpu(const Tensor& tensor) { return tensor.defined() && tensor.is_cuda() ? on_cpu(tensor) : tensor; }

// What was just done is done again whenever the graph is run that this device's stream is captured into, if it is.
void record(int64_t device, const std::function<void()>& work) { standin_record(stream_now[device], &work); }

Tensor& copy(Tensor& self, const Tensor& source, bool) {
  const auto work = [to = as_cpu(self), from = as_cpu(source)] { to.copy_(from); };
  work();
  if (self.is_cuda() && source.is_cuda()) record(self.get_device(), work);
  return self;
}

// An operation that has no kernel here: on the CPU, on the same memory. What it writes is the argument again; what is new
// is copied to the device of its arguments.
int64_t move_to_cpu(torch::jit::Stack* stack, size_t count) {
  const size_t begin = stack->size() - count;
  int64_t device = device_now;
  const auto moved = [&](const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    device = tensor.get_device();
    return tensor.numel() ? as_cpu(tensor) : at::empty(tensor.sizes(), tensor.options().device(at::kCPU));  // resizable
  };
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[begin + i];
    if (value.isTensor()) value = moved(value.toTensor());
    else if (value.isDevice() && value.toDevice().is_cuda()) value = c10::Device(at::kCPU);
    else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(moved(one));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& one : value.toOptionalTensorVector())
        list.push_back(one ? std::optional(moved(*one)) : std::nullopt);
      value = std::move(list);
    }
  }
  return device;
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  const int64_t device = move_to_cpu(stack, count);
  const std::vector<c10::IValue> moved(stack->begin() + begin, stack->end());
  op.callBoxed(stack);
  std::vector<Tensor> made(schema.returns().size());
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    c10::IValue& value = (*stack)[begin + i];
    const auto* const alias = schema.returns()[i].alias_info();
    for (size_t k = 0; alias && alias->isWrite() && k < count; ++k) {
      const auto* const of_argument = schema.arguments()[k].alias_info();
      if (!of_argument || *of_argument != *alias) continue;
      const Tensor written = given[k].toTensor();
      if (!written.numel() && value.toTensor().numel()) {
        written.unsafeGetTensorImpl()->shallow_copy_from(to_gpu(value.toTensor(), device).getIntrusivePtr());
      }
      value = written;
    }
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_cpu())
      value = to_gpu(value.toTensor(), device), made[i] = on_cpu(value.toTensor());
  }
  record(device, [op, moved, made] {
    torch::jit::Stack again = moved;
    op.callBoxed(&again);
    for (size_t i = 0; i < made.size(); ++i)
      if (made[i].defined()) made[i].copy_(again[i].toTensor());
  });
}

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY(standin, m) {
  m.def("to_gpu(Tensor tensor, int device) -> Tensor", to_gpu);
  m.def("on_cpu(Tensor tensor) -> Tensor", on_cpu);
}

// Of a CUDA torch; the library finds it by this name.
extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = stream_now[device];
  return 0;
}
extern "C" __attribute__((visibility("default"))) int standin_device(int device) {  // now; and from now on, unless negative
  const int before = device_now;
  if (device >= 0) set_device(device);
  return before;
}
extern "C" __attribute__((visibility("default"))) void standin_refuse_allocation(int after) {
  allocations_until_refusal = after;
}
extern "C" __attribute__((visibility("default"))) void standin_use_stream(int device, void* stream) {
  stream_now[device] = stream;
}
