"""Where factors beside a layer are not its update, though they are exact: PEFT puts a layer of its own in the place of
one, and runs A and B on what comes in.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ..base.attributes import weight_of
from ..base.kinds import CONVOLUTION, EMBEDDING, LINEAR, kind_of
from ..base.names import named_modules
from ..base.trial import copy_with, input_shape, is_known, tolerance, undisturbed
from ..layers.layer import TinyLoRALayer

MERGED_INSTEAD = (
    "write merged weights with merged_weights(model) or integrations.transformers.save_pretrained(model, directory, "
    "merged=True)"
)


def expect_beside(model: nn.Module, modules: Mapping[str, nn.Module], way_out: str = MERGED_INSTEAD) -> None:
    """Raises ValueError, by name, where what PEFT would compute of a module and its factors is not the adapted module.

    Args:
        modules: adapted or about to be, by name.
    """
    places: dict[nn.Module, dict[tuple[nn.Module, str], str]] = {module: {} for module in modules.values()}
    seen: dict[str, nn.Module] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        seen[name] = module
        if module in places:  # of a shared block both names are one place
            above, _, own = name.rpartition(".")
            places[module].setdefault((seen[above], own), name)
    for name, module in modules.items():
        if len(places[module]) > 1:
            first, other = list(places[module].values())[:2]
            raise ValueError(f"{first} and {other} are one layer, of which PEFT would adapt {first} alone; {way_out}")
        reason = _why_not_beside(module.base if isinstance(module, TinyLoRALayer) else module)
        if reason:
            raise ValueError(f"{name}: {reason}; {way_out}")


def _why_not_beside(base: nn.Module) -> str | None:
    """Why PEFT's layer around a base, with factors of an update beside it, would not compute the update; one line."""
    kind, weight, cls = kind_of(base), weight_of(base), type(base)
    if kind is CONVOLUTION:
        convolution = cast(_ConvNd, base)
        lost = [f"dilation={convolution.dilation}"] if set(convolution.dilation) != {1} else []
        lost += [f"padding_mode={convolution.padding_mode!r}"] if convolution.padding_mode != "zeros" else []
        if lost:
            return f"PEFT's lora_A is a convolution without {' and '.join(lost)}, and its update would be another one"
    if is_known(base):
        return None
    with undisturbed(base):
        off = _off(base, weight)
    if off is None and kind is not EMBEDDING or off is not None and off <= tolerance(weight):
        return None
    found = "is called with other inputs" if off is None else f"with factors beside it is {off:.1g} off its update"
    found = "has no output that PEFT's factors could be added to" if off == math.inf else found
    known = next(above.__name__ for above in cls.__mro__ if above.__module__.startswith("torch.nn."))
    return f"the forward of {cls.__name__} is not that of nn.{known}, and {found}"


def _off(base: nn.Module, weight: Tensor) -> float | None:
    """How far f(x; W) and what PEFT adds are from f(x; W + B A), by norm, for A and B of rank one; infinite where they
    have no one shape, None where the forward cannot be tried.
    """
    kind, generator = kind_of(base), torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(weight)

    matrix = kind.matrix(weight.detach())  # [out, in]
    out = len(matrix)
    left = random(out, 1)
    right = random(1, out) / out**0.5 @ matrix
    if kind is EMBEDDING:
        x = (len(weight) - 1 - torch.arange(8, device=weight.device).view(2, 4)) % len(weight)
    else:
        x = random(1, *input_shape(base))
    updated = kind.stored(torch.addmm(matrix, left, right), weight.shape)
    try:
        before, after = (type(base).forward(copy_with(base, each, None), x) for each in (weight.detach(), updated))
    except Exception:
        return None
    try:
        added = _added(base, x, left, right)
        return float((before + added - after).double().norm() / after.double().norm().clamp(min=1e-300))
    except Exception:  # PEFT's layer cannot be made, or its output is none of these
        return math.inf


def _added(base: nn.Module, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """What PEFT's LoRA adds to the output of a base on x, for B = left [out, r] and A = right [r, in]."""
    kind = kind_of(base)
    if kind is LINEAR:
        return F.linear(F.linear(x, right), left)
    if kind is EMBEDDING:
        looked_up = F.embedding(x, right.T) @ left.T
        scale = getattr(base, "embed_scale", None)
        return looked_up if scale is None else looked_up * scale
    own, make = cast(_ConvNd, base), cast(Any, type(base))  # PEFT's are of the base's own class
    kernel, one = weight_of(base).shape[2:], (1,) * (weight_of(base).dim() - 2)
    first = make(own.in_channels, len(right), own.kernel_size, own.stride, own.padding, bias=False)
    second = make(len(right), len(left), one, one, bias=False)
    first.weight, second.weight = (
        nn.Parameter(matrix.reshape(*matrix.shape[:1], -1, *size), requires_grad=False)
        for matrix, size in ((right, kernel), (left, one))
    )
    return cast(Tensor, second(first(x)))
