"""The update as the paper writes it, on the dense weight and in float64: the truth for every kind of layer."""
from __future__ import annotations

import torch
from torch import Tensor

from tinylora_kernels import TinyLoRALayer
from tinylora_kernels.base.kinds import as_stored, kind_of
from tinylora_kernels.method.philox import philox_projection
from tinylora_kernels.ops.reference import contract


def delta_weight(layer: TinyLoRALayer) -> Tensor:
    """W' - W = U M U^T W, [out, in], in the basis's dtype."""
    v, basis = layer.v.detach().to(layer.projection), layer.basis
    return basis.T @ (contract(v, layer.projection) @ (basis @ layer.weight_matrix().to(basis)))


def paper_weight(layer: TinyLoRALayer, v: Tensor) -> Tensor:
    """W + alpha U S (sum_i v_i P_i) V^T in the shape of the frozen weight, differentiable in v [u] float64.

    U comes from the layer, V^T = S^-1 U^T W from the weight; for an embedding V comes from the layer and U S = W V. A
    fused projection is the same part by part. Only scaling="left", where S stands between U and R.
    """
    assert layer.config.scaling == "left"
    weight = layer.weight_matrix().double()  # [out, in]
    parts = layer.parts or (len(weight),)
    columns = layer.singular_basis().double().split(parts, dim=1)  # each [r, part]
    sigmas = layer.sigma.double().view(len(parts), -1)  # [parts, r]
    updated = []
    for part, (W, U, sigma) in enumerate(zip(weight.split(parts), columns, sigmas, strict=True)):
        P = philox_projection(layer.config.seed, layer.projection_index + part, len(v), len(sigma)).double()
        R = torch.einsum("i,ijk->jk", v, P)
        if kind_of(layer.base).lookup:
            rows, V = W.T, U.T  # the weight as it is stored [rows, out], its right singular vectors [out, r]
            updated.append((rows + layer.config.alpha * (rows @ V) @ R @ V.T).T)
        else:
            S, Vt = torch.diag(sigma), (U @ W) / sigma.unsqueeze(1)
            updated.append(W + layer.config.alpha * U.T @ S @ R @ Vt)
    return as_stored(layer.base, torch.cat(updated))
