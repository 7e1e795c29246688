"""NVRTC, the CUDA compiler that is a library: found, and called.

It needs no toolkit, no driver and no GPU. A CUDA build of torch brings one; for the wheels it comes from PyPI
(nvidia-cuda-nvrtc-cu12). setup.py runs this file without the package: it imports neither it nor torch.
"""
from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MAJORS = (12, 13)  # of the CUDA whose NVRTC is looked for
ELEMENTS = ("float", "tinylora::BFloat16", "tinylora::Half")  # in the order of enum class Element
RANKS = (1, 2, 4, 8)
_CODE_OF = {86: 80, 87: 80, 89: 80}  # run that of sm_80, where NVRTC 12.9 spills less: on sm_86 it does for long rows


class CompileError(Exception):
    """Why there is no device code, in one line."""


class Target(NamedTuple):
    """What is compiled for: machine code of one architecture (90 for sm_90), or PTX."""

    architecture: int
    ptx: bool

    def __str__(self) -> str:
        return f"{'compute' if self.ptx else 'sm'}_{self.architecture}"


def targets(architectures: str) -> list[Target]:
    """What "75-real;90-virtual;100" asks for, in CMake's notation: -real machine code, -virtual PTX, none both."""
    found = []
    for word in re.split(r"[;, ]+", architectures.strip()):
        named = re.fullmatch(r"(\d+)(-real|-virtual)?", word)
        if not named:
            raise CompileError(f"architectures: expected numbers as in '80-real;90', found {word!r}")
        kinds = {None: (False, True), "-real": (False,), "-virtual": (True,)}[named[2]]
        found += [Target(int(named[1]), ptx) for ptx in kinds]
    return found


class Nvrtc:
    """One loaded NVRTC.

    Attributes:
        path: its file, or the name the loader knows it by.
        version: (12, 9).
    """

    def __init__(self, path: str):
        self.path = path
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = major.value, minor.value

    def __str__(self) -> str:
        return "NVRTC {}.{}".format(*self.version)

    def architectures(self) -> list[int]:
        """Those that it has machine code for, in ascending order."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found), "nvrtcGetSupportedArchs")
        return sorted(found)

    def best_target(self, architecture: int) -> Target:
        """For a GPU that may be younger than this compiler: the driver then compiles the PTX of the last it knows."""
        known, architecture = self.architectures(), _CODE_OF.get(architecture, architecture)
        if architecture in known:
            return Target(architecture, ptx=False)
        earlier = [number for number in known if number < architecture]
        if not earlier:
            raise CompileError(f"{self} compiles for sm_{known[0]} and later, the GPU is sm_{architecture}")
        return Target(earlier[-1], ptx=True)

    def compile(self, source: str, target: Target, options: Iterable[str] = ()) -> bytes:
        """The machine code or PTX.

        Raises:
            CompileError: its first error.
        """
        program = ctypes.c_void_p()
        text = source.encode()
        created = self._library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None)
        self._check(created, "nvrtcCreateProgram")
        try:
            arguments = [f"--gpu-architecture={target}", "--std=c++17", *options]
            values = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
            status = self._library.nvrtcCompileProgram(program, len(arguments), values)
            if status:
                lines = self._take(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").splitlines()
                first = next((line for line in lines if "error" in line), lines[0] if lines else f"error {status}")
                raise CompileError(f"{self} for {target}: {first[:300]}")
            return self._take(program, "PTX" if target.ptx else "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _take(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data), f"nvrtcGet{what}")
        return data.raw

    def _check(self, status: int, call: str) -> None:
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"{call} of {self.path}: {self._library.nvrtcGetErrorString(status).decode()}")


def defines(element: int, rank: int) -> list[str]:
    """What makes kernels.cu the module of an element type and a rank."""
    return [f"-DTINYLORA_ELEMENT={ELEMENTS[element]}", f"-DTINYLORA_RANK={rank}"]


def find(majors: Iterable[int] = MAJORS, folders: Iterable[Path] = ()) -> Nvrtc:
    """The NVRTC of one of these CUDA versions, the first that loads.

    Looked for: the file TINYLORA_NVRTC, packages beside the ones that are imported here, `folders`, what the loader
    finds by name, and CUDA_HOME or /usr/local/cuda.

    Raises:
        CompileError: there is none, and what brings one.
    """
    if named := os.environ.get("TINYLORA_NVRTC"):
        try:
            return Nvrtc(named)
        except OSError as error:
            raise CompileError(f"TINYLORA_NVRTC={named} does not load: {error}") from None
    majors = list(majors)
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for major in majors:
        name = f"libnvrtc.so.{major}"
        packages = [Path(entry) / "nvidia" for entry in sys.path if entry]
        places = [package / place for package in packages for place in ("cuda_nvrtc/lib", f"cu{major}/lib")]
        places += folders
        found = [place / name for place in places] + [Path(name)] + [home / "lib64" / name for home in homes]
        for path in found:
            if path.name == str(path) or path.is_file():
                try:
                    return Nvrtc(str(path))
                except (OSError, AttributeError):
                    continue
    names = " or ".join(f"libnvrtc.so.{major}" for major in majors)
    raise CompileError(f"{names} is not found. To change that: pip install nvidia-cuda-nvrtc-cu{majors[0]}")


def one_source(folder: Path, name: str = "kernels.cu") -> str:
    """kernels.cu and what it includes from its own folder, each once, as one text: NVRTC then needs no files."""
    seen = set()

    def text_of(name: str) -> list[str]:
        seen.add(name)
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((folder / name).read_text().splitlines(), 1):
            included = re.fullmatch(r'#include "(.+)".*', line)
            if included and (folder / included[1]).is_file():
                if included[1] not in seen:
                    lines += [*text_of(included[1]), f'#line {number + 1} "{name}"']
                else:
                    lines.append("")
            else:
                lines.append("" if line == "#pragma once" else line)
        return lines

    return "\n".join(text_of(name)) + "\n"
