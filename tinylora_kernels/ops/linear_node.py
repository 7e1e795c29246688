"""The library behind tinylora::linear, an adapted nn.Linear as one node of autograd in C++ (linear_node.cpp).

The kernels use torch's stable ABI, which has no autograd, so that one file of them serves every torch. This node saves 6 us
of Python a layer, forward and backward, 13 to 20 where a matrix product has just emptied the caches, and serves one
release of torch: the one it was compiled with, which its name tells. It is compiled where the package is installed from its sources, or by `python -m tinylora_kernels compile`, in a
quarter of a minute. Beside any other torch, and on a GPU, autograd.py has the same node in Python: the same bits, slower.

setup.py runs this file without the package, and pip without torch: it imports neither at the top.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("linear_node.cpp")
COMMAND = "python -m tinylora_kernels compile"


class CompileError(Exception):
    """Why the node cannot be compiled here, in one line."""


def file_name(torch_directory: Path) -> str:
    """The name of the library for an installed torch: its release and the commit it was built from.

    The same for a release's CPU and CUDA builds, whose C++ is one.
    """
    text = (torch_directory / "version.py").read_text()
    version, commit = (re.search(rf"{name}\b.*= '(\w[^']*)'", text) for name in ("__version__", "git_version"))
    release = version.group(1).split("+")[0] if version else "unknown"
    return f"libtinylora_node-{release}-{commit.group(1)[:8] if commit else 'unknown'}.so"


def find_compiler() -> str | None:
    """CXX, or the first of the usual names on PATH."""
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    return next((path for name in names if (path := shutil.which(name.split()[0]))), None)


def compile_for(torch_directory: Path, destination: Path = PACKAGE, compiler: str | None = None) -> Path:
    """Compile the node for an installed torch.

    Args:
        torch_directory: the torch package, with its headers and libraries.
        destination: the folder that gets the library.
        compiler: a C++20 compiler; None: find_compiler().

    Returns:
        The library's path.

    Raises:
        CompileError: no compiler, or what it said.
    """
    if compiler is None and (compiler := find_compiler()) is None:
        raise CompileError("no C++ compiler found")
    library = destination / file_name(torch_directory)
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")  # a library that is there may be in use
    include, libraries = torch_directory / "include", torch_directory / "lib"
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--no-undefined"]
    command = [
        compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w", str(SOURCE), "-o", str(unfinished),
        f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}", f"-L{libraries}", *undefined,
        "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line]
            raise CompileError(f"{Path(compiler).name}: {(errors or done.stdout.splitlines() or ['no output'])[0][:300]}")
        unfinished.replace(library)
    except OSError as error:
        raise CompileError(str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return library


def load() -> str | None:
    """Load the library for this torch into the process; None if it is there, else one line that says why not."""
    import torch

    from . import library_file

    path = PACKAGE / file_name(Path(torch.__file__).parent)
    if os.environ.get("TINYLORA_NODE", "1") == "0":
        return "switched off by TINYLORA_NODE=0"
    if not path.is_file():
        return f"not compiled for torch {torch.__version__}. To change that: {COMMAND}"
    if damage := library_file.damage(path):
        return f"{path.name} does not load: {damage}. To change that: {COMMAND}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {error.__cause__ or error}. To change that: {COMMAND}"
    return None


def main(argv: list[str]) -> int:
    """`compile`: the node for the torch at hand, beside the package."""
    import argparse

    import torch

    argparse.ArgumentParser(prog=COMMAND, description=main.__doc__).parse_args(argv)
    try:
        path = compile_for(Path(torch.__file__).parent)
    except CompileError as error:
        print(f"compile: {error}", file=sys.stderr)
        return 1
    print(f"{path}: layers run it from the next start of Python on")
    return 0
