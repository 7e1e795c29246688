"""The CUDA backend on a GPU that is the PTX interpreter.

`SimulatedCuda(capability)` has the update and update_backward of a backend. It hands the package's own launchers
(csrc/cuda/launch.cpp) the arguments that csrc/cuda/update.cpp would; each launch they make runs the PTX of that very
kernel, with the grid and block they chose, on the CPU tensors.
"""
from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int32, c_int64, c_uint, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinylora_kernels.ops.native.nvrtc import Target

from . import compilers
from .host import emulator
from .ptx import Buffer, Kernel, SimulationError, Traffic, launch, parse

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum class Element


class Mixing(ctypes.Structure):  # csrc/cuda/kernel_arguments.h
    _fields_ = [
        ("v", c_void_p), ("projection", c_void_p), ("ids", c_void_p), ("rows_per_id", c_int32), ("adapters", c_int32),
        ("numbers", c_int32), ("elementwise", c_bool), ("wide_ids", c_bool),
    ]  # fmt: skip


class Side(ctypes.Structure):
    _fields_ = [
        ("rows", c_void_p), ("stride", c_int64), ("factor", c_void_p), ("features", c_int32),
        ("factor_stride", c_int32),
    ]  # fmt: skip


SOURCE, TARGET, NOTHING = range(3)  # enum class Onto


class RowsArguments(ctypes.Structure):
    _fields_ = [
        ("source", Side), ("target", Side), ("onto", c_int32), ("rows", c_int32), ("share", c_int32),
        ("longer", c_int32), ("bias", c_void_p), ("offset", c_void_p), ("coefficients", c_void_p), ("t", c_void_p),
        ("partial", c_void_p), ("ticket", c_void_p), ("dv", c_void_p), ("cleared", c_void_p),
        ("cleared_count", c_int64), ("mixing", Mixing), ("transposed", c_bool), ("only_finite", c_bool),
        ("warps", c_int32),
    ]  # fmt: skip


MAX_PARTS = 16


class PartsArguments(ctypes.Structure):
    _fields_ = [
        ("part", RowsArguments * MAX_PARTS), ("first_block", c_int32 * (MAX_PARTS + 1)),
        ("group", c_int32 * MAX_PARTS), ("parts", c_int32), ("groups", c_int32),
    ]  # fmt: skip


class BankGradArguments(ctypes.Structure):
    _fields_ = [
        ("a", c_void_p), ("t", c_void_p), ("dv", c_void_p), ("rows", c_int32), ("ids", c_int32), ("parts", c_int32),
        ("group", c_int32 * MAX_PARTS), ("mixing", Mixing),
    ]  # fmt: skip


class RightArguments(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p), ("row_stride", c_int64), ("column_stride", c_int64), ("basis", c_void_p),
        ("right", c_void_p), ("samples", c_void_p), ("rows", c_int32), ("columns", c_int32), ("force", c_bool),
    ]  # fmt: skip


_Callback = ctypes.CFUNCTYPE(None, c_char_p, POINTER(c_uint), POINTER(c_uint), c_void_p)


@functools.cache
def launchers(sources: Path) -> ctypes.CDLL:
    """The launchers of these sources as a library."""
    device = Path(__file__).with_name("ptx_device.cpp")
    objects = [emulator.host_object(source, sources) for source in (device, *emulator.host_sources(sources))]
    library = ctypes.CDLL(str(emulator.link_shared(objects)))
    library.simulate_scratch_words.restype = c_int64
    library.simulate_scratch_words.argtypes = [c_int, c_int, POINTER(RowsArguments)]
    library.simulate_rows.argtypes = [c_int, c_int, POINTER(RowsArguments), c_void_p, c_void_p, c_void_p, c_int]
    library.simulate_parts_scratch_words.restype = c_int64
    library.simulate_parts_scratch_words.argtypes = [c_int, c_int, POINTER(PartsArguments)]
    library.simulate_parts.argtypes = [c_int, c_int, POINTER(PartsArguments), c_void_p, c_void_p, c_void_p, c_int]
    library.simulate_refresh_right.argtypes = [c_int, c_int, POINTER(RightArguments)]
    library.simulate_on_launch.argtypes = [_Callback]
    library.simulate_take_ticket.restype, library.simulate_take_ticket.argtypes = ctypes.c_uint32, []
    return library


@functools.cache
def kernel_of(element: int, rank: int, capability: int, sources: Path, compiler: str | None, name: str) -> Kernel:
    """A kernel by its mangled name, from the PTX of its module: no card's assembler is involved."""
    target = Target(capability, ptx=True)
    code = compilers.module(element, rank, target, "-lineinfo", sources=sources, compiler=compiler)
    return parse(code.read_text(), name)


@dataclass
class Launch:
    kernel: str  # mangled
    grid: tuple[int, ...]
    block: tuple[int, ...]
    traffic: Traffic


@dataclass
class SimulatedCuda:
    capability: int
    sources: Path = compilers.CUDA
    compiler: str | None = None  # one of compilers.COMPILERS; default: the first
    order: str = "forward"  # "reverse": atomics in descending thread order
    skew: int = 0  # elements by which rows miss 16-byte alignment
    bias_skew: int = 0
    card: tuple[int, int] = (2, 2)  # multiprocessors, and blocks that each of them runs at once
    capturing: bool = False  # the stream is being captured into a graph
    launches: list[Launch] = field(default_factory=list)

    def update(
        self, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None, bias: Tensor | None,
        adapter_ids: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows = _skewed(y, self.skew)
        p = _rows_arguments(rows, basis, v, projection, adapter_ids)
        p.target, p.onto, p.only_finite, p.offset = p.source, SOURCE, True, _pointer(offset)
        t = self._forward(p, rows, len(basis), bias)
        if rows is not y:
            y.copy_(rows)
        return t

    def update_backward(
        self, g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None, adapter_ids: Tensor | None,
        need_input_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = _skewed(g, self.skew)
        p = _rows_arguments(rows, basis, v, projection, adapter_ids)
        g0 = torch.empty(g.shape, dtype=g.dtype) if need_input_grad else g.new_empty(0)
        p.target, p.onto = _of_g0(p.source, _pointer(g0), p.source.features), SOURCE
        return g0, self._backward(p, rows, len(basis), v, t)

    def low_rank(
        self, x: Tensor, right: Tensor, basis: Tensor, v: Tensor, projection: Tensor, bias: Tensor | None,
        adapter_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        p = _rows_arguments(x, right, v, projection, adapter_ids)
        y = torch.empty(len(x), basis.shape[1], dtype=x.dtype)
        p.target, p.onto = _side(y, basis), NOTHING
        return y, self._forward(p, x, len(basis), bias)

    def update_input_grad(
        self, dx: Tensor, right: Tensor, g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None,
        adapter_ids: Tensor | None, add: bool,
    ) -> Tensor:  # fmt: skip
        p = _rows_arguments(g, basis, v, projection, adapter_ids)
        p.target, p.onto = _side(dx, right), TARGET if add else NOTHING
        return self._backward(p, g, len(basis), v, t)

    def refresh_right(self, right: Tensor, samples: Tensor, weight: Tensor, basis: Tensor, force: bool) -> None:
        p = RightArguments(
            weight.data_ptr(), *weight.stride(), basis.data_ptr(), right.data_ptr(), samples.data_ptr(),
            *weight.shape, force,
        )  # fmt: skip
        written = set() if force else {right.data_ptr(), samples.data_ptr()}
        self._run(weight.dtype, "simulate_refresh_right", len(basis), p, written=written)

    def update_parts(
        self, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None, bias: Tensor | None,
        x: Tensor | None, right: Tensor | None, adapter_ids: Tensor | None, ends: list[int], groups: list[int],
    ) -> Tensor:  # fmt: skip
        rows = _skewed(y, self.skew)
        bias = None if bias is None else _skewed(bias.view(1, -1), self.bias_skew).view(-1)
        t = torch.empty(len(ends), len(y), len(basis))
        p = _parts_arguments(rows, basis, v, projection, adapter_ids, ends, groups)
        for i, (begin, one) in enumerate(zip([0, *ends[:-1]], p.part, strict=False)):
            one.target, one.onto, one.only_finite = one.source, SOURCE, True
            if x is not None:
                one.source, one.onto, one.only_finite = _side(x, right[i]), TARGET, False
            one.bias = None if bias is None else bias[begin:].data_ptr()
            one.offset = None if offset is None else offset[i].data_ptr()
            one.coefficients = _pointer(t[i])
        self._call(y.dtype, len(basis), p, None, None, None)
        if rows is not y:
            y.copy_(rows)
        return t

    def update_parts_backward(
        self, g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None, adapter_ids: Tensor | None,
        ends: list[int], groups: list[int], need_input_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = _skewed(g, self.skew)
        p = _parts_arguments(rows, basis, v, projection, adapter_ids, ends, groups)
        g0 = torch.empty(g.shape, dtype=g.dtype) if need_input_grad else g.new_empty(0)
        for begin, one in zip([0, *ends[:-1]], p.part, strict=False):
            at = g0[:, begin:].data_ptr() if need_input_grad and len(g) else None
            one.target, one.onto, one.transposed = _of_g0(one.source, at, ends[-1]), SOURCE, True
        dv, scratch = torch.empty_like(v) if t is not None else v.new_empty(0), torch.empty(0)
        if t is not None:
            self._library().simulate_card(*self.card)
            words = self._library().simulate_parts_scratch_words
            scratch = torch.empty(words(ELEMENTS.index(g.dtype), len(basis), ctypes.byref(p)))
        elif not need_input_grad:
            return g0, dv
        self._call(g.dtype, len(basis), p, t, dv, scratch)
        return g0, dv

    def _forward(self, p: RowsArguments, rows: Tensor, rank: int, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else _skewed(bias.view(1, -1), self.bias_skew)
        t = torch.empty(p.rows, rank)
        p.bias, p.coefficients = _pointer(bias), _pointer(t)
        self._call(rows.dtype, rank, p, None, None, None)
        return t

    def _backward(self, p: RowsArguments, rows: Tensor, rank: int, v: Tensor, t: Tensor | None) -> Tensor:
        p.transposed = True
        dv = torch.empty_like(v) if t is not None else v.new_empty(0)
        scratch = torch.empty(0)
        if t is not None:
            self._library().simulate_card(*self.card)
            words = self._library().simulate_scratch_words
            scratch = torch.empty(words(ELEMENTS.index(rows.dtype), rank, ctypes.byref(p)))
        elif not p.target.rows:
            return dv
        self._call(rows.dtype, rank, p, t, dv, scratch)
        return dv

    def _library(self) -> ctypes.CDLL:
        return launchers(self.sources)

    def _call(self, dtype: torch.dtype, rank: int, p: ctypes.Structure, *tensors: Tensor | None) -> None:
        self._library().simulate_card(*self.card)
        function = "simulate_rows" if isinstance(p, RowsArguments) else "simulate_parts"
        self._run(dtype, function, rank, p, *map(_pointer, tensors), self.capturing, written=set())

    def _run(self, dtype: torch.dtype, function: str, rank: int, p: ctypes.Structure, *rest, written: set[int]) -> None:
        """written: addresses of what is initialised before the first launch."""
        element, finding = ELEMENTS.index(dtype), []

        def on_launch(name, grid, block, arguments):
            if finding:
                return
            try:
                self._launch(element, rank, name.decode(), tuple(grid[:3]), tuple(block[:3]), arguments, written)
            except BaseException as error:  # an exception cannot pass through C
                finding.append(error)

        callback = _Callback(on_launch)
        self._library().simulate_on_launch(callback)
        getattr(self._library(), function)(element, rank, ctypes.byref(p), *rest)
        # whatever was found: copies of the sources that differ in the kernels alone share the launchers and this word
        left = self._library().simulate_take_ticket()
        if finding:
            raise finding[0]
        if left:
            raise SimulationError(f"the ticket is left at {left}")

    def _launch(self, element, rank, name, grid, block, address, written: set[int]) -> None:
        kind = next(kind for word, kind in _KINDS.items() if word in name)
        arguments = kind.from_buffer_copy((ctypes.c_char * ctypes.sizeof(kind)).from_address(address))
        itemsize = ELEMENTS[element].itemsize
        if kind is RowsArguments:
            buffers = _rows_buffers(arguments, rank, itemsize, blocks=grid[0])
        elif kind is PartsArguments:
            buffers = _parts_buffers(arguments, rank, itemsize, blocks=grid[0])
        elif kind is RightArguments:
            buffers = _right_buffers(arguments, rank, itemsize, blocks=grid[0], samples=block[0])
        else:
            buffers = _bank_buffers(arguments, rank, groups=grid[1])
        for pointer, buffer in buffers.items():
            buffer.initialised = buffer.read_only or buffer.initialised or pointer in written
        kernel = kernel_of(element, rank, self.capability, self.sources, self.compiler, name)
        traffic = launch(
            kernel, grid, block, [lambda at: _translated(arguments, at)], reverse=self.order == "reverse",
            buffers=buffers,
        )  # fmt: skip
        written.update(pointer for pointer, buffer in buffers.items() if not buffer.read_only)
        self.launches.append(Launch(name, grid, block, traffic))


def _pointer(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() or None if tensor is not None else None


def _skewed(x: Tensor, skew: int) -> Tensor:
    """The same rows, starting `skew` elements past a 16-byte boundary."""
    if not skew:
        return x
    span = (len(x) - 1) * x.stride(0) + x.shape[1]
    memory = torch.full([span + 16], float("nan"), dtype=x.dtype)
    start = -(memory.data_ptr() // x.element_size()) % (16 // x.element_size()) + skew
    return memory.as_strided(x.shape, x.stride(), start).copy_(x)


def _side(x: Tensor, factor: Tensor) -> Side:
    return Side(_pointer(x), x.stride(0), factor.data_ptr(), x.shape[1], x.shape[1])


def _of_g0(source: Side, rows: int | None, stride: int) -> Side:
    return Side(rows, stride, source.factor, source.features, source.factor_stride)


def _rows_arguments(
    x: Tensor, factor: Tensor, v: Tensor, projection: Tensor, adapter_ids: Tensor | None
) -> RowsArguments:
    """As rows_arguments in csrc/cuda/ops.cu."""
    mixing = Mixing(
        v=v.data_ptr(),
        projection=projection.data_ptr(),
        ids=_pointer(adapter_ids),
        rows_per_id=1 if adapter_ids is None else len(x) // max(len(adapter_ids), 1),
        adapters=1 if adapter_ids is None else len(v),
        numbers=v.shape[-1],
        elementwise=projection.dim() == 2,
        wide_ids=adapter_ids is not None and adapter_ids.dtype is torch.int64,
    )
    return RowsArguments(source=_side(x, factor), rows=len(x), mixing=mixing)


def _parts_arguments(
    y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, adapter_ids: Tensor | None, ends: list[int],
    groups: list[int],
) -> PartsArguments:  # fmt: skip
    """As parts_arguments in csrc/cuda/ops.cu."""
    p = PartsArguments(parts=len(ends), groups=len(v))
    for i, (begin, end, group) in enumerate(zip([0, *ends[:-1]], ends, groups, strict=True)):
        one = _rows_arguments(y, basis, v[group], projection[i], adapter_ids)
        at = y[:, begin:].data_ptr() if len(y) else None
        one.source = Side(at, y.stride(0), basis[:, begin:].data_ptr(), end - begin, ends[-1])
        p.part[i], p.group[i] = one, group
    return p


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


def _rows_buffers(p: RowsArguments, rank: int, itemsize: int, blocks: int) -> dict[int, Buffer]:
    """Everything a row kernel may touch, under the names of the ops: y, or g and g0, or x and y, or g and dx."""
    found = _mixing_buffers(p.mixing, rank, p.rows)
    in_place = p.source.rows == p.target.rows
    names = ("y", "y") if in_place else ("g", "g0" if p.onto == SOURCE else "dx") if p.transposed else ("x", "y")
    source, target = p.source, p.target  # once: each look makes another object
    for name, side, written in zip(names, (source, target), (in_place, True), strict=True):
        if side.rows and side.rows not in found:
            shape = p.rows, side.features, side.stride
            fresh = written and not in_place and p.onto != TARGET
            found[side.rows] = _memory(
                name, side.rows, 0, itemsize, rows=shape, read_only=not written, initialised=not fresh
            )  # fmt: skip
        if side.factor:
            name = "right" if names[0] == "x" and side is source or names[1] == "dx" and side is target else "basis"
            shape = rank, side.features, side.factor_stride
            found[side.factor] = _memory(name, side.factor, 0, 4, rows=shape, read_only=True)
    for name, count, size in (
        ("bias", p.target.features, itemsize), ("offset", rank, 4), ("t", p.rows * rank, 4),
    ):  # fmt: skip
        if pointer := getattr(p, name):
            found[pointer] = _memory(name, pointer, count, size, read_only=True)
    for name, count in (
        ("coefficients", p.rows * rank), ("partial", blocks * rank * rank), ("dv", p.mixing.numbers),
        ("cleared", p.cleared_count),
    ):  # fmt: skip
        if pointer := getattr(p, name):
            found[pointer] = _memory(name, pointer, count, 4, initialised=False)
    if p.ticket:
        found[p.ticket] = _memory("ticket", p.ticket, 1, 4)
    return found


def _parts_buffers(p: PartsArguments, rank: int, itemsize: int, blocks: int) -> dict[int, Buffer]:
    """Those of every part; what the launch has once, and x, for all of them."""
    found: dict[int, Buffer] = {}
    for one in p.part[: p.parts]:
        found |= {at: buffer for at, buffer in _rows_buffers(one, rank, itemsize, blocks).items() if at not in found}
        if one.dv:
            found[one.dv] = _memory("dv", one.dv, p.groups * one.mixing.numbers, 4, initialised=False)
    return found


def _bank_buffers(p: BankGradArguments, rank: int, groups: int) -> dict[int, Buffer]:
    found = _mixing_buffers(p.mixing, rank, p.rows)
    entries = p.parts * (1 if p.mixing.elementwise else p.mixing.numbers) * rank * rank
    found[p.mixing.projection] = _memory("projection", p.mixing.projection, entries, 4, read_only=True)
    found[p.a] = _memory("a", p.a, p.parts * p.rows * rank, 4, read_only=True)
    found[p.t] = _memory("t", p.t, p.parts * p.rows * rank, 4, read_only=True)
    found[p.dv] = _memory("dv", p.dv, groups * p.mixing.adapters * p.mixing.numbers, 4, initialised=False)
    return found


def _right_buffers(p: RightArguments, rank: int, itemsize: int, blocks: int, samples: int) -> dict[int, Buffer]:
    count, width, stride = p.rows, p.columns, p.row_stride
    if p.column_stride != 1:
        count, width, stride = p.columns, p.rows, p.column_stride
    return {
        p.weight: _memory("weight", p.weight, 0, itemsize, rows=(count, width, stride), read_only=True),
        p.basis: _memory("basis", p.basis, rank * p.rows, 4, read_only=True),
        p.right: _memory("right", p.right, rank * p.columns, 4, initialised=False),
        p.samples: _memory("samples", p.samples, blocks * samples, 4, initialised=False),
    }


_KINDS = {
    "rows_kernel": RowsArguments, "parts_kernel": PartsArguments, "bank_grad": BankGradArguments,
    "refresh_right": RightArguments,
}  # fmt: skip


def _translated(arguments: ctypes.Structure, address) -> bytes:
    """The structure with every pointer replaced by the simulated address of what it points to."""
    def replace(structure):
        for name, kind in structure._fields_:
            value = getattr(structure, name)
            if kind is c_void_p and value:
                setattr(structure, name, address(value))
            elif isinstance(value, ctypes.Structure):
                replace(value)
            elif isinstance(value, ctypes.Array) and issubclass(value._type_, ctypes.Structure):
                for one in value:
                    replace(one)

    copy = type(arguments).from_buffer_copy(arguments)
    replace(copy)
    return bytes(copy)
