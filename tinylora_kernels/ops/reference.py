"""The ops in plain PyTorch: any device, any dtype, the oracle of every test and benchmark.

Run it in float64 for the truth; it accumulates in float32 for lower activations, as the kernels do.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_arguments, check_input_grad
from .schema import accumulation_dtype


def contract(v: Tensor, projection: Tensor) -> Tensor:
    """M = sum_i v_i P'_i, or projection * v for LoRA-XS: v [u] -> [r, r];  v [n, u] -> [n, r, r]."""
    rank = projection.shape[-1]
    flat = v @ projection.flatten(1) if projection.dim() == 3 else v * projection.flatten()
    return flat.unflatten(-1, (rank, rank))


def contract_backward(d_mixing: Tensor, projection: Tensor) -> Tensor:
    """dv_i = <P'_i, dM>, or projection * dM for LoRA-XS: dM [r, r] -> [u];  dM [n, r, r] -> [n, u]."""
    flat = d_mixing.flatten(-2)
    return flat @ projection.flatten(1).T if projection.dim() == 3 else flat * projection.flatten()


def _row_ids(adapter_ids: Tensor, rows: int, adapters: int) -> Tensor:
    """One id a row, [N] int64; raises where an id is neither -1 nor in [0, K)."""
    if adapter_ids.numel() and not torch.compiler.is_compiling():
        low, high = int(adapter_ids.min()), int(adapter_ids.max())
        if low < -1 or high >= adapters:
            bad = low if low < -1 else high
            raise IndexError(f"adapter_ids: expected -1 or an id below {adapters}, found {bad}")
    repeats = rows // max(adapter_ids.numel(), 1)
    return adapter_ids.long().repeat_interleave(repeats)


def update(
    y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None, adapter_ids: Tensor | None
) -> Tensor:
    """y += ((y U - c) M^T) U^T in place; returns t = y U - c, [N, r]. Shapes and dtypes: see schema.py."""
    check_arguments("y", y, basis, v, projection, offset=offset, adapter_ids=adapter_ids)
    y0 = y.reshape(-1, basis.shape[1]).to(accumulation_dtype(y.dtype))  # [N, D]
    # t = y0 U - c
    t = y0 @ basis.T  # [N, r]
    if offset is not None:
        t = t - offset
    # y = y0 + (t M^T) U^T
    if adapter_ids is None:
        y1 = y0 + (t @ contract(v, projection).T) @ basis
    else:
        ids = _row_ids(adapter_ids, len(y0), len(v))  # [N]
        mixing = contract(v[ids.clamp(min=0)], projection)  # [N, r, r]
        z = (mixing @ t.unsqueeze(-1)).squeeze(-1)  # [N, r]
        y1 = torch.where((ids >= 0).unsqueeze(-1), y0 + z @ basis, y0)
    y.copy_(y1.view(y.shape))
    return t


def _mixed_gradient(g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, adapter_ids: Tensor | None):
    """(a, z): a = g U and z = a M, both [N, r]; z = 0 for rows to leave alone."""
    a = g.reshape(-1, basis.shape[1]).to(accumulation_dtype(g.dtype)) @ basis.T  # [N, r]
    if adapter_ids is None:
        return a, a @ contract(v, projection)
    ids = _row_ids(adapter_ids, len(a), len(v))  # [N]
    mixing = contract(v[ids.clamp(min=0)], projection)  # [N, r, r]
    return a, torch.where((ids >= 0).unsqueeze(-1), (a.unsqueeze(-2) @ mixing).squeeze(-2), 0)


def _vector_gradient(a: Tensor, t: Tensor | None, v: Tensor, projection: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """dv_i = <P'_i, a^T t>; empty without t."""
    if t is None:
        return v.new_empty(0)
    if adapter_ids is None:
        return contract_backward(a.T @ t, projection)
    ids = _row_ids(adapter_ids, len(a), len(v))  # [N]
    keep = ids >= 0
    outer = a[keep].unsqueeze(-1) * t[keep].unsqueeze(-2)  # dM of each row  [n, r, r]
    return torch.zeros_like(v).index_add_(0, ids[keep], contract_backward(outer, projection))


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
    a, z = _mixed_gradient(g, basis, v, projection, adapter_ids)
    g0 = g.new_empty(0)
    if need_input_grad:
        # g0 = g + z U^T
        g0 = (g.reshape(-1, basis.shape[1]).to(z.dtype) + z @ basis).to(g.dtype).view(g.shape)
    return g0, _vector_gradient(a, t, v, projection, adapter_ids)


def update_input_grad(
    dx: Tensor,
    right: Tensor,
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    """dx += ((g U) M) B^T in place; returns dv as update_backward does."""
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    check_input_grad(dx, right, g, basis)
    a, z = _mixed_gradient(g, basis, v, projection, adapter_ids)
    # dx = dx + z B^T
    dx.copy_((dx.reshape(-1, right.shape[1]).to(z.dtype) + z @ right).view(dx.shape))
    return _vector_gradient(a, t, v, projection, adapter_ids)


def why_not(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """The reference runs everywhere."""
    return None
