"""PEFT models on our ops: one call in, one call out; parameters, names, saving, merging and switching stay PEFT's.

    model = accelerate_peft(get_peft_model(base, TinyLoraConfig(...)))
    ...
    deaccelerate_peft(model)

The layers keep their identity and get another class, whose forward runs one update on the frozen layer's output. What
cannot be expressed there keeps PEFT's own forward, and accelerate_peft says which layers and why.
"""
from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, KeysView, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from peft.tuners.psoft import layer as psoft
from peft.tuners.psoft.model import PsoftModel
from peft.tuners.tinylora import layer as tinylora
from peft.tuners.tinylora.model import TinyLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..bank.rows import Layouts, Rows, inputs_of, rows_of
from ..base.attributes import bias_of
from ..base.kinds import is_linear_like, kind_of, weight_matrix
from ..base.weights import PLAIN, bias_offset
from ..base.witness import Witness, witness
from ..common import modes
from ..common.interrupts import finish, undone_by
from ..common.scope import Block, Scope, Trace
from ..common.words import dtype_name, listed
from ..functional import tiny_lora_update
from ..linear.plan import has_hooks, is_bare_product
from ..ops.native import library as native
from .peft_adapters import from_peft, to_peft
from .peft_factors import FitError, output_side

__all__ = ["accelerate_peft", "acceleration_report", "deaccelerate_peft", "from_peft", "to_peft"]

TRAINED_BASE = FitError("its base is trained (a bias, by bias='all'), and the update on the output would follow it")
BARE = "__base__"  # PEFT's name for "no adapter" in adapter_names

NARROW = (torch.bfloat16, torch.float16)
MIXED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # modules_to_save that work row by row, as in PEFT

# What the mixins below stand before. For types alone: with a base of PEFT's an object could not change its class.
if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner as Tuner
    from peft.tuners.tuners_utils import BaseTunerLayer as TunerLayer
else:
    Tuner = TunerLayer = object


class _Seen(NamedTuple):
    """A tensor as it was when something was computed from it."""

    tensor: Tensor
    witness: Witness | None  # None of tensors that are not plain: their own count of writes must do
    same_numbers: Callable[[int], bool] | None  # whether the witness knows what is at an address of the CPU

    def is_still(self, tensor: Tensor) -> bool:
        if self.tensor is not tensor:
            return False
        if self.witness is None:
            return True
        if (0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) != self.witness[:2]:
            return False
        return self.same_numbers(tensor.data_ptr()) if self.same_numbers is not None else self.witness.knows(tensor)


def _seen(tensor: Tensor) -> _Seen:
    if type(tensor) not in PLAIN or tensor.is_meta:
        return _Seen(tensor, None, None)
    known = witness(tensor)
    on_cpu = tensor.device.type == "cpu" and not native.load().error
    return _Seen(tensor, known, native.same_numbers(known.offsets, known.bits) if on_cpu else None)


@dataclass(frozen=True)
class _Update:
    """One adapter, or several side by side: basis [r, D], projection [u, r, r] or [r, r]."""

    basis: Tensor
    projection: Tensor


@dataclass
class _State:
    """What an accelerated layer remembers; all but its name can be computed again."""

    name: str = "layer"
    factors: dict[str, tuple[list[_Seen], _Update | FitError]] = field(default_factory=dict)
    stacks: dict[tuple[str, ...], tuple[list[_Update], _Update]] = field(default_factory=dict)
    hook: RemovableHandle | None = None  # of _refresh

    def __getstate__(self) -> dict:
        """Copies and pickles have other tensors, at other addresses."""
        return {**vars(self), "factors": {}, "stacks": {}}


class _Samples(Block):
    """One call with adapter_names.

    Attributes:
        adapters: the names, one a sample.
        rows: which sample a row belongs to.
        copies: rows of each sample, side by side, where generate has expanded them.
        known: the modules that the names are for.
    """

    def __init__(self, adapters: list[str], rows: Rows, copies: int, known: set[nn.Module]):
        self.adapters, self.rows, self.copies, self.known = adapters, rows, copies, known
        self._ids: dict[tuple[str, ...], Tensor] = {}

    @functools.cached_property
    def trace(self) -> Trace:
        return Trace(hash((tuple(self.adapters), self.copies)), frozenset(map(id, self.known)))

    def ids(self, names: tuple[str, ...]) -> Tensor:
        """[B] index into names, -1 for none; [1] where all samples have one adapter."""
        if names not in self._ids:
            samples = self.adapters[:1] if self.rows.uniform else self.adapters
            ids = [names.index(name) if name in names else -1 for name in samples]
            with modes.out_of_sight():
                self._ids[names] = torch.tensor(ids, device="cpu")
        return self._ids[names]


mixed_batches = Scope("adapter_names", "do without gradient checkpointing")


def _samples_of(module: nn.Module) -> _Samples | None:
    """The call with adapter_names that a module of an accelerated model runs in."""
    block = mixed_batches.now(module) if mixed_batches.matters() else None
    while block is not None and (block.ended or module not in cast(_Samples, block).known):
        block = block.outer
    return cast("_Samples | None", block)


class _Accelerated(TunerLayer):
    """The forward shared by all kinds of layer; what differs between them is in the methods below it."""

    samples_first = False

    @property
    def name(self) -> str:
        """Of the module, for messages."""
        return self._tinylora.name

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        samples = _samples_of(self)
        wanted = self.active_adapters if samples is None else dict.fromkeys(samples.adapters)
        names = tuple(name for name in wanted if name in self._adapters())
        parts: list[_Update] = []
        for name in names:
            part = self._factors(name)
            if isinstance(part, FitError):
                if samples is not None:
                    raise ValueError(f"adapter_names: {part}")
                return super().forward(x, *args, **kwargs)
            parts.append(part)
        if not names:
            return self._finish(self.base_layer(x, *args, **kwargs), x)
        vectors = [self._vector(name) for name in names]  # each [u_k]
        if samples is None:
            v, ids = vectors[0] if len(vectors) == 1 else torch.cat(vectors), None  # several active ones add up
        else:
            # [K, sum u], row k holds v_k in its own columns: P' of the others meets zeros
            v, ids = torch.block_diag(*vectors), samples.ids(names)
            ids = samples.rows.order(self, self._rows_of(x)).of(ids)
        return self._finish(self._output(x, args, kwargs, self._stack(names, parts), v, ids), x)

    def _output(
        self, x: Tensor, args: tuple, kwargs: dict, stacked: _Update, v: Tensor, ids: Tensor | None
    ) -> Tensor:
        """The frozen layer's output and its update, by the bias that the layer holds now."""
        base, fresh = self.base_layer, not has_hooks(self.base_layer)
        kind, bias, offset = kind_of(base), bias_of(base), None
        product = kind.product if kind.is_product(base) and is_bare_product(base, x) else None
        if product is not None and fresh and not (args or kwargs):
            y = product(base, x, base.weight)
            bias = None if bias is None else bias.to(y.dtype)
        else:
            y, offset, bias = base(x, *args, **kwargs), bias_offset(stacked.basis, bias), None
        ids = None if ids is None else ids.to(y.device)
        # y is nobody else's: _why_not_layer lets no other kind through
        return tiny_lora_update(
            y, stacked.basis, v.to(y.device), stacked.projection, offset, ids, bias=bias, inplace=fresh
        )

    def _rows_of(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the rows of an input: all but its features."""
        return tuple(x.shape[:-1])

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
        with modes.out_of_sight():
            if name in stored and all(seen.is_still(now) for seen, now in zip(stored[name][0], watched, strict=True)):
                return stored[name][1]
            factors: _Update | FitError
            try:
                dropout = self._dropout(name)
                if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                    raise FitError(
                        f"dropout {dropout.p} on the adapter's input has no equivalent on the layer's output"
                    )
                factors = self._fit(name)
            except FitError as error:
                factors = error
            stored[name] = ([_seen(tensor) for tensor in watched], factors)
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
        return _Update(side.basis, side.projection(fixed).contiguous())

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        return y.to(x.dtype)


class AcceleratedEmbedding(_OfTinyLora, tinylora.Embedding):
    """PEFT's TinyLoRA embedding: rows e of the table get e += e V M^T V^T, the linear case with V for U.

    PEFT adds B[x] R A with the table W = U S V^T, A = sqrt(S) V^T and B = U sqrt(S): the update of W^T by A^T R^T B^T.
    """

    def _fit(self, name: str) -> _Update:
        right, left, fixed = self._sources(name)
        side = output_side(right.T, left.T, self.base_layer.weight.detach().T)
        return _Update(side.basis, side.projection(fixed.transpose(1, 2)).contiguous())

    def _rows_of(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)


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
        # M = (s n g^T) * (R - I)
        return _Update(side.basis, (self.scaling[name] * side.ratios()).contiguous())


class AcceleratedModulesToSave(ModulesToSaveWrapper):
    """PEFT's modules_to_save with the module of each sample's adapter, or the base's where that adapter has none."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        samples = _samples_of(self)
        if samples is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        adapters = samples.adapters
        count, left = divmod(len(x), len(adapters))  # beams lie side by side
        if left or count not in (1, samples.copies):
            raise ValueError(
                f"adapter_names: expected one for each row of modules_to_save's input, found {len(adapters)} for "
                f"{len(x)} rows"
            )
        owners = [name if name in self.modules_to_save else BARE for name in adapters for _ in range(count)]
        outputs, order = [], []
        for owner in dict.fromkeys(owners):
            own = [row for row, name in enumerate(owners) if name == owner]
            module = self.original_module if owner == BARE else self.modules_to_save[owner]
            outputs.append(module(x[own], *args, **kwargs))
            order += own
        return torch.cat(outputs)[torch.tensor(order, device=x.device).argsort()]


class _MixedBatches(Tuner):
    """Hands adapter_names to the layers for the duration of a forward or a generate, as PEFT does for LoRA."""

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: Sequence[str] | None = None, **kwargs) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        names = _checked_names(adapter_names)
        layers, saved = self._layers_for(names)
        copies = _copies(self.model, kwargs)
        layouts = Layouts(self.model, layers, False, "call the model with one adapter at a time")
        layouts.in_order.update(set(layers.values()) - layouts.listed)  # heads and poolers: PEFT's own rule for rows
        layouts.turned, layouts.entries_first = dict.fromkeys(layers.values(), False), True
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        ids = torch.tensor([numbers[name] for name in names], device="cpu")
        rows = Rows(ids, layouts, len(names) * copies)
        samples = _Samples(names, rows, copies, {*layers.values(), *saved})
        for what, content in islice(inputs_of(self.model, args, kwargs), 1):
            if len(content) != len(names):
                raise ValueError(
                    f"adapter_names: expected one for each row of {what} {list(content.shape)}, found {len(names)}"
                )
            rows.see(rows_of(content), what, [content])

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            """What generate calls the model with, in this call's own context."""
            if mixed_batches.innermost.get() is samples:
                rows.see_call(module, args, kwargs)

        hook = self.model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            with mixed_batches.holding(samples):
                yield
        finally:
            hook.remove()

    def _layers_for(self, adapter_names: list[str]) -> tuple[dict[str, _Accelerated], list[nn.Module]]:
        """The adapted layers by name, and the modules_to_save; raises where the names cannot be honoured."""
        layers = dict(_peft_layers(self.model))
        left = [name for name, layer in layers.items() if not isinstance(layer, _Accelerated)]
        if left:
            raise ValueError(f"adapter_names: {left[0]} runs on PEFT's own path, which would ignore them")
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise ValueError(f"adapter_names: {merged[0]} is merged, for all rows alike; call unmerge_adapter() first")
        wrapped = {name: m for name, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
        for name, module in wrapped.items():
            mixes = isinstance(module, AcceleratedModulesToSave) and isinstance(module.original_module, MIXED)
            if not mixes:
                raise ValueError(
                    f"adapter_names: {name} is a {type(module).__name__} of a {type(module.original_module).__name__}, "
                    "which cannot run rows of different adapters; call accelerate_peft again if it is new, or call the "
                    "model with one adapter at a time"
                )
        known = {name for layer in layers.values() for name in layer._adapters()} | {BARE}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"adapter_names: no adapter named {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                "adapter_names: gradient checkpointing runs layers again after the batch's names are gone; "
                "call gradient_checkpointing_disable() to train a mixed batch"
            )
        return cast("dict[str, _Accelerated]", layers), list(wrapped.values())


def _checked_names(names: Sequence[str]) -> list[str]:
    listed = [] if isinstance(names, str) else list(names)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"adapter_names: expected a list of names, one for each row of the input, found {names!r}")
    return listed


def _copies(model: nn.Module, kwargs: dict) -> int:
    """Rows of each sample in what generate calls the model with: beams, or sequences to return."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    asked = (kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences"))
    return max(count or 1 for count in asked)


class AcceleratedTinyLoraModel(_MixedBatches, TinyLoraModel):
    """PEFT's TinyLoraModel, which alone drops adapter_names without a word."""


class AcceleratedPsoftModel(_MixedBatches, PsoftModel):
    """PEFT's PsoftModel with adapter_names."""


LAYERS = {
    tinylora.Linear: AcceleratedLinear,
    tinylora.Embedding: AcceleratedEmbedding,
    psoft.Linear: AcceleratedPsoftLinear,
}
MODELS: dict[type, type] = {
    TinyLoraModel: AcceleratedTinyLoraModel,
    PsoftModel: AcceleratedPsoftModel,
    ModulesToSaveWrapper: AcceleratedModulesToSave,
}
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
            Or an adapter trains in 16 bits: PEFT keeps it in the dtype it came in.

    Raises:
        ValueError: the model has no TinyLoRA or PSOFT layer, or is merged.
    """
    layers = dict(_peft_layers(model))
    if not layers:
        raise ValueError("model: expected PEFT TinyLoRA or PSOFT layers, found none; call get_peft_model(...) first")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]} is merged; call unmerge_adapter() first")
    before = {module for module in model.modules() if type(module) in ORIGINALS}
    with undone_by(lambda: _restore_all(module for module in model.modules() if module not in before)):
        _accelerate(model, layers)
    left = {name: reason for name, reason in acceleration_report(model).items() if reason}
    if left:
        first = next(iter(left))
        warnings.warn(
            f"accelerate_peft: {len(left)} of {len(layers)} layers stay on PEFT's own path: {first}: {left[first]}",
            stacklevel=2,
        )
    if narrow := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in NARROW]:
        dtype = dtype_name(model.get_parameter(narrow[0]).dtype)
        warnings.warn(
            f"accelerate_peft: {listed(narrow, 3)} train in {dtype}, where small steps are lost: 1.0 + 0.001 is 1.0 in "
            "bfloat16; leave out autocast_adapter_dtype=False, or make them float() before the optimizer is built",
            stacklevel=2,
        )
    return model


def _accelerate(model: nn.Module, layers: dict[str, BaseTunerLayer]) -> None:
    for name, layer in layers.items():
        if type(layer) in LAYERS and _why_not_layer(layer) is None:
            layer._tinylora = _State(name)
            layer._tinylora.hook = layer.register_load_state_dict_post_hook(_refresh)
            layer.__class__ = LAYERS[type(layer)]
            if all(layer._why_not(name) for name in layer._adapters()):
                _restore(layer)
    for module in list(model.modules()):
        if type(module) in MODELS:
            module.__class__ = MODELS[type(module)]


def deaccelerate_peft(model: nn.Module) -> nn.Module:
    """Give every layer PEFT's own forward back; undoes accelerate_peft. Returns the same model."""
    finish(lambda: _restore_all(model.modules()))
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


def _restore_all(modules: Iterable[nn.Module]) -> None:
    for module in list(modules):
        if type(module) in ORIGINALS or isinstance(vars(module).get("_tinylora"), _State):
            _restore(module)


def _restore(module: nn.Module) -> None:
    state = vars(module).get("_tinylora")
    module.__class__ = ORIGINALS.get(type(module), type(module))
    if state is not None:
        if state.hook is not None:
            state.hook.remove()
        vars(module).pop("_tinylora")


def _refresh(layer: _Accelerated, incompatible_keys) -> None:
    """After tensors were loaded into a layer: compiled code, which cannot look at versions, finds the new factors."""
    if not layer.merged:
        for name in list(layer._tinylora.factors):
            layer._factors(name)


def _joined(parts: list[_Update]) -> _Update:
    """Several adapters as one, their vectors concatenated: P' gets rows for each, and a block for each other basis."""
    projections = [_matrices(part.projection) for part in parts]  # each [u_k, r_k, r_k]
    first = parts[0]
    if all(part.basis.shape == first.basis.shape and torch.equal(part.basis, first.basis) for part in parts):
        return _Update(first.basis, torch.cat(projections))
    rank, numbers = (sum(p.shape[axis] for p in projections) for axis in (1, 0))
    blocks = first.projection.new_zeros(numbers, rank, rank)
    row = column = 0
    for projection in projections:
        u, r, _ = projection.shape
        blocks[row : row + u, column : column + r, column : column + r] = projection
        row, column = row + u, column + r
    return _Update(torch.cat([part.basis for part in parts]), blocks)


def _matrices(projection: Tensor) -> Tensor:
    """[u, r, r] of either form: for M = projection * R every number of R has a matrix with one entry."""
    return projection if projection.dim() == 3 else torch.diag(projection.flatten()).unflatten(1, projection.shape)
