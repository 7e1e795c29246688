"""Fused projections: one layer that holds several, such as qkv_proj (Phi-3), c_attn (GPT-2) or gate_up_proj.

By default such a layer is one matrix and gets one SVD. With TinyLoRAConfig.fused it is adapted part by part, W =
[W_1; ...; W_k] by output rows, each part with its own U_p, S_p and P_p and all with the layer's one v:

    W'_p = W_p + alpha U_p S_p (sum_i v_i P_{p,i}) S_p^-1 U_p^T W_p

which is the same update with a larger rank: basis [k r, out] whose rows of part p are zero outside its columns, and P'
block-diagonal. So forward, backward, merging, export and adapter banks are those of any layer. Rows of zeros fill the
rank up to one the kernels are specialised for.

Files and factors hold the compact form: U_1^T, ..., U_k^T side by side, [r, out], and the singular values [k, r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .base_layers import matrix_shape, weight_matrix
from .experts import ExpertSlice
from .factors import Factors, factorize_many, truncated_svd

if TYPE_CHECKING:
    from .layer import TinyLoRALayer

SPECIALISED_RANKS = (1, 2, 4, 8)


def names_match(name: str, pattern: str) -> bool:
    """Whether a qualified name is the pattern or ends with it, at a dot."""
    return name == pattern or name.endswith("." + pattern)


def part_sizes(config, name: str, out_features: int) -> tuple[int, ...] | None:
    """The output rows of each part of a module by the config's first entry that names it; None where none does.

    An entry names a module as target_modules does, and every expert of a stack by the stack's name.

    Raises:
        ValueError: the sizes do not add up to the module's output features.
    """
    stack, _, number = name.rpartition(".")
    names = (name, stack) if number.isdigit() else (name,)
    for pattern, entry in (getattr(config, "fused", None) or {}).items():
        if not any(names_match(known, pattern) for known in names):
            continue
        sizes = (out_features // entry,) * entry if isinstance(entry, int) else entry
        if sum(sizes) != out_features:
            found = f"{entry} equal parts" if isinstance(entry, int) else f"parts of {list(entry)}, in all {sum(entry)}"
            raise ValueError(f"fused: {name} has {out_features} output features, which cannot be {found}")
        return sizes
    return None


def fused_parts(config, bases: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Module name -> the sizes of its parts, for the modules that the config takes apart.

    Raises:
        ValueError: an entry of the config names none of the modules, its sizes do not add up, or a module's rows are
            not in one piece for each part.
    """
    patterns = getattr(config, "fused", None)
    if not patterns:
        return {}
    parts = {name: part_sizes(config, name, matrix_shape(base)[0]) for name, base in bases.items()}
    parts = {name: sizes for name, sizes in parts.items() if sizes is not None}
    for name in parts:
        base = bases[name]
        if isinstance(base, nn.Embedding):
            raise ValueError(f"fused: {name} is an embedding, which holds no projections; leave it out of fused")
        if isinstance(base, ExpertSlice) and base.experts.has_gate and not base.experts.is_concatenated:
            raise ValueError(f"fused: {name} interleaves its gate and up rows, which are not parts one after the other")
    for pattern in patterns:
        names = [known for name in parts for known in (name, name.rpartition(".")[0])]
        if not any(names_match(name, pattern) for name in names):
            raise ValueError(f"fused: no adapted module matches {pattern}; it names modules as target_modules does")
    return parts


def factorize_modules(
    bases: Mapping[str, nn.Module],
    rank: int,
    parts: Mapping[str, Sequence[int]],
    *,
    cache: bool = True,
    progress: bool = True,
) -> dict[str, Factors]:
    """The truncated SVD of every module's weight, part by part where it has parts; one weight at a time.

    Args:
        bases: module name -> frozen layer.
        rank: singular triplets of each weight, or of each part.
        parts: module name -> sizes of its parts.

    Returns:
        name -> Factors, those of modules with parts in the compact form: basis [r, out], sigma [parts, r].
    """
    items, owners = [], []
    for name, base in bases.items():
        for label, rows in _pieces(name, parts):
            items.append((label, lambda base=base, rows=rows: weight_matrix(base)[rows]))
            owners.append(name)
    pieces: dict[str, list[Factors]] = {}
    for owner, (_, factors) in zip(owners, factorize_many(items, rank, cache=cache, progress=progress)):
        pieces.setdefault(owner, []).append(factors)
    return {name: _side_by_side(found) if name in parts else found[0] for name, found in pieces.items()}


def factorize_matrix(
    name: str, matrix: Tensor, rank: int, parts: Mapping[str, Sequence[int]], *, cache: bool = True
) -> Factors:
    """factorize_modules for one module, whose weight [out, in] is at hand."""
    pieces = [truncated_svd(matrix[rows], rank, name=label, cache=cache) for label, rows in _pieces(name, parts)]
    return _side_by_side(pieces) if name in parts else pieces[0]


def _pieces(name: str, parts: Mapping[str, Sequence[int]]) -> list[tuple[str, slice]]:
    """What messages call each piece of a module's weight, and its rows; a module without parts is one piece."""
    if name not in parts:
        return [(name, slice(None))]
    return [(f"{name}[{rows.start}:{rows.stop}]", rows) for rows in _row_slices(parts[name])]


def _row_slices(sizes: Sequence[int]) -> list[slice]:
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


def _side_by_side(pieces: list[Factors]) -> Factors:
    return Factors(
        torch.cat([piece.basis for piece in pieces], dim=1).contiguous(),  # [r, out]
        torch.stack([piece.sigma for piece in pieces]),  # [k, r]
        any(piece.degenerate for piece in pieces),
        max(piece.residual for piece in pieces),
    )


def padded_rank(rank: int) -> int:
    """The rank itself, or the next one that the kernels are specialised for."""
    return next((specialised for specialised in SPECIALISED_RANKS if specialised >= rank), rank)


def block_basis(basis: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compact [r, out] -> [R, out]: rows p r to p r + r are U_p^T in the columns of part p, zero elsewhere."""
    rank = basis.shape[0]
    blocks = basis.new_zeros(padded_rank(len(sizes) * rank), basis.shape[1])
    for part, columns in enumerate(_row_slices(sizes)):
        blocks[part * rank : (part + 1) * rank, columns] = basis[:, columns]
    return blocks


def compact_basis(blocks: Tensor, rank: int, sizes: Sequence[int]) -> Tensor:
    """[R, out] -> compact [r, out], undoing block_basis: in every column one part alone is not zero."""
    return blocks[: len(sizes) * rank].view(len(sizes), rank, -1).sum(0)


def singular_basis(layer: TinyLoRALayer) -> Tensor:
    """The layer's U^T [r, out] as files hold it, in the compact form if it has parts."""
    return compact_basis(layer.basis, layer.sigma.shape[1], layer.parts) if layer.parts else layer.basis


def block_projection(projections: Sequence[Tensor]) -> Tensor:
    """P' of the parts, each [u, r, r] -> [u, R, R], block-diagonal."""
    numbers, rank, _ = projections[0].shape
    total = padded_rank(len(projections) * rank)
    blocks = projections[0].new_zeros(numbers, total, total)
    for part, projection in enumerate(projections):
        block = slice(part * rank, (part + 1) * rank)
        blocks[:, block, block] = projection
    return blocks
