"""The CUDA device code for the GPUs at hand: out of the library's archive, or compiled here, once, and kept.

A library has code for the architectures and ranks it was built with. For any other GPU, and in a library that was built
with none, the NVRTC that torch brings compiles the sources in the archive: a module (an element type and a rank) in
some seconds, when it is first asked for. An entry of the cache is SHA-256 of its key and its code, then the code; one
that is damaged is compiled again. Processes that want the same wait for one of them.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...common.atomic import open_regular, take_name
from ...common.caches import cache_directory, distrust, make_directory
from . import cuda_driver, nvrtc
from .cuda_archive import Archive
from .nvrtc import CompileError, Nvrtc, Target

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum class Element
OLDEST_ARCHITECTURE = 75
_DIGEST = hashlib.sha256


def archive_of(library: ctypes.CDLL) -> Archive | None:
    """The archive in a loaded library; None in one without CUDA."""
    return _archive_in(library._name)


@functools.cache
def _archive_in(path: str) -> Archive | None:
    library = ctypes.CDLL(path)
    if not hasattr(library, "tinylora_cuda_archive"):
        return None
    library.tinylora_cuda_archive.restype = ctypes.c_void_p
    size = ctypes.c_int64()
    address = library.tinylora_cuda_archive(ctypes.byref(size))
    return Archive(ctypes.string_at(address, size.value))


_Provider = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_providers: list[Any] = []  # the library calls them as long as the process lives


def provide_to(library: ctypes.CDLL) -> None:
    """Let the library ask for code that nobody has made ready: an op may run before a backend was chosen."""

    def provide(element: int, rank: int, architecture: int, why_not: int, size: int) -> None:
        try:
            make_ready(library, ELEMENTS[element], rank, architecture)
        except Exception as error:  # none passes through C
            text = str(error).encode()[: size - 1]
            ctypes.memmove(why_not, text + b"\0", len(text) + 1)

    _providers.append(_Provider(provide))
    library.tinylora_provide_cuda_images(_providers[-1])


def make_ready(library: ctypes.CDLL, dtype: torch.dtype, rank: int, architecture: int) -> None:
    """Hand the library the code of a module for a GPU, if it does not have it yet.

    Args:
        architecture: of the GPU, 90 for compute capability 9.0.

    Raises:
        CompileError: there is none, in one line.
    """
    element = ELEMENTS.index(dtype)
    if library.tinylora_has_cuda_image(element, rank, architecture):
        return
    archive = archive_of(library)
    assert archive is not None, "asked by why_not_cuda"
    if architecture < OLDEST_ARCHITECTURE:
        raise CompileError(f"the GPU is sm_{architecture}, expected sm_{OLDEST_ARCHITECTURE} or later")
    target = best_target(archive.targets, architecture)
    code = archive.modules(str(target)).get((element, rank)) if target else None
    if target is None or code is None:
        compiler = _compiler()
        target = compiler.best_target(architecture)
        code = compiled(compiler, archive.source, target, element, rank)
    library.tinylora_add_cuda_image(element, rank, target.architecture, target.ptx, code, ctypes.c_int64(len(code)))


def best_target(targets: tuple[str, ...], architecture: int) -> Target | None:
    """What of "sm_90" and "compute_100" a GPU runs, if any.

    Machine code runs on the same major version from its minor version on; PTX is compiled by the driver for everything
    from its architecture on.
    """
    found = [Target(int(name.split("_")[1]), name.startswith("compute_")) for name in targets]
    earlier = [target for target in found if target.architecture <= architecture]
    runs = [target for target in earlier if target.ptx or target.architecture // 10 == architecture // 10]
    return max(runs, key=lambda target: (not target.ptx, target.architecture), default=None)


def compiled(compiler: Nvrtc, source: str, target: Target, element: int, rank: int) -> bytes:
    """The code of one module from the cache, or compiled and kept there."""
    options = nvrtc.defines(element, rank)
    key = _DIGEST("\n".join([str(compiler), str(target), *options, source]).encode()).hexdigest()[:32]
    folder = _folder()
    path = folder / f"{target}-{key}" if folder else None
    with _one_process(path) as kept:
        if path and (code := _read(path, key)):
            return code
        name = str(ELEMENTS[element]).removeprefix("torch.")
        where = f"once, into {folder}" if kept else "for this process alone: no cache that is this user's to write"
        what = f"tinylora_kernels: compiling the CUDA kernels of {name} and rank {rank} for {target} with {compiler}"
        print(f"{what}; {where}", file=sys.stderr, flush=True)
        code = compiler.compile(source, target, options)
        if path and kept:
            with contextlib.suppress(OSError):
                take_name(path, _DIGEST(key.encode() + code).digest() + code, None)
        return code


def _read(path: Path, key: str) -> bytes | None:
    try:
        with open_regular(path) as file:
            entry = file.read()
    except OSError:
        return None
    digest, code = entry[:32], entry[32:]
    return code if _DIGEST(key.encode() + code).digest() == digest else None


def _folder() -> Path | None:
    """The folder of this user's entries; None where it cannot be had, or others may write to it."""
    directory = cache_directory()
    if directory is None:
        return None
    folder = directory / f"cuda-{os.geteuid()}"
    with contextlib.suppress(OSError):
        make_directory(directory)
        folder.mkdir(0o700, exist_ok=True)
    return folder if distrust(folder) is None else None


@contextlib.contextmanager
def _one_process(path: Path | None) -> Iterator[bool]:
    """Whoever is in here with this path is alone, if a file can be written beside it: whether it can."""
    import fcntl  # not on Windows

    descriptor = -1
    if path:
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # a file system without locks: both compile, and write the same
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor >= 0
    finally:
        if descriptor >= 0:
            os.close(descriptor)


@functools.cache
def _compiler() -> Nvrtc:
    """torch's own NVRTC; or that of another CUDA, no newer than the driver's."""
    version, driver = torch.version.cuda, cuda_driver.driver_version()
    first = int(version.split(".")[0]) if version else nvrtc.MAJORS[0]
    newest = driver[0] if driver else first
    majors = [first, *(major for major in nvrtc.MAJORS if major != first and major <= newest)]
    return nvrtc.find(majors, [Path(torch.__file__).parent / "lib"])
