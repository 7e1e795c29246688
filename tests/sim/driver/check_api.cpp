// csrc/cuda/driver_api.h against NVIDIA's cuda.h: the same functions, parameters of the same sizes in the same places, the
// same numbers. Compiled, not run.
#include <cuda.h>

#include <type_traits>

#include "driver_api.h"

template <class Ours, class Theirs>
constexpr bool kAlike = sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;

template <class Ours, class Theirs>
constexpr bool kSameCall = false;
template <class R, class... Ours, class S, class... Theirs>
constexpr bool kSameCall<R (*)(Ours...), S (*)(Theirs...)> = [] {
  if constexpr (sizeof...(Ours) == sizeof...(Theirs)) return sizeof(R) == sizeof(S) && (kAlike<Ours, Theirs> && ...);
  return false;
}();

namespace ours = tinylora::driver;
using namespace ours;
#define CHECK(name, parameters) static_assert(kSameCall<ours::Result(*) parameters, decltype(&::name)>, #name);
TINYLORA_DRIVER_FUNCTIONS(CHECK)

static_assert(ours::kSuccess == CUDA_SUCCESS);
static_assert(ours::kMultiprocessors == static_cast<int>(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
static_assert(ours::kMajor == static_cast<int>(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
static_assert(ours::kMinor == static_cast<int>(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
static_assert(ours::kNotCapturing == static_cast<int>(CU_STREAM_CAPTURE_STATUS_NONE));
static_assert(ours::kRelaxed == static_cast<int>(CU_STREAM_CAPTURE_MODE_RELAXED));
static_assert(CU_GET_PROC_ADDRESS_DEFAULT == 0);
