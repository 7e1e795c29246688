"""A frozen linear layer and its update as one node of autograd. node.cpp is its twin: what is done here is done there.

Against the update behind torch's own linear this spares one node each way, which a small batch feels. The twin runs
instead on the CPU where it is compiled (build.py); here is what runs beside any torch and Python, and on a GPU.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.autograd import update_gradients
from ..ops.dispatch import Backend
from . import build
from .rules import LAST_BACKWARD, LAST_FORWARD, PAST_WEIGHT, product_order

extension, why_no_twin = build.load()
twin = torch.ops.tinylora.linear.default if extension is not None else None
TWIN_BACKENDS = ("cpu",)

_in_transform = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling


class FrozenLinear(NamedTuple):
    """All that TinyLoRALinear holds still, as one argument: autograd takes every argument of a node apart."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    basis: Tensor  # [r, out]
    projection: Tensor  # [u, r, r] or [r, r]
    offset: Tensor | None  # [r]
    adapter_ids: Tensor | None
    right: Tensor | None  # [r, in] B^T = U^T W, where the order wants it
    order: int  # rules.product_order, 0 without right
    backend: Backend


def order_of(weight: Tensor, bias: Tensor | None, backend: Backend) -> int:
    """rules.product_order where the backend can go around the product, else 0."""
    return product_order(weight, bias) if backend.low_rank is not None else 0


def apply_linear(x: Tensor, v: Tensor, frozen: FrozenLinear) -> Tensor:
    """The updated output of a linear layer, by the shortest node there is; by none where nothing wants a gradient."""
    traced = _in_transform() or _is_compiling()
    if twin is not None and frozen.backend.name in TWIN_BACKENDS and not traced:
        return twin(x, v, *frozen[:-1])
    if torch.is_grad_enabled() and (v.requires_grad or x.requires_grad):
        return (TinyLoRALinear.apply if traced else _apply_outside_transforms)(x, v, frozen)
    return _updated_linear(x, v, frozen)[0]


class TinyLoRALinear(torch.autograd.Function):
    """y = x W^T + b and its update, W and b frozen: gradients into x and v. Saves t, and refers to W."""

    @staticmethod
    def forward(ctx, x, v, frozen: FrozenLinear):
        y, t = _updated_linear(x, v, frozen)
        ctx.frozen = frozen
        ctx.save_for_backward(t if v.requires_grad else None, v, frozen.weight)  # a W changed since is an error
        return y

    @staticmethod
    def backward(ctx, g):
        return _BACKWARD_ONCE(ctx, g) if torch.is_grad_enabled() else _backward(ctx, g)


def _backward(ctx, g):
    t, v, weight = ctx.saved_tensors
    _, _, basis, projection, _, adapter_ids, right, order, backend = ctx.frozen
    if order & PAST_WEIGHT and ctx.needs_input_grad[0]:
        g = g.contiguous()
        last = order & LAST_BACKWARD
        # dx = (a M) B^T + g W
        dx = g.new_empty((*g.shape[:-1], weight.shape[1])) if last else torch.matmul(g, weight)
        dv = backend.update_input_grad(dx, right, g, basis, v, projection, t, adapter_ids, not last)
        if last:
            _add_product(dx, g, weight)
        return dx, (None if t is None else dv), None
    g0, dv = update_gradients(g, basis, v, projection, t, adapter_ids, ctx.needs_input_grad[0], backend)
    # dx = g0 W
    dx = None if g0 is None else torch.matmul(g0, weight)
    return dx, dv, None


# create_graph=True: second derivatives are an error, not zero.
_BACKWARD_ONCE = torch.autograd.function.once_differentiable(_backward)
# What Function.apply comes to outside torch.func's transforms and torch.compile, less its search of the arguments for
# wrappers that a transform has left behind: 3 us of 14 with nine arguments, 2 of 12 with three.
_apply_outside_transforms = super(torch.autograd.Function, TinyLoRALinear).apply


def _updated_linear(x: Tensor, v: Tensor, frozen: FrozenLinear) -> tuple[Tensor, Tensor]:
    """The updated output, fresh and no view of another tensor, and t [N, r]."""
    weight, bias, basis, projection, offset, adapter_ids, right, order, backend = frozen
    if order & LAST_FORWARD:
        x = x.contiguous()
        # y = b + (t M^T) U^T + x W^T
        y, t = backend.low_rank(x, right, basis, v, projection, bias, adapter_ids)
        _add_product(y, x, weight.t())
        return y, t
    y = frozen_linear(x, weight, bias)
    return y, backend.update(y, basis, v, projection, offset, adapter_ids)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as a fresh contiguous tensor that is no view of another."""
    y = torch.nn.functional.linear(x, weight, bias).contiguous()
    # With a bias and more than two dimensions y is a view of its matmul, which autograd would have to track.
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


def _add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """total += rows @ matrix over the last dimension, in place; total and rows are contiguous."""
    if total.dim() != 2:
        total, rows = total.view(-1, total.shape[-1]), rows.view(-1, rows.shape[-1])
    total.addmm_(rows, matrix)
