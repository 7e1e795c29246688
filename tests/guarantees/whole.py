"""What an adapter is, in float64 and without the package's layers: W' = W + U M U^T W in a copy of the bare model."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tinylora_kernels import remove_adapter
from tinylora_kernels.model.adapted import adapted_layers


@torch.no_grad()
def dense_model(model: nn.Module, vectors: Tensor) -> nn.Module:
    """The bare model in float64 with one adapter's update in its weights; vectors [groups, u]."""
    twin = copy.deepcopy(model).double()
    changed = {}
    for name, layer in adapted_layers(twin).items():
        basis, v = layer.basis.double(), vectors[layer.group].double()
        projection = layer.projection.double()
        by_numbers = projection.dim() == 3
        mixing = torch.einsum("u,uij->ij", v, projection) if by_numbers else projection * v.view_as(projection)
        weight = layer.base.weight
        matrix = weight.T if isinstance(layer.base, nn.Embedding) else weight.flatten(1)  # [out, in]
        matrix = matrix + basis.T @ mixing @ basis @ matrix
        changed[name] = (matrix.T if isinstance(layer.base, nn.Embedding) else matrix).reshape(weight.shape)
    bare = remove_adapter(twin)
    for name, weight in changed.items():
        bare.get_submodule(name).weight.copy_(weight)
    return bare
