// What a kernel asks of a launch, read from its cubin or its PTX: the stand-in driver holds launches to it.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace standin {

struct KernelFacts {
  unsigned parameter_bytes = 0, parameters = 0;  // of the block, and how many there are
  unsigned most_threads = 1024;                  // .maxntid
  unsigned registers = 0, shared = 0;            // of a thread; static bytes of a block
};

struct Facts {
  bool ptx = false;
  int architecture = 0;
  std::map<std::string, KernelFacts> kernels;
  std::map<std::string, uint64_t> variables;  // bytes of each
};

// Throws std::runtime_error: why no driver would take it.
Facts read_image(const void* image);

}  // namespace standin
