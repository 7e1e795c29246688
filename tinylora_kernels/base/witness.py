"""A few numbers of a weight, by which to tell whether it still holds what it held.

Torch counts what is written into a tensor, but not what is written through ``weight.data``. What was computed from a
weight and is kept (B^T = U^T W) would then be of the old one. So a witness is heard before it is used again: the count
and the address, and numbers from all over the weight, all of them where it is small.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 64
ALL_BELOW = 4096  # elements of a weight that is compared whole
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: NaN is equal to itself
_GOLDEN = 0.6180339887498949


class Witness(NamedTuple):
    """What a weight was: torch's count of writes, its address and dtype, and the bits of some of its numbers."""

    version: int
    address: int
    dtype: torch.dtype
    offsets: Tensor  # [n] int64, elements from the first one of the weight
    bits: Tensor  # [n] integers of the weight's size

    def confirms(self, weight: Tensor) -> bool:
        """Whether the weight is where it was, nobody is known to have written into it, and its numbers are the same."""
        if (weight._version, weight.data_ptr(), weight.dtype) != (self.version, self.address, self.dtype):
            return False
        return self.knows(weight)

    def knows(self, weight: Tensor) -> bool:
        """Whether the weight holds the same numbers, wherever it lies. Of a GPU's weight: waits for the device."""
        if weight.dtype is not self.dtype or weight.shape.numel() == 0:
            return weight.dtype is self.dtype and not len(self.bits)
        return torch.equal(_bits_at(weight, self.offsets), self.bits.to(weight.device))

    def cast(self, dtype: torch.dtype) -> Witness:
        """The witness of the same numbers in another dtype."""
        if dtype is self.dtype:
            return self
        numbers = self.bits.view(self.dtype).to(dtype)
        return self._replace(dtype=dtype, bits=numbers.view(_BITS[dtype.itemsize]))


def witness(weight: Tensor) -> Witness:
    """The witness of a plain tensor [out, ...] of any strides, as it is now."""
    version = 0 if weight.is_inference() else weight._version
    offsets = _offsets(tuple(weight.shape), tuple(weight.stride()))
    return Witness(version, weight.data_ptr(), weight.dtype, offsets, _bits_at(weight, offsets))


def _bits_at(weight: Tensor, offsets: Tensor) -> Tensor:
    if not len(offsets):
        return torch.empty(0, dtype=_BITS[weight.dtype.itemsize], device=weight.device)
    flat = weight.detach().as_strided((int(offsets.max()) + 1,), (1,)).view(_BITS[weight.dtype.itemsize])
    return flat[offsets.to(weight.device)]


@functools.lru_cache(maxsize=256)
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Of one number in each of NUMBERS bands of rows, the columns spread evenly by the golden ratio; on the CPU."""
    total = torch.Size(shape).numel()
    if total <= ALL_BELOW:
        at = torch.arange(total, device="cpu")
    else:
        rows, columns = shape[0], total // shape[0]
        band = torch.arange(NUMBERS, dtype=torch.float64, device="cpu")
        row = ((band + (band * _GOLDEN) % 1) * rows / NUMBERS).long().clamp(max=rows - 1)
        column = (((band * _GOLDEN * _GOLDEN + 0.5) % 1) * columns).long().clamp(max=columns - 1)
        at = row * columns + column
    index, offsets = at, torch.zeros_like(at)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        offsets += index % size * stride
        index = index // size
    return offsets
