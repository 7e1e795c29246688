"""The tests' decoder with its projections kept in the formats that quantisation libraries use."""
from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels.base.kinds import weight_matrix

GROUP = 32


def decoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_decoder(width=64, inner=96, bias=True).to(dtype)


def is_projection(module: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in TARGETS


def torchao_int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_projection)
    return model


def torchao_int4(model: nn.Module) -> nn.Module:
    """Four bits in groups; the layout that torchao runs, forward and backward, without a GPU."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    four_bits = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    quantize_(model, four_bits, filter_fn=is_projection)
    return model


def bitsandbytes_8bit(model: nn.Module) -> nn.Module:
    import bitsandbytes

    return with_layers(model, lambda base: bitsandbytes.nn.Linear8bitLt(
        base.in_features, base.out_features, has_fp16_weights=False,
    ))  # fmt: skip


def bitsandbytes_nf4(model: nn.Module) -> nn.Module:
    import bitsandbytes

    return with_layers(model, lambda base: bitsandbytes.nn.Linear4bit(
        base.in_features, base.out_features, quant_type="nf4", compute_dtype=base.weight.dtype,
    ))  # fmt: skip


def with_layers(model: nn.Module, make) -> nn.Module:
    """Every projection replaced by make(projection) with its values; bitsandbytes quantises as they are moved."""
    for name, module in list(model.named_modules()):
        if is_projection(module, name):
            layer = make(module)
            layer.load_state_dict(module.state_dict())
            set_submodule(model, name, layer.to("cpu"))
    return model


def gguf_q8_0(model: nn.Module) -> nn.Module:
    """transformers' layer on the blocks of a GGUF file, which it unpacks a chunk at a time where there is no kernel."""
    import gguf
    from transformers.integrations.gguf.utils import GgufLinear

    kind = gguf.GGMLQuantizationType.Q8_0
    for name, module in list(model.named_modules()):
        if is_projection(module, name):
            layer = GgufLinear(module.in_features, module.out_features, int(kind), bias=True)
            blocks = gguf.quants.quantize(module.weight.detach().float().numpy(), kind)
            layer.weight.data = torch.from_numpy(np.ascontiguousarray(blocks))
            layer.bias.data.copy_(module.bias.data)
            if name.endswith("o_proj"):  # some files store attention heads in another order
                layer.input_permutation = torch.arange(module.in_features).flip(0)
            set_submodule(model, name, layer)
    return model


def set_submodule(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


FORMATS = {
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "bitsandbytes int8": bitsandbytes_8bit,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "GGUF Q8_0": gguf_q8_0,
}
# bitsandbytes rounds the activations to 8 bits as well: its output is no exact function of the weight.
ROUNDS_ACTIVATIONS = ("bitsandbytes int8",)


def dequantised(model: nn.Module) -> nn.Module:
    """The same model with plain linear layers of the dequantised weights."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if is_projection(module, name):
            weight = weight_matrix(module).float().contiguous()
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data, layer.bias.data = weight, module.bias.detach().float().clone()
            set_submodule(plain, name, layer)
    return plain
