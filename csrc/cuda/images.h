// Device code: what is embedded in the library, and what is ready for the driver.
#pragma once
#include <cstddef>

#include "kernel.h"

namespace tinylora {

struct Image {
  int architecture;  // 90 for sm_90
  bool ptx;          // which the driver compiles, for that architecture and any later one
  const void* data;  // null: there is none
};

// Of what was handed over, the one for a GPU of this compute capability (90 for 9.0): machine code of the same major
// version and no later a minor one, else PTX of no later an architecture; the latest of them.
Image best_image(int module, int capability);

// The same, where there is none asked of who hands them over, who may compile for seconds. Throws std::runtime_error.
Image provided_image(Element element, int rank, int capability);

}  // namespace tinylora
