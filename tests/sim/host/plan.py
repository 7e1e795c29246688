"""csrc/cuda/launch_plan.h, asked directly: which kernel a problem runs on, and with how many threads."""
from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from .emulator import HERE, host_object, link_shared

TILES = ("Few", "Short", "Medium", "Long", "Stream", "Scalar")  # in the order of enum class Tile


@dataclass(frozen=True)
class Shape:
    """struct TileShape."""

    rows: int
    vectors: int
    width: int
    threads: int
    resident: bool

    @property
    def features(self) -> int:
        return self.threads * self.vectors * self.width


@dataclass(frozen=True)
class LaunchPlan:
    """struct LaunchPlan."""

    tile: str
    team: int
    teams: int
    blocks: int


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(link_shared([host_object(HERE / "plan.cpp")])))


@functools.cache
def shape(tile: str, element_bytes: int) -> Shape:
    out = (ctypes.c_int * 5)()
    _library().tile_shape(TILES.index(tile), element_bytes, out)
    return Shape(*out[:4], bool(out[4]))


def plan_rows(
    rows: int, features: int, element_bytes: int, *, aligned: bool = True, stays: bool = True,
    multiprocessors: int = 132, resident: int = 3,
) -> LaunchPlan:  # fmt: skip
    """As plan_rows of launch.cu, for a card whose multiprocessors each run `resident` blocks of the kernel at once."""
    out, wide = (ctypes.c_int * 3)(), ctypes.c_int64
    _library().plan_tile(wide(features), element_bytes, aligned, stays, rows <= multiprocessors, out)
    tile, team, teams = TILES[out[0]], *out[1:]
    block_rows = teams * shape(tile, element_bytes).rows
    blocks = _library().spread(wide(rows), block_rows, multiprocessors, multiprocessors * resident)
    return LaunchPlan(tile, team, teams, blocks)
