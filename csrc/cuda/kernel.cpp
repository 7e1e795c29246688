#include "kernel.h"

namespace tinylora {

std::string Kernel::name() const {
  static constexpr const char* kTypes[kElements] = {"f", "NS_8BFloat16E", "NS_4HalfE"};
  const std::string type = kTypes[static_cast<int>(element)], r = "Li" + std::to_string(rank) + "E";
  const std::string of_tile = "LNS_4TileE" + std::to_string(static_cast<int>(tile)) + "ELb" + (ids ? "1" : "0");
  switch (kind) {
    case Kind::Rows:  // rows_kernel<type, r, tile, ids>(RowsArguments)
      return "_ZN8tinylora11rows_kernelI" + type + r + of_tile + "EEEvNS_13RowsArgumentsE";
    case Kind::Parts:  // parts_kernel<type, r, tile, ids>(PartsArguments)
      return "_ZN8tinylora12parts_kernelI" + type + r + of_tile + "EEEvNS_14PartsArgumentsE";
    case Kind::BankGrad:  // bank_grad_kernel<r>(BankGradArguments)
      return "_ZN8tinylora16bank_grad_kernelI" + r + "EEvNS_17BankGradArgumentsE";
    default:  // refresh_right_kernel<type, r>(RightArguments)
      return "_ZN8tinylora20refresh_right_kernelI" + type + r + "EEvNS_14RightArgumentsE";
  }
}

}  // namespace tinylora
