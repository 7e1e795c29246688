"""Fused projections: one layer that holds several, such as qkv_proj (Phi-3), c_attn (GPT-2) or gate_up_proj.

By default such a layer is one matrix and gets one SVD. With TinyLoRAConfig.fused it is adapted part by part, W =
[W_1; ...; W_k] by output rows, each part with its own U_p, S_p and P_p and all with the layer's one v:

    W'_p = W_p + alpha U_p S_p (sum_i v_i P_{p,i}) S_p^-1 U_p^T W_p

which is the same update with a larger rank: basis [k r, out] whose rows of part p are zero outside its columns, and P'
block-diagonal. So forward, backward, merging, export and adapter banks are those of any layer. Rows of zeros fill the
rank up to one the kernels are specialised for.

Where that costs too much (linear/rules.py: by_parts) an adapted nn.Linear updates its output part by part in one op,
update_parts, from part_factors.

Files and factors hold the compact form: U_1^T, ..., U_k^T side by side, [r, out], and the singular values [k, r].
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import suffixes

SPECIALISED_RANKS = (1, 2, 4, 8)  # that kernels exist for


def part_sizes(
    fused: Mapping[str, int | Sequence[int]], order: Mapping[str, int], name: str, out_features: int
) -> tuple[int, ...] | None:
    """The output rows of each part of a module by the first entry that names it; None where none does.

    An entry names a module as target_modules does, and every expert of a stack by the stack's name. It gives the number
    of equal parts, or the size of each.

    Args:
        order: where each entry stands, so that none is looked at but those that match.

    Raises:
        ValueError: the sizes do not add up to the module's output features.
    """
    stack, _, number = name.rpartition(".")
    names = (name, stack) if number.isdigit() else (name,)
    if not fused:
        return None
    matching = [suffix for known in names for suffix in suffixes(known) if suffix in fused]
    if not matching:
        return None
    entry = fused[min(matching, key=order.__getitem__)]
    sizes = (out_features // entry,) * entry if isinstance(entry, int) else tuple(entry)
    if sum(sizes) != out_features:
        found = f"{entry} equal parts" if isinstance(entry, int) else f"parts of {list(entry)}, in all {sum(entry)}"
        raise ValueError(f"fused: {name} has {out_features} output features, which cannot be {found}")
    return sizes


def row_slices(sizes: Sequence[int]) -> list[slice]:
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def padded_rank(rank: int) -> int:
    """The rank itself, or the next one that the kernels are specialised for."""
    return next((specialised for specialised in SPECIALISED_RANKS if specialised >= rank), rank)


def block_basis(basis: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compact [r, out] -> [R, out]: rows p r to p r + r are U_p^T in the columns of part p, zero elsewhere."""
    rank = basis.shape[0]
    blocks = basis.new_zeros(padded_rank(len(sizes) * rank), basis.shape[1])
    for part, columns in enumerate(row_slices(sizes)):
        blocks[part * rank : (part + 1) * rank, columns] = basis[:, columns]
    return blocks


def compact_basis(blocks: Tensor, rank: int, sizes: Sequence[int]) -> Tensor:
    """[R, out] -> compact [r, out], undoing block_basis: in every column one part alone is not zero."""
    return blocks[: len(sizes) * rank].view(len(sizes), rank, -1).sum(0)


def block_projection(projections: Sequence[Tensor]) -> Tensor:
    """P' of the parts, each [u, r, r] -> [u, R, R], block-diagonal."""
    numbers, rank, _ = projections[0].shape
    total = padded_rank(len(projections) * rank)
    blocks = projections[0].new_zeros(numbers, total, total)
    for part, projection in enumerate(projections):
        block = slice(part * rank, (part + 1) * rank)
        blocks[:, block, block] = projection
    return blocks


class PartFactors(NamedTuple):
    """A fused layer's factors as update_parts takes them: nothing in them is zero for being another part's."""

    basis: Tensor  # [r, out] U_1^T, ..., U_k^T side by side
    projection: Tensor  # [k, u, r, r]
    ends: list[int]


def part_factors(blocks: Tensor, projection: Tensor, rank: int, sizes: Sequence[int]) -> PartFactors:
    """Of basis [R, out] and P' [u, R, R] as block_basis and block_projection arrange them."""
    corners = [slice(part * rank, (part + 1) * rank) for part in range(len(sizes))]
    own = torch.stack([projection[:, corner, corner] for corner in corners])
    return PartFactors(compact_basis(blocks, rank, sizes).contiguous(), own, list(accumulate(sizes)))


def block_coefficients(t: Tensor, total: int) -> Tensor:
    """t [k, N, r] of the parts -> [N, R], as they are beside block_basis."""
    flat = t.transpose(0, 1).flatten(1)  # [N, k r]
    return torch.nn.functional.pad(flat, (0, total - flat.shape[1]))
