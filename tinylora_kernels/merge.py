"""Merging the update into the frozen weights: for rollout engines, for export, and what a cast loses on the way.

W' = W + U M U^T W is formed in float32 (float64 for float64 weights), one module at a time, and cast once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base_layers import as_stored, write_weight
from .expert_layers import AdaptedExperts
from .experts import ExpertSlice
from .layer import TinyLoRALayer
from .model import adapted_layers, original_name, wrappers
from .ops.reference import contract
from .tying import module_kind

ROWS_SHOWN = 40  # longer reports are summarised by kind of module


def merged_weights(model: nn.Module, only_adapted: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model with the update applied, under the names of the model before it was adapted.

    Args:
        model: an adapted model, merged or not; it is not changed.
        only_adapted: yield the merged weights alone, not the tensors that adapting left as they were.

    Yields:
        (name, tensor) in the order of the original ``state_dict()``, tied names included.  A merged weight is a fresh
        tensor in the dtype of its base, made when it is asked for and not kept: a loop holds one or two at a time, and
        one float32 copy of a single weight while it is made.  The other tensors, and all those of a merged model, are
        the model's own: do not write to them.

    Raises:
        ValueError: no adapter, a base that is quantised, or a weight shared with another module; raised by the call,
            not at the first tensor.
    """
    _mergeable_layers(model)
    return _stream(model, only_adapted)


def merge(model: nn.Module, save_to: torch.device | str | None = None) -> nn.Module:
    """Write W' into every adapted base weight and switch the update off: the model then runs at the base's speed.

    The bits of the original weights are kept, one copy of every adapted weight in its own dtype, until ``unmerge``
    writes them back; nothing is ever subtracted, so any number of cycles is exact.  While merged, the vectors get no
    gradient (a training step says so) and changing them changes nothing until the next merge.  ``state_dict()`` is then
    that of the merged weights with the vectors beside them: loaded into an adapted model it would apply the update
    twice.  To keep a merged model use ``merged_weights``; to keep the adapter, ``save_adapter``, merged or not.

    Args:
        save_to: device for the saved bits, e.g. "cpu" to spare accelerator memory; default the weight's own device.

    Raises:
        ValueError: merged already, no adapter, an open AdapterBank, a quantised base, or a weight shared with another
            module.  Nothing has changed then.
    """
    layers = _mergeable_layers(model)
    if any(layer.bank is not None for layer in layers.values()):
        raise ValueError("merge: the model has an AdapterBank, but merged weights serve all rows alike; close it first")
    merged = [name for name, layer in layers.items() if is_merged(layer)]
    if merged:
        raise ValueError(f"merge: {_some(merged)} merged already; call unmerge(model) first")
    done = []
    try:
        for layer in layers.values():
            weight = layer.weight_matrix()
            layer.saved_weight = weight.to(save_to or weight.device, copy=True)
            done.append(layer)
            write_weight(layer.base, merged_weight(layer))
            layer.enabled = False
    except BaseException:
        for layer in done:
            _restore(layer)
        raise
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Write the original bits back and switch the update on again.

    Raises:
        ValueError: the model is not merged, or its dtype was changed since.  Nothing has changed then.
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if is_merged(layer)}
    if not layers:
        raise ValueError("unmerge: the model is not merged; call merge(model) first")
    for name, layer in layers.items():
        saved, weight = layer.saved_weight, layer.weight_matrix()
        if saved.dtype != weight.dtype or saved.shape != weight.shape:
            raise ValueError(
                f"unmerge: {name} was merged as {_describe(saved)} and is {_describe(weight)} now; "
                "convert the model back first"
            )
    for layer in layers.values():
        _restore(layer)
    return model


def is_dense(weight: Tensor) -> bool:
    """Whether the tensor holds the weight itself, not the packed integers or the shard of one."""
    return weight.is_floating_point() and type(weight) in (nn.Parameter, Tensor)


def is_merged(layer: TinyLoRALayer) -> bool:
    """Whether the layer's update sits in its base weight."""
    return layer.saved_weight is not None


@torch.no_grad()
def merged_weight(layer: TinyLoRALayer) -> Tensor:
    """W' = W + U M U^T W, [out, in], in the dtype of W; a fresh tensor.  Of a merged layer too: W is what was saved."""
    weight = original_weight(layer)
    exact = weight.to(_work_dtype(weight), copy=True)  # [out, in]
    left, right = delta_factors(layer, exact)
    return exact.addmm_(left, right).to(weight.dtype)


@torch.no_grad()
def delta_factors(layer: TinyLoRALayer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The update as a product, W' - W = (U M) (U^T W): [out, r] and [r, in], in the dtype of ``weight`` [out, in]."""
    basis = layer.basis.to(weight.dtype)  # [r, out]
    mixing = contract(layer.v.detach().to(weight), layer.projection.to(weight.dtype))  # [r, r]
    return basis.T @ mixing, basis @ weight


def original_weight(layer: TinyLoRALayer) -> Tensor:
    """The frozen weight [out, in] as it was before any merge; no copy unless the saved bits live on another device."""
    return layer.saved_weight.to(layer.basis.device) if is_merged(layer) else layer.weight_matrix()


def _work_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def _restore(layer: TinyLoRALayer) -> None:
    write_weight(layer.base, layer.saved_weight)
    layer.saved_weight = None
    layer.enabled = True


def _stream(model: nn.Module, only_adapted: bool) -> Iterator[tuple[str, Tensor]]:
    # A module may be reachable under several names, and the state dict lists them all.
    wrapped = wrappers(model, remove_duplicate=False)
    vectors = {name for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, TinyLoRALayer)}
    for key, tensor in model.state_dict().items():
        name = original_name(key, wrapped, vectors)
        owner, _, own = key.rpartition(".base.")
        wrapper = wrapped.get(owner)
        if isinstance(wrapper, AdaptedExperts) and own in wrapper._modules:
            yield name, _merged_stack(wrapper, own, tensor)
        elif isinstance(wrapper, TinyLoRALayer) and own == "weight":
            yield name, tensor if is_merged(wrapper) else as_stored(wrapper.base, merged_weight(wrapper))
        elif name is not None and not only_adapted:
            yield name, tensor


def _merged_stack(experts: AdaptedExperts, stack: str, weight: Tensor) -> Tensor:
    """The stack [E, ...] with the update of every adapted expert; a fresh tensor unless the model is merged."""
    layers = experts._modules[stack].values()
    if all(is_merged(layer) for layer in layers):
        return weight
    merged = weight.clone()
    for layer in layers:
        merged[layer.base.expert] = as_stored(layer.base, merged_weight(layer))
    return merged


def _mergeable_layers(model: nn.Module) -> dict[str, TinyLoRALayer]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; call apply_tiny_lora(model, config) first")
    for name, layer in layers.items():
        weight = layer.base.weight
        if not is_dense(weight):
            raise ValueError(
                f"{name}: expected a dense floating weight to merge into, found {type(weight).__name__} "
                f"{_describe(weight)} (quantised or sharded); keep the update beside it with "
                "export_lora(model, directory)"
            )
    _refuse_shared_weights(model, layers)
    return layers


def _refuse_shared_weights(model: nn.Module, layers: dict[str, TinyLoRALayer]) -> None:
    """Merging writes one module's update into memory that another reads: tied lm_head and embeddings, for instance."""
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for module_name, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel() and not tensor.is_meta:
                full_name = f"{module_name}.{name}".lstrip(".")
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((full_name, tensor))
    for name, layer in layers.items():
        weight, own_name = layer.base.weight, _parameter_name(name, layer)
        first, last = _extent(weight)
        for other_name, other in storages[weight.untyped_storage().data_ptr()]:
            start, end = _extent(other)
            if other_name != own_name and start < last and first < end:
                other_name = other_name.replace(".base.", ".")
                raise ValueError(
                    f"{name}.weight shares its memory with {other_name}: merging the update of {name} would corrupt "
                    "the other; untie them, leave it out of target_modules, or use export_lora(model, directory)"
                )


def _parameter_name(name: str, layer: TinyLoRALayer) -> str:
    """The parameter that holds the layer's weight, by its name in the adapted model."""
    if isinstance(layer.base, ExpertSlice):
        return f"{name.rsplit('.', 2)[0]}.base.{layer.base.stack}"
    return f"{name}.base.weight"


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the tensor covers in its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.storage_offset() * tensor.element_size()
    return start, start + (last + 1) * tensor.element_size()


@dataclass(frozen=True)
class ModuleFidelity:
    """What one module's update becomes when it is merged.

    With D the exact update W' - W and D^ = cast(W + D) - cast(W) the one that the merged weight carries:

    Attributes:
        name, dtype: the module and the dtype it is cast to.
        norm: ||D||, Frobenius.
        survived: <D^, D> / <D, D>, how much of the intended update is left along itself: 1 all, 0 nothing.
        error: ||D^ - D|| / ||D||, everything that went wrong, rounding noise across the update included.  A cast that
            drops the update whole has 1; one that amplifies its noise has more.
        changed: share of the weight's elements whose bits differ after the merge.
    """

    name: str
    dtype: torch.dtype
    norm: float
    survived: float
    error: float
    changed: float


@dataclass(frozen=True)
class MergeFidelity:
    """``merge_fidelity``'s report: one row per module and the totals over all; ``print`` shows a table.

    Attributes:
        rows: one ModuleFidelity per adapted module.
        survived, error: as in the rows, over all modules taken as one vector.
    """

    rows: list[ModuleFidelity]
    survived: float
    error: float

    def __str__(self) -> str:
        head = ("module", "cast to", "||dW||", "survived", "error", "changed")
        if len(self.rows) <= ROWS_SHOWN:
            body = [
                (row.name, _dtype_name(row.dtype), f"{row.norm:.3g}", f"{row.survived:.1%}", f"{row.error:.3g}",
                 f"{row.changed:.1%}") for row in self.rows
            ]  # fmt: skip
        else:
            head = ("kind of module", "modules", "cast to", "||dW||", "survived", "worst", "error")
            body = [_summary(kind, rows) for kind, rows in self._by_kind().items()]
        table = _table([head, *body])
        return f"{table}\nall modules: {self.survived:.1%} of the update survives the cast, error {self.error:.3g}"

    def _by_kind(self) -> dict[str, list[ModuleFidelity]]:
        kinds: dict[str, list[ModuleFidelity]] = {}
        for row in self.rows:
            kinds.setdefault(module_kind(row.name), []).append(row)
        return kinds


@torch.no_grad()
def merge_fidelity(model: nn.Module, dtype: torch.dtype | None = None) -> MergeFidelity:
    """How much of the update survives being merged, for each module; the model is not changed.

    A low-precision weight swallows an update below half its last place.  Warns (UserWarning) when more than half of
    the whole update would be lost: export_lora keeps it beside the weights then, or train with ``tis_cap`` in mind.

    Args:
        model: an adapted model, merged or not.
        dtype: the dtype a rollout engine would hold the weights in; default each weight's own.

    Raises:
        ValueError: no adapter, a quantised base, or a weight shared with another module.
    """
    rows, dots, energies, errors = [], 0.0, 0.0, 0.0
    for name, layer in _mergeable_layers(model).items():
        weight = original_weight(layer)
        cast = dtype or weight.dtype
        base = weight.to(_work_dtype(weight), copy=True)  # [out, in]
        left, right = delta_factors(layer, base)
        delta = left @ right  # D
        before, after = base.to(cast), (base + delta).to(cast)
        changed = float((before != after).double().mean())
        merged_delta = after.to(base.dtype).sub_(before.to(base.dtype))  # D^
        energy = float(delta.square().sum(dtype=torch.float64))
        dot = float((merged_delta * delta).sum(dtype=torch.float64))
        error = float((merged_delta - delta).square().sum(dtype=torch.float64))
        rows.append(
            ModuleFidelity(
                name, cast, energy**0.5, dot / energy if energy else 1.0, (error / energy) ** 0.5 if energy else 0.0,
                changed,
            )  # fmt: skip
        )
        dots, energies, errors = dots + dot, energies + energy, errors + error
    report = MergeFidelity(
        rows, dots / energies if energies else 1.0, (errors / energies) ** 0.5 if energies else 0.0
    )
    if report.survived < 0.5:
        warnings.warn(
            f"merging would swallow {1 - report.survived:.0%} of the update; export_lora(model, directory) keeps all "
            "of it beside the weights",
            stacklevel=3,
        )
    return report


def _summary(kind: str, rows: list[ModuleFidelity]) -> tuple[str, ...]:
    energy = sum(row.norm**2 for row in rows)
    survived = sum(row.survived * row.norm**2 for row in rows) / energy if energy else 1.0
    error = (sum((row.error * row.norm) ** 2 for row in rows) / energy) ** 0.5 if energy else 0.0
    worst = min(row.survived for row in rows)
    return (
        kind, str(len(rows)), _dtype_name(rows[0].dtype), f"{energy**0.5:.3g}", f"{survived:.1%}", f"{worst:.1%}",
        f"{error:.3g}",
    )  # fmt: skip


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(lines)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{names[0]} and {len(names) - 1} more modules are"
