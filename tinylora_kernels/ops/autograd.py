"""Registration of the ops with torch (fakes, fallbacks) and their gradient.

A torch.autograd.Function outside the ops costs about 25 us a call pair less than register_autograd, and lets the
update stay in place on the frozen layer's fresh output.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import native, reference, triton_kernels
from .checks import check_arguments, check_input_grad, check_low_rank
from .dispatch import BACKENDS, Backend
from .linear_rules import product_last, product_last_in_backward, updates_input_grad
from .schema import accumulation_dtype, library

# The library fills the CPU key and, if built for it, the CUDA key. Whatever is left falls to Triton or the reference.
status = native.load()
if not status.has_cuda and triton_kernels.why_not("cuda", torch.float32, 2) is None:
    library.impl("update", triton_kernels.update, "CUDA")
    library.impl("update_backward", triton_kernels.update_backward, "CUDA")
library.impl("update", reference.update, "CompositeExplicitAutograd")
library.impl("update_backward", reference.update_backward, "CompositeExplicitAutograd")
library.impl("low_rank", reference.low_rank, "CompositeExplicitAutograd")
library.impl("update_input_grad", reference.update_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("tinylora::update")
def _(y, basis, v, projection, offset, adapter_ids):
    check_arguments("y", y, basis, v, projection, offset=offset, adapter_ids=adapter_ids)
    return y.new_empty((_rows(y), basis.shape[0]), dtype=accumulation_dtype(y.dtype))


@torch.library.register_fake("tinylora::update_backward")
def _(g, basis, v, projection, t, adapter_ids, need_input_grad):
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    g0 = g.new_empty(g.shape) if need_input_grad else g.new_empty(0)
    return g0, v.new_empty(v.shape if t is not None else (0,))


@torch.library.register_fake("tinylora::low_rank")
def _(x, right, basis, v, projection, bias, adapter_ids):
    check_arguments("x", x, right, v, projection, adapter_ids=adapter_ids, basis_name="right")
    check_low_rank(x, right, basis, bias)
    t = x.new_empty((_rows(x), right.shape[0]), dtype=accumulation_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], basis.shape[1])), t


@torch.library.register_fake("tinylora::update_input_grad")
def _(dx, right, g, basis, v, projection, t, adapter_ids, add):
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    check_input_grad(dx, right, g, basis)
    return v.new_empty(v.shape if t is not None else (0,))


def _rows(y: Tensor):
    rows = 1
    for size in y.shape[:-1]:
        rows = rows * size
    return rows


class TinyLoRAUpdate(torch.autograd.Function):
    """y <- y + ((y U - c) M^T) U^T in place, with gradients into y and v. Saves t: r numbers a row, nothing else."""

    @staticmethod
    def forward(ctx, y, basis, v, projection, offset, adapter_ids, backend: str):
        t = BACKENDS[backend].update(y, basis, v, projection, offset, adapter_ids)
        ctx.mark_dirty(y)
        # The frozen factors go on ctx: saving a tensor costs a microsecond each way, and nobody writes into these.
        ctx.frozen = basis, projection, adapter_ids, BACKENDS[backend].update_backward
        ctx.save_for_backward(t if ctx.needs_input_grad[2] else None, v)
        return y

    @staticmethod
    def backward(ctx, g):
        return _UPDATE_BACKWARD_ONCE(ctx, g) if torch.is_grad_enabled() else _update_backward(ctx, g)


def _update_backward(ctx, g):
    t, v = ctx.saved_tensors
    g0, dv = _gradients(ctx, g, t, v)
    return g0, None, dv, None, None, None, None


def _gradients(ctx, g: Tensor, t: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """g0 where the first input needs a gradient, dv where t was saved for it."""
    basis, projection, adapter_ids, update_backward = ctx.frozen
    need_input_grad = ctx.needs_input_grad[0]
    # Expanded gradients (sum, mean) have stride 0.
    g0, dv = update_backward(g.contiguous(), basis, v, projection, t, adapter_ids, need_input_grad)
    return (g0 if need_input_grad else None), (None if t is None else dv)


class FrozenLinear(NamedTuple):
    """All that TinyLoRALinear holds still, as one argument: autograd takes every argument of a node apart."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    basis: Tensor  # [r, out]
    projection: Tensor  # [u, r, r] or [r, r]
    offset: Tensor | None  # [r]
    adapter_ids: Tensor | None
    right: Tensor | None  # [r, in] B^T = U^T W, for backends with low_rank
    backend: Backend


class TinyLoRALinear(torch.autograd.Function):
    """y = x W^T + b and its update, W and b frozen, as one node: gradients into x and v. Saves t, and refers to W.

    Against the update behind torch's own linear this spares one node each way, which a small batch feels. What runs
    instead on the CPU is linear_node.cpp, where that is compiled.
    """

    @staticmethod
    def forward(ctx, x, v, frozen: FrozenLinear):
        weight, _, basis, projection, _, adapter_ids, right, backend = frozen
        y, t = _updated_linear(x, v, frozen)
        ctx.frozen = basis, projection, adapter_ids, backend.update_backward
        past_weight = right is not None and backend.low_rank is not None and updates_input_grad(weight)
        ctx.right = (right, backend.update_input_grad) if past_weight else None
        ctx.save_for_backward(t if v.requires_grad else None, v, weight)  # a W changed since is an error
        return y

    @staticmethod
    def backward(ctx, g):
        return _LINEAR_BACKWARD_ONCE(ctx, g) if torch.is_grad_enabled() else _linear_backward(ctx, g)


def _linear_backward(ctx, g):
    t, v, weight = ctx.saved_tensors
    if ctx.right is not None and ctx.needs_input_grad[0]:
        right, update_input_grad = ctx.right
        basis, projection, adapter_ids, _ = ctx.frozen
        g = g.contiguous()
        last = product_last_in_backward(weight)
        # dx = (a M) B^T + g W
        dx = g.new_empty((*g.shape[:-1], weight.shape[1])) if last else torch.matmul(g, weight)
        dv = update_input_grad(dx, right, g, basis, v, projection, t, adapter_ids, not last)
        if last:
            _add_product(dx, g, weight)
        return dx, (None if t is None else dv), None
    g0, dv = _gradients(ctx, g, t, v)
    # dx = g0 W
    dx = None if g0 is None else torch.matmul(g0, weight)
    return dx, dv, None


# What Function.apply comes to outside torch.func's transforms and torch.compile, less its search of the arguments for
# wrappers that a transform has left behind: 3 us of 14 with nine arguments, 2 of 12 with three.
_apply_outside_transforms = super(torch.autograd.Function, TinyLoRALinear).apply
_in_transform = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling


def apply_linear(x: Tensor, v: Tensor, frozen: FrozenLinear) -> Tensor:
    """The updated output of a linear layer, by the shortest node there is; without one where nothing wants a gradient."""
    weight, bias, basis, projection, offset, adapter_ids, right, backend = frozen
    traced = _in_transform() or _is_compiling()
    if backend.linear is not None and not traced:
        return backend.linear(x, v, weight, bias, basis, projection, offset, adapter_ids, right)
    if torch.is_grad_enabled() and (v.requires_grad or x.requires_grad):
        return (TinyLoRALinear.apply if traced else _apply_outside_transforms)(x, v, frozen)
    return _updated_linear(x, v, frozen)[0]


# create_graph=True: second derivatives are an error, not zero.
_UPDATE_BACKWARD_ONCE = torch.autograd.function.once_differentiable(_update_backward)
_LINEAR_BACKWARD_ONCE = torch.autograd.function.once_differentiable(_linear_backward)


def _updated_linear(x: Tensor, v: Tensor, frozen: FrozenLinear) -> tuple[Tensor, Tensor]:
    """The updated output, fresh and no view of another tensor, and t [N, r]."""
    weight, bias, basis, projection, offset, adapter_ids, right, backend = frozen
    if right is not None and backend.low_rank is not None and product_last(weight, bias):
        x = x.contiguous()
        # y = b + (t M^T) U^T + x W^T
        y, t = backend.low_rank(x, right, basis, v, projection, bias, adapter_ids)
        _add_product(y, x, weight.t())
        return y, t
    y = frozen_linear(x, weight, bias)
    return y, backend.update(y, basis, v, projection, offset, adapter_ids)


def _add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """total += rows @ matrix over the last dimension, in place; total and rows are contiguous."""
    if total.dim() != 2:
        total, rows = total.view(-1, total.shape[-1]), rows.view(-1, rows.shape[-1])
    total.addmm_(rows, matrix)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as a fresh contiguous tensor that is no view of another."""
    y = torch.nn.functional.linear(x, weight, bias).contiguous()
    # With a bias and more than two dimensions y is a view of its matmul, which autograd would have to track.
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y
