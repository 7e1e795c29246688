// ops.cpp and update.cpp of csrc/cuda, unchanged, as ops for CPU tensors: torch.ops.tinylora_emulated.update and so on. What it
// checks, allocates and launches is what a GPU would be given; the launches go to the emulator.
#include <torch/csrc/stable/library.h>

#include "emulator.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(tinylora_emulated, CPU, m, 0)

#include "ops.cpp"

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
