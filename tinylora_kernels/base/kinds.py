"""What an adapter can sit on: one row of KINDS for each kind of frozen layer.

The update needs to know three things of a layer: its weight as a matrix W [out, in], whose left singular vectors are
the basis; where the `out` features lie in its output; and how a matrix [out, in] is written back into its weight, for
merging. Everything else (SVD, files, merging, export, per-row adapters) works on the matrix.

A new kind of layer is a new row of KINDS. A new way to hold the numbers of a weight goes into weights.py (sharded)
or quantised.py, which every reader of a weight comes through.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .attributes import weight_of
from .experts import ExpertSlice, why_not_experts
from .trial import why_not_linear, why_not_lookup
from .weights import PLAIN, dense_weight, stored_shape

# Read through an adapted layer to its base, as the code of models expects of the layer that stood there.
FORWARDED = frozenset((
    "weight", "bias", "in_features", "out_features", "nf", "nx",
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "num_embeddings", "embedding_dim", "padding_idx", "embed_scale",
))  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of layer whose output is linear in its weight.

    Attributes:
        name: of such layers, in messages.
        matches: whether a module is one.
        why_not: the reason why this one cannot be adapted, one line with the way out, or None.
        matrix: the weight as it is stored -> W [out, in]; a view wherever its strides allow one.
        stored: (W [out, in], shape of the weight) -> the weight as it is stored; undoes `matrix`.
        product: (module, x, weight as stored) -> x W^T, what such a layer computes before its bias; None where it has
            none. Of a convolution the products of W and every patch.
        is_product: whether the forward of a module is that product and the bias, and nothing else.
        fresh: types whose forward returns a tensor nobody else holds, from a node that saves no output: the update may
            be written into it.
        channels_first: the `out` features are the channels of [B, C, ...], not the last dimension.
        lookup: the output is a row of the stored weight [rows, out], not a product with it. The paper's U S R V^T
            on those rows is y (V R V^T): on the output side V is the basis and M = R^T, without S.
        by_default: adapted where target_modules is None.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    matrix: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, torch.Size], Tensor]
    product: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    is_product: Callable[[nn.Module], bool] = lambda module: False
    fresh: tuple[type, ...] = ()
    why_not: Callable[[nn.Module], str | None] = lambda module: None
    channels_first: bool = False
    lookup: bool = False
    by_default: bool = False


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as [in, out]. Known by name: no import."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_gguf(module: nn.Module) -> bool:
    """transformers' GgufLinear: no nn.Linear, since its weight stays in the blocks of the file."""
    return type(module).__name__ == "GgufLinear" and hasattr(module, "ggml_type")


def _linear_product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def _conv1d_product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _convolution_product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return cast(nn.Conv1d | nn.Conv2d | nn.Conv3d, module)._conv_forward(x, weight, None)


def _as_is(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix


def _transposed(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix.T.contiguous()


def _why_not_convolution(module: nn.Module) -> str | None:
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution stores its weight as [in, out, ...], no matrix [out, in]; leave it out"
    groups = cast(_ConvNd, module).groups
    if groups > 1:
        return (
            f"its {groups} groups are {groups} separate weights, and one basis over all output channels "
            "would mix them; leave it out of target_modules"
        )
    return why_not_linear(module)


def _why_not_embedding(module: nn.Module) -> str | None:
    embedding = cast(nn.Embedding, module)
    if embedding.max_norm is not None:
        return f"max_norm={embedding.max_norm} rescales its rows as they are read: no frozen weight; set max_norm=None"
    if embedding.sparse:
        return "sparse=True asks for sparse gradients of a weight that is frozen here; set sparse=False"
    return why_not_lookup(module)


def _why_not_expert(module: nn.Module) -> str | None:
    return why_not_experts(cast(ExpertSlice, module).experts)


LINEAR = Kind(
    "linear layers", lambda module: isinstance(module, nn.Linear) or _is_gguf(module), lambda weight: weight, _as_is,
    product=_linear_product, is_product=lambda module: type(module) is nn.Linear, fresh=(nn.Linear,),
    why_not=why_not_linear, by_default=True,
)  # fmt: skip
CONV1D = Kind(
    "linear layers", _is_conv1d, lambda weight: weight.T, _transposed,
    product=_conv1d_product, is_product=_is_conv1d, by_default=True,
)  # fmt: skip
CONVOLUTION = Kind(
    # [out, in, k...] -> [out, in * k...]
    "convolutions", lambda module: isinstance(module, _ConvNd), lambda weight: weight.flatten(1),
    lambda matrix, shape: matrix.reshape(shape),
    product=_convolution_product, is_product=lambda module: type(module) in _CONVOLUTIONS,
    fresh=_CONVOLUTIONS, why_not=_why_not_convolution, channels_first=True,
)  # fmt: skip
EMBEDDING = Kind(
    # [rows, out] -> [out, rows]
    "embeddings", lambda module: isinstance(module, nn.Embedding), lambda weight: weight.T, _transposed,
    fresh=(nn.Embedding,), why_not=_why_not_embedding, lookup=True,
)  # fmt: skip
EXPERT = Kind(
    "experts", lambda module: isinstance(module, ExpertSlice) and not module.transposed, lambda weight: weight, _as_is,
    why_not=_why_not_expert,
)  # fmt: skip
EXPERT_TRANSPOSED = Kind(
    "experts", lambda module: isinstance(module, ExpertSlice) and module.transposed, lambda weight: weight.T,
    _transposed, why_not=_why_not_expert,
)  # fmt: skip

KINDS = (LINEAR, CONV1D, CONVOLUTION, EMBEDDING, EXPERT, EXPERT_TRANSPOSED)
# No kind that target_modules finds; a TinyLoRALayer made by hand takes it where it has a weight [out, in].
OTHER = Kind("other modules", lambda module: True, lambda weight: weight, _as_is)


def kind_of(module: nn.Module) -> Kind:
    """The row of KINDS that a module belongs to; OTHER where it belongs to none."""
    return next((kind for kind in KINDS if kind.matches(module)), OTHER)


def why_not_weight(module: nn.Module) -> str | None:
    """Why no matrix can be read from the module's weight, one line; None where its form is one that is known."""
    weight = weight_of(module)
    if isinstance(weight, nn.UninitializedParameter):
        return f"the weight of {type(module).__name__} has no shape yet; call the model once, then adapt it"
    if type(weight) in PLAIN and (weight.layout is not torch.strided or weight.is_complex()):
        found = weight.dtype if weight.is_complex() else weight.layout
        return f"expected a dense weight of real numbers, found {found}; leave it out by exclude_modules"
    return None


def is_linear_like(module: nn.Module) -> bool:
    """Whether the module is a linear layer, however its weight is stored: what target_modules=None adapts."""
    return kind_of(module).by_default


def has_fresh_output(module: nn.Module) -> bool:
    """Whether the update may be written into what the module returns."""
    kind = kind_of(module)
    return kind is CONV1D or type(module) in kind.fresh


def weight_matrix(module: nn.Module) -> Tensor:
    """The frozen weight as [out, in]; a view without a copy, but for a convolution's in channels_last."""
    return kind_of(module).matrix(dense_weight(module))


def matrix_shape(module: nn.Module) -> torch.Size:
    """[out, in] of weight_matrix, which it does not make."""
    return kind_of(module).matrix(torch.empty(stored_shape(module), device="meta")).shape


def as_stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [out, in] in the shape of the module's own weight, contiguous."""
    return kind_of(module).stored(matrix, weight_of(module).shape)


@torch.no_grad()
def write_weight(module: nn.Module, matrix: Tensor) -> None:
    """Copy a matrix [out, in] into the module's weight, whatever its layout in memory."""
    weight = weight_of(module)
    with torch.inference_mode() if weight.is_inference() else torch.no_grad():  # of a model loaded in that mode
        weight.copy_(as_stored(module, matrix))
