"""Product and term for 1 to 16 rows in one launch: what such a product costs is one pass over W.

    y = x W^T + (t M^T) U^T     t = x B

A program takes COLUMNS rows of W, less the last 2 r of them: in their place lie the halves of B^T (coefficients.py), so
that the product that makes y makes t as well, without a load or an instruction more in the loop. Every program sums t
for itself, from L2; the price is COLUMNS / (COLUMNS - 2 r) as many programs. As few as these rows are, t passes between
no two of them.

Launched as a dependent one (dependent.py), a program asks for its first piece of W, which no kernel writes, and makes M
before it waits for the kernel that writes x.
"""
from __future__ import annotations

import enum

import triton
import triton.language as tl
from torch import Tensor

from tinylora_kernels.ops.triton.kernels import _mixing

from .coefficients import NO_FUSION, block_u, on_16_bytes
from .dependent import option

MOST_ROWS = 16
COLUMNS = (32, 64)  # the card says which
BLOCK = 256


class Term(enum.IntEnum):
    NONE = 0
    INSIDE = 1  # t by the product itself
    GIVEN = 2  # gains of the pass before, which this launch overtakes if it is a dependent one


@triton.jit
def skinny_kernel(
    x_ptr,  # [N, E]
    w_ptr,  # [D, E]
    halves_ptr,  # [2 R, E] of x's type, read if TERM is 1: B^T high, B^T low
    basis_ptr,  # [R, D] fp32
    v_ptr,  # [u] fp32
    projection_ptr,  # [u, R, R] or [R, R] fp32
    y_ptr,  # [N, D], written
    t_ptr,  # [N, R] fp32, written if TERM is 1
    gains_ptr,  # [R, N] fp32, read if TERM is 2
    x_stride, w_stride, y_stride, N, D, E, u,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_U: tl.constexpr,
    LORA_XS: tl.constexpr, TERM: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y = x W^T + (t M^T) U^T, t = x B."""
    OWN: tl.constexpr = COLUMNS - 2 * R if TERM == 1 else COLUMNS  # rows of W
    rows, rank = tl.arange(0, ROWS), tl.arange(0, R)
    place = tl.arange(0, COLUMNS)
    columns = tl.program_id(0) * OWN + place
    inside = (columns < D) & (place < OWN)
    k = tl.arange(0, BLOCK)
    # Lines of the tile: rows of W, then those of the halves. One address each, so that one load brings both.
    line = w_ptr + tl.minimum(columns, D - 1).to(tl.int64) * w_stride
    read = inside
    if TERM == 1:
        half = place - OWN
        line = tl.where(half >= 0, halves_ptr + tl.maximum(half, 0).to(tl.int64) * E, line)
        if ALIGNED:  # which the compiler knows of either, and not of a choice: without it a load brings 2 bytes, not 16
            line = tl.multiple_of(line, 16)
        read = inside | (half >= 0)
        mixing = _mixing(v_ptr, projection_ptr, tl.zeros([1], tl.int32), u, R, BLOCK_U, LORA_XS)  # [1, R, R]
    w = tl.load(line[:, None] + k[None, :], mask=read[:, None] & (k < E)[None, :], other=0.0)
    if DEPENDENT and TERM != 2:
        tl.extra.cuda.gdc_wait()
    row = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    row_ok = rows < N

    # [x W^T | x B_high | x B_low]
    x = tl.load(row + k[None, :], mask=row_ok[:, None] & (k < E)[None, :], other=0.0)
    sums = tl.dot(x, w.T)
    for start in tl.range(BLOCK, E, BLOCK, num_stages=STAGES):
        at = start + k
        w = tl.load(line[:, None] + at[None, :], mask=read[:, None] & (at < E)[None, :], other=0.0)
        x = tl.load(row + at[None, :], mask=row_ok[:, None] & (at < E)[None, :], other=0.0)
        sums = tl.dot(x, w.T, sums)

    if DEPENDENT:
        if TERM == 2:
            tl.extra.cuda.gdc_wait()  # gains come from the launch before; nothing above does
        tl.extra.cuda.gdc_launch_dependents()  # the next kernel's first loads, beside this one's end
    if TERM == 1:
        # t = x B_high + x B_low
        t = tl.zeros([ROWS, R], tl.float32)
        for i in tl.static_range(R):
            mine = (place == OWN + i) | (place == OWN + R + i)
            t_i = tl.sum(tl.where(mine[None, :], sums, 0.0), axis=1)  # [ROWS]
            t = tl.where((rank == i)[None, :], t_i[:, None], t)
        if tl.program_id(0) == 0:  # all have the same t
            tl.store(t_ptr + rows[:, None] * R + rank[None, :], t, mask=row_ok[:, None])
        # gains = t M^T:  gains[n, j] = sum_k t[n, k] M[j, k]
        gains = tl.sum(t[:, None, :] * mixing, axis=2)  # [ROWS, R]
    elif TERM == 2:
        gains = tl.load(gains_ptr + rank[None, :] * N + rows[:, None], mask=row_ok[:, None], other=0.0)
    # y = x W^T + gains U^T
    if TERM > 0:
        for j in tl.static_range(R):
            gain = tl.sum(tl.where((rank == j)[None, :], gains, 0.0), axis=1)  # [ROWS]
            u = tl.load(basis_ptr + j * D + columns, mask=inside, other=0.0)
            sums = tl.fma(tl.broadcast_to(gain[:, None], sums.shape), tl.broadcast_to(u[None, :], sums.shape), sums)
    at = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(at, sums.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & inside[None, :])


def product(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    columns: int,
    term: Term = Term.NONE,
    halves: Tensor | None = None,
    basis: Tensor | None = None,
    t: Tensor | None = None,
    gains: Tensor | None = None,
    dependent: bool = False,
) -> None:
    """y = x W^T + (t M^T) U^T, written.

    Args:
        x: [N, E], N at most 16, bf16 or fp16; w: [D, E]; y: [N, D]. Last strides 1.
        halves: of B^T; with t [N, r] fp32, which is written: Term.INSIDE.
        basis: U^T [r, D] fp32.
        gains: [r, N] fp32 of the pass before: Term.GIVEN.
        dependent: with Term.GIVEN the pass must be launched plainly: x is read before its end is waited for.
    """
    (rows, features), rank = y.shape, 1 if basis is None else len(basis)
    if rows > MOST_ROWS:
        raise ValueError(f"x: expected at most {MOST_ROWS} rows, found {rows}: take the persistent product")
    if rows == 0 or features == 0:
        return
    own = columns - 2 * rank if term is Term.INSIDE else columns
    skinny_kernel[(-(-features // own),)](
        x, w, halves, basis, v, projection, y, t, gains,
        x.stride(0), w.stride(0), y.stride(0), rows, features, x.shape[1], v.shape[-1],
        R=rank, ROWS=16, COLUMNS=columns, BLOCK=BLOCK, BLOCK_U=block_u(len(projection), rank),
        LORA_XS=projection.dim() == 2, TERM=int(term), STAGES=4, DEPENDENT=dependent,
        ALIGNED=halves is not None and on_16_bytes(w, halves), num_warps=columns // 8, **option(dependent), **NO_FUSION,
    )  # fmt: skip
