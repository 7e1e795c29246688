"""What the attributes of a frozen layer are: torch types each one of a module `Tensor | Module`; the casts are here."""
from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def weight_of(module: nn.Module) -> Tensor:
    """The layer's own weight, in whatever form it is kept."""
    return cast(Tensor, module.weight)


def bias_of(module: nn.Module) -> Tensor | None:
    """The layer's own bias; None of a layer without one, or of a kind that has none."""
    return brought(module, "bias", getattr(module, "bias", None))


def brought(module: nn.Module, name: str, tensor: Tensor | None) -> Tensor | None:
    """The module's tensor of this name; where accelerate has offloaded it, what its hook brings for a forward pass."""
    if tensor is None or not tensor.is_meta:
        return tensor
    hook = getattr(module, "_hf_hook", None)
    maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,))]
    return next((numbers[name] for numbers in maps if numbers is not None), tensor)


def computes_weight(module: nn.Module) -> bool:
    """Whether the layer's weight is computed from other tensors (weight_norm, pruning), and not one that it holds."""
    return "weight" in vars(module) or "weight" in getattr(module, "parametrizations", ())


def features_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) as the layer says."""
    return cast(int, module.out_features), cast(int, module.in_features)
