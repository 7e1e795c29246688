"""The CUDA backend on a GPU that is the PTX interpreter.

`SimulatedCuda(capability)` has the update and update_backward of a backend. It hands the package's own launchers
(launch.cu, compiled by nvcc) the arguments that csrc/cuda/ops.cu would; each launch they make runs the PTX of that
very kernel, with the grid and block they chose, on the CPU tensors.
"""
from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import nvcc
from .ptx import Buffer, Kernel, Traffic, launch, parse

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum class Element
STUB = Path(__file__).with_name("cuda_runtime_stub.cu")


class Mixing(ctypes.Structure):  # csrc/cuda/kernel_arguments.h
    _fields_ = [
        ("v", c_void_p), ("projection", c_void_p), ("ids", c_void_p), ("rows_per_id", c_int32), ("adapters", c_int32),
        ("numbers", c_int32), ("elementwise", c_bool), ("wide_ids", c_bool),
    ]  # fmt: skip


class RowsArguments(ctypes.Structure):
    _fields_ = [
        ("source", c_void_p), ("target", c_void_p), ("source_stride", c_int64), ("target_stride", c_int64),
        ("rows", c_int32), ("columns", c_int32), ("tiles_per_block", c_int32), ("ticket_count", c_int32),
        ("basis", c_void_p), ("offset", c_void_p), ("coefficients", c_void_p), ("tickets", c_void_p),
        ("mixing", Mixing), ("transposed", c_bool),
    ]  # fmt: skip


class VectorGradArguments(ctypes.Structure):
    _fields_ = [
        ("a", c_void_p), ("t", c_void_p), ("partial", c_void_p), ("tickets", c_void_p), ("dv", c_void_p),
        ("rows", c_int32), ("chunks", c_int32), ("mixing", Mixing),
    ]  # fmt: skip


_Callback = ctypes.CFUNCTYPE(None, c_char_p, POINTER(c_uint), POINTER(c_uint), c_size_t, POINTER(c_void_p))


@dataclass(frozen=True)
class Build:
    """The launchers as a library, and the PTX of every kernel they can launch."""

    library: ctypes.CDLL
    ptx: dict[int, str]  # by capability
    kernels: dict[tuple[int, str], Kernel] = field(default_factory=dict)  # parsed so far

    def kernel(self, capability: int, name: str) -> Kernel:
        key = capability, name
        if key not in self.kernels:
            self.kernels[key] = parse(self.ptx[capability], name)
        return self.kernels[key]


@functools.cache
def build(dtype: torch.dtype, capabilities: tuple[int, ...], sources: Path, launchers: Path | None) -> Build:
    """Compile the sources for one element type; PTX only, so that no card's assembler is involved.

    Args:
        launchers: other sources, with the same host code: these launch the kernels, and no second library is built.
    """
    element = f"-DTINYLORA_ELEMENT={ELEMENTS.index(dtype)}"
    if launchers:
        texts = {c: nvcc.ptx(STUB, c, element, include=sources) for c in capabilities}
        return Build(build(dtype, capabilities, launchers, None).library, texts)
    targets = [f"-gencode=arch=compute_{c},code=compute_{c}" for c in capabilities]
    folder = nvcc.compile_cached(
        STUB, "-shared", "-cudart=none", "-Xcompiler=-fPIC,-D__NV_LEGACY_LAUNCH", element, *targets,
        include=sources, keep=f"{STUB.stem}*.ptx",
    )  # fmt: skip
    library = ctypes.CDLL(str(folder / "out"))
    library.simulate_workspace_words.restype = c_int64
    library.simulate_workspace_words.argtypes = [c_int, c_int64, c_int64]
    library.simulate_update.argtypes = [c_int, c_int, POINTER(RowsArguments)]
    library.simulate_update_backward.argtypes = [c_int, c_int, POINTER(RowsArguments), c_void_p, c_void_p, c_void_p]
    library.simulate_on_launch.argtypes = [_Callback]
    texts = {}
    for capability in capabilities:
        name = f"{STUB.stem}.compute_{capability}.ptx" if len(capabilities) > 1 else f"{STUB.stem}.ptx"
        texts[capability] = (folder / name).read_text()
    return Build(library, texts)


@dataclass
class Launch:
    kernel: str  # mangled
    grid: tuple[int, ...]
    block: tuple[int, ...]
    traffic: Traffic


@dataclass
class SimulatedCuda:
    capability: int
    capabilities: tuple[int, ...] = ()  # what to compile for in one go; default: this one
    sources: Path = nvcc.CUDA
    launchers: Path | None = None  # sources with the same launchers, which are built already
    order: str = "forward"  # "reverse": atomics in descending thread order
    skew: int = 0  # elements by which rows miss 16-byte alignment
    launches: list[Launch] = field(default_factory=list)

    def update(
        self, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None, bias: Tensor | None,
        adapter_ids: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows = self._skewed(y)
        p = _rows_arguments(rows, basis, v, projection, adapter_ids)
        t = torch.empty(p.rows, len(basis))
        p.offset = _pointer(offset)
        p.target, p.target_stride, p.coefficients = rows.data_ptr(), p.source_stride, _pointer(t)
        self._call(y.dtype, "simulate_update", len(basis), p)
        if rows is not y:
            y.copy_(rows)
        if bias is not None:  # as ops/dispatch.py
            y.add_(bias)
        return t

    def update_backward(
        self, g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None, adapter_ids: Tensor | None,
        need_input_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = self._skewed(g)
        p = _rows_arguments(rows, basis, v, projection, adapter_ids)
        g0 = torch.empty(g.shape, dtype=g.dtype) if need_input_grad else g.new_empty(0)
        dv = torch.empty_like(v) if t is not None else v.new_empty(0)
        library = self._build(g.dtype).library
        words = library.simulate_workspace_words(len(basis), p.rows, p.mixing.adapters) if t is not None else 0
        workspace = torch.empty(words)
        p.target, p.target_stride = _pointer(g0), p.columns
        pointers = _pointer(t), _pointer(dv), _pointer(workspace)
        self._call(g.dtype, "simulate_update_backward", len(basis), p, *pointers)
        return g0, dv

    def _skewed(self, x: Tensor) -> Tensor:
        """The same rows, starting `skew` elements past a 16-byte boundary."""
        if not self.skew:
            return x
        span = (len(x) - 1) * x.stride(0) + x.shape[1]
        memory = torch.full([span + 16], float("nan"), dtype=x.dtype)
        start = -(memory.data_ptr() // x.element_size()) % (16 // x.element_size()) + self.skew
        return memory.as_strided(x.shape, x.stride(), start).copy_(x)

    def _build(self, dtype: torch.dtype) -> Build:
        return build(dtype, self.capabilities or (self.capability,), self.sources, self.launchers)

    def _call(self, dtype: torch.dtype, function: str, rank: int, p: RowsArguments, *rest) -> None:
        built = self._build(dtype)
        finding = []
        written: set[int] = set()

        def on_launch(name, grid, block, shared, arguments):
            if finding:
                return
            try:
                self._launch(built, name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, arguments[0], written)
            except BaseException as error:  # an exception cannot pass through C
                finding.append(error)

        callback = _Callback(on_launch)
        built.library.simulate_on_launch(callback)
        getattr(built.library, function)(ELEMENTS.index(dtype), rank, ctypes.byref(p), *rest)
        if finding:
            raise finding[0]

    def _launch(self, built, name, grid, block, shared, address, written: set[int]) -> None:
        kind = RowsArguments if "rows_kernel" in name else VectorGradArguments
        arguments = kind.from_buffer_copy((ctypes.c_char * ctypes.sizeof(kind)).from_address(address))
        itemsize = 4 if "rows_kernelIf" in name else 2
        rank = int(name.split("Li")[1].split("E")[0])
        buffers = _rows_buffers(arguments, rank, itemsize) if kind is RowsArguments else _grad_buffers(arguments, rank)
        for pointer, buffer in buffers.items():
            buffer.initialised = buffer.read_only or buffer.initialised or pointer in written
        kernel = built.kernel(self.capability, name)
        traffic = launch(
            kernel, grid, block, [lambda at: _translated(arguments, at)], dynamic_shared=shared,
            reverse=self.order == "reverse", buffers=buffers,
        )  # fmt: skip
        written.update(pointer for pointer, buffer in buffers.items() if not buffer.read_only)
        self.launches.append(Launch(name, grid, block, traffic))


def _pointer(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() or None if tensor is not None else None


def _rows_arguments(
    x: Tensor, basis: Tensor, v: Tensor, projection: Tensor, adapter_ids: Tensor | None
) -> RowsArguments:
    """As rows_arguments in csrc/cuda/ops.cu."""
    flat = x.view(x.numel() // x.shape[-1], x.shape[-1])
    mixing = Mixing(
        v=v.data_ptr(),
        projection=projection.data_ptr(),
        ids=_pointer(adapter_ids),
        rows_per_id=1 if adapter_ids is None else len(flat) // max(len(adapter_ids), 1),
        adapters=1 if adapter_ids is None else len(v),
        numbers=v.shape[-1],
        elementwise=projection.dim() == 2,
        wide_ids=adapter_ids is not None and adapter_ids.dtype is torch.int64,
    )
    return RowsArguments(
        source=flat.data_ptr(), source_stride=flat.stride(0), rows=len(flat), columns=flat.shape[1],
        basis=basis.data_ptr(), mixing=mixing,
    )  # fmt: skip


def _memory(name: str, address: int, elements: int, itemsize: int, *, rows=None, **flags: bool) -> Buffer:
    """elements of memory at a real address; rows: (count, width, stride) where they have gaps."""
    valid = None
    if rows is not None:
        count, width, stride = rows
        elements = (count - 1) * stride + width
        valid = np.zeros(elements, bool)
        valid[(np.arange(count)[:, None] * stride + np.arange(width)).ravel()] = True
        valid = valid.repeat(itemsize)
    data = np.ctypeslib.as_array((ctypes.c_uint8 * (elements * itemsize)).from_address(address))
    return Buffer(name, data, itemsize, address % 256, valid, **flags)


def _mixing_buffers(m: Mixing, rank: int, rows: int) -> dict[int, Buffer]:
    entries = (1 if m.elementwise else m.numbers) * rank * rank
    found = {m.projection: _memory("projection", m.projection, entries, 4, read_only=True)}
    if m.v:
        found[m.v] = _memory("v", m.v, m.adapters * m.numbers, 4, read_only=True)
    if m.ids:
        found[m.ids] = _memory("ids", m.ids, rows // m.rows_per_id, 8 if m.wide_ids else 4, read_only=True)
    return found


def _rows_buffers(p: RowsArguments, rank: int, itemsize: int) -> dict[int, Buffer]:
    found = _mixing_buffers(p.mixing, rank, p.rows)
    found[p.basis] = _memory("basis", p.basis, rank * p.columns, 4, read_only=True)
    in_place = p.source == p.target
    source = (p.rows, p.columns, p.source_stride)
    found[p.source] = _memory("y" if in_place else "g", p.source, 0, itemsize, rows=source, read_only=not in_place)
    if p.target and not in_place:
        target = (p.rows, p.columns, p.target_stride)
        found[p.target] = _memory("g0", p.target, 0, itemsize, rows=target, initialised=False)
    if p.offset:
        found[p.offset] = _memory("offset", p.offset, rank, 4, read_only=True)
    if p.coefficients:
        found[p.coefficients] = _memory("coefficients", p.coefficients, p.rows * rank, 4, initialised=False)
    if p.tickets:
        found[p.tickets] = _memory("tickets", p.tickets, p.ticket_count, 4, initialised=False)
    return found


def _grad_buffers(p: VectorGradArguments, rank: int) -> dict[int, Buffer]:
    found = _mixing_buffers(p.mixing, rank, p.rows)
    chunks = p.mixing.adapters * p.chunks * rank * rank
    found[p.a] = _memory("a", p.a, p.rows * rank, 4, read_only=True)
    found[p.t] = _memory("t", p.t, p.rows * rank, 4, read_only=True)
    found[p.partial] = _memory("partial", p.partial, chunks, 4, initialised=False)
    found[p.tickets] = _memory("tickets", p.tickets, p.mixing.adapters, 4, initialised=False)
    found[p.dv] = _memory("dv", p.dv, p.mixing.adapters * p.mixing.numbers, 4, initialised=False)
    return found


def _translated(arguments: ctypes.Structure, address) -> bytes:
    """The structure with every pointer replaced by the simulated address of what it points to."""
    def replace(structure):
        for name, kind in structure._fields_:
            value = getattr(structure, name)
            if kind is c_void_p and value:
                setattr(structure, name, address(value))
            elif isinstance(value, ctypes.Structure):
                replace(value)

    copy = type(arguments).from_buffer_copy(arguments)
    replace(copy)
    return bytes(copy)
