"""The short way through an adapted nn.Linear: what one call found out about the layer serves the next ones.

Generation streams every weight through the caches, so whatever Python touches for a layer has to come from memory again.
Over 120 layers of 768 x 768 at one token (1 thread, median), an adapted layer cost 20 to 24 us more than the bare one with
all questions asked, 14 to 15 with a plan, and 6 to 8 with nothing asked at all.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .frozen import PLAIN
from .ops import BACKENDS, FrozenLinear, apply_linear, choose, dispatch
from .ops.schema import accumulation_dtype

_all_modules = nn.modules.module
_changes = 0  # attributes set on adapted layers so far, in the whole process


def note_change() -> None:
    """An adapted layer is not what it was: no plan holds any more. Tie groups make one layer's v another's."""
    global _changes
    _changes += 1


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
        or _all_modules._global_forward_hooks
        or _all_modules._global_forward_pre_hooks
        or _all_modules._global_backward_hooks
        or _all_modules._global_backward_pre_hooks
    )


def is_plain_linear(base: nn.Module, x: Tensor) -> bool:
    """Whether base(x), hooks aside, is x W^T + b on frozen tensors, with nothing that wants to see the call.

    Not so with tensor subclasses (quantised or sharded weights), under autocast, while tracing, where a library has
    put its own ``forward`` on the module (offloading), or where the base is being trained.
    """
    if type(base) is not nn.Linear or "forward" in base.__dict__ or torch.compiler.is_compiling():
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # a DataParallel replica has neither
    return (
        type(x) in PLAIN and type(weight) in PLAIN and x.dtype is weight.dtype and not weight.requires_grad
        and (bias is None or (type(bias) in PLAIN and not bias.requires_grad))
        and not torch.is_autocast_enabled(x.device.type)
    )  # fmt: skip


class Plan(NamedTuple):
    """How to run a layer for as long as its tensors are these very objects and no adapted layer was changed."""

    changes: int
    requested: str | None  # backend
    state: dict[str, Any]  # __dict__ of the nn.Linear
    dtype: torch.dtype
    device_type: str
    buffers: dict[str, Tensor | None]
    parameters: dict[str, Tensor | None]  # of the layer that holds v
    v: Tensor
    frozen: FrozenLinear

    def run(self, x: Tensor) -> Tensor | None:
        """The adapted output, or None where something is not as it was: then the questions must be asked again."""
        changes, requested, state, dtype, device_type, buffers, parameters, v, frozen = self
        weight, bias, basis, projection, offset, _, backend = frozen
        own = state["_parameters"]
        if (
            changes != _changes
            or own["weight"] is not weight or own["bias"] is not bias
            or parameters["v"] is not v or buffers["basis"] is not basis
            or type(x) is not Tensor or x.dtype is not dtype  # a weight of another dtype by now is an error to come
            or _has_hooks(state) or "forward" in state
            or dispatch.requested is not requested or torch.is_autocast_enabled(device_type)
            or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):  # fmt: skip
            return None
        if torch.is_grad_enabled() and (v.requires_grad or x.requires_grad):
            return apply_linear(x, v, frozen)
        y = nn.functional.linear(x, weight, bias)
        if not y.is_contiguous():
            return None
        backend.update(y, basis, v, projection, offset, None)
        return y


def make_plan(layer: nn.Module, owner: nn.Module) -> Plan | None:
    """A plan for a layer whose base is_plain_linear; None where its small tensors need work at every call."""
    base, buffers, v = layer._modules["base"], layer._buffers, owner._parameters["v"]
    weight, basis = base._parameters["weight"], buffers["basis"]
    accumulate = accumulation_dtype(weight.dtype)
    if basis.dtype is not accumulate or v.dtype is not accumulate or v.device != basis.device:
        return None
    backend = BACKENDS[choose(weight.device.type, weight.dtype, basis.shape[0], layer.backend)]
    bias, projection, offset = base._parameters["bias"], buffers["projection"], buffers["offset"]
    return Plan(
        _changes, dispatch.requested, base.__dict__, weight.dtype, weight.device.type, buffers, owner._parameters, v,
        FrozenLinear(weight, bias, basis, projection, offset, None, backend),
    )  # fmt: skip
