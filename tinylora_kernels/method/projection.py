"""P', the projection of one module, and the first values of v: numbers from numbers.

On the output side of a frozen W = U S V^T the paper's update is W' = (I + U M U^T) W with

    M = sum_i v_i P'_i,    P'_i = alpha S P_i S^-1  ("left", the paper),    alpha S^1/2 P_i S^-1/2  ("sqrt", as PEFT)

An embedding looks rows of its table up: they get U S R V^T, which is y V R V^T on the output side. With V for the basis
M = alpha R^T where S stands on the left, alpha S^1/2 R^T S^-1/2 where it is split.

LoRA-XS (Balazy et al., arXiv 2405.17604) trains R itself, W' = W + U S R V^T: P' is the matrix of ratios s_j / s_k,
and M its product with R, entry by entry.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .parts import block_projection
from .philox import STREAM_VECTOR, philox_normal, philox_projection, philox_uniform

UNIFORM_BOUND = 0.01  # init="uniform": v ~ U(-0.01, 0.01)
NORMAL_DEVIATION = 1e-5  # init="normal": the sigma of LoRA-XS for R (section 3)


def scaled_projection(fixed: Tensor, sigma: Tensor, alpha: float, scaling: str, lookup: bool = False) -> Tensor:
    """P' from P: fixed [..., r, r], sigma [r] -> [..., r, r] float64.

    Args:
        scaling: "left" or "sqrt".
        lookup: the module is an embedding; P is transposed, and S drops out of "left".
    """
    fixed = (fixed.mT if lookup else fixed).double()
    if lookup and scaling == "left":
        return alpha * fixed
    sigma = sigma.double()
    s = sigma.sqrt() if scaling == "sqrt" else sigma
    # P'_jk = alpha s_j P_jk / s_k
    return alpha * s.unsqueeze(-1) * fixed / s


def random_projection(
    seed: int, index: int, numbers: int, sigma: Tensor, alpha: float, scaling: str, lookup: bool = False
) -> Tensor:
    """P' of one TinyLoRA module: its random P (philox.py) between its singular values.

    Args:
        index: of the module's P; a fused projection taken apart uses one index a part from here on.
        numbers: u.
        sigma: [r] singular values, or [k, r] of k parts.
        alpha, scaling, lookup: as in scaled_projection.

    Returns:
        [u, r, r] float64, or [u, R, R] for parts, block-diagonal.
    """
    if sigma.dim() == 2:
        parts = enumerate(sigma, start=index)
        return block_projection([random_projection(seed, i, numbers, s, alpha, scaling, lookup) for i, s in parts])
    fixed = philox_projection(seed, index, numbers, len(sigma))  # [u, r, r]
    return scaled_projection(fixed, sigma, alpha, scaling, lookup)


def ratio_projection(sigma: Tensor, alpha: float, scaling: str, lookup: bool = False) -> Tensor:
    """P' [r, r] of one LoRA-XS module: M = P' * R, entry by entry.

    Of an embedding v holds R^T: an elementwise product cannot transpose, and no function is lost.
    """
    return scaled_projection(torch.ones(len(sigma), len(sigma), device=sigma.device), sigma, alpha, scaling, lookup)


def uniform_vector(seed: int, group: int, numbers: int) -> Tensor:
    """v [u] of one tie group, drawn from U(-0.01, 0.01)."""
    return philox_uniform(seed, group, numbers, UNIFORM_BOUND)


def normal_vector(seed: int, group: int, numbers: int) -> Tensor:
    """R of one tie group, flattened to [r * r], drawn from N(0, 1e-5 squared)."""
    return NORMAL_DEVIATION * philox_normal(seed, group, 1, numbers, STREAM_VECTOR)[0]
