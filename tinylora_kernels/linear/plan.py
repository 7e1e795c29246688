"""The short way through an adapted nn.Linear: what one call found out about the layer serves the next ones.

Generation streams every weight through the caches, so whatever Python touches for a layer has to come from memory
again: asking all questions took longer than the update (bench/results/dispatch.csv). Where node.cpp is compiled,
plan.inl is the twin of Plan: what asks here must ask there.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..base.weights import PLAIN, right_factor
from ..base.witness import Witness, witness
from ..common import modes, scope
from ..method.parts import PartFactors, part_factors
from ..ops import BACKENDS, choose, dispatch
from ..ops.dispatch import Backend
from ..ops.native import library as native
from ..ops.schema import accumulation_dtype, samples_shape
from . import compiled, node
from .node import FrozenLinear, apply_linear
from .rules import by_parts, wants_right

_all_modules = nn.modules.module
_GLOBAL_HOOKS = (
    _all_modules._global_forward_hooks, _all_modules._global_forward_pre_hooks,
    _all_modules._global_backward_hooks, _all_modules._global_backward_pre_hooks,
)  # fmt: skip
_in_transform = torch._C._are_functorch_transforms_active
_modes_on = torch._C._len_torch_dispatch_stack
twin = node.extension.Plan if node.extension is not None else None
_numbers = itertools.count(1)  # no two threads draw the same
_NEVER = -1, 0  # no weight was written then
_changes = 0  # the last change of an adapted layer, of all in the process


def note_change() -> None:
    """An adapted layer is not what it was: no plan holds any more. Tie groups make one layer's v another's."""
    global _changes
    _changes = next(_numbers)


def take_twin(extension: ModuleType) -> None:
    """Layers run the node and the plan in C++ from their next call on, whichever thread and pass they are in.

    That changes no number. A graph keeps the nodes it was made of, and a checkpoint that runs again finds the same t in
    either; what was traced has never looked at the twin; and a plan that was made in Python does not hold any more.
    """
    global twin
    node.take_twin(extension)
    twin = extension.Plan
    note_change()


def changes() -> int:
    """The last one, to be read before the questions whose answers a plan holds."""
    return _changes


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook may hold the module's output, change its input, or stand between it and autograd."""
    return _has_hooks(module.__dict__)


def _has_hooks(state: dict) -> bool:
    """Of the module with these attributes: looked up through the module, each costs as much as all of them here."""
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or any(_GLOBAL_HOOKS)
    )


def is_bare_product(base: nn.Module, x: Tensor) -> bool:
    """Of a layer whose forward is x W^T + b: whether it is so on this call, hooks aside. Not with tensor subclasses
    (quantised or sharded weights), nor with a ``forward`` that a library has put on the module (offloading), nor of a
    nested or sparse x.
    """
    if "forward" in base.__dict__ or not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided:
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # a DataParallel replica has neither
    return type(x) in PLAIN and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)


def is_plain_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Whether a call of an nn.Linear that is_bare_product has frozen tensors of one dtype, no autocast, no tracer."""
    return (
        not torch.compiler.is_compiling() and x.dtype is weight.dtype and not weight.requires_grad
        and (bias is None or (bias.dtype is weight.dtype and not bias.requires_grad))
        and not torch.is_autocast_enabled(x.device.type)
    )  # fmt: skip


class Bank(Protocol):
    """What is asked here of a bank.AdapterBank."""

    tables: dict[int, Tensor]  # tie group -> [K, u]
    selected: ContextVar[Any]


class Layer(Protocol):
    """What is asked here of a TinyLoRALayer, whose room is above this one."""

    backend: str | None
    group: int
    parts: tuple[int, ...] | None  # output rows of each part of a fused layer
    _modules: dict[str, nn.Module | None]
    _buffers: dict[str, Tensor | None]
    _parameters: dict[str, nn.Parameter | None]

    @property
    def bank(self) -> Bank | None: ...


class Buffers(TypedDict):
    """Of a TinyLoRALayer."""

    basis: Tensor  # [r, out]
    sigma: Tensor
    projection: Tensor  # [u, r, r] or [r, r]


class LinearParameters(TypedDict):
    """Of an nn.Linear."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Chosen(NamedTuple):
    """What a bank's selection has for the rows of one layer: bank.Selection.of."""

    selection: Any
    vectors: Tensor  # [K, u]
    projection: Tensor
    adapter_ids: Tensor  # [B]
    holds_for: tuple[int, int] | None  # dimensions and first size of inputs with these ids, 0: any; None: this one


class HeldRight(NamedTuple):
    """B^T of a layer, and what it was computed from.

    With samples, a captured graph may read both and write into them for as long as the layer lives: they stay where
    they are, and what changes is written into them.
    """

    weight: Tensor
    written: tuple[int, int]  # the weight's version and address
    witness: Witness | None
    same_numbers: Callable[[int], bool] | None  # whether the witness knows what is at an address of the CPU
    samples: Tensor | None  # instead of a witness, where the node has the device look at each use: refresh_right
    basis: Tensor
    right: Tensor

    def is_of(self, weight: Tensor, basis: Tensor) -> bool:
        same = self.weight is weight and self.basis is basis and _written(weight) == self.written
        return same and self.has_same_numbers(weight)

    def is_kept_for(self, weight: Tensor, basis: Tensor) -> bool:
        """Whether B^T of this weight goes where this one lies. Not of another, whose old one autograd may want."""
        return (
            self.samples is not None and self.weight is weight
            and self.right.device == weight.device == basis.device
            and self.right.shape == (len(basis), weight.shape[1])
            and self.right.dtype is accumulation_dtype(weight.dtype)
        )  # fmt: skip

    def has_same_numbers(self, weight: Tensor) -> bool:
        """Of a weight that torch counts no write into since, and that may have been written through its .data."""
        if self.witness is None:
            return True
        return self.same_numbers(weight.data_ptr()) if self.same_numbers is not None else self.witness.knows(weight)


class Plan(NamedTuple):
    """How to run a layer for as long as its tensors are these very objects and no adapted layer was changed."""

    changes: int
    written: tuple[int, int]  # the weight's version and address: what B^T = U^T W was computed from
    requested: str | None  # backend
    state: dict[str, Any]  # __dict__ of the nn.Linear
    dtype: torch.dtype
    device_type: str
    buffers: dict[str, Tensor | None]
    parameters: Mapping[str, Tensor | None]  # of the layer that holds v
    v: Tensor
    lacks_right: bool  # the first x that wants a gradient wants B^T as well
    held: HeldRight | None
    frozen: FrozenLinear
    selected: ContextVar[Any] | None  # of the layer's bank
    selection: Any  # what it holds inside the block of bank.use that the plan is for
    dimensions: int  # and first size of the inputs whose rows have these ids, 0: any
    first_size: int
    table: Tensor | None  # of a bank that trains, where v is not it but was computed from it, without gradients:
    computed_at: int  # its version

    def run(self, x: Tensor) -> Tensor | None:
        """The adapted output, or None where something is not as it was: then the questions must be asked again."""
        changes, written, requested, state, dtype, device_type, buffers, parameters, v, lacks_right = self[:10]
        weight, bias, basis = self.frozen[:3]
        own = state["_parameters"]
        try:
            if (
                changes != _changes
                or own["weight"] is not weight or own["bias"] is not bias
                or parameters["v"] is not v or buffers["basis"] is not basis
                or type(x) is not Tensor or x.dtype is not dtype  # a weight of another dtype by now is an error to come
                or x.is_nested or x.layout is not torch.strided
                or _has_hooks(state) or "forward" in state
                or dispatch.requested is not requested or torch.is_autocast_enabled(device_type)
                or weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype is not dtype))
                or (weight._version, weight.data_ptr()) != written
                or v.dtype is not basis.dtype or not v.is_contiguous()  # v.data was set
                or _in_transform() or forward_ad._current_level >= 0 or _modes_on()
                or (lacks_right and x.requires_grad and torch.is_grad_enabled())
                or (self.selected is not None and not self._selects(x))
                or ((scope.nodes_in_blocks or self.selected is not None) and scope.in_backward())  # in another block?
            ):  # fmt: skip
                return None
        except KeyError:  # a tensor that was a parameter is computed from others now: weight_norm, pruning
            return None
        y = apply_linear(x, v, self.frozen)
        # Heard after the product, which has just brought the weight into the caches.
        return y if self.held is None or self.held.has_same_numbers(weight) else None

    def _selects(self, x: Tensor) -> bool:
        assert self.selected is not None
        if self.dimensions and (x.dim() != self.dimensions or x.shape[0] != self.first_size):
            return False
        if self.table is not None and (torch.is_grad_enabled() or self.table._version != self.computed_at):
            return False
        return self.selected.get() is self.selection


def make_plan(
    layer: Layer, owner: Layer, held: HeldRight | None, chosen: Chosen | None, asked_at: int
) -> Plan | None:
    """A plan for a layer whose base is_plain_linear; None where its small tensors need work at every call.

    Args:
        owner: the layer that holds v.
        held: B^T, where right_for has it for calls like those to come.
        chosen: the vectors that the layer's bank has for the rows, instead of v.
        asked_at: changes() before the layer was asked anything.
    """
    base, buffers = cast(nn.Linear, layer._modules["base"]), cast(Buffers, layer._buffers)
    parameters: Mapping[str, Tensor | None] = owner._parameters
    projection, adapter_ids = buffers["projection"], None
    of_bank: tuple[ContextVar[Any] | None, Any, int, int, Tensor | None, int] = None, None, 0, 0, None, 0
    if chosen is not None and layer.bank is not None:
        selection, vectors, projection, adapter_ids, holds_for = chosen
        if holds_for is None:
            return None
        table = layer.bank.tables[layer.group] if selection.live else None
        if vectors is table:
            table = None
        elif table is not None and torch.is_grad_enabled():  # computed from it for this call
            return None
        computed_at = 0 if table is None else table._version
        parameters, of_bank = {"v": vectors}, (layer.bank.selected, selection, *holds_for, table, computed_at)
    v, basis = cast(Tensor, parameters["v"]), buffers["basis"]
    own = cast(LinearParameters, base._parameters)
    weight, bias = own["weight"], own["bias"]
    accumulate = accumulation_dtype(weight.dtype)
    if basis.dtype is not accumulate or v.dtype is not accumulate or v.device != basis.device:
        return None
    if not (v.is_contiguous() and basis.is_contiguous() and projection.is_contiguous()):  # to be copied at every call
        return None
    if weight.is_inference():  # it has no version
        return None
    backend = BACKENDS[choose(weight.device.type, weight.dtype, basis.shape[0], layer.backend)]
    parts = parts_for(layer, projection)
    order = 0 if parts is not None else node.order_of(weight, bias, backend)
    lacks_right = held is None and wants_right(order, training=True)
    right, samples = (None, None) if held is None else (held.right, held.samples)
    frozen = FrozenLinear(
        weight, bias, basis, projection, adapter_ids, right, samples, 0 if held is None else order, parts, backend
    )
    plan = Plan(
        asked_at, _written(weight), dispatch.requested, base.__dict__, weight.dtype, weight.device.type, layer._buffers,
        parameters, v, lacks_right, held, frozen, *of_bank,
    )  # fmt: skip
    if backend.name not in node.TWIN_BACKENDS or node.backward_is_compiled():
        return plan
    if node.extension is None:
        compiled.wanted(take_twin)
    return plan if twin is None else twin(plan, globals(), vars(dispatch), vars(scope), _GLOBAL_HOOKS)


class HeldParts(NamedTuple):
    """The factors of a layer's parts, and what they were taken from."""

    basis: Tensor
    projection: Tensor
    factors: PartFactors


def parts_for(layer: Layer, projection: Tensor) -> PartFactors | None:
    """Of a fused layer whose base is_plain_linear, where its update goes part by part; None with another's P'."""
    buffers = cast(Buffers, layer._buffers)
    if layer.parts is None or projection is not buffers["projection"]:
        return None
    weight = cast(LinearParameters, cast(nn.Linear, layer._modules["base"])._parameters)["weight"]
    if not by_parts(weight):
        return None
    basis = buffers["basis"]
    held: HeldParts | None = layer.__dict__["_parts"]
    if held is None or held.basis is not basis or held.projection is not projection:
        held = layer.__dict__["_parts"] = _hold_parts(layer, layer.parts)
    return held.factors


@modes.outside_inference_mode  # they will be written again
def _hold_parts(layer: Layer, parts: tuple[int, ...]) -> HeldParts:
    buffers = cast(Buffers, layer._buffers)
    basis, projection = buffers["basis"], buffers["projection"]
    with modes.out_of_sight():
        return HeldParts(basis, projection, part_factors(basis, projection, buffers["sigma"].shape[1], parts))


def right_for(layer: Layer, x: Tensor) -> HeldRight | None:
    """B^T = U^T W [r, in] of a layer whose base is_plain_linear, where x will pass it faster with it.

    Computed once for each state of the weight that can be told apart: the base is frozen.
    """
    own = cast(LinearParameters, cast(nn.Linear, layer._modules["base"])._parameters)
    weight, basis = own["weight"], cast(Buffers, layer._buffers)["basis"]
    if weight.is_inference():  # it has no version
        return None
    backend = BACKENDS[choose(weight.device.type, weight.dtype, basis.shape[0], layer.backend)]
    order = node.order_of(weight, own["bias"], backend)
    if not wants_right(order, training=x.requires_grad and torch.is_grad_enabled()):
        return None
    held: HeldRight | None = layer.__dict__["_right"]
    if held is None or not held.is_of(weight, basis):
        with modes.out_of_sight():
            held = layer.__dict__["_right"] = _compute_right(weight, basis, backend, held)
    return held


@modes.outside_inference_mode
def take_factors(layer: Layer) -> None:
    """U and P' of a layer have been written: what is held of them is of the new ones, and where it was."""
    own = cast(nn.Module, layer._modules["base"])._parameters
    held: HeldRight | None = layer.__dict__["_right"]
    parts: HeldParts | None = layer.__dict__["_parts"]
    layer.__dict__.update(_plan=None, _right=None, _parts=None)
    weight, basis = own.get("weight"), cast(Buffers, layer._buffers)["basis"]
    if held is not None and weight is not None and held.is_kept_for(weight, basis):
        backend = BACKENDS[choose(weight.device.type, weight.dtype, len(basis), layer.backend)]
        if backend.refresh_right is not None:
            layer.__dict__["_right"] = _compute_right(weight, basis, backend, held)
    if parts is not None and layer.parts is not None:
        found = _hold_parts(layer, layer.parts)
        pairs = list(zip(parts.factors[:2], found.factors[:2], strict=True))
        if all(old.shape == new.shape and old.device == new.device and old.dtype is new.dtype for old, new in pairs):
            for old, new in pairs:
                old.copy_(new)
            found = found._replace(factors=parts.factors)
        layer.__dict__["_parts"] = found


def doubt_right(layer: Layer) -> None:
    """The weight may hold other numbers now, though nothing tells."""
    held: HeldRight | None = layer.__dict__["_right"]
    weight = cast(nn.Module, layer._modules["base"])._parameters.get("weight")
    kept = held is not None and weight is not None and held.is_kept_for(weight, held.basis)
    layer.__dict__["_right"] = held._replace(written=_NEVER) if held is not None and kept else None


@modes.outside_inference_mode  # it will be written again
def _compute_right(weight: Tensor, basis: Tensor, backend: Backend, held: HeldRight | None) -> HeldRight:
    """Where that of before lies, if it may be there."""
    written, exact_basis = _written(weight), basis.to(accumulation_dtype(weight.dtype))
    if backend.refresh_right is not None:
        if held is not None and held.samples is not None and held.is_kept_for(weight, basis):
            right, samples = held.right, held.samples
        else:
            right = exact_basis.new_empty(len(basis), weight.shape[1])
            samples = right.new_empty(samples_shape(weight.shape[1]), dtype=torch.int32)
        backend.refresh_right(right, samples, weight, exact_basis, True)
        return HeldRight(weight, written, None, None, samples, basis, right)
    right, known = right_factor(exact_basis, weight), witness(weight)
    on_cpu = weight.device.type == "cpu" and not native.load().error
    same_numbers = native.same_numbers(known.offsets, known.bits) if on_cpu else None
    return HeldRight(weight, written, known, same_numbers, None, basis, right)


def _written(weight: Tensor) -> tuple[int, int]:
    """What changes when other values come into a weight, but for what is written through its .data: Witness."""
    return node.version_of(weight), weight.data_ptr()
