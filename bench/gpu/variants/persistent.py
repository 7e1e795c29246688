"""A persistent Triton product with the term of rank r: as many programs as multiprocessors, each takes tile after tile.

    forward    y  = x W^T + gains U^T     gains = t M^T
    backward   dx = g W + gains B^T       gains = a M

Operands and result move by TMA where their rows lie on 16 bytes, and by masked loads and stores where not. Gains are
given (coefficients.py), and the term is added in one of two ways:

    Term.EPILOGUE   r multiplications and additions an element in fp32, on the sums of a tile: 2 percent of the
                    operations that a multiprocessor can do beside a product 3584 deep
    Term.STEP       one more step of the tile's own product, 16 deep, of gains and factor in halves:
                    [s_high | s_low | s_high] [U_high | U_high | U_low]^T; a two hundredth of that product
"""
from __future__ import annotations

import enum
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .coefficients import NO_FUSION, Coefficients, depth, on_16_bytes
from .dependent import option


class Term(enum.IntEnum):
    NONE = 0
    EPILOGUE = 1
    STEP = 2


class Tiling(NamedTuple):
    """rows x columns of d a tile, so deep a step, with so many steps on their way; d leaves in so many pieces."""

    rows: int
    columns: int
    depth: int
    stages: int
    pieces: int
    warps: int = 8


# Which is best for a shape the card says. In two pieces d leaves through half the shared memory: room for a stage more.
TILINGS = (Tiling(128, 256, 64, 3, 1), Tiling(128, 256, 64, 4, 2), Tiling(128, 128, 64, 4, 1))
RAGGED = Tiling(128, 64, 64, 3, 1)  # without TMA, which wants rows on 16 bytes
SHARED = 227 * 1024  # bytes that a program may have on Hopper
GROUP = 8  # tiles in groups of so many rows of tiles, so that what runs together shares operands in L2


@triton.jit
def _load_tile(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, COLUMNS] of a matrix [rows, columns] from there on; zero outside. source: a descriptor, or a pointer."""
    if TMA:
        tile = source.load([row, column])
    else:
        i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        at = source + i.to(tl.int64)[:, None] * stride + j[None, :]
        tile = tl.load(at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return tile


@triton.jit
def _store_tile(
    target, tile, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """Rounds a tile, once, and writes what of it lies inside."""
    if TMA:
        target.store([row, column], tile.to(target.dtype))
    else:
        i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        at = target + i.to(tl.int64)[:, None] * stride + j[None, :]
        tl.store(at, tile.to(target.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def _wait(tile):
    """gdc_wait as a zero that gains' addresses need. A wait that the compiler may not move stops it from loading ahead
    for the next tile, and so from loading ahead at all."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, 0;", "=r,r", [tile], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def persistent_kernel(
    x_at,  # [N, E], a descriptor if TMA, else a pointer; so are the next two and the deep ones
    w_at,  # [D, E] if W_IS_DE, else [E, D]
    d_at,  # [N, D], written
    deep_at,  # [N, DEPTH] of x's type, gains if TERM is 2
    deep_factor_at,  # [DEPTH, D]
    gains_ptr,  # [R, N] fp32, gains if TERM is 1
    factor_ptr,  # [R, D] fp32
    x_stride, w_stride, d_stride, N, D, E,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, DEPTH: tl.constexpr, TERM: tl.constexpr, W_IS_DE: tl.constexpr, TMA: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """d = x W^T + gains U^T. Backward D and E change places, W is as it lies, and the factor B^T."""
    tiles_down, tiles_across = tl.cdiv(N, ROWS), tl.cdiv(D, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0), flatten=True):
        group = tile // (GROUP * tiles_across)
        height = min(tiles_down - group * GROUP, GROUP)  # of the last group less
        within = tile % (GROUP * tiles_across)
        row = (group * GROUP + within % height) * ROWS
        column = within // height * COLUMNS

        # x W^T
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, E, BLOCK):
            x = _load_tile(x_at, row, k, N, E, x_stride, ROWS, BLOCK, TMA)
            if W_IS_DE:
                w = _load_tile(w_at, column, k, D, E, w_stride, COLUMNS, BLOCK, TMA).T
            else:
                w = _load_tile(w_at, k, column, E, D, w_stride, BLOCK, COLUMNS, TMA)
            sums = tl.dot(x, w, sums)

        if TERM > 0 and DEPENDENT:
            row += _wait(tile)  # gains come from the launch before; nothing above does
        if TERM == 1:
            # + gains U^T
            i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
            for r in tl.static_range(R):
                gain = tl.load(gains_ptr + r * N + i, mask=i < N, other=0.0)[:, None]
                u = tl.load(factor_ptr + r * D + j, mask=j < D, other=0.0)[None, :]
                sums = tl.fma(tl.broadcast_to(gain, sums.shape), tl.broadcast_to(u, sums.shape), sums)
        elif TERM == 2:
            # + [s_high | s_low | s_high] [U_high | U_high | U_low]^T
            gains = _load_tile(deep_at, row, 0, N, DEPTH, DEPTH, ROWS, DEPTH, False)
            factor = _load_tile(deep_factor_at, 0, column, DEPTH, D, D, DEPTH, COLUMNS, False)
            sums = tl.dot(gains, factor, sums)

        if PIECES == 2:
            HALF: tl.constexpr = COLUMNS // 2
            left, right = tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, HALF]), [0, 2, 1]))
            _store_tile(d_at, left, row, column, N, D, d_stride, ROWS, HALF, TMA)
            _store_tile(d_at, right, row, column + HALF, N, D, d_stride, ROWS, HALF, TMA)
        else:
            _store_tile(d_at, sums, row, column, N, D, d_stride, ROWS, COLUMNS, TMA)


def shared_bytes(tiling: Tiling, term: Term, rank: int) -> int:
    """Shared memory of a program with TMA: steps on their way and barriers, d on its way out, the term's factor."""
    rows, columns, stages = tiling.rows, tiling.columns, tiling.stages
    step = (rows + columns) * 2  # bytes of one number deep
    factor = {Term.NONE: 0, Term.EPILOGUE: 4 * columns, Term.STEP: depth(rank) * step}[term]
    return stages * (tiling.depth * step + 8) + rows * columns // tiling.pieces * 2 + factor


def fits(tiling: Tiling, term: Term, rank: int) -> bool:
    """Whether it has memory and registers enough: beside 128 sums a thread 4 factors spill (Triton 3.6), or 8 (3.9)."""
    registers = term is not Term.EPILOGUE or rank <= 2 or tiling.columns <= 128
    return registers and shared_bytes(tiling, term, rank) <= SHARED


def product(
    x: Tensor,
    w: Tensor,
    d: Tensor,
    *,
    backward: bool,
    programs: int,
    tiling: Tiling,
    term: Term = Term.NONE,
    gains: Coefficients | None = None,
    factor: Tensor | None = None,
    dependent: bool = False,
) -> None:
    """d = x W^T + gains U^T, or backward x W + gains B^T, written.

    Args:
        x: [N, k], bf16 or fp16; d: [N, n]; w: W as it lies, [n, k], backward [k, n]. Last strides 1.
        programs: the multiprocessors of the card.
        gains: of the pass.
        factor: of d's side: [r, n] fp32 for Term.EPILOGUE, deep_factor() of it for Term.STEP.
        dependent: launched behind the pass, whose gains alone are waited for: x, which is read before the wait, must
            be complete when the pass starts, and the pass therefore be launched plainly.
    """
    (rows, n), k = d.shape, x.shape[1]
    if rows == 0 or n == 0:
        return
    deep = (gains.deep, factor) if term is Term.STEP and gains is not None and factor is not None else None
    tma = k > 0 and on_16_bytes(x, w, d)
    columns = tiling.columns // tiling.pieces

    def at(matrix: Tensor, *block: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, list(block)) if tma else matrix

    persistent_kernel[(min(programs, -(-rows // tiling.rows) * -(-n // tiling.columns)),)](
        at(x, tiling.rows, tiling.depth),
        at(w, tiling.depth, tiling.columns) if backward else at(w, tiling.columns, tiling.depth),
        at(d, tiling.rows, columns),
        *(deep or (None, None)),
        gains.gains if term is Term.EPILOGUE and gains is not None else None,
        factor if term is Term.EPILOGUE else None,
        x.stride(0), w.stride(0), d.stride(0), rows, n, k,
        ROWS=tiling.rows, COLUMNS=tiling.columns, BLOCK=tiling.depth, PIECES=tiling.pieces, GROUP=GROUP,
        R=0 if gains is None else gains.t.shape[1], DEPTH=deep[0].shape[1] if deep else 0, TERM=int(term),
        W_IS_DE=not backward, TMA=tma, DEPENDENT=dependent,
        num_warps=tiling.warps, num_stages=tiling.stages, **option(dependent), **NO_FUSION,
    )  # fmt: skip
