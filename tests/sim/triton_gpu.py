"""A Triton driver whose GPU is the PTX interpreter.

Under `simulated_gpu(target)` the Triton backend runs as it is: it checks its arguments, picks its launch parameters,
lets Triton's own JIT specialise and compile for that target, and launches. The launch runs the compiled PTX on the CPU
tensors it was given (or only records it, for targets without PTX). What the backend allocates with torch.empty counts
as uninitialised.
"""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from tinylora_kernels.ops.triton import launch as triton_kernels

from .ptx import Buffer, Traffic, launch, parse

CUDA_TARGETS = {capability: GPUTarget("cuda", capability, 32) for capability in (75, 80, 86, 89, 90, 100, 120)}
SHARED = {90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have, where a test asks for more than 64 KB
HIP_TARGETS = {"gfx942": GPUTarget("hip", "gfx942", 64), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
_WRITTEN = {
    "rows_kernel": {"y_ptr", "kept_ptr"},
    "reduce_dv_kernel": {"dv_ptr"},
    "update_parts_kernel": {"y_ptr", "t_ptr"},
    "update_parts_backward_kernel": {"g0_ptr", "scratch_ptr"},
    "reduce_dv_parts_kernel": {"dv_ptr"},
    "refresh_right_kernel": {"right_ptr", "samples_ptr"},
}


@dataclass
class Launch:
    """One launch as it happened."""

    kernel: str
    grid: tuple[int, int, int]
    metadata: object  # Triton's: num_warps, shared, target, hash
    traffic: Traffic | None  # None where the code was not run

    def assembly(self, kind: str) -> Path:
        """The compiler's output: 'ptx', 'cubin', 'amdgcn', 'ttgir'."""
        return _assembly(self.metadata.hash, self.kernel, kind)


@dataclass
class SimulatedGPU:
    target: GPUTarget
    execute: bool
    launches: list[Launch] = field(default_factory=list)
    fresh: set[int] = field(default_factory=set)  # addresses of tensors that nothing has written yet

    def run(self, source, metadata, grid: tuple[int, int, int], arguments: tuple) -> None:
        name = source.fn.__name__
        given = [
            (parameter.name, value)
            for n, (parameter, whole) in enumerate(zip(source.fn.params, arguments, strict=True))
            for path, value in _leaves((n,), whole)
            if path not in source.constants
        ]
        traffic = None
        if self.execute:
            buffers = self._buffers(_WRITTEN[name], {n: t for n, t in given if isinstance(t, torch.Tensor)})
            passed = [buffers[v.data_ptr()] if isinstance(v, torch.Tensor) else v for _, v in given]
            kernel = _parsed(_assembly(metadata.hash, name, "ptx"))
            passed += [None] * (len(kernel.parameters) - len(passed))  # Triton's own scratch, which we never use
            traffic = launch(kernel, grid, (metadata.num_warps * 32,), passed, dynamic_shared=metadata.shared)
        self.fresh -= {value.data_ptr() for value in arguments if isinstance(value, torch.Tensor)}
        self.launches.append(Launch(name, grid, metadata, traffic))

    def _buffers(self, written: set[str], given: dict[str, torch.Tensor]) -> dict[int, Buffer]:
        """By address: what is passed twice, to be read and to be written, is one buffer under its first name."""
        found: dict[int, Buffer] = {}
        for name, tensor in given.items():
            address = tensor.data_ptr()
            if address not in found:
                aliases = {n for n, other in given.items() if other.data_ptr() == address}
                fresh = address in self.fresh
                found[address] = Buffer.of(
                    name.removesuffix("_ptr"), tensor, read_only=not aliases & written, initialised=not fresh
                )  # fmt: skip
        return found


def _leaves(path: tuple[int, ...], value):
    """(path, value) of an argument; a tuple's numbers one by one, as the compiler numbers and passes them."""
    if not isinstance(value, tuple):
        return [(path, value)]
    return [leaf for n, inner in enumerate(value) for leaf in _leaves((*path, n), inner)]


@contextlib.contextmanager
def simulated_gpu(target: GPUTarget, *, execute: bool | None = None) -> Iterator[SimulatedGPU]:
    """Run the Triton backend on this target; execute: run the PTX (default: wherever there is PTX)."""
    gpu = SimulatedGPU(target, target.backend == "cuda" if execute is None else execute)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(gpu)))
        stack.enter_context(mock.patch.object(triton_kernels, "_device_types", lambda: ("cpu",)))
        stack.enter_context(mock.patch.object(triton_kernels, "_warp_size", lambda: target.warp_size))
        stack.enter_context(_TrackFresh(gpu.fresh))
        yield gpu


class _TrackFresh(TorchDispatchMode):
    """Remembers what torch.empty and its kin return."""

    _allocators = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_like.default,
    )

    def __init__(self, fresh: set[int]) -> None:
        super().__init__()
        self.fresh = fresh

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in self._allocators and result.numel():
            self.fresh.add(result.data_ptr())
        elif isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.fresh.discard(result.data_ptr())
        return result


class _Driver(DriverBase):
    """What Triton's JIT asks of a driver, answered without a GPU. The device number is the target itself."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        self.gpu = gpu
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED.get(gpu.target.arch, 65536)},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            driver.active.gpu.run(source, metadata, (x, y, z), arguments)

        return run

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_current_device(self) -> str:
        return f"{self.gpu.target.backend}:{self.gpu.target.arch}"

    def get_current_stream(self, device) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise TypeError(f"no C++ launcher is built for {ty}")

    def get_benchmarker(self):
        raise RuntimeError("a simulated GPU has no timings")


def _assembly(key: str, kernel: str, kind: str) -> Path:
    return Path(get_cache_manager(key).get_file(f"{kernel}.{kind}"))


@functools.cache
def _parsed(ptx: Path):
    return parse(ptx.read_text())
