"""The factors of a model's modules, part by part where a module holds several projections (method/parts.py)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..base.kinds import weight_matrix
from ..method.parts import row_slices
from .svd import TOLERANCE, Factors, factorize_many, truncated_svd, why_not_of


def factorize_modules(
    bases: Mapping[str, nn.Module],
    rank: int,
    parts: Mapping[str, Sequence[int]],
    *,
    cache: bool = True,
    progress: bool = True,
    skip: bool = False,
) -> dict[str, Factors]:
    """The truncated SVD of every module's weight, part by part where it has parts; one weight at a time.

    Args:
        bases: module name -> frozen layer.
        rank: singular triplets of each weight, or of each part.
        parts: module name -> sizes of its parts.
        skip: leave out the modules whose weight, or one part of it, cannot carry the rank.

    Returns:
        name -> Factors, those of modules with parts in the compact form: basis [r, out], sigma [parts, r].
    """
    items, owners = [], {}
    for name, base in bases.items():
        for label, rows in _pieces(name, parts):
            items.append((label, lambda base=base, rows=rows: weight_matrix(base)[rows]))
            owners[label] = name
    pieces: dict[str, list[Factors]] = {}
    without_rank: list[str] | None = [] if skip else None
    for label, factors in factorize_many(items, rank, cache=cache, progress=progress, without_rank=without_rank):
        pieces.setdefault(owners[label], []).append(factors)
    for label in without_rank or []:
        pieces.pop(owners[label], None)
    return {name: _compact(found) if name in parts else found[0] for name, found in pieces.items()}


def factorize_matrix(
    name: str, matrix: Tensor, rank: int, parts: Mapping[str, Sequence[int]], *, cache: bool = True
) -> Factors:
    """factorize_modules for one module, whose weight [out, in] is at hand."""
    pieces = [truncated_svd(matrix[rows], rank, name=label, cache=cache) for label, rows in _pieces(name, parts)]
    return _compact(pieces) if name in parts else pieces[0]


def expect_factors_of(
    name: str, matrix: Tensor, factors: Factors, rank: int, parts: Mapping[str, Sequence[int]]
) -> None:
    """Check factors that somebody brought for a module whose weight [out, in] is at hand.

    Raises:
        ValueError: they are not, as exactly as their residual says, the leading triplets of this weight.
    """
    pieces, shape = _pieces(name, parts), (rank, len(matrix))
    if tuple(factors.basis.shape) != shape or factors.sigma.numel() != len(pieces) * rank:
        raise ValueError(
            f"{name}: factors: expected a basis {list(shape)} and {len(pieces) * rank} singular values, found "
            f"{list(factors.basis.shape)} and {factors.sigma.numel()}"
        )
    tol = max(TOLERANCE, factors.residual)
    for (label, rows), sigma in zip(pieces, factors.sigma.view(-1, rank), strict=True):
        reason = why_not_of(matrix[rows], Factors(factors.basis[:, rows], sigma, factors.degenerate, tol), tol)
        if reason is not None:
            raise ValueError(
                f"{label}: factors: expected those of its weight, to the residual {tol:g}, found others: {reason}; "
                "give those of this model, or none"
            )


def _pieces(name: str, parts: Mapping[str, Sequence[int]]) -> list[tuple[str, slice]]:
    """What messages call each piece of a module's weight, and its rows; a module without parts is one piece."""
    if name not in parts:
        return [(name, slice(None))]
    return [(f"{name}[{rows.start}:{rows.stop}]", rows) for rows in row_slices(parts[name])]


def _compact(pieces: list[Factors]) -> Factors:
    return Factors(
        torch.cat([piece.basis for piece in pieces], dim=1).contiguous(),  # [r, out]
        torch.stack([piece.sigma for piece in pieces]),  # [k, r]
        any(piece.degenerate for piece in pieces),
        max(piece.residual for piece in pieces),
    )
