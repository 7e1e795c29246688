"""No contender is timed before its y, dx and dv agree with the float64 truth of the same adapter."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contenders import Contender, Problem

SAMPLED_ROWS = 32
CHUNK = 1 << 22  # elements of the weight held in float64 at a time

# Root-mean-square error relative to the truth. bf16 keeps 8 bits: an output rounded once is off by 1.7e-3, a chain that
# rounds each of its links a few times that, and a dv summed from rounded terms more. A missing update is off by 0.1 or
# more everywhere on the grid.
TOLERANCE = {torch.float32: {"y": 2e-5, "dx": 2e-5, "dv": 1e-4}, torch.bfloat16: {"y": 1e-2, "dx": 1e-2, "dv": 5e-2}}


class WrongResult(AssertionError):
    """A contender does not compute the adapter."""


@dataclass(frozen=True)
class Truth:
    """rows [k] sampled rows; y [k, out] and dx [k, in] of those rows; dv [u]; all float64."""

    rows: Tensor
    y: Tensor
    dx: Tensor
    dv: Tensor


@torch.no_grad()
def truth(problem: Problem) -> Truth:
    """W' = W + B R A in float64. y and dx are checked on rows spread over the batch, dv on all of them."""
    tokens, dtype = problem.case.tokens, torch.float64
    rows = torch.linspace(0, tokens - 1, min(tokens, SAMPLED_ROWS)).round().long()
    x, g = problem.x[0], problem.g[0]
    x_rows, g_rows = x[rows].to(dtype), g[rows].to(dtype)
    root = problem.sigma.to(dtype).sqrt()
    a = root[:, None] * problem.right.to(dtype).T  # A = sqrt(S) V^T  [r, in]
    b = problem.left.to(dtype) * root  # B = U sqrt(S)  [out, r]
    mixing = torch.einsum("i,ijk->jk", problem.v.to(dtype), problem.fixed.to(dtype))  # R
    # y = x (W + B R A)^T + bias,  dx = g (W + B R A)
    y = x_rows @ a.T @ mixing.T @ b.T
    if problem.bias is not None:
        y += problem.bias.to(dtype)
    dx = g_rows @ b @ mixing @ a
    step = max(1, CHUNK // problem.weight.shape[1])
    for start in range(0, problem.weight.shape[0], step):
        part = problem.weight[start : start + step].to(dtype)
        y[:, start : start + step] += x_rows @ part.T
        dx += g_rows[:, start : start + step] @ part
    # dR = (g B)^T (x A^T),  dv_i = <P_i, dR>
    d_mixing = torch.zeros_like(mixing)
    for start in range(0, tokens, 128):
        d_mixing += (g[start : start + 128].to(dtype) @ b).T @ (x[start : start + 128].to(dtype) @ a.T)
    return Truth(rows, y, dx, torch.einsum("ijk,jk->i", problem.fixed.to(dtype), d_mixing))


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.to(exact) - exact).norm() / exact.norm())


def errors(contender: Contender, problem: Problem, exact: Truth) -> dict[str, float]:
    """Relative errors of y, dx and, where a v is trained, dv."""
    x = problem.x.detach().requires_grad_()
    y = contender.forward(x)
    inputs = [x] if contender.v is None else [x, contender.v]
    dx, *dv = torch.autograd.grad(y, inputs, problem.g)
    found = {"y": y.detach()[0, exact.rows], "dx": dx[0, exact.rows]} | ({"dv": dv[0]} if dv else {})
    return {name: relative_error(tensor, getattr(exact, name)) for name, tensor in found.items()}


def check(contender: Contender, problem: Problem, exact: Truth) -> dict[str, float]:
    """The errors, or WrongResult where one is above its tolerance. Run it on contenders that train a v."""
    found = errors(contender, problem, exact)
    for name, limit in TOLERANCE[problem.case.dtype].items():
        value = found.get(name, float("inf"))
        if not value <= limit:
            raise WrongResult(
                f"{contender.name}, {problem.case}: {name} is off by {value:.2g}, expected {limit:.0e} at most"
            )
    return found
