"""The C++ of an adapted nn.Linear: its node of autograd (node.cpp), and the plan by which it is called (plan.inl).

The kernels use torch's stable ABI, which has no autograd, so that one file of them serves every torch and every
Python. This one serves one release of torch and one of Python: those it was compiled with, which its name tells. It
is compiled where the package is installed from its sources, or by `python -m tinylora_kernels compile`, in half a
minute. Beside any other torch or Python, and with Triton, node.py has the same node and plan.py the same plan: the same
bits, slower: bench/results/dispatch.csv has what one token costs a layer either way (bench/dispatch.py).

setup.py runs this file without the package, and pip without torch: it imports neither at the top.
"""
from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("node.cpp")
INCLUDED = Path(__file__).with_name("plan.inl")
COMMAND = "python -m tinylora_kernels compile"


class CompileError(Exception):
    """Why the node cannot be compiled here, in one line."""


def file_name(torch_directory: Path) -> str:
    """The name of the library for an installed torch and this Python: torch's release and commit, our sources' digest.

    The same for a release's CPU and CUDA builds, whose C++ is one; another for other sources, so that none is loaded
    that was compiled from older ones.
    """
    sources = hashlib.sha256(SOURCE.read_bytes() + INCLUDED.read_bytes()).hexdigest()[:8]
    text = (torch_directory / "version.py").read_text()
    version, commit = (re.search(rf"{name}\b.*= '(\w[^']*)'", text) for name in ("__version__", "git_version"))
    release = version.group(1).split("+")[0] if version else "unknown"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")  # .cpython-311-x86_64-linux-gnu.so
    return f"libtinylora_node-{release}-{commit.group(1)[:8] if commit else 'unknown'}-{sources}{suffix}"


def _of_other_sources(name: str) -> str:
    """A pattern for the libraries of the same torch and Python, whatever sources they were compiled from."""
    return re.sub(r"-[0-9a-f]{8}(?=\.)", "-" + 8 * "[0-9a-f]", name, count=1)


def find_compiler() -> list[str] | None:
    """CXX as a command, launcher and options included ("ccache g++ -m64"), or the first of the usual names on PATH.

    Raises:
        CompileError: CXX names something that is not there.
    """
    if asked := shlex.split(os.environ.get("CXX", "")):
        programs = [word for word in asked[:2] if not word.startswith("-")]  # a launcher and the compiler, or it alone
        if missing := next((word for word in programs if not shutil.which(word)), None):
            raise CompileError(f"CXX={os.environ['CXX']}: {missing} is not on PATH")
        return asked
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def compile_for(torch_directory: Path, destination: Path = PACKAGE, compiler: list[str] | None = None) -> Path:
    """Compile the node for an installed torch.

    Args:
        torch_directory: the torch package, with its headers and libraries.
        destination: the folder that gets the library.
        compiler: the command of a C++20 compiler; None: find_compiler().

    Returns:
        The library's path.

    Raises:
        CompileError: no compiler, or what it said.
    """
    if compiler is None and (compiler := find_compiler()) is None:
        raise CompileError("no C++ compiler found")
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        raise CompileError(f"no Python.h in {headers}: install the headers of Python (python3-dev, python3-devel)")
    library = destination / file_name(torch_directory)
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")  # a library that is there may be in use
    include, libraries = torch_directory / "include", torch_directory / "lib"
    python = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []  # the interpreter has its own symbols
    command = [
        *compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w", str(SOURCE), "-o",
        str(unfinished), f"-isystem{headers}", f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}",
        f"-L{libraries}", *python, "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            lines = done.stdout.splitlines() or ["no output"]
            error = next((line for line in lines if "error" in line), lines[0])
            raise CompileError(f"{' '.join([Path(compiler[0]).name, *compiler[1:]])}: {error[:300]}")
        unfinished.replace(library)
        for older in destination.glob(_of_other_sources(library.name)):
            if older != library:
                older.unlink(missing_ok=True)
    except OSError as error:
        raise CompileError(str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return library


def load() -> tuple[ModuleType | None, str | None]:
    """The extension for this torch and Python, or None and one line that says why not."""
    import torch

    from ..ops.native import library_file

    path = PACKAGE / file_name(Path(torch.__file__).parent)
    if os.environ.get("TINYLORA_NODE", "1") == "0":
        return None, "switched off by TINYLORA_NODE=0"
    if not path.is_file():
        if any(PACKAGE.glob(_of_other_sources(path.name))):
            return None, f"compiled from other sources than those of this package. To change that: {COMMAND}"
        return None, f"not compiled for torch {torch.__version__}. To change that: {COMMAND}"
    if damage := library_file.damage(path):
        return None, f"{path.name} does not load: {damage}. To change that: {COMMAND}"
    try:
        spec = importlib.util.spec_from_file_location(f"{__package__}._node", path)
        assert spec is not None and spec.loader is not None  # as of every file with an extension's suffix
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"{path.name} does not load: {error}. To change that: {COMMAND}"
    return module, None


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
