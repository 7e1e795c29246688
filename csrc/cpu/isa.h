// Which kernels run on this machine.
#pragma once

#include "cpu/kernels.h"

namespace tinylora::cpu {

// The fastest kernels this CPU and operating system can run, chosen at the first call. The environment variable
// TINYLORA_CPU_ISA asks for others by name; std::runtime_error if it cannot be honoured.
const Kernels& kernels();

// The kernels of that name from now on; false, and no change, where the machine cannot run them.
bool use_isa(const char* name);

}  // namespace tinylora::cpu
