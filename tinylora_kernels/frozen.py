"""The frozen tensors of a layer as plain floating matrices, whatever form an engine keeps them in."""
from __future__ import annotations

from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor: a shard on this rank of a tensor that lives on many (FSDP2, tensor parallelism)."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def dense(tensor: Tensor) -> Tensor:
    """The whole tensor's values, plain: the tensor itself where it is plain already.

    A DTensor is gathered, which every rank of its mesh must take part in. Nothing is kept: matrices pass one at a time.
    """
    if is_sharded(tensor):
        tensor = tensor.full_tensor()
    return tensor
