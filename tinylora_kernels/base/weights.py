"""The frozen tensors of a layer as plain floating tensors, whatever form an engine or a quantiser keeps them in."""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from .attributes import features_of, weight_of
from .quantised import dequantised_weight

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # for types alone: it brings 500 modules

PLAIN = (Tensor, nn.Parameter)
_ROWS = 256  # of a weight, widened at a time: a slab stays in the caches


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether it is a DTensor: a shard on this rank of a tensor that lives on many (FSDP2, tensor parallelism)."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def dense(tensor: Tensor) -> Tensor:
    """The whole tensor's values, plain: the tensor itself where it is plain already.

    A DTensor is gathered, which every rank of its mesh must take part in. Nothing is kept: matrices pass one at a time.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def stored_shape(module: nn.Module) -> torch.Size:
    """Shape of dense_weight, which it does not make."""
    weight = weight_of(module)
    return weight.shape if weight.is_floating_point() else torch.Size(features_of(module))


def dense_weight(module: nn.Module) -> Tensor:
    """A layer's weight as it is stored, whole and in floating point: gathered where it is sharded, dequantised where
    it is quantised, itself otherwise.
    """
    weight = weight_of(module)
    if is_sharded(weight):
        return dense(weight.detach())
    if type(weight) in PLAIN and weight.is_floating_point():
        return weight.detach()
    return dequantised_weight(module)


@torch.no_grad()
def bias_offset(basis: Tensor, bias: Tensor | None) -> Tensor | None:
    """c = b U [r] from U^T [r, out] and b [out], so that t = y U - c is the projection of W x alone; None without b.

    In float64, which autocast and the precision asked of matrix products leave alone.
    """
    if bias is None:
        return None
    return (basis.double() @ dense(bias).to(basis.device, torch.float64)).to(basis.dtype)


def slabs(rows: int) -> Iterator[slice]:
    """The rows of a matrix, some at a time, so that no whole copy of it in float64 is ever made."""
    return (slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS))


@torch.no_grad()
def right_factor(basis: Tensor, matrix: Tensor) -> Tensor:
    """B^T = U^T W [r, in] from U^T [r, out] and W [out, in], in the basis's dtype.

    In float64 like bias_offset, a slab of W at a time.
    """
    right = basis.new_zeros(basis.shape[0], matrix.shape[1], dtype=torch.float64)
    exact = basis.double()
    for rows in slabs(len(matrix)):
        right.addmm_(exact[:, rows], matrix[rows].double())
    return right.to(basis.dtype)
