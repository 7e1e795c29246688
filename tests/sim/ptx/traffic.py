"""Counts what global memory sees: bytes per buffer, requests, and 32-byte sectors per request.

A request is one instruction of one warp. Threads of a request that ask for the same bytes are served once, so bytes
are counted once per request. The least number of sectors a request can need is its bytes / 32; more means it is not
coalesced.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

SECTOR_BITS = 5


@dataclass
class Requests:
    """All requests of one instruction to one buffer."""

    count: int = 0
    bytes: int = 0
    sectors: int = 0
    fewest_sectors: int = 0

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / self.count

    @property
    def excess(self) -> float:
        """Sectors over the fewest that hold these bytes: 1.0 is perfectly coalesced."""
        return self.sectors / max(self.fewest_sectors, 1)


@dataclass
class Traffic:
    """requests[where, opcode, buffer]."""

    requests: dict[tuple[str, str, str], Requests] = field(default_factory=lambda: defaultdict(Requests))

    def record(self, where: str, opcode: str, buffer: str, threads: np.ndarray, offsets: np.ndarray, size: int) -> None:
        """threads ascending; every access lies within one sector or covers whole ones."""
        warps = threads >> 5
        first = warps.astype(np.int64) << 44 | offsets  # [n], in one order for all warps
        bytes_per_warp, sectors = self._distinct(first) * size, self._distinct(first >> SECTOR_BITS)
        whole = max(size >> SECTOR_BITS, 1)  # 32-byte vectors cover one sector, wider ones do not exist
        entry = self.requests[where, opcode, buffer]
        requests = 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))
        entry.count += requests
        entry.bytes += bytes_per_warp
        entry.sectors += sectors * whole
        entry.fewest_sectors += max(-(-bytes_per_warp // (1 << SECTOR_BITS)), requests)

    @staticmethod
    def _distinct(keys: np.ndarray) -> int:
        if (keys[1:] < keys[:-1]).any():
            keys = np.sort(keys)
        return 1 + int(np.count_nonzero(keys[1:] != keys[:-1]))

    def _total(self, buffer: str, kinds: tuple[str, ...]) -> int:
        return sum(
            r.bytes for (_, opcode, name), r in self.requests.items() if name == buffer and opcode.startswith(kinds)
        )

    def bytes_read(self, buffer: str) -> int:
        return self._total(buffer, ("ld", "atom"))

    def bytes_written(self, buffer: str) -> int:
        return self._total(buffer, ("st", "atom", "red"))

    def of(self, buffer: str) -> Requests:
        """All requests to one buffer together."""
        total = Requests()
        for (_, _, name), r in self.requests.items():
            if name == buffer:
                total.count += r.count
                total.bytes += r.bytes
                total.sectors += r.sectors
                total.fewest_sectors += r.fewest_sectors
        return total
