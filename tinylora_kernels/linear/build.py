"""Compiles the C++ of an adapted nn.Linear: its node of autograd (node.cpp), the sum of dx that layers share
(siblings.inl), the plan by which it is called (plan.inl), and its way to the CPU kernels (direct.inl).

The kernels use torch's stable ABI, which has no autograd, so that one file of them serves every torch and every
Python. This one serves one release of torch and one of Python: those it was compiled with, which its name tells. It
is compiled where the package is installed from its sources, behind the first call that would run it (compiled.py), or
by `python -m tinylora_kernels compile`; that takes half a minute and a gigabyte of memory. Beside any other torch or
Python, and with Triton, node.py has the same node and plan.py the same plan: the same bits, slower:
bench/results/dispatch.csv has what one token costs a layer either way (bench/dispatch.py).

setup.py runs this file without the package, pip without torch, and compiled.py as a program: it imports neither.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("node.cpp")
INCLUDED = [Path(__file__).with_name(name) for name in ("direct.inl", "siblings.inl", "plan.inl")]
INCLUDED.append(PACKAGE / "ops/native/kernels.h")
COMMAND = "python -m tinylora_kernels compile"
UNFINISHED = ".compiling-"  # begins the name of a folder in which one is being compiled
KEPT = 8  # libraries in a cache: those used last


class CompileError(Exception):
    """Why the node cannot be compiled here, in one line."""


def file_name(torch_directory: Path) -> str:
    """The name of the library for an installed torch and this Python: torch's release and commit, our sources' digest.

    The same for a release's CPU and CUDA builds, whose C++ is one; another for other sources, so that none is loaded
    that was compiled from older ones.
    """
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in (SOURCE, *INCLUDED))).hexdigest()[:8]
    text = (torch_directory / "version.py").read_text()
    version, commit = (re.search(rf"{name}\b.*= '(\w[^']*)'", text) for name in ("__version__", "git_version"))
    release = version.group(1).split("+")[0] if version else "unknown"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")  # .cpython-311-x86_64-linux-gnu.so
    return f"libtinylora_node-{release}-{commit.group(1)[:8] if commit else 'unknown'}-{sources}{suffix}"


def of_other_sources(name: str) -> str:
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


def find_tools() -> tuple[list[str], Path]:
    """find_compiler(), and the folder of Python's headers.

    Raises:
        CompileError: one of them is missing.
    """
    if (compiler := find_compiler()) is None:
        raise CompileError("no C++ compiler found (Debian, Ubuntu: apt install g++)")
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        raise CompileError(f"no Python.h in {headers}: install the headers of Python (python3-dev, python3-devel)")
    return compiler, headers


def compile_for(torch_directory: Path, destination: Path = PACKAGE) -> Path:
    """Compile the node for an installed torch, in the place of those of older sources.

    Args:
        torch_directory: the torch package, with its headers and libraries.
        destination: the folder that gets the library: whole, by a rename.

    Returns:
        The library's path.

    Raises:
        CompileError: no compiler, or what it said.
    """
    compiler, headers = find_tools()
    library = destination / file_name(torch_directory)
    include, libraries = torch_directory / "include", torch_directory / "lib"
    python = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []  # the interpreter has its own symbols
    try:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=destination, ignore_cleanup_errors=True) as work:
            unfinished = Path(work) / library.name  # a library that is there may be in use
            command = [
                *compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w", str(SOURCE), "-o",
                str(unfinished), f"-isystem{headers}", f"-isystem{include}",
                f"-isystem{include / 'torch/csrc/api/include'}", f"-L{libraries}", *python,
                "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python",
            ]  # fmt: skip
            environment = {**os.environ, "TMPDIR": work}  # what a killed compiler leaves goes with the folder
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace",
            )  # fmt: skip
            if done.returncode:
                lines = done.stdout.splitlines() or [f"no output, exit status {done.returncode}"]
                error = next((line for line in lines if "error" in line), lines[0])
                raise CompileError(f"{' '.join([Path(compiler[0]).name, *compiler[1:]])}: {error[:300]}")
            unfinished.replace(library)
        for older in destination.glob(of_other_sources(library.name)):
            if older != library:
                older.unlink(missing_ok=True)
    except OSError as error:
        raise CompileError(str(error)) from error
    return library


class Record(NamedTuple):
    """What became of compiling a node into a cache; kept beside it, as JSON."""

    tools: str  # of the attempts
    attempts: int  # begun, one after another
    error: str | None = None  # of the last one
    digest: str | None = None  # SHA-256 of the library, once there is one


def record_of(library: Path) -> Path:
    return library.with_suffix(".json")


def read_record(library: Path) -> Record | None:
    """None where there is none, or none that can be read."""
    try:
        tools, attempts, error, digest = json.loads(record_of(library).read_text())
        return Record(str(tools), int(attempts), error and str(error), digest and str(digest))
    except (OSError, ValueError, TypeError):
        return None


def describe_tools(compiler: list[str]) -> str:
    """The compiler's command, and when the programs in it were changed last: another one may do better."""
    programs = (shutil.which(word) for word in compiler)
    return " ".join([*compiler, *(str(os.stat(program).st_mtime_ns) for program in programs if program)])


def compile_aside(torch_directory: Path, cache: Path) -> None:
    """compile_for, in a process of its own that stands back behind everything else on the machine.

    The record says that an attempt has begun before it begins: one that is killed counts.
    """
    _stand_back()
    library = cache / file_name(torch_directory)
    tools, before = describe_tools(find_tools()[0]), read_record(library)
    begun = Record(tools, before.attempts + 1 if before and before.tools == tools else 1)
    write_record(library, begun)
    try:
        digest = hashlib.sha256(compile_for(torch_directory, cache).read_bytes()).hexdigest()
        write_record(library, begun._replace(digest=digest))
    except CompileError as error:
        write_record(library, begun._replace(error=str(error)))
    _trim(cache)


def _stand_back() -> None:
    """Ctrl-C in the terminal is not meant for this process; a processor is its own where nobody else wants one; where
    memory runs out, it is the first to go.
    """
    os.setpgrp()
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):  # Linux
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        Path("/proc/self/oom_score_adj").write_text("1000")


def write_record(library: Path, record: Record) -> None:
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=library.parent, ignore_cleanup_errors=True) as work:
        unfinished = Path(work) / "record"
        unfinished.write_text(json.dumps(record))
        unfinished.replace(record_of(library))


def _trim(cache: Path) -> None:
    """Keep the libraries used last, and the records of those and of as many others."""
    for suffix in ("so", "json"):
        oldest_first = sorted(cache.glob(f"libtinylora_node-*.{suffix}"), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[:-KEPT]:
            path.unlink(missing_ok=True)


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


if __name__ == "__main__":
    compile_aside(*map(Path, sys.argv[1:]))
