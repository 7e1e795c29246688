"""PEFT's factored updates, B R A, rewritten on the output side of the frozen layer.

PEFT keeps A = sqrt(S) V^T and B = U sqrt(S) and adds B R A x to W x. With the columns of B normalised, B = U n, and
A = G U^T W for some small G (S^-1/2 in exact arithmetic), so

    B R A x = U M U^T (W x),    M = n R G            n = diag of the column norms

holds for whatever A and B PEFT has stored, signs and rounding included, as far as the rows of A lie in those of U^T W.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative part of A outside the rows of U^T W. PEFT rounds A and B to the weight's dtype: about 0.002 in bfloat16.
FIT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class FitError(ValueError):
    """A and B are no factors of this weight; the message says by how much."""


@dataclass(frozen=True)
class OutputSide:
    """B R A = U M U^T W with M = n R G; ``basis`` U^T [r, out], ``norms`` n [r], ``gain`` G [r, r] or its diagonal."""

    basis: Tensor
    norms: Tensor
    gain: Tensor

    def projection(self, fixed: Tensor) -> Tensor:
        """P' of M = sum_i v_i P'_i from PEFT's P of R = sum_i v_i P_i; both [u, r, r]."""
        return self.norms.unsqueeze(-1) * fixed.to(self.norms) @ self.gain

    def ratios(self) -> Tensor:
        """[r, r]: M = ratios * R elementwise, for a gain that is diagonal."""
        return torch.outer(self.norms, self.gain)


@torch.no_grad()
def output_side(left: Tensor, right: Tensor, weight: Tensor, diagonal: bool = False) -> OutputSide:
    """Fit B = left [out, r] and A = right [r, in] to the frozen weight [out, in]; diagonal: G = diag(gain), gain [r].

    Raises:
        FitError: a column of B is zero, or A lies outside the rows of B^T W: they belong to another weight.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    left, right = left.to(weight.device, work), right.to(weight.device, work)
    norms = left.norm(dim=0)  # [r]
    if not bool((norms > 0).all()) or not bool(torch.isfinite(norms).all()):
        raise FitError("the rank is above that of the weight (a singular value is 0): lower r")
    basis = (left / norms).T.contiguous()  # U^T [r, out]
    rows = (basis @ weight.to(work)).double()  # Y = U^T W [r, in]
    target = right.double()
    if diagonal:
        gain = (target * rows).sum(1) / rows.square().sum(1)  # [r]
        fitted = gain.unsqueeze(1) * rows
    else:
        # G = A Y^+
        gain = torch.linalg.lstsq(rows.T, target.T).solution.T  # [r, r]
        fitted = gain @ rows
    distance = float((target - fitted).norm() / target.norm())
    limit = FIT_TOLERANCE[weight.dtype]
    if not distance <= limit:
        raise FitError(
            f"its factors do not belong to this weight: {distance:.2g} of A lies outside the rows of B^T W, "
            f"expected at most {limit:g}; load the base model that the adapter was made for"
        )
    return OutputSide(basis, norms, gain.to(norms))
