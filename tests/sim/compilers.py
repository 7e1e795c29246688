"""Compiles device code for the simulators, as the wheels are, by NVRTC, or by nvcc; kept by the hash of what went in.

What the tests take is NVRTC where it is found, else nvcc. Both write PTX that the interpreter runs; both are held
to the same grid where TINYLORA_TEST_COMPILERS is "all".
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tinylora_kernels.ops.native import nvrtc
from tinylora_kernels.ops.native.nvrtc import CompileError, Target

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
_CACHE = Path(tempfile.gettempdir()) / f"tinylora-device-code-{os.getuid()}"
Compiler = Callable[[str, Target, tuple[str, ...]], bytes]  # raises CompileError


def by_nvcc(source: str, target: Target, options: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "kernels.cu", Path(scratch) / "out"
        path.write_text(source)
        kind = "-ptx" if target.ptx else "-cubin"
        command = [_nvcc(), "-std=c++17", f"-arch={target}", kind, *options, "-o", str(out), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"nvcc for {target}: {(done.stderr or done.stdout)[-3000:]}")
        return out.read_bytes()


def _nvcc() -> str | None:
    return next((path for name in ("nvcc", "/usr/local/cuda/bin/nvcc") if (path := shutil.which(name))), None)


@functools.cache
def available() -> dict[str, Compiler]:
    """By name and version ("NVRTC 12.9", "nvcc 13.0"), the one to take first."""
    found: dict[str, Compiler] = {}
    with contextlib.suppress(CompileError):
        library = nvrtc.find()
        found[str(library)] = library.compile
    if path := _nvcc():
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        found["nvcc " + re.search(r"release ([\d.]+)", text)[1]] = by_nvcc
    return found


# What the wheels are compiled by; the grid by all of them takes twice as long.
COMPILERS = tuple(available())[: None if os.environ.get("TINYLORA_TEST_COMPILERS") == "all" else 1]
needs_compiler = pytest.mark.skipif(
    not COMPILERS, reason="needs NVRTC (pip install nvidia-cuda-nvrtc-cu12) or nvcc from the CUDA toolkit"
)


def compile_cached(
    source: str, target: Target, options: tuple[str, ...] = (), compiler: str | None = None
) -> Path:
    """A file with the code."""
    compiler = compiler or COMPILERS[0]
    text = "\n".join([compiler, str(target), *options, source])
    path = _CACHE / f"{target}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if not path.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(available()[compiler](source, target, options))
        unfinished.replace(path)
    return path


def module(
    element: int, rank: int, target: Target, *options: str, sources: Path = CUDA, compiler: str | None = None
) -> Path:
    """The kernels of an element type and a rank."""
    return compile_cached(nvrtc.one_source(sources), target, (*nvrtc.defines(element, rank), *options), compiler)


def ptx(source: Path, capability: int, *options: str) -> str:
    """The PTX of one source for compute_XY, with line numbers of the source."""
    target = Target(capability, ptx=True)
    text = nvrtc.one_source(source.parent, source.name)
    return compile_cached(text, target, ("-lineinfo", *options)).read_text()
