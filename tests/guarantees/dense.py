"""The truth for one adapted layer: the dense W + U M U^T W in float64; and the inputs of the guarantees."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tinylora_kernels import TinyLoRAConfig, TinyLoRALayer, apply_tiny_lora
from tinylora_kernels.ops import reference

NUMBERS = 3


def _conv1d(out: int, wide: int) -> nn.Module:
    layer = Conv1D(out, wide)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias)
    return layer


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16, bias=False),
    "linear with a bias": lambda: nn.Linear(24, 16),
    "wide linear": lambda: nn.Linear(40, 8),  # another order of the products
    "large linear": lambda: nn.Linear(96, 128),  # more than a witness looks at one by one
    "conv1d": lambda: _conv1d(16, 24),
    "conv2d": lambda: nn.Conv2d(5, 12, 3, padding=1),
    "embedding": lambda: nn.Embedding(24, 16),
}
PRODUCTS = ["linear", "linear with a bias", "wide linear", "large linear", "conv1d"]


def adapted(base: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> TinyLoRALayer:
    """One adapted layer of this kind, with v that matters."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"layer": BASES[base]().to(dtype)})
    options = {"frozen_rank": 2, "trainable_dim": NUMBERS, "seed": 7, "cache": False} | options
    layer = apply_tiny_lora(model, TinyLoRAConfig(target_modules=["layer"], **options), progress=False)["layer"]
    with torch.no_grad():
        layer.v.copy_(torch.randn(layer.v.shape, generator=torch.Generator().manual_seed(seed)))
    return layer


def example(layer: TinyLoRALayer, rows: int = 6, seed: int = 1) -> Tensor:
    """An input of the layer's kind, in the dtype of its weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = layer.base.weight
    if isinstance(layer.base, nn.Embedding):
        return torch.randint(0, weight.shape[0], (2, rows), generator=generator)
    shape = (2, weight.shape[1], 4, 5) if weight.dim() == 4 else (2, rows, layer.weight_matrix().shape[1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.dtype)


def dense_output(layer: TinyLoRALayer, x: Tensor, v: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """(W + U M U^T W) x + b in float64, by the base's own function; differentiable in x, v and bias."""
    base, basis = layer.base, layer.basis.double()
    v = (layer.v.detach() if v is None else v).double()
    stored = base.weight.detach().double()
    weight = layer.weight_matrix().detach().double()  # [out, in]
    # W' = W + U M^T U^T W, of rows that are multiplied from the left
    weight = weight + basis.T @ reference.contract(v, layer.projection.double()) @ basis @ weight
    if bias is None and getattr(base, "bias", None) is not None:
        bias = base.bias.detach()
    bias = None if bias is None else bias.double()
    if isinstance(base, nn.Embedding):
        return nn.functional.embedding(x, weight.T)
    if stored.dim() == 4:
        return nn.functional.conv2d(x.double(), weight.view_as(stored), bias, padding=base.padding)
    return nn.functional.linear(x.double(), weight, bias)


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest deviation relative to the largest number of the truth."""
    return float((found.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max().clamp(min=1e-300))
