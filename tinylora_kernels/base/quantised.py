"""Quantised weights, one row of FORMATS for each way a library keeps one: how its numbers are read back.

An adapter sits on the output, so it never touches the integers: the frozen layer runs its own kernel, and the matrix is
dequantised, one at a time, only where the factors, a fingerprint or an export are made from it.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PROBE_ROWS = 1024  # unit vectors at a time


@dataclass(frozen=True)
class Format:
    """One quantised format.

    Attributes:
        name: of the library and its layers, in messages.
        matches: whether a module's weight is in it; the module has a weight that is not a plain floating tensor.
        dequantise: the module -> its weight as stored, floating point, a fresh tensor.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    dequantise: Callable[[nn.Module], Tensor]


def _bitsandbytes_4bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _bitsandbytes_8bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = module.weight
    if weight.is_floating_point():  # not moved to its device yet, where it is quantised
        return weight.data
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # the first forward hands them over
    return int8_vectorwise_dequant(weight.data, scales)


def _gguf(module: nn.Module) -> Tensor:
    from transformers.integrations.gguf.utils import dequantize_blocks

    blocks = module.weight.detach()  # [out, bytes of a row] uint8
    weight = dequantize_blocks(blocks, module.ggml_type, module.out_features, module.in_features, torch.float32)
    if module.input_permutation is None:
        return weight
    # y = x[:, p] W^T = x W'^T  with  W'[:, p] = W
    return torch.empty_like(weight).index_copy_(1, module.input_permutation, weight)


def _dequantises_itself(module: nn.Module) -> bool:
    return type(module.weight).dequantize is not Tensor.dequantize


FORMATS = (
    Format("bitsandbytes, 4 bits", lambda m: getattr(m.weight, "quant_state", None) is not None, _bitsandbytes_4bit),
    Format("bitsandbytes, 8 bits", lambda m: type(m.weight).__name__ == "Int8Params", _bitsandbytes_8bit),
    Format("GGUF blocks", lambda m: hasattr(m, "ggml_type"), _gguf),
    Format("torchao", _dequantises_itself, lambda m: m.weight.detach().dequantize()),
    Format("linear layers", lambda m: hasattr(m, "in_features"), lambda m: probed_weight(m)),
)


@torch.no_grad()
def dequantised_weight(module: nn.Module) -> Tensor:
    """The weight of a quantised layer as it is stored, in floating point; a fresh tensor.

    Raises:
        ValueError: no format fits; one line that says what was found.
    """
    for candidate in FORMATS:
        if candidate.matches(module):
            return candidate.dequantise(module)
    raise ValueError(
        f"{type(module).__name__}: expected a floating weight or one of {', '.join(f.name for f in FORMATS)}, found "
        f"{type(module.weight).__name__} of {module.weight.dtype}; leave it out of target_modules"
    )


@torch.no_grad()
def probed_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of any linear layer as its outputs for the unit vectors, where no other way leads to it."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    device = module.weight.device
    dtype = tensors[0].dtype if tensors else torch.float32
    at_zero = module(torch.zeros(1, module.in_features, dtype=dtype, device=device))  # the bias
    columns = []
    for first in range(0, module.in_features, PROBE_ROWS):
        unit = torch.zeros(min(PROBE_ROWS, module.in_features - first), module.in_features, dtype=dtype, device=device)
        unit.diagonal(first).fill_(1)
        columns.append(module(unit) - at_zero)  # row i is W[:, first + i]
    return torch.cat(columns).T
