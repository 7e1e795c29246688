"""Merging the update into the frozen weights: for rollout engines and for export.

W' = W + U M U^T W is formed in float64, some rows of a module at a time, and rounded once: the same bits whatever
autocast and the precision of products are around the call.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..base.attributes import weight_of
from ..base.experts import ExpertSlice
from ..base.kinds import as_stored, write_weight
from ..base.names import inside, named_modules
from ..base.weights import right_factor, slabs
from ..common.finite import as_finite
from ..common.interrupts import finish, undone_by
from ..common.words import described
from ..layers.experts import AdaptedExperts
from ..layers.layer import TinyLoRALayer
from ..ops.reference import contract, product
from .adapted import adapted_layers, expect_unmerged, is_merged, original_names, wrappers


def merged_weights(model: nn.Module, only_adapted: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model with the update applied, under the names of the model before it was adapted.

    Args:
        model: an adapted model, merged or not; it is not changed.
        only_adapted: yield the merged weights alone, not the tensors that adapting left as they were.

    Yields:
        (name, tensor) in the order of the original ``state_dict()``, tied names included. A merged weight is a fresh
        tensor in the dtype of its base, made when it is asked for and not kept: a loop holds one or two at a time. The
        other tensors, and all those of a merged model, are the model's own: do not write to them.

    Raises:
        ValueError: no adapter, a base that is quantised, or a weight that is computed or shared with another module;
            raised by the call, not at the first tensor. At its tensor: a merged weight that is not finite in its dtype.
        RuntimeError: a weight that is not the one adapted to; by the call.
    """
    mergeable_layers(model)
    return _stream(model, only_adapted)


def merge(model: nn.Module, save_to: torch.device | str | None = None) -> nn.Module:
    """Write W' into every adapted base weight and switch the update off: the model then runs at the base's speed.

    The bits of the original weights are kept, one copy of every adapted weight in its own dtype, until ``unmerge``
    writes them back; nothing is ever subtracted, so any number of cycles is exact.  While merged, the vectors get no
    gradient (a training step says so) and changing them changes nothing until the next merge.  ``state_dict()`` is then
    that of the merged weights with the vectors beside them: this model takes it as long as it is merged, and no other
    weights; an adapted one that is not merged, where the update would be applied twice, refuses it.  To keep a merged
    model use ``merged_weights``; to keep the adapter, ``save_adapter``, merged or not.

    Args:
        save_to: device for the saved bits, e.g. "cpu" to spare accelerator memory; default the weight's own device.

    Raises:
        ValueError: merged already, no adapter, an open AdapterBank, a quantised base, a weight that is computed,
            shared with another module or expanded, a save_to that keeps no bits, or a merged weight that is not finite
            in its dtype.  Nothing has changed then.
        RuntimeError: a weight that is not the one adapted to.  Nothing has changed then.
    """
    layers = mergeable_layers(model)
    if any(layer.bank is not None for layer in layers.values()):
        raise ValueError("merge: the model has an AdapterBank, but merged weights serve all rows alike; close it first")
    expect_unmerged(layers, "merge")
    if save_to is not None and torch.device(save_to).type == "meta":
        raise ValueError(f"save_to: expected a device that keeps the bits of the weights, found {save_to!r}")
    for name, layer in layers.items():
        _expect_writable(name, layer.weight_matrix())
    with undone_by(lambda: _restore(layers)):
        for layer in layers.values():
            weight = layer.weight_matrix()
            layer.saved_weight = weight.to(save_to or weight.device, copy=True)
            write_weight(layer.base, merged_weight(layer))
            layer.take_witness()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Write the original bits back and switch the update on again.

    Raises:
        ValueError: the model is not merged, or its dtype was changed or a merged weight was written since.  Nothing has
            changed then.
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if is_merged(layer)}
    if not layers:
        raise ValueError("unmerge: the model is not merged; call merge(model) first")
    for name, layer in layers.items():
        saved, weight = saved_weight(layer), layer.weight_matrix()
        if saved.dtype != weight.dtype or saved.shape != weight.shape:
            raise ValueError(
                f"unmerge: {name} was merged as {described(saved)} and is {described(weight)} now; "
                "convert the model back first"
            )
        if not layer.holds_what_was_merged():
            raise ValueError(
                f"unmerge: {name}.weight was written since it was merged, and the bits it had before the merge may be "
                "of another model; undo that first (RWKV scales its weights at its first call in evaluation mode, and "
                "back in training mode)"
            )
    finish(lambda: _restore(layers))
    return model


def is_dense(weight: Tensor) -> bool:
    """Whether the tensor holds the weight itself, not the packed integers or the shard of one."""
    return weight.is_floating_point() and type(weight) in (nn.Parameter, Tensor)


def saved_weight(layer: TinyLoRALayer) -> Tensor:
    """The bits that a merged layer's weight had before."""
    return cast(Tensor, layer.saved_weight)


@torch.no_grad()
def merged_weight(layer: TinyLoRALayer) -> Tensor:
    """W' = W + U M U^T W, [out, in], in the dtype of W; a fresh tensor.  Of a merged layer too: W is what was saved."""
    weight = original_weight(layer)
    left, right = delta_factors(layer)
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in slabs(len(weight)):
        exact = weight[rows].to(torch.float64, copy=True).addmm_(left[rows], right)
        merged[rows] = exact
        if not bool(torch.isfinite(merged[rows]).all()) and bool(torch.isfinite(weight).all()):
            as_finite(f"{layer.name}: its merged weight", exact, weight.dtype)  # raises
    return merged


@torch.no_grad()
def delta_factors(layer: TinyLoRALayer) -> tuple[Tensor, Tensor]:
    """The update as a product, W' - W = (U M) (U^T W): [out, r] and [r, in], float64. Of a merged layer too.

    Raises:
        RuntimeError: the weight is not the one that U is of, TinyLoRALayer.expect_its_weight.
    """
    layer.expect_its_weight()
    basis = layer.basis.double()  # [r, out]
    mixing = contract(layer.v.detach().to(basis), layer.projection.double())  # [r, r]
    return product(basis.T, mixing), right_factor(basis, original_weight(layer))


def original_weight(layer: TinyLoRALayer) -> Tensor:
    """The frozen weight [out, in] as it was before any merge; no copy unless the saved bits live on another device."""
    return saved_weight(layer).to(layer.basis.device) if is_merged(layer) else layer.weight_matrix()


@torch.no_grad()
def _restore(layers: Mapping[str, TinyLoRALayer]) -> None:
    """Put the original bits back where a layer has them, and forget them last."""
    for layer in filter(is_merged, layers.values()):
        write_weight(layer.base, saved_weight(layer))
        layer.saved_weight = None


def _stream(model: nn.Module, only_adapted: bool) -> Iterator[tuple[str, Tensor]]:
    # A module may be reachable under several names, and the state dict lists them all.
    model = inside(model)
    wrapped, original_name = wrappers(model, remove_duplicate=False), original_names(model)
    for key, tensor in model.state_dict().items():
        name = original_name(key)
        if name is None:  # a vector v
            continue
        owner, _, own = name.rpartition(".")
        wrapper = wrapped.get(owner)
        if isinstance(wrapper, AdaptedExperts) and wrapper.layers_of(own):
            yield name, _merged_stack(wrapper, own, tensor)
        elif isinstance(wrapper, TinyLoRALayer) and own == "weight":
            yield name, tensor if is_merged(wrapper) else as_stored(wrapper.base, merged_weight(wrapper))
        elif not only_adapted:
            yield name, tensor


def _merged_stack(experts: AdaptedExperts, stack: str, weight: Tensor) -> Tensor:
    """The stack [E, ...] with the update of every adapted expert; a fresh tensor unless the model is merged."""
    layers = experts.layers_of(stack).values()
    if all(is_merged(layer) for layer in layers):
        return weight
    merged = weight.clone()
    for layer in layers:
        merged[cast(ExpertSlice, layer.base).expert] = as_stored(layer.base, merged_weight(layer))
    return merged


def mergeable_layers(model: nn.Module) -> dict[str, TinyLoRALayer]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; call apply_tiny_lora(model, config) first")
    for name, layer in layers.items():
        layer.expect_its_weight()
        weight = weight_of(layer.base)
        if not is_dense(weight):
            raise ValueError(
                f"{name}: expected a dense floating weight to merge into, found {type(weight).__name__} "
                f"{described(weight)} (quantised or sharded); keep the update beside it with "
                "export_lora(model, directory)"
            )
    _refuse_shared_weights(model, layers)
    return layers


def _refuse_shared_weights(model: nn.Module, layers: dict[str, TinyLoRALayer]) -> None:
    """Merging writes one module's update into memory that another reads (tied lm_head and embeddings, for instance), or
    into a weight that is computed anew at the next call.
    """
    original_name = original_names(model)
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for module_name, module in named_modules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel() and not tensor.is_meta:
                full_name = f"{module_name}.{name}".lstrip(".")
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((full_name, tensor))
    for name, layer in layers.items():
        weight, own_name = weight_of(layer.base), _parameter_name(name, layer)
        first, last = _extent(weight)
        beside = storages.get(weight.untyped_storage().data_ptr())
        if beside is None:
            raise ValueError(
                f"{name}: expected a weight that is a tensor of {type(layer.base).__name__} to merge into, found one "
                "that it computes from others (weight_norm, pruning); make it one by torch.nn.utils' "
                "parametrize.remove_parametrizations or prune.remove, or keep the update beside it with "
                "export_lora(model, directory)"
            )
        for other_name, other in beside:
            start, end = _extent(other)
            if other_name != own_name and start < last and first < end:
                other_name = original_name(other_name) or other_name
                raise ValueError(
                    f"{name}.weight shares its memory with {other_name}: merging the update of {name} would corrupt "
                    "the other; untie them, leave it out of target_modules, or use export_lora(model, directory)"
                )


def _expect_writable(name: str, weight: Tensor) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        raise ValueError(
            f"{name}: expected a weight of its own numbers to merge into, found one that is expanded: several of its "
            "elements are one; make it contiguous, or keep the update beside it with export_lora(model, directory)"
        )


def _parameter_name(name: str, layer: TinyLoRALayer) -> str:
    """The parameter that holds the layer's weight, by its name in the adapted model."""
    if isinstance(layer.base, ExpertSlice):
        return f"{name.rsplit('.', 2)[0]}.base.{layer.base.stack}"
    return f"{name}.base.weight"


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the tensor covers in its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (last + 1) * tensor.element_size()
