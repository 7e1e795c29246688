"""A few numbers of a weight, by which to tell whether it still holds what it held.

Torch counts what is written into a tensor, but not what is written through ``weight.data``. What was computed from a
weight and is kept (B^T = U^T W) would then be of the old one. So before it is used again a witness is heard: the count
and the address, and runs of numbers from all over the weight, or all of it where it is small. A run is 4 numbers side
by side: to look at them costs one fetch from memory, and that is what a call feels.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

RUNS, RUN = 16, 4
ALL_BELOW = 4096  # numbers of a weight that is compared whole, if nothing lies between them
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: NaN is equal to itself
_GOLDEN = 0.6180339887498949


class Witness(NamedTuple):
    """What a weight was: torch's count of writes, its address and dtype, and the bits of some of its numbers."""

    version: int
    address: int
    dtype: torch.dtype
    offsets: Tensor  # [runs] int64, elements from the first one of the weight, on the CPU
    bits: Tensor  # [runs, numbers of a run] integers of the weight's size

    def knows(self, weight: Tensor) -> bool:
        """Whether the weight holds the same numbers, wherever it lies. Of a GPU's weight: waits for the device."""
        if weight.dtype is not self.dtype or weight.shape.numel() == 0:
            return weight.dtype is self.dtype and not len(self.bits)
        return torch.equal(_bits_at(weight, self.offsets, self.bits.shape[1]), self.bits.to(weight.device))

    def is_exactly(self, weight: Tensor) -> bool:
        """Whether the weight holds the same numbers with nothing rounded away, whatever its dtype."""
        there = self.cast(weight.dtype)
        return torch.equal(there.cast(self.dtype).bits, self.bits) and there.knows(weight)

    def is_nearly(self, weight: Tensor) -> bool:
        """Whether the weight holds the same numbers to some roundings: one that was computed, of this dtype or that."""
        expected = self.bits.to(weight.device).view(self.dtype).double()
        found = _bits_at(weight, self.offsets, self.bits.shape[1]).view(weight.dtype).double()
        rounding = max(torch.finfo(dtype).eps for dtype in (self.dtype, weight.dtype))
        return bool((found - expected).norm() <= 8 * rounding * expected.norm())

    def cast(self, dtype: torch.dtype) -> Witness:
        """The witness of the same numbers in another dtype."""
        if dtype is self.dtype:
            return self
        numbers = self.bits.view(self.dtype).to(dtype)
        return self._replace(dtype=dtype, bits=numbers.view(_BITS[dtype.itemsize]))


def witness(weight: Tensor) -> Witness:
    """The witness of a plain tensor [out, ...] of any strides, as it is now."""
    version = 0 if weight.is_inference() else weight._version
    offsets, run = _runs(tuple(weight.shape), tuple(weight.stride()))
    return Witness(version, weight.data_ptr(), weight.dtype, offsets, _bits_at(weight, offsets, run))


def _bits_at(weight: Tensor, offsets: Tensor, run: int) -> Tensor:
    bits = _BITS[weight.dtype.itemsize]
    if not len(offsets):
        return torch.empty(0, run, dtype=bits, device=weight.device)
    flat = weight.detach().as_strided((int(offsets.max()) + run,), (1,)).view(bits)
    return flat.unfold(0, run, 1)[offsets.to(weight.device)]


@functools.lru_cache(maxsize=256)
def _runs(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Tensor, int]:
    """Where the runs begin, one in each of RUNS bands of rows, columns spread by the golden ratio; and their length."""
    total = torch.Size(shape).numel()
    fastest = min(range(len(shape)), key=lambda axis: (strides[axis], -shape[axis]))
    run = RUN if strides[fastest] == 1 and shape[fastest] >= RUN else 1
    if total <= ALL_BELOW and _is_dense(shape, strides):
        return torch.zeros(min(total, 1), dtype=torch.int64, device="cpu"), total
    if total == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu"), run
    offsets = torch.zeros(RUNS, dtype=torch.int64, device="cpu")
    band = torch.arange(RUNS, dtype=torch.float64, device="cpu")
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        room = size - (run - 1 if axis == fastest else 0)  # a run ends inside
        at = (band + (band * _GOLDEN) % 1) / RUNS if axis == 0 else ((band + axis) * _GOLDEN * _GOLDEN) % 1
        offsets += (at * room).long().clamp(max=room - 1) * stride
    return offsets, run


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the numbers lie side by side, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
