"""Buffers and shared memory, with the checks a GPU does not make: bounds, alignment, initialisation and races.

Every region keeps a shadow beside its bytes, one entry per granule (the narrowest access the kernel makes): whether it
was ever written, who wrote it last and when, who has read it since and when. An access that touches a granule another
thread wrote (or a write that touches one another thread read) must come after it in the order that clock.py defines.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .clock import NOBODY, Clock
from .errors import Misaligned, OutOfBounds, Race, ReadOnly, SimulationError, Uninitialised

ADDRESS_BITS = 40  # every buffer has 1 TiB of addresses to itself, so that no access can stray into another one
SHARED_WINDOW = 1 << 60  # where generic addresses of shared memory start


@dataclass
class Access:
    """One memory instruction of some threads, for the checks and their messages."""

    what: str  # "line 127 (update.cuh:57): ld.global.v4.b32"
    thread: np.ndarray  # [n]
    size: int  # bytes per thread
    clock: Clock

    def fail(
        self, error: type[SimulationError], offsets: np.ndarray, bad: np.ndarray, message: str, other=None
    ) -> SimulationError:
        """The error for the first bad entry: offsets and bad [n] or [n, k], other: the thread it collides with."""
        first = tuple(np.argwhere(bad)[0])
        who = self.clock.name(self.thread[first[0]])
        by = "" if other is None else f" of {self.clock.name(other[first])}"
        return error(f"{self.what}: {who}, {self.size} bytes at offset {int(offsets[first])}: {message}{by}")


class Region:
    """Bytes with a shadow: one buffer, or the shared memory of all blocks."""

    def __init__(
        self,
        name: str,
        data: np.ndarray,
        granule: int,
        *,
        initialised: bool,
        read_only: bool = False,
        valid: np.ndarray | None = None,
        origin: int = 0,
        period: int = 1 << 62,
    ) -> None:
        """origin, period: an offset is reported as (offset - origin) % period."""
        self.name, self.data, self.granule, self.read_only = name, data, granule, read_only
        self.origin, self._period = origin, period
        count = -(-len(data) // granule)
        self.valid = valid  # [granules], or None: all of them
        self._written = None if initialised else np.zeros(count, bool)
        self._writer, self._written_at = np.full(count, NOBODY), np.zeros(count, np.int64)
        self._reader, self._read_at = np.full(count, NOBODY), np.zeros(count, np.int64)
        self._atomic, self._cached = np.zeros(count, bool), np.zeros(count, bool)
        self._first, self._last = np.zeros(count, np.int64), np.zeros(count, np.int64)

    def granules(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """[n, k]: the granules that n accesses of `size` bytes touch."""
        first = (offsets // self.granule)[:, None]
        return first if size <= self.granule else first + np.arange(-(-size // self.granule))

    def _place(self, granules: np.ndarray) -> np.ndarray:
        return (granules * self.granule - self.origin) % self._period

    def check_read(self, access: Access, offsets: np.ndarray, cached: bool = False) -> None:
        """cached: through the non-coherent path, which must never meet data of this launch."""
        if self.read_only and self._written is None:
            return
        at = self.granules(offsets, access.size)
        if self._written is not None and not self._written[at].all():
            message = f"reads {self.name} that nothing has written"
            raise access.fail(Uninitialised, self._place(at), ~self._written[at], message)
        if self.read_only:
            return
        thread = np.broadcast_to(access.thread[:, None], at.shape)
        now = access.clock.epoch[thread]
        writer = self._writer[at]
        if cached:
            if (writer != NOBODY).any():
                message = f"reads {self.name} through ld.global.nc after a write"
                raise access.fail(ReadOnly, self._place(at), writer != NOBODY, message, writer)
            self._cached[at] = True
        if ((writer != NOBODY) & (writer != thread)).any():
            racing = ~access.clock.ordered(writer, self._written_at[at], thread, now)
            if racing.any():
                message = f"reads {self.name}, unordered with the write"
                raise access.fail(Race, self._place(at), racing, message, writer)
        self._add_readers(access.clock, at, thread, now)

    def _add_readers(self, clock: Clock, at: np.ndarray, thread: np.ndarray, now: np.ndarray) -> None:
        """Remember these readers beside those not ordered before them. Threads come in ascending order."""
        self._first[at.ravel()[::-1]] = thread.ravel()[::-1]
        self._last[at] = thread
        together = clock.join(self._first[at], self._last[at])  # all who read the granule in this instruction
        earlier = self._reader[at]
        stay = (earlier != NOBODY) & (earlier != thread)
        if stay.any():
            stay &= ~clock.ordered(earlier, self._read_at[at], thread, now)
            together = np.where(stay, clock.join(earlier, together), together)
        self._reader[at], self._read_at[at] = together, now

    def check_write(
        self, access: Access, offsets: np.ndarray, changes: Callable[[], np.ndarray] | None, atomic: bool = False
    ) -> None:
        """changes() [n] says whose value differs from what is there: the same value written twice is no race."""
        at = self.granules(offsets, access.size)
        if atomic and self._written is not None and not self._written[at].all():
            message = f"reads {self.name} that nothing has written"
            raise access.fail(Uninitialised, self._place(at), ~self._written[at], message)
        if self.read_only:
            message = f"writes {self.name}, which the launch declared read-only"
            raise access.fail(ReadOnly, self._place(at), at >= 0, message)
        if self._cached[at].any():
            message = f"writes {self.name}, read through ld.global.nc before"
            raise access.fail(ReadOnly, self._place(at), self._cached[at], message)
        thread = np.broadcast_to(access.thread[:, None], at.shape)
        now = access.clock.epoch[thread]
        writer, reader = self._writer[at], self._reader[at]
        if (foreign := (writer != NOBODY) & (writer != thread)).any():
            racing = foreign & ~access.clock.ordered(writer, self._written_at[at], thread, now)
            racing &= ~self._atomic[at] if atomic else changes()[:, None]
            if racing.any():
                message = f"writes {self.name}, unordered with the write"
                raise access.fail(Race, self._place(at), racing, message, writer)
        if (foreign := (reader != NOBODY) & (reader != thread)).any():
            racing = foreign & ~access.clock.ordered(reader, self._read_at[at], thread, now)
            if racing.any():
                message = f"writes {self.name}, unordered with the read"
                raise access.fail(Race, self._place(at), racing, message, reader)
        self._writer[at], self._written_at[at], self._atomic[at] = thread, now, atomic
        if self._written is not None:
            self._written[at] = True


@dataclass
class Buffer:
    """A kernel argument in global memory; a launch updates the caller's memory in place."""

    name: str
    data: np.ndarray  # uint8, shared with the caller
    itemsize: int
    start: int = 0  # of the first element within a 256-byte line: alignment is that of the caller's own pointer
    valid: np.ndarray | None = None  # bytes that belong to the tensor, where rows have gaps
    read_only: bool = False
    initialised: bool = True

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, **flags: bool) -> Buffer:
        """A torch tensor, strided or not."""
        extents = list(zip(tensor.shape, tensor.stride(), strict=True))
        span = 1 + sum((n - 1) * stride for n, stride in extents) if tensor.numel() else 0
        if span == 0:
            return cls(name, np.zeros(0, np.uint8), tensor.element_size(), **flags)
        storage = torch.as_strided(tensor.detach(), (span,), (1,))
        valid = None
        if span != tensor.numel():
            positions = np.zeros(1, np.int64)
            for n, stride in extents:
                positions = (positions[:, None] + np.arange(n) * stride).ravel()
            valid = np.zeros(span, bool)
            valid[positions] = True
            valid = valid.repeat(tensor.element_size())
        data = storage.view(torch.uint8).numpy()
        return cls(name, data, tensor.element_size(), tensor.data_ptr() % 256, valid, **flags)


class GlobalMemory:
    """All buffers of a launch, each in its own stretch of addresses."""

    def __init__(self, buffers: list[Buffer], narrowest: int) -> None:
        self.buffers, self.regions = buffers, []
        for buffer in buffers:
            inner = slice(buffer.start, buffer.start + len(buffer.data))
            data = np.zeros(-(-inner.stop // 64) * 64, np.uint8)
            data[inner] = buffer.data
            valid = np.zeros(len(data), bool)
            valid[inner] = True if buffer.valid is None else buffer.valid
            granule = min(buffer.itemsize, narrowest)
            flags = dict(initialised=buffer.initialised, read_only=buffer.read_only)
            self.regions.append(
                Region(buffer.name, data, granule, valid=valid[::granule], origin=buffer.start, **flags)
            )

    def address(self, index: int) -> int:
        return ((index + 1) << ADDRESS_BITS) + self.buffers[index].start

    def write_back(self) -> None:
        for buffer, region in zip(self.buffers, self.regions, strict=True):
            if not buffer.read_only:
                found = region.data[buffer.start : buffer.start + len(buffer.data)]
                np.copyto(buffer.data, found, where=True if buffer.valid is None else buffer.valid)  # gaps are others'

    def locate(self, access: Access, addresses: np.ndarray) -> list[tuple[Region, np.ndarray, np.ndarray]]:
        """(region, which of the accesses, their offsets in it), after the checks of alignment and bounds."""
        _check_alignment(access, addresses)
        index = (addresses >> ADDRESS_BITS) - 1
        offsets = addresses & (1 << ADDRESS_BITS) - 1
        one_buffer = (index == index[0]).all()
        found = []
        for which in [index[0]] if one_buffer else np.unique(index):
            chosen = np.arange(len(index)) if one_buffer else np.nonzero(index == which)[0]
            if not 0 <= which < len(self.regions):
                raise access.fail(OutOfBounds, addresses, index == which, "is in no buffer")
            region, buffer = self.regions[which], self.buffers[which]
            own = offsets if one_buffer else offsets[chosen]
            inside = (own >= buffer.start) & (own + access.size <= buffer.start + len(buffer.data))
            if buffer.valid is not None and inside.all():
                inside = region.valid[region.granules(own, access.size)].all(axis=1)
            if not inside.all():
                outside = np.zeros(len(addresses), bool)
                outside[chosen] = ~inside
                length = len(buffer.data)
                raise access.fail(
                    OutOfBounds, offsets - region.origin, outside, f"is outside {region.name} ({length} bytes)"
                )
            found.append((region, chosen, own))
        return found


class SharedMemory:
    """The shared memory of every block; nothing in it is initialised when the block starts."""

    def __init__(self, blocks: int, size: int, narrowest: int) -> None:
        self.size, self.stride = size, -(-max(size, 1) // 128) * 128
        data = np.full(blocks * self.stride, 0xCB, np.uint8)
        self.region = Region("shared memory", data, narrowest, initialised=False, period=self.stride)

    def locate(self, access: Access, addresses: np.ndarray) -> list[tuple[Region, np.ndarray, np.ndarray]]:
        _check_alignment(access, addresses)
        outside = (addresses < 0) | (addresses + access.size > self.size)
        if outside.any():
            raise access.fail(OutOfBounds, addresses, outside, f"is outside the {self.size} bytes of shared memory")
        block = access.clock.block_of[access.thread]
        return [(self.region, np.arange(len(addresses)), addresses + block * self.stride)]


def _check_alignment(access: Access, addresses: np.ndarray) -> None:
    if int(np.bitwise_or.reduce(addresses)) % access.size:  # sizes are powers of two
        wrong = addresses % access.size != 0
        offsets = addresses & (1 << ADDRESS_BITS) - 1
        raise access.fail(Misaligned, offsets, wrong, f"is not aligned to {access.size} bytes")
