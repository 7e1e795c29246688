"""PEFT models on our ops: one call in, one call out; parameters, names, saving, merging and switching stay PEFT's.

    model = accelerate_peft(get_peft_model(base, TinyLoraConfig(...)))
    ...
    deaccelerate_peft(model)

The layers keep their identity and get another class, whose forward runs one update on the frozen layer's output. What
cannot be expressed there keeps PEFT's own forward, and accelerate_peft says which layers and why.
"""
from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, KeysView, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from peft.tuners.psoft import layer as psoft
from peft.tuners.psoft.model import PsoftModel
from peft.tuners.tinylora import layer as tinylora
from peft.tuners.tinylora.model import TinyLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..base.attributes import bias_of
from ..base.kinds import is_linear_like, weight_matrix
from ..base.weights import bias_offset
from ..functional import tiny_lora_update
from ..linear.plan import has_hooks
from .peft_adapters import from_peft, to_peft
from .peft_factors import FitError, output_side

__all__ = ["accelerate_peft", "acceleration_report", "deaccelerate_peft", "from_peft", "to_peft"]

TRAINED_BASE = FitError("its base is trained (a bias, by bias='all'), and the update on the output would follow it")
BARE = "__base__"  # PEFT's name for "no adapter" in adapter_names

Seen = tuple[Tensor, int | None]  # a tensor and its version when it was read

# What the mixins below stand before. For types alone: with a base of PEFT's an object could not change its class.
if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner as Tuner
    from peft.tuners.tuners_utils import BaseTunerLayer as TunerLayer
else:
    Tuner = TunerLayer = object


@dataclass(frozen=True)
class _Update:
    """One adapter, or several side by side: basis [r, D], projection [u, r, r] or [r, r], offset [r]."""

    basis: Tensor
    projection: Tensor
    offset: Tensor | None


@dataclass
class _State:
    """What an accelerated layer remembers; all of it can be computed again."""

    factors: dict[str, tuple[list[Seen], _Update | FitError]] = field(default_factory=dict)
    stacks: dict[tuple[str, ...], tuple[list[_Update], _Update]] = field(default_factory=dict)
    sample_names: tuple[str, ...] | None = None  # the adapters of this batch
    sample_ids: Tensor | None = None  # [B] index into sample_names, -1 for none
    hook: RemovableHandle | None = None  # of _refresh


class _Accelerated(TunerLayer):
    """The forward shared by all kinds of layer; what differs between them is in the methods below it."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        state = self._tinylora
        names = state.sample_names
        if names is None:
            names = tuple(name for name in self.active_adapters if name in self._adapters())
        parts: list[_Update] = []
        for name in names:
            part = self._factors(name)
            if isinstance(part, FitError):
                if state.sample_names is not None:
                    raise ValueError(f"adapter_names: {part}")
                return super().forward(x, *args, **kwargs)
            parts.append(part)
        y = self.base_layer(x, *args, **kwargs)
        if names:
            y = self._update(y, x, names, self._stack(names, parts))
        return self._finish(y, x)

    def _update(self, y: Tensor, x: Tensor, names: tuple[str, ...], stacked: _Update) -> Tensor:
        vectors = [self._vector(name).to(y.device) for name in names]  # each [u_k]
        ids = self._tinylora.sample_ids
        if ids is None:
            v = vectors[0] if len(vectors) == 1 else torch.cat(vectors)  # deltas of several active adapters add up
        else:
            if x.shape[0] % len(ids):
                raise ValueError(
                    f"adapter_names: {len(ids)} names for an input of shape {tuple(x.shape)}; a layer whose rows are "
                    "not whole samples in order (routed tokens, for instance) cannot mix adapters in a batch"
                )
            # [K, sum u], row k holds v_k in its own columns: P' of the others meets zeros
            v, ids = torch.block_diag(*vectors), ids.to(y.device)
        inplace = not has_hooks(self.base_layer)  # its output is fresh: _why_not_layer lets no other kind through
        return tiny_lora_update(y, stacked.basis, v, stacked.projection, stacked.offset, ids, inplace=inplace)

    def _why_not(self, name: str) -> str | None:
        factors = self._factors(name)
        return str(factors) if isinstance(factors, FitError) else None

    def _factors(self, name: str) -> _Update | FitError:
        """The adapter on the output side, computed again when its tensors or the weight were replaced or rewritten."""
        stored = self._tinylora.factors
        if torch.compiler.is_compiling() and name in stored:
            return stored[name][1]  # _refresh has seen to it
        frozen = self._modules["base_layer"]._parameters
        for parameter in frozen.values():
            if parameter is not None and parameter.requires_grad:
                return TRAINED_BASE
        watched = (*self._sources(name), frozen["weight"])
        if name in stored and _unchanged(stored[name][0], watched):
            return stored[name][1]
        factors: _Update | FitError
        try:
            dropout = self._dropout(name)
            if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                raise FitError(f"dropout {dropout.p} on the adapter's input has no equivalent on the layer's output")
            factors = self._fit(name)
        except FitError as error:
            factors = error
        stored[name] = ([(tensor, _version(tensor)) for tensor in watched], factors)
        return factors

    def _stack(self, names: tuple[str, ...], parts: list[_Update]) -> _Update:
        if len(parts) == 1:
            return parts[0]
        stacks = self._tinylora.stacks
        if names not in stacks or any(a is not b for a, b in zip(stacks[names][0], parts, strict=True)):
            stacks[names] = (parts, _joined(parts))
        return stacks[names][1]

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        return y


class _OfTinyLora(_Accelerated):
    def _adapters(self) -> KeysView[str]:
        return self.tinylora_A.keys()

    def _vector(self, name: str) -> Tensor:
        return self.tinylora_v[name][self._tinylora_v_key[name]]

    def _sources(self, name: str) -> tuple[Tensor, ...]:
        modules = self._modules  # not by attribute: this runs on every forward
        return modules["tinylora_A"][name], modules["tinylora_B"][name], modules["tinylora_P"][name]

    def _dropout(self, name: str) -> nn.Module:
        return self.tinylora_dropout[name]


class AcceleratedLinear(_OfTinyLora, tinylora.Linear):
    """PEFT's TinyLoRA linear layer with its update on the output side."""

    def _fit(self, name: str) -> _Update:
        right, left, fixed = self._sources(name)
        side = output_side(left, right, weight_matrix(self.base_layer))
        offset = bias_offset(side.basis, bias_of(self.base_layer))
        return _Update(side.basis, side.projection(fixed).contiguous(), offset)

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        return y.to(x.dtype)


class AcceleratedEmbedding(_OfTinyLora, tinylora.Embedding):
    """PEFT's TinyLoRA embedding: rows e of the table get e += e V M^T V^T, the linear case with V for U.

    PEFT adds B[x] R A with the table W = U S V^T, A = sqrt(S) V^T and B = U sqrt(S): the update of W^T by A^T R^T B^T.
    """

    def _fit(self, name: str) -> _Update:
        right, left, fixed = self._sources(name)
        side = output_side(right.T, left.T, self.base_layer.weight.detach().T)
        return _Update(side.basis, side.projection(fixed.transpose(1, 2)).contiguous(), None)


class AcceleratedPsoftLinear(_Accelerated, psoft.Linear):
    """PEFT's PSOFT, W + s B (R - I) A with R [r, r] trained: LoRA-XS if psoft_orth=False and without magnitudes."""

    def _adapters(self) -> KeysView[str]:
        return self.psoft_R.keys()

    def _vector(self, name: str) -> Tensor:
        # v = R - I, flattened by rows
        rotation = self.psoft_R[name].get_matrix()
        return (rotation - torch.eye(len(rotation), device=rotation.device, dtype=rotation.dtype)).flatten()

    def _sources(self, name: str) -> tuple[Tensor, ...]:
        return self._get_psoft_ab_cache_buffers(name)

    def _dropout(self, name: str) -> nn.Module:
        return self.psoft_dropout[name]

    def _fit(self, name: str) -> _Update:
        right, left = self._sources(name)
        side = output_side(left, right, weight_matrix(self.base_layer), diagonal=True)
        offset = bias_offset(side.basis, bias_of(self.base_layer))
        # M = (s n g^T) * (R - I)
        return _Update(side.basis, (self.scaling[name] * side.ratios()).contiguous(), offset)


class _MixedBatches(Tuner):
    """Hands adapter_names to the layers for the duration of a forward or a generate, as PEFT does for LoRA."""

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: Sequence[str] | None = None, **kwargs) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        layers = self._layers_for(list(adapter_names))
        names = tuple(dict.fromkeys(name for name in adapter_names if name != BARE))
        try:
            for layer in layers:
                present = tuple(name for name in names if name in layer._adapters())
                ids = [present.index(name) if name in present else -1 for name in adapter_names]
                layer._tinylora.sample_names, layer._tinylora.sample_ids = present, torch.tensor(ids, device="cpu")
            yield
        finally:
            for layer in layers:
                layer._tinylora.sample_names = layer._tinylora.sample_ids = None

    def _layers_for(self, adapter_names: list[str]) -> list[_Accelerated]:
        layers = dict(_peft_layers(self.model))
        left = [name for name, layer in layers.items() if not isinstance(layer, _Accelerated)]
        if left:
            raise ValueError(f"adapter_names: {left[0]} runs on PEFT's own path, which would ignore them")
        known = {name for layer in layers.values() for name in layer._adapters()} | {BARE}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"adapter_names: no adapter named {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                "adapter_names: gradient checkpointing runs layers again after the batch's names are gone; "
                "call gradient_checkpointing_disable() to train a mixed batch"
            )
        return list(layers.values())


class AcceleratedTinyLoraModel(_MixedBatches, TinyLoraModel):
    """PEFT's TinyLoraModel, which alone drops adapter_names without a word."""


class AcceleratedPsoftModel(_MixedBatches, PsoftModel):
    """PEFT's PsoftModel with adapter_names."""


LAYERS = {
    tinylora.Linear: AcceleratedLinear,
    tinylora.Embedding: AcceleratedEmbedding,
    psoft.Linear: AcceleratedPsoftLinear,
}
MODELS = {TinyLoraModel: AcceleratedTinyLoraModel, PsoftModel: AcceleratedPsoftModel}
ORIGINALS: dict[type, type] = {ours: theirs for theirs, ours in (LAYERS | MODELS).items()}


def accelerate_peft(model: nn.Module) -> nn.Module:
    """Run a PEFT TinyLoRA or PSOFT model on our ops, in place; every tensor and every name of PEFT stays where it is.

    Args:
        model: a PeftModel, or a model with PSOFT adapters injected into it. Adapters added or loaded
            later are taken up by the layers that are accelerated already; call again for layers that are new.

    Returns:
        The same model. With a PeftModel, ``adapter_names`` (one adapter per sample, "__base__" for none) works in
        forward and generate, gradients included.

    Warns:
        UserWarning: layers stay on PEFT's own path; the message says why, acceleration_report(model) says it for each.

    Raises:
        ValueError: the model has no TinyLoRA or PSOFT layer, or is merged.
    """
    layers = dict(_peft_layers(model))
    if not layers:
        raise ValueError("model: expected PEFT TinyLoRA or PSOFT layers, found none; call get_peft_model(...) first")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]} is merged; call unmerge_adapter() first")
    for layer in layers.values():
        if type(layer) in LAYERS and _why_not_layer(layer) is None:
            layer.__class__ = LAYERS[type(layer)]
            layer._tinylora = _State(hook=layer.register_load_state_dict_post_hook(_refresh))
            if all(layer._why_not(name) for name in layer._adapters()):
                _restore(layer)
    for module in list(model.modules()):
        if type(module) in MODELS:
            module.__class__ = MODELS[type(module)]

    left = {name: reason for name, reason in acceleration_report(model).items() if reason}
    if left:
        first = next(iter(left))
        warnings.warn(
            f"accelerate_peft: {len(left)} of {len(layers)} layers stay on PEFT's own path: {first}: {left[first]}",
            stacklevel=2,
        )
    return model


def deaccelerate_peft(model: nn.Module) -> nn.Module:
    """Give every layer PEFT's own forward back; undoes accelerate_peft. Returns the same model."""
    for module in list(model.modules()):
        if type(module) in ORIGINALS:
            _restore(module)
    return model


def acceleration_report(model: nn.Module) -> dict[str, str | None]:
    """Module name -> None where its active adapters run on our ops, else the reason why not."""
    report: dict[str, str | None] = {}
    for name, layer in _peft_layers(model):
        if layer.merged:
            report[name] = "merged: the base alone is running"
        elif isinstance(layer, _Accelerated):
            reasons = (layer._why_not(adapter) for adapter in layer.active_adapters if adapter in layer._adapters())
            report[name] = next(filter(None, reasons), None)
        else:
            report[name] = _why_not_layer(layer) or _why_not_adapters(layer) or "accelerate_peft has not been called"
    return report


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, (tinylora.TinyLoraLayer, psoft.PsoftLayer)):
            yield name, module


def _why_not_layer(layer: BaseTunerLayer) -> str | None:
    """What is wrong with the layer itself, whatever its adapters."""
    base = layer.base_layer
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    if type(layer) not in LAYERS and not isinstance(layer, _Accelerated):
        return f"{type(layer).__module__}.{type(layer).__qualname__} is not a layer this module knows"
    if "forward" in vars(layer):
        return "its forward has been replaced on the instance; accelerate before whatever replaced it"
    if isinstance(layer, tinylora.Embedding):
        if type(base) is not nn.Embedding or base.max_norm is not None:
            return f"expected a plain nn.Embedding without max_norm, found {kind}"
    elif type(base) is not nn.Linear and (isinstance(base, nn.Linear) or not is_linear_like(base)):
        return f"expected nn.Linear or transformers' Conv1D under the adapter, found {kind}"
    return None


def _why_not_adapters(layer: BaseTunerLayer) -> str | None:
    """Why a layer of a known kind was left alone: what its first active adapter gives for a reason."""
    ours = object.__new__(LAYERS[type(layer)])
    ours.__dict__.update(vars(layer), _tinylora=_State())
    reasons = (ours._why_not(name) for name in layer.active_adapters if name in ours._adapters())
    return next(filter(None, reasons), None)


def _restore(module: nn.Module) -> None:
    module.__class__ = ORIGINALS[type(module)]
    state = vars(module).pop("_tinylora", None)
    if state is not None:
        state.hook.remove()


def _refresh(layer: _Accelerated, incompatible_keys) -> None:
    """After tensors were loaded into a layer: compiled code, which cannot look at versions, finds the new factors."""
    if not layer.merged:
        for name in list(layer._tinylora.factors):
            layer._factors(name)


def _unchanged(seen: list[Seen], now: tuple[Tensor, ...]) -> bool:
    for n, (old, version) in enumerate(seen):  # on every forward: no generator, no call that can be spared
        if old is not now[n] or (version is not None and version != old._version):
            return False
    return True


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _joined(parts: list[_Update]) -> _Update:
    """Several adapters as one, their vectors concatenated: P' gets rows for each, and a block for each other basis."""
    projections = [_matrices(part.projection) for part in parts]  # each [u_k, r_k, r_k]
    first = parts[0]
    if all(part.basis.shape == first.basis.shape and torch.equal(part.basis, first.basis) for part in parts):
        return _Update(first.basis, torch.cat(projections), first.offset)
    rank, numbers = (sum(p.shape[axis] for p in projections) for axis in (1, 0))
    blocks = first.projection.new_zeros(numbers, rank, rank)
    row = column = 0
    for projection in projections:
        u, r, _ = projection.shape
        blocks[row : row + u, column : column + r, column : column + r] = projection
        row, column = row + u, column + r
    offsets = [part.offset for part in parts if part.offset is not None]  # of one base: all of them or none
    offset = torch.cat(offsets) if offsets else None
    return _Update(torch.cat([part.basis for part in parts]), blocks, offset)


def _matrices(projection: Tensor) -> Tensor:
    """[u, r, r] of either form: for M = projection * R every number of R has a matrix with one entry."""
    return projection if projection.dim() == 3 else torch.diag(projection.flatten()).unflatten(1, projection.shape)
