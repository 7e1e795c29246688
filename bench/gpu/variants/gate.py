"""What a variant must pass before it is timed: float64 on sampled rows, the last among them, every element written.

A result is rounded once: its error is what one rounding of the truth leaves. A product that is rounded before the term
is added leaves up to 1.4 times as much, cutting off twice. Coefficients are fp32 sums of a factor kept in two halves.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..products import Side

ROUNDED = 1.15  # times the error of rounding the truth itself
FEWEST = 0.2  # times eps, about what rounding many numbers leaves: of a few it may be nothing
COEFFICIENTS = 1e-4  # two halves keep 16 bits of a factor; without the low one it is 3e-4 in fp16, 2e-3 in bf16
GRADIENT = 1e-3  # dv: rows may cancel
MOST = 200  # rows that are compared


class Wrong(ValueError):
    """A result that is not the float64 one."""


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def sampled_rows(rows: int, device: torch.device) -> Tensor:
    return torch.linspace(0, rows - 1, min(rows, MOST), device=device).round().long()


def truth(side: Side, i: int, at: Tensor, *, term: bool = True) -> tuple[Tensor, Tensor]:
    """(d, t) of some rows in float64, from buffers i."""
    x, m = side.x[i][at].double(), torch.tensordot(side.v.double(), side.projection.double(), 1)
    t = x @ side.near[i].double().T  # [n, r]
    d = x @ side.matrix(i).double()  # [n, n_out]
    return (d + t @ (m if side.backward else m.T) @ side.far[i].double() if term else d), t


def check(side: Side, run, *, term: bool = True, t: bool = True, dv: bool = False, i: int = 0) -> dict[str, float]:
    """The errors of d, t and dv after run(i); Wrong where one is too large.

    Args:
        term: d has its term; else it is the bare product.
        t, dv: run makes side.t[i], side.dv.
    """
    side.d[i].fill_(torch.nan)
    side.t[i].fill_(torch.nan)
    run(i)
    at = sampled_rows(side.rows, side.d[i].device)
    d_true, t_true = truth(side, i, at, term=term)
    found = {"d": error(side.d[i][at], d_true)}
    kind = side.d[i].dtype
    limits = {"d": max(ROUNDED * error(d_true.to(kind), d_true), FEWEST * torch.finfo(kind).eps)}
    if t:
        found["t"], limits["t"] = error(side.t[i][at], t_true), COEFFICIENTS
    if dv:
        a = side.x[i].double() @ side.near[i].double().T
        dv_true = torch.einsum("ijk,jk->i", side.projection.double(), a.T @ side.saved.double())
        found["dv"], limits["dv"] = error(side.dv, dv_true), GRADIENT
    for name, value in found.items():
        if not value <= limits[name]:  # a NaN is not
            raise Wrong(f"{name}: error {value:.2e}, allowed {limits[name]:.2e}")
    if not side.d[i].isfinite().all():
        raise Wrong("d: not every element was written")
    return found
