"""The frozen tensors of a layer as plain floating tensors, whatever form an engine or a quantiser keeps them in."""
from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from .attributes import features_of, weight_of
from .quantised import dequantised_weight

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # for types alone: it brings 500 modules

PLAIN = (Tensor, nn.Parameter)
_ROWS = 1024  # of a weight, widened at a time


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


def bias_offset(basis: Tensor, bias: Tensor | None) -> Tensor | None:
    """c = b U [r] from U^T [r, out] and b [out], so that t = y U - c is that of W x alone; None without a bias."""
    return None if bias is None else basis @ dense(bias.detach()).to(basis)


@torch.no_grad()
def right_factor(basis: Tensor, matrix: Tensor) -> Tensor:
    """B^T = U^T W [r, in] from U^T [r, out] and W [out, in], in the basis's dtype, without a whole W in it."""
    right = basis.new_zeros(basis.shape[0], matrix.shape[1])
    for columns, rows in zip(basis.split(_ROWS, dim=1), matrix.split(_ROWS), strict=True):
        right.addmm_(columns, rows.to(basis.dtype))
    return right
