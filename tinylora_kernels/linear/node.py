"""A frozen linear layer and its update as one node of autograd. node.cpp is its twin: what is done here is done there.

Against the update behind torch's own linear this spares one node each way, which a small batch feels. The twin runs
instead with the native kernels where it is compiled (compiled.py); here is what runs beside any torch and Python.

A process may change from this one to its twin between any two calls (plan.take_twin): what the two save for the
backward pass is the same, number by number, since a checkpoint may take it from the other one. Layers that read one x
add up their dx in C++ alone (siblings.inl), and not in a process that has changed.
"""
from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..common import modes
from ..method.parts import PartFactors, block_coefficients
from ..ops.autograd import differentiable_gradients, run_update, update_gradients
from ..ops.dispatch import Backend
from ..ops.reference import product
from . import compiled
from .rules import GPU_ROWS, LAST_BACKWARD, LAST_FORWARD, PAST_WEIGHT, product_order

extension, why_no_twin = compiled.load()
twin = torch.ops.tinylora.linear.default if extension is not None else None
TWIN_BACKENDS = ("cpu", "cuda")

_is_compiling = torch.compiler.is_compiling


def backward_is_compiled() -> bool:
    """Whether compiled autograd is on, which refuses nodes in C++."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and getattr(dynamo.config, "compiled_autograd", False)


def take_twin(compiled_since: ModuleType) -> None:
    """Calls run the twin from now on."""
    global extension, why_no_twin, twin
    compiled_since.share_dx_from(sys.maxsize)  # never: dx would be rounded otherwise from some call on
    extension, why_no_twin, twin = compiled_since, None, torch.ops.tinylora.linear.default


class FrozenLinear(NamedTuple):
    """All that TinyLoRALinear holds still, as one argument: autograd takes every argument of a node apart."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    basis: Tensor  # [r, out]
    projection: Tensor  # [u, r, r] or [r, r]
    adapter_ids: Tensor | None
    right: Tensor | None  # [r, in] B^T = U^T W, where the order wants it
    samples: Tensor | None  # on a GPU, of the W that B^T is of: backend.refresh_right looks before each use
    order: int  # rules.product_order, 0 without right
    parts: PartFactors | None  # of a fused layer whose update goes part by part; with order 0
    backend: Backend

    def order_for(self, rows: Tensor) -> int:
        """The order of a call with these rows, x or g; 0 for few of them on a GPU."""
        if self.samples is None or rows.numel() >= GPU_ROWS * rows.shape[-1]:
            return self.order
        return 0


def order_of(weight: Tensor, bias: Tensor | None, backend: Backend) -> int:
    """rules.product_order where the backend can go around the product, else 0."""
    return product_order(weight, bias) if backend.low_rank is not None else 0


NO_PARTS: tuple[None, None, list[int]] = None, None, []


def apply_linear(x: Tensor, v: Tensor, frozen: FrozenLinear) -> Tensor:
    """The updated output of a linear layer, by the shortest node there is; by none where nothing wants a gradient."""
    compiling = _is_compiling()  # asked first: a graph that had looked at the twin would be of one that is not there
    live = torch.is_grad_enabled() and (v.requires_grad or x.requires_grad)
    if not compiling and twin is not None and frozen.backend.name in TWIN_BACKENDS and not modes.seen_by_a_mode():
        if not (live and backward_is_compiled()):
            return twin(x, v, *frozen[:-2], *(frozen.parts or NO_PARTS))
    if not live:
        return _updated_linear(x, v, frozen)[0]
    return TracedLinear.apply(x, v, frozen) if compiling else _apply_untransformed(x, v, frozen)[0]


if TYPE_CHECKING:

    class LinearContext(torch.autograd.function.FunctionCtx):
        """What the forward pass leaves for the backward pass."""

        needs_input_grad: tuple[bool, bool, bool]
        saved_tensors: tuple[Tensor | None, ...]  # t, where v wants a gradient; traced, also v and W
        v: Tensor
        versions: tuple[int, int, int]  # of v, W and U
        frozen: FrozenLinear
        shape: torch.Size

        def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class TinyLoRALinear(torch.autograd.Function):
    """y = x W^T + b and its update, W and b frozen: gradients into x and v; also t (ops/autograd.py says why).

    Saves t ([k, N, r] where the update goes part by part), and refers to v, W and U, with which B^T and the factors of
    parts are written (plan.py: take_factors).
    """

    @staticmethod
    def forward(ctx: LinearContext, x: Tensor, v: Tensor, frozen: FrozenLinear) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, t = _updated_linear(x, v, frozen)
        ctx.frozen, ctx.shape = frozen, y.shape
        ctx.v, ctx.versions = v, _versions(v, frozen)
        ctx.save_for_backward(t if v.requires_grad else None)
        return y, t

    @staticmethod
    def backward(
        ctx: LinearContext, g: Tensor | None, g_t: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if g is None and g_t is None:
            return None, None, None
        (t,), v, weight = ctx.saved_tensors, ctx.v, ctx.frozen.weight
        if _versions(v, ctx.frozen) != ctx.versions:
            _raise_modified(ctx)
        if g is not None and g_t is None and not torch.is_grad_enabled() and not modes.is_taken_apart(g):
            return _gradients(ctx, g, t, v)
        basis, adapter_ids = ctx.frozen.basis, ctx.frozen.adapter_ids
        g = weight.new_zeros(ctx.shape) if g is None else g
        if ctx.frozen.parts is not None:  # as one update of the rank of all parts
            t, g_t = (None if one is None else block_coefficients(one, len(basis)) for one in (t, g_t))
        g0, dv = differentiable_gradients(g, g_t, basis, v, ctx.frozen.projection, t, adapter_ids)
        # dx = g0 W
        return product(g0, weight) if ctx.needs_input_grad[0] else None, dv, None


class TracedLinear(torch.autograd.Function):
    """The same while tracing, where there are no second derivatives, and nothing is seen but what is saved."""

    @staticmethod
    def forward(ctx: LinearContext, x: Tensor, v: Tensor, frozen: FrozenLinear) -> Tensor:
        y, t = _updated_linear(x, v, frozen)
        ctx.frozen = frozen
        ctx.save_for_backward(t if v.requires_grad else None, v, frozen.weight)
        return y

    @staticmethod
    def backward(ctx: LinearContext, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        t, v, _ = ctx.saved_tensors
        assert v is not None  # as it was saved
        return _gradients(ctx, g, t, v)


# What Function.apply comes to outside torch.func's transforms and torch.compile, less its search of the arguments for
# wrappers that a transform has left behind: 3 us of 14 with nine arguments, 2 of 12 with three (at 9d8989d).
_apply_untransformed = super(torch.autograd.Function, TinyLoRALinear).apply


def _versions(v: Tensor, frozen: FrozenLinear) -> tuple[int, int, int]:
    return version_of(v), version_of(frozen.weight), version_of(frozen.basis)


def version_of(tensor: Tensor) -> int:
    """torch's count of the writes into it; 0 of an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version


def _raise_modified(ctx: LinearContext) -> None:
    """In the words of torch, where it had saved them."""
    named = ("v", ctx.v), ("the frozen weight", ctx.frozen.weight), ("its basis", ctx.frozen.basis)
    for (name, tensor), version, expected in zip(named, _versions(ctx.v, ctx.frozen), ctx.versions, strict=True):
        if version != expected:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{name} {list(tensor.shape)} is at version {version}; expected version {expected} instead."
            )


def _gradients(
    ctx: LinearContext, g: Tensor, t: Tensor | None, v: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    if torch.is_autocast_enabled(g.device.type):  # it would cast the product
        with torch.autocast(g.device.type, enabled=False):
            return _gradients(ctx, g, t, v)
    weight, _, basis, projection, adapter_ids, right, _, _, parts, backend = ctx.frozen
    order = ctx.frozen.order_for(g)
    if order & PAST_WEIGHT and ctx.needs_input_grad[0]:
        assert right is not None and backend.update_input_grad is not None  # or the order were 0
        g = g.contiguous()
        last = order & LAST_BACKWARD
        # dx = (a M) B^T + g W
        dx = g.new_empty((*g.shape[:-1], weight.shape[1])) if last else torch.matmul(g, weight)
        dv = backend.update_input_grad(dx, right, g, basis, v, projection, t, adapter_ids, not last)
        if last:
            _add_product(dx, g, weight)
        return dx, (None if t is None else dv), None
    if parts is not None:
        groups = [0] * len(parts.ends)
        g_parts, dv_parts = backend.update_parts_backward(
            g.contiguous(), parts.basis, v[None], parts.projection, t, adapter_ids, parts.ends, groups,
            ctx.needs_input_grad[0],
        )  # fmt: skip
        return (
            torch.matmul(g_parts, weight) if ctx.needs_input_grad[0] else None,
            None if t is None else dv_parts[0],
            None,
        )
    g0, dv_or_none = update_gradients(g, basis, v, projection, t, adapter_ids, ctx.needs_input_grad[0], backend)
    # dx = g0 W
    return None if g0 is None else torch.matmul(g0, weight), dv_or_none, None


def _updated_linear(x: Tensor, v: Tensor, frozen: FrozenLinear) -> tuple[Tensor, Tensor]:
    """The updated output, fresh and no view of another tensor, and t [N, r]."""
    weight, bias, basis, projection, adapter_ids, right, samples, _, parts, backend = frozen
    order = frozen.order_for(x)
    if order and samples is not None:
        assert right is not None and backend.refresh_right is not None  # or there were no samples
        backend.refresh_right(right, samples, weight, basis, False)
    if order & LAST_FORWARD:
        assert right is not None and backend.low_rank is not None  # or the order were 0
        x = x.contiguous()
        # y = b + (t M^T) U^T + x W^T
        y, t = backend.low_rank(x, right, basis, v, projection, bias, adapter_ids)
        _add_product(y, x, weight.t())
        return y, t
    y = torch.nn.functional.linear(x, weight).contiguous()
    if parts is not None:
        return y, backend.update_parts(
            y, parts.basis, v[None], parts.projection, None, bias, None, None, adapter_ids, parts.ends,
            [0] * len(parts.ends),
        )  # fmt: skip
    return run_update(backend, y, basis, v, projection, None, bias, adapter_ids)


def _add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """total += rows @ matrix over the last dimension, in place; total and rows are contiguous."""
    if total.dim() != 2:
        total, rows = total.view(-1, total.shape[-1]), rows.view(-1, rows.shape[-1])
    total.addmm_(rows, matrix)
