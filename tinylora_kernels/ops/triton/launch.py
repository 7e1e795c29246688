"""The Triton backend: the ops on any GPU that Triton compiles for, NVIDIA (sm_75 to sm_120) and AMD (gfx942, gfx1100).

One launch forward, at most two backward, on the caller's current stream. dv is a two-stage fp32 sum in a fixed order,
without float atomics, so it is the same bits on every run. Launch parameters come from a table; nothing is tuned at run
time. Triton itself is imported by the first call, never by importing this module.

An adapter id outside [-1, K) stops the kernel (a device-side assertion: the launch fails, nothing is returned); it
cannot be raised here without waiting for the GPU.
"""
from __future__ import annotations

import enum
import functools
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.words import one_line
from ...method.parts import SPECIALISED_RANKS
from ..checks import check_arguments, check_input_grad, check_low_rank, check_parts, check_refresh_right
from ..schema import RIGHT_COLUMNS, RIGHT_SAMPLES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_PROGRAMS = 2048  # bounds the first stage's partial sums and the number of times M is contracted
INT32_LIMIT = 2**31


class LaunchParameters(NamedTuple):
    """How one program covers its rows: a tile of rows x block columns, held by this many threads."""

    rows: int
    block: int
    threads: int


# block: (rows, then threads for r <= 2, r = 4 and r = 8; 0: too long, r rows of the basis beside it would spill).
# 32 fp32 numbers a thread where they fit: at 16, ptxas aims at 64 registers and for r = 4 and 8 spills a pair on some
# targets (sm_80, sm_100).
_TILES = {
    64: (32, 64, 128, 128),
    128: (16, 64, 128, 128),
    256: (8, 64, 128, 128),
    512: (4, 64, 128, 128),
    1024: (2, 64, 128, 128),
    2048: (1, 64, 128, 128),
    4096: (1, 128, 128, 512),
    8192: (1, 256, 256, 0),
    16384: (1, 1024, 0, 0),
}


# Rows of the other side of the layer are streamed: a block of columns of several rows at a time.
STREAMING = {
    1: LaunchParameters(4, 1024, 128),
    2: LaunchParameters(4, 1024, 128),
    4: LaunchParameters(2, 1024, 128),
    8: LaunchParameters(2, 1024, 128),
}


def launch_parameters(features: int, rank: int) -> LaunchParameters:
    """The smallest tile of the table that holds a row; the streaming block where none does."""
    column = {1: 1, 2: 1, 4: 2, 8: 3}[rank]
    tiles = (block for block, tile in _TILES.items() if block >= features and tile[column])
    block = next(tiles, 8192 if rank < 8 else 1024)
    return LaunchParameters(_TILES[block][0], block, _TILES[block][column])


def is_installed() -> bool:
    """Whether there is a Triton to import; it is not imported."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # imported already, and made by something else than an import
        return True


def why_not(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """None where this backend can serve the request, else the reason in one line, with the fix."""
    if device_type not in _device_types():
        return f"triton kernels run on GPU tensors, not on {device_type!r}: move the tensors to a GPU"
    if dtype not in DTYPES:
        return f"triton kernels take float32, bfloat16 and float16, not {dtype}: use the reference backend"
    if rank not in SPECIALISED_RANKS:
        return f"triton kernels are built for rank 1, 2, 4 and 8, not {rank}: use the reference backend"
    if problem := _import_problem():
        return f"triton cannot be imported ({problem}): pip install triton"
    return None


@functools.cache
def _import_problem() -> str | None:
    """Why a Triton that may be there is of no use, in one line."""
    try:
        import triton
        import triton.language

        return None if callable(triton.jit) else "triton.jit is no function"
    except (Exception, SystemExit) as error:  # whatever a broken installation raises
        return one_line(error) or type(error).__name__


def update(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    """y <- y0 + b + (t M^T) U^T in place; returns t = y0 U - c, [N, r]. Shapes and dtypes: see schema.py."""
    check_arguments("y", y, basis, v, projection, offset=offset, bias=bias, adapter_ids=adapter_ids)
    _check_supported("y", y, basis, v, projection, offset, adapter_ids)
    flat = _as_rows("y", y)  # [N, D]
    if len(flat) > 1 and flat.stride(0) < flat.shape[1]:
        raise ValueError(f"y: rows overlap in memory (row stride {flat.stride(0)} < {flat.shape[1]}): clone it first")
    side = Side(flat, basis)
    return _forward(side, side, Onto.SOURCE, v, projection, offset, bias, adapter_ids)


def update_backward(
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(g0, dv): g0 = g + ((g U) M) U^T and dv_i = <P'_i, (g U)^T t>; what is not asked for comes back empty."""
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    _check_supported("g", g, basis, v, projection, t, adapter_ids)
    flat = _as_rows("g", g)  # [N, D]
    g0 = torch.empty(g.shape, dtype=g.dtype, device=g.device) if need_input_grad else g.new_empty(0)
    target = Side(g0.view(flat.shape), basis) if need_input_grad else None
    return g0, _backward(Side(flat, basis), target, Onto.SOURCE, v, projection, t, adapter_ids)


def low_rank(
    x: Tensor,
    right: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, t): t = x B, [N, r], and y = b + (t M^T) U^T, which x W^T is to be added to."""
    check_arguments("x", x, right, v, projection, adapter_ids=adapter_ids, basis_name="right")
    check_low_rank(x, right, basis, bias)
    _check_supported("x", x, right, v, projection, basis, adapter_ids)
    flat = _as_rows("x", x)  # [N, E]
    y = x.new_empty((*x.shape[:-1], basis.shape[1]))
    target = Side(y.view(len(flat), basis.shape[1]), basis)
    return y, _forward(Side(flat, right), target, Onto.NOTHING, v, projection, None, bias, adapter_ids)


def update_input_grad(
    dx: Tensor,
    right: Tensor,
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
    add: bool,
) -> Tensor:
    """dx = ((g U) M) B^T in place, or dx += the same with add; returns dv as update_backward does."""
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    check_input_grad(dx, right, g, basis)
    _check_supported("g", g, basis, v, projection, t, right, adapter_ids)
    source, target = Side(_as_rows("g", g), basis), Side(_as_rows("dx", dx), right)
    return _backward(source, target, Onto.TARGET if add else Onto.NOTHING, v, projection, t, adapter_ids)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """The device of x as the current one. Code that torch.compile traces sees to that itself, and cannot trace this."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def refresh_right(right: Tensor, samples: Tensor, weight: Tensor, basis: Tensor, force: bool) -> None:
    """B^T [r, E] of the weight as it is, where a sample of it says that it is another or `force` does."""
    check_refresh_right(right, samples, weight, basis)
    _check_supported("weight", weight, basis, basis, right, samples)
    if not weight.numel():
        return
    with _on_device_of(weight):
        _device_code().refresh_right_kernel[(len(samples),)](
            weight, basis, right, samples, *weight.shape, *weight.stride(),
            R=len(basis), ROWS=8, COLUMNS=RIGHT_COLUMNS, SAMPLES=RIGHT_SAMPLES, FORCE=force, **_options(128, None),
        )  # fmt: skip


class Onto(enum.IntEnum):
    """What the term of rank r is added to."""

    SOURCE = 0  # the rows that were read
    TARGET = 1  # those that are written
    NOTHING = 2


class Side(NamedTuple):
    """Rows on one side of the frozen layer, and the singular factor of that side."""

    rows: Tensor  # [N, features]
    factor: Tensor  # [r, features]: U^T or B^T


def _forward(
    source: Side,
    target: Side,
    onto: Onto,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    """t [N, r], and the target written."""
    t = v.new_empty(len(source.rows), len(source.factor))
    if len(t):
        _launch_rows(source, target, onto, v, projection, offset, bias, adapter_ids, None, t)
    return t


def _backward(
    source: Side,
    target: Side | None,
    onto: Onto,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    """dv, empty without t, and the target written."""
    rows, rank = len(source.rows), len(source.factor)
    if rows == 0 or (t is None and target is None):
        return v.new_empty(0) if t is None else torch.zeros_like(v)
    if adapter_ids is None:
        _, programs = _split(rows, _tile(source, onto).rows)
        kept = v.new_empty(programs, rank * rank) if t is not None else None  # dM of each program
        _launch_rows(source, target, onto, v, projection, None, None, None, t, kept, transposed=True)
        dv, grid = torch.empty_like(v) if t is not None else v.new_empty(0), 1
    else:
        kept = v.new_empty(rows, rank) if t is not None else None  # a = g U
        _launch_rows(source, target, onto, v, projection, None, None, adapter_ids, None, kept, transposed=True)
        by_id = len(adapter_ids) < len(v)
        dv = v.new_empty(0) if t is None else torch.zeros_like(v) if by_id else torch.empty_like(v)
        grid = min(len(adapter_ids), len(v))
    if t is None or kept is None:
        return dv
    numbers = v.shape[-1]
    block_u = _block_u(numbers, rank)
    with _on_device_of(v):
        _device_code().reduce_dv_kernel[(-(-numbers // block_u) if projection.dim() == 3 else 1, grid)](
            kept, t, adapter_ids, projection, dv,
            len(kept), numbers, _rows_per_id(rows, adapter_ids), len(v),
            R=rank, BLOCK_N=1024 // rank**2, BLOCK_U=block_u, LORA_XS=projection.dim() == 2,
            HAS_IDS=adapter_ids is not None, BY_ID=adapter_ids is not None and len(adapter_ids) < len(v),
            **_options(128, None),
        )  # fmt: skip
    return dv


def _launch_rows(
    source: Side,
    target: Side | None,
    onto: Onto,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
    t: Tensor | None,
    kept: Tensor | None,
    *,
    transposed: bool = False,
) -> None:
    x, out = source.rows, source.rows if target is None else target.rows
    rows, rank = len(x), len(source.factor)
    tile = _tile(source, onto)
    tiles_per_program, programs = _split(rows, tile.rows)
    written, factor = (None, None) if target is None else target
    with _on_device_of(x):
        _device_code().rows_kernel[(programs,)](
            x, written, source.factor, factor, v, projection, offset, bias, adapter_ids, t, kept,
            x.stride(0), out.stride(0), rows, x.shape[1], out.shape[1], v.shape[-1], tiles_per_program,
            _rows_per_id(rows, adapter_ids), len(v),
            R=rank, ROWS=tile.rows, BLOCK=tile.block, BLOCK_U=_block_u(len(projection), rank),
            SINGLE=onto is Onto.SOURCE and x.shape[1] <= tile.block, ONTO=int(onto),
            TRANSPOSED=transposed, ONLY_FINITE=not transposed and onto is Onto.SOURCE,
            IN_PLACE=target is source or onto is Onto.TARGET, LORA_XS=projection.dim() == 2,
            HAS_OFFSET=offset is not None, HAS_BIAS=bias is not None, HAS_IDS=adapter_ids is not None,
            WRITES=target is not None, KEEPS=kept is not None and t is None, NEED_DV=t is not None,
            **_options(tile.threads, adapter_ids),
        )  # fmt: skip


def _tile(source: Side, onto: Onto) -> LaunchParameters:
    rank, features = source.factor.shape
    if onto is Onto.SOURCE:
        return launch_parameters(features, rank)
    return STREAMING[rank]


def update_parts(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    right: Tensor | None,
    adapter_ids: Tensor | None,
    ends: Sequence[int],
    groups: Sequence[int],
) -> Tensor:
    """update of each part's columns of y in place; returns t [k, N, r]."""
    check_parts(
        "y", y, basis, v, projection, ends, groups, offset=offset, bias=bias, x=x, right=right, adapter_ids=adapter_ids
    )
    _check_supported("y", y, basis, v, projection, offset, bias, right, adapter_ids)
    flat = _as_rows("y", y)  # [N, D]
    if len(flat) > 1 and flat.stride(0) < flat.shape[1]:
        raise ValueError(f"y: rows overlap in memory (row stride {flat.stride(0)} < {flat.shape[1]}): clone it first")
    t = v.new_empty(len(ends), len(flat), len(basis))
    if len(flat) == 0:
        return t
    inputs = None if x is None else _as_rows("x", x)  # [N, E]
    x_stride, x_features = (0, 0) if inputs is None else (inputs.stride(0), inputs.shape[1])
    launch = _part_parameters(ends, len(basis))
    tiles_per_program, programs = _split(len(flat), launch.rows)
    with _on_device_of(y):
        _part_code().update_parts_kernel[(programs, len(ends))](
            flat, basis, v, projection, offset, bias, inputs, right, adapter_ids, t,
            (0, *ends[:-1]), tuple(ends), tuple(groups),
            flat.stride(0), x_stride, len(flat), flat.shape[1], x_features, v.shape[-1], tiles_per_program,
            _rows_per_id(len(flat), adapter_ids), _adapters(v, adapter_ids),
            **_part_constants(launch, ends, projection, adapter_ids),
            HAS_OFFSET=offset is not None, HAS_BIAS=bias is not None, HAS_X=x is not None,
            **_options(launch.threads, adapter_ids),
        )  # fmt: skip
    return t


def update_parts_backward(
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
    ends: Sequence[int],
    groups: Sequence[int],
    need_input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(g0, dv) of update_parts, dv summed over the parts of a tie group; what is not asked for comes back empty."""
    check_parts("g", g, basis, v, projection, ends, groups, t=t, adapter_ids=adapter_ids)
    _check_supported("g", g, basis, v, projection, t, adapter_ids)
    flat = _as_rows("g", g)  # [N, D]
    g0 = torch.empty(g.shape, dtype=g.dtype, device=g.device) if need_input_grad else g.new_empty(0)
    dv = torch.empty_like(v) if t is not None else v.new_empty(0)
    if len(flat) == 0:
        dv.zero_()
    elif need_input_grad or t is not None:
        _launch_parts_backward(flat, basis, v, projection, t, adapter_ids, ends, groups, g0, dv)
    return g0, dv


def _launch_parts_backward(
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
    ends: Sequence[int],
    groups: Sequence[int],
    g0: Tensor,
    dv: Tensor,
) -> None:
    rank, parts = len(basis), len(ends)
    launch = _part_parameters(ends, rank)
    tiles_per_program, programs = _split(len(g), launch.rows)
    stages = programs if adapter_ids is None else len(g)
    width = rank * rank if adapter_ids is None else rank
    scratch = v.new_empty(parts, stages, width) if t is not None else None
    rows_per_id, adapters = _rows_per_id(len(g), adapter_ids), _adapters(v, adapter_ids)
    with _on_device_of(g):
        _part_code().update_parts_backward_kernel[(programs, parts)](
            g, g0, basis, v, projection, t, adapter_ids, scratch,
            (0, *ends[:-1]), tuple(ends), tuple(groups),
            g.stride(0), len(g), g.shape[1], v.shape[-1], tiles_per_program, rows_per_id, adapters,
            **_part_constants(launch, ends, projection, adapter_ids),
            NEED_G0=g0.numel() > 0, NEED_DV=t is not None,
            **_options(launch.threads, adapter_ids),
        )  # fmt: skip
        if t is None:
            return
        block_u = _block_u(v.shape[-1], rank)
        blocks = -(-v.shape[-1] // block_u) if projection.dim() == 4 else 1
        _part_code().reduce_dv_parts_kernel[(blocks, adapters, len(v))](
            scratch, t, adapter_ids, projection, dv, tuple(groups),
            stages, v.shape[-1], rows_per_id, adapters,
            PARTS=parts, R=rank, BLOCK_N=1024 // rank**2, BLOCK_U=block_u,
            LORA_XS=projection.dim() == 3, HAS_IDS=adapter_ids is not None,
            **_options(128, adapter_ids),
        )  # fmt: skip


def _widest(ends: Sequence[int]) -> int:
    return max(end - begin for begin, end in zip([0, *ends], ends, strict=False))


def _part_parameters(ends: Sequence[int], rank: int) -> LaunchParameters:
    """The tile for the widest part: that of a row, but where the bounds beside 32 numbers a thread spill (sm_75)."""
    tile = launch_parameters(_widest(ends), rank)
    return tile._replace(threads=512) if tile.block == 8192 and tile.threads == 256 else tile


def _part_constants(
    launch: LaunchParameters, ends: Sequence[int], projection: Tensor, adapter_ids: Tensor | None
) -> dict[str, Any]:
    rank = projection.shape[-1]
    return dict(
        PARTS=len(ends),
        R=rank,
        ROWS=launch.rows,
        BLOCK_D=launch.block,
        BLOCK_U=_block_u(projection.shape[1], rank),
        SINGLE=_widest(ends) <= launch.block,
        LORA_XS=projection.dim() == 3,
        HAS_IDS=adapter_ids is not None,
    )


def _adapters(v: Tensor, adapter_ids: Tensor | None) -> int:
    return 1 if adapter_ids is None else v.shape[1]


def _split(rows: int, rows_per_tile: int) -> tuple[int, int]:
    """(tiles per program, programs): every tile once, at most MAX_PROGRAMS programs."""
    tiles = -(-rows // rows_per_tile)
    tiles_per_program = -(-tiles // MAX_PROGRAMS)
    return tiles_per_program, -(-tiles // tiles_per_program)


def _block_u(numbers: int, rank: int) -> int:
    """Numbers contracted at a time: a power of two, at most 1024 entries of P'."""
    return min(1 << (numbers - 1).bit_length(), 1024 // rank**2)


def _rows_per_id(rows: int, adapter_ids: Tensor | None) -> int:
    return 1 if adapter_ids is None else rows // len(adapter_ids)


def _options(threads: int, adapter_ids: Tensor | None) -> dict[str, int | bool]:
    """Compiler options, none left to a default that differs between Triton releases.

    No fusion: kernels.py says why. debug turns the adapter-id assertion on; sanitize_overflow would add one to
    every integer operation.
    """
    return dict(
        num_warps=threads // _warp_size(),
        num_stages=1,
        enable_fp_fusion=False,
        debug=adapter_ids is not None,
        sanitize_overflow=False,
    )


def _check_supported(
    name: str, activation: Tensor, basis: Tensor, v: Tensor, projection: Tensor, *others: Tensor | None
) -> None:
    """What the schema allows and these kernels do not, said before any launch."""
    reason = why_not(activation.device.type, activation.dtype, len(basis))
    if reason is not None:
        raise RuntimeError(f"{name}: {reason}")
    for tensor in (basis, v, projection, *others):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"expected contiguous parameters beside {name}, found strides {tensor.stride()}: copy it")
    for entries, of in ((basis.numel(), "basis"), (projection.numel(), "projection")):
        if entries >= INT32_LIMIT:
            raise ValueError(f"{of}: expected fewer than 2**31 numbers, found {entries}: use the reference backend")


def _as_rows(name: str, activation: Tensor) -> Tensor:
    """[..., D] as [N, D] without a copy."""
    features = activation.shape[-1]
    if features > 1 and activation.stride(-1) != 1:
        raise ValueError(f"{name}: expected last stride 1, found {activation.stride(-1)}: call contiguous() first")
    try:
        return activation.view(activation.numel() // features, features)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected leading dimensions with one row stride, found shape {tuple(activation.shape)} "
            f"strides {activation.stride()}: call contiguous() first"
        ) from None


@functools.cache
def _device_code() -> ModuleType:
    from . import kernels

    return kernels


@functools.cache
def _part_code() -> ModuleType:
    from . import part_kernels

    return part_kernels


def _device_types() -> tuple[str, ...]:
    """GPUs ("cuda" is also PyTorch's name for AMD's); under Triton's interpreter the CPU as well."""
    return ("cuda", "cpu") if _interpreted() else ("cuda",)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _warp_size() -> int:
    if _interpreted():
        return 32
    import triton

    size: int = triton.runtime.driver.active.get_current_target().warp_size
    return size
