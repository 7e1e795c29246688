"""The ops as sums and pointwise operations alone, which torch.compile fuses into what stands around them.

A kernel of ours is opaque to Inductor: y is written by the product, read and written by the update, and read again by
what consumes it. Taken apart, t is one more sum over rows that the consumer reads anyway, and the term is arithmetic in
its loop. Every line here is there for that: each t_j is a sum of its own, or its consumer could not follow it in one
kernel; r is unrolled; there is no product of matrices, which would be a call. Sums are made in one order, so that the
same bits come out at every run.

Run without torch.compile this is correct and slow.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_arguments
from .reference import check_ids

MOST_UNROLLED = 8  # ranks


def updated(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y0 + b + (t M^T) U^T, t = y0 U - c [N, r]), y0 left as it is. Shapes and dtypes: see schema.py."""
    check_arguments("y", y, basis, v, projection, offset=offset, bias=bias, adapter_ids=adapter_ids)
    mixing, on = _mixing(v, projection, adapter_ids)
    wide = _by_id(y, adapter_ids).to(basis.dtype)  # [..., D]
    # t = y0 U - c over the finite elements of y0
    t = _coefficients(torch.where(torch.isfinite(wide), wide, 0), basis)
    if offset is not None:
        t = [t_j - c_j for t_j, c_j in zip(t, offset.unbind(), strict=True)]
    # y = y0 + b + (t M^T) U^T
    wide = _add_term(wide if bias is None else wide + bias.to(basis.dtype), t, mixing, on, basis)
    return wide.to(y.dtype).view(y.shape), torch.cat(t, -1).view(-1, len(t))


def update(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    """The same in place; returns t. What is written into y would have to be kept for the backward pass of the rest."""
    changed, t = updated(y, basis, v, projection, offset, bias, adapter_ids)
    y.copy_(changed)
    return t


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
    wide = _by_id(g, adapter_ids).to(basis.dtype)  # [..., D]
    a = _coefficients(wide, basis)
    g0, dv = g.new_empty(0), v.new_empty(0)
    if need_input_grad:
        # g0 = g + (a M) U^T
        mixing, on = _mixing(v, projection, adapter_ids)
        g0 = _add_term(wide, a, mixing.mT, on, basis).to(g.dtype).view(g.shape)
    if t is not None:
        dv = _vector_gradient(a, t, len(v), projection, adapter_ids)
    return g0, dv


def why_not(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """None where the ranks can be unrolled."""
    return None if rank <= MOST_UNROLLED else f"rank {rank}: it is unrolled, up to rank {MOST_UNROLLED}"


def _by_id(rows: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """[..., D] as it is, or [B, N / B, D] where ids [B] say which vector the rows use."""
    if adapter_ids is None:
        return rows
    count = len(adapter_ids)
    return rows.reshape(count, rows.numel() // (max(count, 1) * rows.shape[-1]), rows.shape[-1])


def _coefficients(wide: Tensor, basis: Tensor) -> list[Tensor]:
    """The columns of wide U: [..., D] -> r of [..., 1]."""
    return [(wide * u).sum(-1, keepdim=True) for u in basis.unbind()]


def _add_term(wide: Tensor, coefficients: list[Tensor], mixing: Tensor, on: Tensor | None, basis: Tensor) -> Tensor:
    """wide + (coefficients M^T) U^T; where ``on`` is not, wide."""
    terms = []
    for i, u in enumerate(basis.unbind()):
        gain = _sum([mixing[..., i, j, None, None] * c for j, c in enumerate(coefficients)])
        terms.append((gain if on is None else torch.where(on, gain, 0)) * u)
    return wide + _sum(terms)  # the terms first: a rounding each of y is more than one of the sum


def _sum(tensors: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _mixing(v: Tensor, projection: Tensor, adapter_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """M = sum_i v_i P'_i [r, r]; or M [B, r, r] of the id of each group of rows, and whether it has one [B, 1, 1]."""
    if adapter_ids is None:
        return _contract(v, projection), None
    check_ids(adapter_ids, len(v))
    on = adapter_ids != -1
    # gather, since it alone takes no index from the end: another negative id is an error in generated code too
    rows = torch.where(on, adapter_ids, 0).long().unsqueeze(-1).expand(-1, v.shape[1])
    return _contract(v.gather(0, rows), projection), on[:, None, None]


def _contract(v: Tensor, projection: Tensor) -> Tensor:
    """M = sum_i v_i P'_i, or projection * v for LoRA-XS: [..., u] -> [..., r, r]."""
    mixing: Tensor
    if projection.dim() == 2:
        mixing = projection * v.unflatten(-1, projection.shape)
    else:
        mixing = (v[..., None, None] * projection).sum(-3)
    return mixing


def _vector_gradient(
    a: Sequence[Tensor], t: Tensor, adapters: int, projection: Tensor, adapter_ids: Tensor | None
) -> Tensor:
    """dM = a^T t and dv_i = <P'_i, dM>, or projection * dM; for K adapters [K, u]."""
    # dM over all rows [r, r], or over those of each id [B, r, r]
    columns = [t_j.view(a[0].shape) for t_j in t.unbind(-1)]
    over = None if adapter_ids is None else (-2, -1)
    entries = [(a_i * t_j).sum(over) for a_i in a for t_j in columns]
    d_mixing: Tensor = torch.stack(entries, -1).unflatten(-1, projection.shape[-2:])
    if adapter_ids is not None:
        # an adapter's is the sum over its ids: [K, B, r, r] -> [K, r, r]
        is_of = adapter_ids == torch.arange(adapters, device=a[0].device).unsqueeze(-1)  # [K, B]
        d_mixing = torch.where(is_of[..., None, None], d_mixing, 0).sum(1)
    if projection.dim() == 2:
        return (projection * d_mixing).flatten(-2)
    return (projection * d_mixing.unsqueeze(-3)).sum((-2, -1))
