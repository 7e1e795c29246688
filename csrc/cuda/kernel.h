// Which kernel: what the launchers ask for, and what a driver or a simulator finds it by.
#pragma once
#include <string>

#include "tiles.h"

namespace tinylora {

enum class Element : int { Float32, BFloat16, Float16 };
constexpr int kElements = 3;
constexpr int kRanks = 4;  // 1, 2, 4, 8

inline int element_bytes(Element element) { return element == Element::Float32 ? 4 : 2; }
inline bool supported_rank(int64_t rank) { return rank == 1 || rank == 2 || rank == 4 || rank == 8; }

// What kernels.cu makes of an element type and a rank is a module.
constexpr int kModules = kElements * kRanks;
inline int module_of(Element element, int rank) {
  return static_cast<int>(element) * kRanks + (rank == 1 ? 0 : rank == 2 ? 1 : rank == 4 ? 2 : 3);
}

struct Kernel {
  enum class Kind { Rows, Parts, BankGrad, RefreshRight };
  static constexpr int kOfModule = 26, kAll = kModules * kOfModule;

  Kind kind;
  Element element;
  int rank;
  Tile tile = Tile::Few;  // of Rows and Parts
  bool ids = false;       // of Rows and Parts

  int module() const { return module_of(element, rank); }
  int number() const {
    const int of_tile = 2 * static_cast<int>(tile) + ids;
    const int within = kind == Kind::Rows ? of_tile : kind == Kind::Parts ? 12 + of_tile : kind == Kind::BankGrad ? 24 : 25;
    return module() * kOfModule + within;
  }
  std::string name() const;  // as compilers mangle it
};

constexpr const char* kTicketsName = "_ZN8tinylora7ticketsE";  // of kernels.cu

}  // namespace tinylora
