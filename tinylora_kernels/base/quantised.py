"""Quantised weights, one row of FORMATS for each way a library keeps one: how its numbers are read back.

An adapter sits on the output, so it never touches the integers: the frozen layer runs its own kernel, and the matrix is
dequantised, one at a time, only where the factors, a fingerprint or an export are made from it.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .attributes import features_of, weight_of

if TYPE_CHECKING:
    from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit
    from transformers.integrations.gguf import GgufLinear

PROBE_ROWS = 1024  # unit vectors at a time


@dataclass(frozen=True)
class Format:
    """One quantised format.

    Attributes:
        name: of the library and its layers, in messages.
        matches: whether a module's weight is in it; the module has a weight that is not a plain floating tensor.
        dequantise: the module -> its weight as stored, floating point, a fresh tensor.
        adds_bias: the forward is a product of the weight and, where the module has a bias, that added to it.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    dequantise: Callable[[nn.Module], Tensor]
    adds_bias: bool = True


def _bitsandbytes_4bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = cast("Params4bit", module.weight)
    return dequantize_4bit(weight.data, weight.quant_state)


def _bitsandbytes_8bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = cast("Int8Params", module.weight)
    if weight.is_floating_point():  # not moved to its device yet, where it is quantised
        return weight.data
    # the first forward hands them over
    scales = weight.SCB if weight.SCB is not None else cast("Linear8bitLt", module).state.SCB
    return int8_vectorwise_dequant(weight.data, scales)


def _gguf(module: nn.Module) -> Tensor:
    from transformers.integrations.gguf.utils import dequantize_blocks

    layer = cast("GgufLinear", module)
    blocks = layer.weight.detach()  # [out, bytes of a row] uint8
    weight = dequantize_blocks(blocks, layer.ggml_type, layer.out_features, layer.in_features, torch.float32)
    if layer.input_permutation is None:
        return weight
    # y = x[:, p] W^T = x W'^T  with  W'[:, p] = W
    return torch.empty_like(weight).index_copy_(1, layer.input_permutation, weight)


def _dequantises_itself(module: nn.Module) -> bool:
    return type(weight_of(module)).dequantize is not Tensor.dequantize


@torch.no_grad()
def probed_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of any linear layer as its outputs for the unit vectors, where no other way leads to it."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    (_, width), device = features_of(module), weight_of(module).device
    dtype = tensors[0].dtype if tensors else torch.float32
    at_zero = module(torch.zeros(1, width, dtype=dtype, device=device))  # the bias
    columns = []
    for first in range(0, width, PROBE_ROWS):
        unit = torch.zeros(min(PROBE_ROWS, width - first), width, dtype=dtype, device=device)
        unit.diagonal(first).fill_(1)
        columns.append(module(unit) - at_zero)  # row i is W[:, first + i]
    return torch.cat(columns).T


FORMATS = (
    Format("bitsandbytes, 4 bits", lambda m: getattr(m.weight, "quant_state", None) is not None, _bitsandbytes_4bit),
    Format("bitsandbytes, 8 bits", lambda m: type(m.weight).__name__ == "Int8Params", _bitsandbytes_8bit),
    Format("GGUF blocks", lambda m: hasattr(m, "ggml_type"), _gguf),
    Format("torchao", _dequantises_itself, lambda m: weight_of(m).detach().dequantize()),
    Format("linear layers", lambda m: hasattr(m, "in_features"), probed_weight, adds_bias=False),
)


def _format_of(module: nn.Module) -> Format | None:
    return next((candidate for candidate in FORMATS if candidate.matches(module)), None)


def without_bias(module: nn.Module) -> nn.Module | None:
    """The quantised layer without its bias, on the same tensors; None of a format whose forward may do other things.

    Beside a large bias the output, rounded to 16 bits, says little of the product that the update is made of.
    """
    found = _format_of(module)
    if found is None or not found.adds_bias:
        return None
    bare = object.__new__(type(module))  # a copy would be asked of the library's own __deepcopy__ and __getstate__
    bare.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, "bias": None}}
    return bare


@torch.no_grad()
def dequantised_weight(module: nn.Module) -> Tensor:
    """The weight of a quantised layer as it is stored, in floating point; a fresh tensor.

    Raises:
        ValueError: no format fits; one line that says what was found.
    """
    found = _format_of(module)
    if found is not None:
        return found.dequantise(module)
    raise ValueError(
        f"{type(module).__name__}: expected a floating weight or one of {', '.join(f.name for f in FORMATS)}, found "
        f"{type(module.weight).__name__} of {weight_of(module).dtype}; leave it out of target_modules"
    )
