"""The pass before a product with the term in its epilogue: coefficients of every row, and gains made of them.

    forward    t = x B     gains = t M^T
    backward   a = g U     gains = a M      dM = a^T t

One pass over x serves every layer that reads the same x. The factor is multiplied on tensor cores in two halves of x's
own type, high and low, [PAD, E]: rows 0 to r - 1 high, r to 2 r - 1 low, the rest zero. A product is 8 wide at least,
so that the low half, which keeps 16 bits of the factor in bf16 and 22 in fp16, costs nothing up to r = 4.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylora_kernels.ops.triton.kernels import _mixing, reduce_dv_kernel

BLOCK = 256  # columns of x at a time
NO_FUSION = {"enable_fp_fusion": False}  # why: ops/triton/kernels.py


@triton.jit
def coefficients_kernel(
    x_ptr,  # [N, E]
    halves_ptr,  # [PAD, E] of x's type
    v_ptr,  # [u] fp32
    projection_ptr,  # [u, R, R] or [R, R] fp32
    saved_ptr,  # [N, R] fp32, t of the forward pass, read if NEED_DV
    t_ptr,  # [N, R] fp32, written
    gains_ptr,  # [R, N] fp32, written
    deep_ptr,  # [N, DEPTH] of x's type, written if DEEP: gains as one more step of a product's depth
    kept_ptr,  # [programs, R * R] fp32, written if NEED_DV: dM of each program
    x_stride, N, E, u,
    R: tl.constexpr, PAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_U: tl.constexpr, LORA_XS: tl.constexpr, TRANSPOSED: tl.constexpr, DEEP: tl.constexpr,
    NEED_DV: tl.constexpr, STAGES: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """t = x B;  gains = t M^T.   a = g U;  gains = a M;  dM = a^T t."""
    if DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()  # the product begins with what it multiplies, and waits for gains later
    rank = tl.arange(0, R)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < N
    mixing = _mixing(v_ptr, projection_ptr, tl.zeros([1], tl.int32), u, R, BLOCK_U, LORA_XS)  # [1, R, R]

    # [x P_high | x P_low | 0]
    products = tl.zeros([ROWS, PAD], tl.float32)
    for start in tl.range(0, E, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)
        at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
        x = tl.load(at, mask=row_ok[:, None] & (cols < E)[None, :], other=0.0)
        half = tl.load(halves_ptr + tl.arange(0, PAD)[:, None] * E + cols[None, :], mask=(cols < E)[None, :], other=0.0)
        products = tl.dot(x, half.T, products)
    # t = x P_high + x P_low
    t = tl.sum(tl.reshape(products, [ROWS, PAD // R, R]), axis=1)  # [ROWS, R]
    if TRANSPOSED:
        # gains = a M:  gains[n, k] = sum_j a[n, j] M[j, k]
        gains = tl.sum(t[:, :, None] * mixing, axis=1)  # [ROWS, R]
    else:
        # gains = t M^T:  gains[n, j] = sum_k t[n, k] M[j, k]
        gains = tl.sum(t[:, None, :] * mixing, axis=2)  # [ROWS, R]

    rank_at = rows.to(tl.int64)[:, None] * R + rank[None, :]  # [ROWS, R]
    tl.store(t_ptr + rank_at, t, mask=row_ok[:, None])
    tl.store(gains_ptr + rank[None, :] * N + rows[:, None], gains, mask=row_ok[:, None])
    if DEEP:
        # [gains_high | gains_low | gains_high | 0], beside [U_high | U_high | U_low | 0]
        high = gains.to(deep_ptr.dtype.element_ty)
        low = (gains - high.to(tl.float32)).to(deep_ptr.dtype.element_ty)
        deep = deep_ptr + rows.to(tl.int64)[:, None] * DEPTH + rank[None, :]
        tl.store(deep, high, mask=row_ok[:, None])
        tl.store(deep + R, low, mask=row_ok[:, None])
        tl.store(deep + 2 * R, high, mask=row_ok[:, None])
    if NEED_DV:
        # dM[j, k] = sum_n a[n, j] t[n, k]
        saved = tl.load(saved_ptr + rank_at, mask=row_ok[:, None], other=0.0)
        d_mixing = tl.sum(t[:, :, None] * saved[:, None, :], axis=0)  # [R, R]
        tl.store(kept_ptr + tl.program_id(0) * R * R + rank[:, None] * R + rank[None, :], d_mixing)


class Coefficients(NamedTuple):
    """What the pass writes for N rows."""

    t: Tensor  # [N, r] fp32: t or a
    gains: Tensor  # [r, N] fp32: a row for each j, as an epilogue reads them
    deep: Tensor  # [N, depth(r)] of x's type
    kept: Tensor  # [programs, r * r] fp32


def buffers(x: Tensor, rank: int) -> Coefficients:
    """For x [N, E]. `deep` is zero where the pass never writes: its last columns."""
    rows, fp32 = len(x), {"dtype": torch.float32, "device": x.device}
    return Coefficients(
        torch.empty(rows, rank, **fp32), torch.empty(rank, rows, **fp32), x.new_zeros(rows, depth(rank)),
        torch.empty(-(-rows // rows_of_program(rows)), rank * rank, **fp32),
    )  # fmt: skip


def depth(rank: int) -> int:
    """Columns of gains as a step of a product's depth: three of each, in a multiple of 16."""
    return 16 if 3 * rank <= 16 else 32


def rows_of_program(rows: int) -> int:
    return 16 if rows <= 4096 else 32 if rows <= 8192 else 64


def halves_of(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """[PAD, k] of a type: high and low halves of a factor [r, k] fp32."""
    rank, width = factor.shape
    high = factor.to(dtype)
    halves = factor.new_zeros(max(8, 2 * rank), width, dtype=dtype)
    halves[:rank], halves[rank : 2 * rank] = high, (factor - high.float()).to(dtype)
    return halves


def deep_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """[depth(r), n] of a type: what `deep` is multiplied by, from a factor [r, n] fp32."""
    rank, width = factor.shape
    high = factor.to(dtype)
    deep = factor.new_zeros(depth(rank), width, dtype=dtype)
    deep[:rank], deep[rank : 2 * rank], deep[2 * rank : 3 * rank] = high, high, (factor - high.float()).to(dtype)
    return deep


def coefficients(
    x: Tensor,
    halves: Tensor,
    v: Tensor,
    projection: Tensor,
    into: Coefficients,
    *,
    backward: bool,
    saved: Tensor | None = None,
    deep: bool = False,
    dependents: bool = False,
) -> None:
    """The pass, one launch.

    Args:
        x: [N, E], bf16 or fp16, last stride 1.
        halves: of the factor on x's side: B^T forward, U^T backward.
        saved: [N, r] fp32, t of the forward pass: dM is wanted.
        deep: write gains for a step of the depth as well.
        dependents: the next launch is a dependent one.
    """
    rank, block = into.t.shape[1], rows_of_program(len(x))
    if len(x) == 0:
        return
    coefficients_kernel[(len(into.kept),)](
        x, halves, v, projection, saved, into.t, into.gains, into.deep, into.kept,
        x.stride(0), len(x), x.shape[1], v.shape[-1],
        R=rank, PAD=len(halves), DEPTH=into.deep.shape[1], ROWS=block, BLOCK=BLOCK,
        BLOCK_U=block_u(len(projection), rank), LORA_XS=projection.dim() == 2, TRANSPOSED=backward, DEEP=deep,
        NEED_DV=saved is not None, STAGES=4 if block < 64 else 3, DEPENDENTS=dependents, num_warps=4, **NO_FUSION,
    )  # fmt: skip


def vector_grad(into: Coefficients, projection: Tensor, dv: Tensor) -> None:
    """dv_i = <P'_i, dM>, by the package's own kernel; dv [u] or [r, r] fp32 is written."""
    rank, numbers = into.t.shape[1], dv.numel()
    block = block_u(numbers, rank)
    reduce_dv_kernel[(-(-numbers // block) if projection.dim() == 3 else 1, 1)](
        into.kept, None, None, projection, dv, len(into.kept), numbers, 1, 1,
        R=rank, BLOCK_N=1024 // rank**2, BLOCK_U=block, LORA_XS=projection.dim() == 2, HAS_IDS=False, BY_ID=False,
        num_warps=4, **NO_FUSION,
    )  # fmt: skip


def on_16_bytes(*matrices: Tensor) -> bool:
    """Whether every row of all of them begins on 16 bytes, and has no gaps."""
    return all(
        m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 and m.stride(1) == 1 for m in matrices
    )


def block_u(numbers: int, rank: int) -> int:
    """Numbers contracted at a time: a power of two, at most 1024 entries of P'."""
    return min(1 << (numbers - 1).bit_length(), 1024 // rank**2)
