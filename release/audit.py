"""What a native library asks of the machine it is loaded on, read from the ELF file itself.

    python release/audit.py LIBRARY...     prints what is wrong, exit status 1 if anything is

The library may need torch's stable C shims, libc, libm, libstdc++ and libgcc, none of them newer than manylinux_2_28
(glibc 2.28, the libstdc++ of gcc 8); what only a CUDA build of torch defines must be weak. Everything else would tie
it to one Python, one torch, one CUDA or one distribution. NVIDIA's driver is for it to open, not to need, and nothing
of CUDA's runtime is linked into it.
"""
from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# PEP 600's manylinux_2_28: https://github.com/pypa/auditwheel, policy/manylinux-policy.json
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
ALLOWED_LIBRARIES = re.compile(
    r"(libtorch|libtorch_cpu|libc10)\.so"
    r"|(libc|libm|libmvec|libstdc\+\+|libgcc_s|libpthread|libdl|librt)\.so\.\d+"
    r"|ld-linux-(x86-64|aarch64)\.so\.\d+"
)
STABLE_SHIM = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
# Compiler and linker runtime, weak by convention and unversioned.
RUNTIME = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}

_DYNAMIC, _DYNSYM, _VERSYM, _VERNEED = 6, 11, 0x6FFFFFFF, 0x6FFFFFFE
_DT_NEEDED = 1
_LOCAL, _WEAK = 0, 2
_MACHINES = {62: "x86_64", 183: "aarch64"}


class Symbol(NamedTuple):
    """One symbol that the library uses or gives: `version` as in "GLIBC_2.14", empty where there is none."""

    name: str
    version: str
    weak: bool
    undefined: bool


class Library:
    """The machine, the dynamic symbols and the needed libraries of a 64-bit little-endian ELF file."""

    def __init__(self, path: Path):
        data = Path(path).read_bytes()
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path}: expected a 64-bit little-endian ELF file, found it to begin {data[:6]!r}")
        self.data = data
        (number,) = struct.unpack_from("<H", data, 0x12)
        self.machine = _MACHINES.get(number, f"ELF machine {number}")
        (start,) = struct.unpack_from("<Q", data, 0x28)
        size, count = struct.unpack_from("<HH", data, 0x3A)
        # (name, type, flags, address, offset, length, link) of each section
        self._headers = [struct.unpack_from("<IIQQQQI", data, start + i * size) for i in range(count)]
        self._sections = {kind: (offset, length, link) for _, kind, _, _, offset, length, link in self._headers}

    def _strings(self, section: int) -> Callable[[int], str]:
        """The text at an offset of a string table."""
        offset = self._headers[section][4]
        return lambda at: self.data[offset + at : self.data.index(b"\0", offset + at)].decode()

    @property
    def needed(self) -> list[str]:
        """Names of the libraries the loader has to find."""
        offset, length, link = self._sections[_DYNAMIC]
        text = self._strings(link)
        entries = struct.iter_unpack("<QQ", self.data[offset : offset + length])
        return [text(value) for tag, value in entries if tag == _DT_NEEDED]

    @property
    def symbols(self) -> Iterator[Symbol]:
        offset, length, link = self._sections[_DYNSYM]
        text, versions = self._strings(link), self._versions()
        marks = self._sections.get(_VERSYM)  # absent where nothing is versioned
        for number, entry in enumerate(struct.iter_unpack("<IBBHQQ", self.data[offset : offset + length])):
            if number == 0:  # the empty symbol every table begins with
                continue
            name, info, _, section, _, _ = entry
            if info >> 4 == _LOCAL:  # sections, in what some linkers write
                continue
            index = struct.unpack_from("<H", self.data, marks[0] + 2 * number)[0] & 0x7FFF if marks else 0
            yield Symbol(text(name), versions.get(index, ""), info >> 4 == _WEAK, section == 0)

    @property
    def versions(self) -> set[str]:
        """Versions that other libraries must have, such as GLIBC_2.14."""
        return set(self._versions().values())

    def _versions(self) -> dict[int, str]:
        """The same by the index that symbols are marked with."""
        if _VERNEED not in self._sections:
            return {}
        at, _, link = self._sections[_VERNEED]
        text, found = self._strings(link), {}
        while True:
            _, count, _, first, following = struct.unpack_from("<HHIII", self.data, at)
            entry = at + first
            for _ in range(count):
                _, _, index, name, next_entry = struct.unpack_from("<IHHII", self.data, entry)
                found[index & 0x7FFF] = text(name)
                entry += next_entry
            if not following:
                return found
            at += following


def foreign_symbols(library: Library) -> list[str]:
    """Undefined symbols of no C or C++ runtime and no stable shim of torch, and CUDA shims that are not weak."""
    problems = []
    for symbol in library.symbols:
        if not symbol.undefined or symbol.version or symbol.name in RUNTIME:
            continue
        if not STABLE_SHIM.fullmatch(symbol.name):
            problems.append(f"{symbol.name}: not a stable shim of torch and of no versioned system library")
        elif "cuda_" in symbol.name and not symbol.weak:
            problems.append(f"{symbol.name}: must be weak, a torch without CUDA lacks it")
    return problems


def foreign_libraries(library: Library) -> list[str]:
    """Needed libraries outside torch's core and the C and C++ runtimes."""
    unexpected = [name for name in library.needed if not ALLOWED_LIBRARIES.fullmatch(name)]
    return [f"{name}: not among the libraries allowed" for name in unexpected]


def exports(library: Library) -> list[str]:
    """Defined symbols other than the library's own: one of them could stand in for a namesake elsewhere."""
    names = [symbol.name for symbol in library.symbols if not symbol.undefined]
    return [f"{name}: exported, expected tinylora_* alone" for name in names if not name.startswith("tinylora_")]


def too_new(library: Library) -> list[str]:
    """Versions of the C and C++ runtimes that manylinux_2_28 does not have, with the symbols that need them."""
    problems = []
    for version in sorted(library.versions):
        family, _, number = version.partition("_")
        numbered = re.fullmatch(r"\d+(\.\d+)*", number)
        if family in NEWEST and numbered and tuple(map(int, number.split("."))) <= NEWEST[family]:
            continue
        users = [symbol.name for symbol in library.symbols if symbol.version == version]
        newest = f"{family}_{'.'.join(map(str, NEWEST[family]))}" if family in NEWEST else "any version known"
        problems.append(f"{version}: newer than {newest}, needed for {', '.join(users) or 'the file itself'}")
    return problems


def runtime_inside(library: Library) -> list[str]:
    """CUDA's static runtime, by the names of the errors that it returns."""
    return ["CUDA's runtime is linked into it: cudaError..."] if b"cudaError" in library.data else []


def audit(path: Path) -> list[str]:
    """Everything that would keep the library from loading on a manylinux_2_28 machine; empty if nothing."""
    library = Library(path)
    parts = (foreign_libraries, foreign_symbols, runtime_inside, exports, too_new)
    return [problem for part in parts for problem in part(library)]


def main(paths: list[str]) -> int:
    problems = [f"{path}: {problem}" for path in paths for problem in audit(Path(path))]
    print("\n".join(problems) or "nothing but stable shims and manylinux_2_28")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
