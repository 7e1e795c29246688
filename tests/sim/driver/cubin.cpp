#include "cubin.h"

#include <elf.h>

#include <cstring>
#include <regex>
#include <stdexcept>

namespace standin {
namespace {

constexpr int kMachine = 190;  // EM_CUDA
// Attributes of .nv.info.KERNEL: a format, a number, and a size or a value of 16 bits; kSized is followed by so many bytes.
constexpr uint8_t kSized = 4, kMaxThreads = 0x05, kParameterBlock = 0x0a, kParameter = 0x17;

template <class T>
T at(const char* data, uint64_t offset) {
  T value;
  std::memcpy(&value, data + offset, sizeof value);
  return value;
}

void read_attributes(const char* data, uint64_t size, KernelFacts& facts) {
  for (uint64_t i = 0; i + 4 <= size;) {
    const auto format = at<uint8_t>(data, i), number = at<uint8_t>(data, i + 1);
    const auto value = at<uint16_t>(data, i + 2);
    if (format == kSized && number == kMaxThreads) facts.most_threads = at<uint32_t>(data, i + 4);
    if (format == kSized && number == kParameterBlock) facts.parameter_bytes = at<uint16_t>(data, i + 4 + 6);
    if (format == kSized && number == kParameter) ++facts.parameters;
    i += 4 + (format == kSized ? value : 0);
  }
}

Facts read_cubin(const char* data) {
  const auto header = at<Elf64_Ehdr>(data, 0);
  if (header.e_machine != kMachine) throw std::runtime_error("an ELF file of machine " + std::to_string(header.e_machine));
  Facts facts;
  facts.architecture = header.e_flags & 0xff;
  const auto section = [&](unsigned i) { return at<Elf64_Shdr>(data, header.e_shoff + i * header.e_shentsize); };
  const char* const names = data + section(header.e_shstrndx).sh_offset;
  const auto after = [](const std::string& name, const char* prefix) {
    return name.rfind(prefix, 0) == 0 ? name.substr(std::strlen(prefix)) : std::string();
  };
  for (unsigned i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr s = section(i);
    const std::string name = names + s.sh_name;
    if (const auto kernel = after(name, ".text."); !kernel.empty()) facts.kernels[kernel].registers = s.sh_info >> 24;
    if (const auto kernel = after(name, ".nv.shared."); !kernel.empty() && kernel.rfind("_Z", 0) == 0)
      facts.kernels[kernel].shared = s.sh_size;
    if (const auto kernel = after(name, ".nv.info."); !kernel.empty())
      read_attributes(data + s.sh_offset, s.sh_size, facts.kernels[kernel]);
    if (s.sh_type != SHT_SYMTAB) continue;
    const char* const symbols = data + section(s.sh_link).sh_offset;
    for (uint64_t k = 0; k < s.sh_size / sizeof(Elf64_Sym); ++k) {
      const auto symbol = at<Elf64_Sym>(data, s.sh_offset + k * sizeof(Elf64_Sym));
      if (ELF64_ST_TYPE(symbol.st_info) == STT_OBJECT) facts.variables[symbols + symbol.st_name] = symbol.st_size;
    }
  }
  return facts;
}

Facts read_ptx(const std::string& text) {
  Facts facts;
  facts.ptx = true;
  std::smatch found;
  if (!std::regex_search(text, found, std::regex(R"(\.target sm_(\d+))"))) throw std::runtime_error("PTX for no target");
  facts.architecture = std::stoi(found[1]);
  const std::regex entry(R"(\.entry (\w+)\(\s*([^)]*)\)\s*((?:\.\w+ [\d, ]+\s*)*))"), bytes(R"(\.b8 \w+\[(\d+)\])");
  for (std::sregex_iterator i(text.begin(), text.end(), entry), end; i != end; ++i) {
    KernelFacts& kernel = facts.kernels[(*i)[1]];
    const std::string parameters = (*i)[2], directives = (*i)[3];
    for (std::sregex_iterator p(parameters.begin(), parameters.end(), bytes); p != end; ++p) {
      kernel.parameter_bytes += std::stoi((*p)[1]);
      ++kernel.parameters;
    }
    if (std::regex_search(directives, found, std::regex(R"(\.maxntid (\d+))"))) kernel.most_threads = std::stoi(found[1]);
  }
  const std::regex variable(R"(\.global \.align \d+ \.(?:b8|u32) (\w+)\[(\d+)\])");
  for (std::sregex_iterator i(text.begin(), text.end(), variable), end; i != end; ++i)
    facts.variables[(*i)[1]] = std::stoull((*i)[2]);
  return facts;
}

}  // namespace

Facts read_image(const void* image) {
  const auto* const data = static_cast<const char*>(image);
  if (std::memcmp(data, ELFMAG, SELFMAG) == 0) return read_cubin(data);
  if (data[0] == '/' || data[0] == '.' || data[0] == '\n') return read_ptx(data);
  throw std::runtime_error("neither a cubin nor PTX");
}

}  // namespace standin
