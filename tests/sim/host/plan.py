"""csrc/cuda/launch_plan.h, asked directly: which kernel a problem runs on, and with how many threads."""
from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from .emulator import HERE, KERNELS, build_shared

TILES = ("Short", "Medium", "Long", "Scalar", "Stream", "StreamScalar")  # in the order of enum class Tile


@dataclass(frozen=True)
class Shape:
    """struct TileShape."""

    rows: int
    vectors: int
    width: int
    threads: int
    resident: bool

    @property
    def columns(self) -> int:
        return self.threads * self.vectors * self.width


@dataclass(frozen=True)
class Plan:
    """struct Plan."""

    tile: str
    team: int
    teams: int
    blocks: int
    tiles_per_block: int


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_shared(HERE / "plan.cpp", [KERNELS])))


@functools.cache
def shape(tile: str, element_bytes: int) -> Shape:
    out = (ctypes.c_int * 5)()
    _library().tile_shape(TILES.index(tile), element_bytes, out)
    return Shape(*out[:4], bool(out[4]))


def plan_rows(rows: int, columns: int, element_bytes: int, aligned: bool = True) -> Plan:
    out = (ctypes.c_int * 5)()
    _library().plan_rows(ctypes.c_int64(rows), ctypes.c_int64(columns), element_bytes, aligned, out)
    return Plan(TILES[out[0]], *out[1:])
