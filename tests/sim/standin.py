"""A machine with NVIDIA GPUs that is none: the stand-in driver (driver/libcuda.cpp) under the real library and torch.

    python tests/sim/standin.py SCRIPT     runs SCRIPT there; `build()` makes what it needs

The script sees "cuda" tensors, whose memory is host memory; every launch that the library makes through the driver runs
on the emulator, or is refused as a driver would refuse it.
"""
from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).with_name("driver")


def build() -> Path:
    """The folder with libcuda.so.1 and libtorch_gpu.so."""
    import torch  # not where it is started: torch_gpu.cpp comes first

    from .host import emulator

    flags = emulator.COMMON
    includes = [HERE, emulator.HERE, emulator.KERNELS]
    files = (HERE / "libcuda.cpp", HERE / "cubin.cpp", emulator.KERNELS / "kernel.cpp")
    objects = [emulator.compile_object(path, flags, includes) for path in files]  # hidden: the library has its own
    objects += emulator.kernel_objects("plain", emulator.KERNELS, emulator.RANKS, emulator.ELEMENTS)
    objects += [emulator.compile_object(emulator.HERE / "scheduler.cpp", flags, [emulator.HERE])]
    driver = emulator.link_shared(objects, "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs")
    package = Path(torch.__file__).parent
    include = ["-isystem", str(package / "include"), "-isystem", str(package / "include/torch/csrc/api/include")]
    glue = emulator.compile_object(HERE / "torch_gpu.cpp", ["-std=c++20", "-O1", "-fPIC", "-w", *include], [])
    libraries = (f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}", "-lc10", "-ltorch_cpu")
    library = emulator.link_shared([glue], str(driver), *libraries)
    folder = library.with_suffix("")
    folder.mkdir(exist_ok=True)
    for made, name in ((driver, "libcuda.so.1"), (library, "libtorch_gpu.so")):
        if not (final := folder / name).exists():
            os.link(made, unfinished := folder / f"{os.getpid()}")
            unfinished.replace(final)
    return folder


def build_library(sources: Path) -> Path:
    """The ops on NVIDIA GPUs, and nothing else of the library, from a copy of csrc/cuda that may have a fault in it.

    The device code that it embeds is without one.
    """
    import torch

    from tinylora_kernels.ops.native import cuda_archive, nvrtc

    from .host import emulator

    package = Path(torch.__file__).parent
    archive = sources / "device_code.archive"
    archive.write_bytes(cuda_archive.pack(nvrtc.one_source(emulator.KERNELS), "", {}))
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += ["-isystem", str(package / "include")]
    (sources / "cuda").unlink(missing_ok=True)
    (sources / "cuda").symlink_to(".")  # of "cuda/launch.h"
    embedding = [*flags, f'-DTINYLORA_CUDA_ARCHIVE="{archive}"']
    includes = [sources, *emulator.LIBRARY_HEADERS]
    objects = [
        emulator.compile_object(path, embedding if path.name == "images.cpp" else flags, includes)
        for path in (*sorted(sources.glob("*.cpp")), *emulator.TORCH_SIDE)
    ]
    return emulator.link_shared(
        objects, "-Wl,-Bsymbolic", f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"
    )


def run(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python text on that machine."""
    here = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from tests.sim import standin\nstandin.start({str(folder)!r})\n{script}"]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | here | environment, cwd=ROOT, timeout=580
    )


driver: ctypes.CDLL  # what `start` has loaded
glue: ctypes.CDLL


def start(folder: str) -> None:
    """Make this process one with GPUs, before torch and the package are imported."""
    global driver, glue
    driver = ctypes.CDLL(str(Path(folder) / "libcuda.so.1"))
    driver.standin_stream.restype = ctypes.c_void_p
    driver.standin_report.restype = driver.standin_launched.restype = ctypes.c_char_p
    glue = ctypes.CDLL(str(Path(folder) / "libtorch_gpu.so"), ctypes.RTLD_GLOBAL)
    atexit.register(lambda: sys.stderr.write(report()))

    import torch

    cards = [divmod(int(card), 10) for card in os.environ.get("STANDIN_CARDS", "90").split(",")]
    torch.version.cuda = "12.9"
    torch.cuda.is_available = lambda: True
    torch.cuda._lazy_init = lambda: None
    torch.cuda.current_device = lambda: glue.standin_device(-1)
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = glue.standin_device
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.cuda.device_count = lambda: len(cards)
    torch.cuda.get_device_capability = lambda device=0: cards[device]
    torch._C._cuda_hasPrimaryContext = lambda device: device == 0
    torch.cuda.Stream, torch.cuda.CUDAGraph = Stream, Graph
    torch.cuda.stream, torch.cuda.graph = on_stream, captured
    torch.cuda.current_stream = lambda *_: _streams[-1]
    torch.cuda.synchronize = lambda *_: None


class Stream:
    """Of device 0; the default one has no pointer."""

    def __init__(self, pointer: int | None = 0):
        self.pointer = ctypes.c_void_p(pointer if pointer is None else driver.standin_stream(0))

    def wait_stream(self, other: Stream) -> None:
        """Whatever was asked for is done."""


_streams = [Stream(None)]  # of the main thread


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    _streams.append(stream)
    glue.standin_use_stream(0, stream.pointer)
    try:
        yield
    finally:
        _streams.pop()
        glue.standin_use_stream(0, _streams[-1].pointer)


class Graph(Stream):
    """A stream that has been captured. What torch does in it is done at once as well."""

    def replay(self) -> None:
        driver.standin_replay(self.pointer)


@contextlib.contextmanager
def captured(graph: Graph) -> Iterator[None]:
    with on_stream(graph):
        driver.standin_capture(graph.pointer, 1)
        try:
            yield
        finally:
            driver.standin_capture(graph.pointer, 0)


def report() -> str:
    """What the driver refused so far."""
    return driver.standin_report().decode()


def launched() -> list[str]:
    """The kernels that were launched, by their mangled names."""
    return driver.standin_launched().decode().split()


class Gpu:
    """The ops of the library on a device: a backend that takes tensors of the CPU, for the checks of the simulators."""

    def __init__(self, device: int = 0, **_):
        self.device = device

    def _call(self, name, *arguments, written=()):
        import torch

        ops = torch.ops.tinylora
        moved = [ops_to_gpu(a, self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        out = getattr(ops, name).default(*moved)
        for n in written:
            arguments[n].copy_(torch.ops.standin.on_cpu(moved[n]))
        if isinstance(out, tuple | list):
            return tuple(torch.ops.standin.on_cpu(one).clone() for one in out)
        return None if out is None else torch.ops.standin.on_cpu(out).clone()

    def update(self, *arguments):
        return self._call("update", *arguments, written=(0,))

    def update_backward(self, *arguments):
        return self._call("update_backward", *arguments)

    def low_rank(self, *arguments):
        return self._call("low_rank", *arguments)

    def update_input_grad(self, *arguments):
        return self._call("update_input_grad", *arguments, written=(0,))

    def refresh_right(self, *arguments):
        return self._call("refresh_right", *arguments, written=(0, 1))


def ops_to_gpu(tensor, device: int):
    import torch

    return torch.ops.standin.to_gpu(tensor, device)
