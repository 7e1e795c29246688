"""Registration of the ops with torch (fakes, fallbacks) and the gradient of the update.

A torch.autograd.Function outside the ops costs about 25 us a call pair less than register_autograd, and lets the
update stay in place on the frozen layer's fresh output.

Its second output is t. Nobody reads it, but what was saved is then an output with a history, so that a gradient that is
to be differentiated again (create_graph=True) is made of plain operations on tensors that lead back to every input.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..common import modes
from . import reference
from .checks import check_arguments, check_input_grad, check_low_rank, check_parts, check_refresh_right
from .dispatch import BACKENDS, Backend
from .native import library as native
from .schema import accumulation_dtype, library
from .triton import launch as triton

# The library fills the CPU key and, if built for it, the CUDA key of the ops it has kernels for. Whatever is left falls
# to Triton or the reference, and to Triton where the GPUs of that key are AMD's.
native.load()
for _name in (
    "update", "update_backward", "low_rank", "update_input_grad", "refresh_right", "update_parts",
    "update_parts_backward",
):  # fmt: skip
    _has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"tinylora::{_name}", "CUDA")
    if triton.is_installed() and (torch.version.hip or not _has_kernel):
        library.impl(_name, getattr(triton, _name), "CUDA")
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("tinylora::update")
def _(
    y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None, bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:  # fmt: skip
    check_arguments("y", y, basis, v, projection, offset=offset, bias=bias, adapter_ids=adapter_ids)
    return y.new_empty((_rows(y), basis.shape[0]), dtype=accumulation_dtype(y.dtype))


@torch.library.register_fake("tinylora::updated")
def _(
    y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None, bias: Tensor | None,
    adapter_ids: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_arguments("y", y, basis, v, projection, offset=offset, bias=bias, adapter_ids=adapter_ids)
    return y.new_empty(y.shape), y.new_empty((_rows(y), basis.shape[0]), dtype=accumulation_dtype(y.dtype))


def _updated(y: Tensor, *factors: Any) -> tuple[Tensor, Tensor]:
    y = y.clone(memory_format=torch.contiguous_format)
    return y, BACKENDS[factors[-1]].update(y, *factors[:-1])


library.impl("updated", _updated, "CompositeExplicitAutograd")


@torch.library.register_fake("tinylora::update_backward")
def _(
    g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None, adapter_ids: Tensor | None,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    g0 = g.new_empty(g.shape) if need_input_grad else g.new_empty(0)
    return g0, v.new_empty(v.shape if t is not None else (0,))


@torch.library.register_fake("tinylora::low_rank")
def _(
    x: Tensor, right: Tensor, basis: Tensor, v: Tensor, projection: Tensor, bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_arguments("x", x, right, v, projection, adapter_ids=adapter_ids, basis_name="right")
    check_low_rank(x, right, basis, bias)
    t = x.new_empty((_rows(x), right.shape[0]), dtype=accumulation_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], basis.shape[1])), t


@torch.library.register_fake("tinylora::update_input_grad")
def _(
    dx: Tensor, right: Tensor, g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None,
    adapter_ids: Tensor | None, add: bool,
) -> Tensor:  # fmt: skip
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    check_input_grad(dx, right, g, basis)
    return v.new_empty(v.shape if t is not None else (0,))


@torch.library.register_fake("tinylora::refresh_right")
def _(right: Tensor, samples: Tensor, weight: Tensor, basis: Tensor, force: bool) -> None:
    check_refresh_right(right, samples, weight, basis)


@torch.library.register_fake("tinylora::update_parts")
def _(
    y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None, bias: Tensor | None,
    x: Tensor | None, right: Tensor | None, adapter_ids: Tensor | None, ends: Sequence[int], groups: Sequence[int],
) -> Tensor:  # fmt: skip
    check_parts(
        "y", y, basis, v, projection, ends, groups, offset=offset, bias=bias, x=x, right=right, adapter_ids=adapter_ids
    )
    return y.new_empty((len(ends), _rows(y), basis.shape[0]), dtype=accumulation_dtype(y.dtype))


@torch.library.register_fake("tinylora::update_parts_backward")
def _(
    g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None, adapter_ids: Tensor | None,
    ends: Sequence[int], groups: Sequence[int], need_input_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_parts("g", g, basis, v, projection, ends, groups, t=t, adapter_ids=adapter_ids)
    g0 = g.new_empty(g.shape) if need_input_grad else g.new_empty(0)
    return g0, v.new_empty(v.shape if t is not None else (0,))


def _rows(y: Tensor) -> int:
    rows = 1
    for size in y.shape[:-1]:
        rows = rows * size
    return rows


if TYPE_CHECKING:

    class UpdateContext(torch.autograd.function.FunctionCtx):
        """What the forward pass of an update leaves for the backward pass."""

        needs_input_grad: tuple[bool, bool, bool, bool, bool, bool, bool, bool]
        saved_tensors: tuple[Tensor | None, Tensor]  # t, where v wants a gradient, and v
        frozen: tuple[Tensor, Tensor, Tensor | None, Backend]  # basis, projection, adapter_ids
        shape: torch.Size

        def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class TinyLoRAUpdate(torch.autograd.Function):
    """y <- y0 + b + (t M^T) U^T in place, with gradients into y, b and v; also t. Saves t alone: r numbers a row."""

    @staticmethod
    def forward(
        ctx: UpdateContext, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None,
        bias: Tensor | None, adapter_ids: Tensor | None, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        return _update(ctx, y, basis, v, projection, offset, bias, adapter_ids, backend)

    @staticmethod
    def backward(ctx: UpdateContext, g: Tensor | None, g_t: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            if g_t is None:
                return (None,) * 8
            g = g_t.new_zeros(ctx.shape)
        t, v = ctx.saved_tensors
        basis, projection, adapter_ids, backend = ctx.frozen
        needs_y, _, needs_v, _, _, needs_bias, _, _ = ctx.needs_input_grad
        g0: Tensor | None
        if g_t is not None or torch.is_grad_enabled() or modes.is_taken_apart(g):
            g0, dv = differentiable_gradients(g, g_t, basis, v, projection, t, adapter_ids)
        else:
            g0, dv = update_gradients(g, basis, v, projection, t, adapter_ids, needs_y, backend)
        return g0 if needs_y else None, None, dv, None, None, bias_gradient(g) if needs_bias else None, None, None


class TracedUpdate(torch.autograd.Function):
    """The same while tracing, where there are no second derivatives, and a second output would be carried along."""

    @staticmethod
    def forward(
        ctx: UpdateContext, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None,
        bias: Tensor | None, adapter_ids: Tensor | None, backend: str,
    ) -> Tensor:  # fmt: skip
        return _update(ctx, y, basis, v, projection, offset, bias, adapter_ids, backend)[0]

    @staticmethod
    def backward(ctx: UpdateContext, g: Tensor) -> tuple[Tensor | None, ...]:
        t, v = ctx.saved_tensors
        basis, projection, adapter_ids, backend = ctx.frozen
        needs_y, _, _, _, _, needs_bias, _, _ = ctx.needs_input_grad
        g0, dv = update_gradients(g, basis, v, projection, t, adapter_ids, needs_y, backend)
        return g0, None, dv, None, None, bias_gradient(g) if needs_bias else None, None, None


def _update(
    ctx: UpdateContext, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None,
    bias: Tensor | None, adapter_ids: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, t = run_update(BACKENDS[backend], y, basis, v, projection, offset, bias, adapter_ids)
    if out is y:
        ctx.mark_dirty(y)
    # The frozen factors go on ctx: saving a tensor costs a microsecond each way, and nobody writes into these.
    ctx.frozen, ctx.shape = (basis, projection, adapter_ids, BACKENDS[backend]), y.shape
    ctx.save_for_backward(t if ctx.needs_input_grad[2] else None, v)
    return out, t


def run_update(
    backend: Backend, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None,
    bias: Tensor | None, adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the updated y, t): y itself, in place; under a dispatch mode, and while tracing what dissolves, a fresh one."""
    factors = basis, v, projection, offset, bias, adapter_ids
    if backend.updated is not None and torch.compiler.is_compiling():
        return backend.updated(y, *factors)
    if modes.seen_by_a_mode():
        return cast(tuple[Tensor, Tensor], torch.ops.tinylora.updated.default(y, *factors, backend.name))
    return y, backend.update(y, *factors)


def update_gradients(
    g: Tensor, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None, adapter_ids: Tensor | None,
    need_input_grad: bool, backend: Backend,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """g0 where it is needed, dv where t was saved for it; None in place of what is not."""
    # Expanded gradients (sum, mean) have stride 0.
    g0, dv = backend.update_backward(g.contiguous(), basis, v, projection, t, adapter_ids, need_input_grad)
    return (g0 if need_input_grad else None), (None if t is None else dv)


def differentiable_gradients(
    g: Tensor, g_t: Tensor | None, basis: Tensor, v: Tensor, projection: Tensor, t: Tensor | None,
    adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(g0, dv) in plain operations, for gradients that are differentiated again, or one of many (is_grads_batched), or
    with a tangent; g_t [N, r] is what came to t.
    """
    a = reference.project(g, basis)  # [N, r]
    gains = reference.gains(a, v, projection, adapter_ids, transposed=True)
    # g0 = g + (a M + g_t) U^T;  dv_i = <P'_i, a^T t>
    delta = reference.product(gains if g_t is None else gains + g_t, basis).view(g.shape)
    dv = None if t is None else reference.vector_gradient(a, t, v, projection, adapter_ids)
    return (g.to(delta.dtype) + delta).to(g.dtype), dv


def refuse_second_derivatives(of: str) -> None:
    """For a backward pass that cannot be differentiated: its gradients would be constants, without a word."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{of}: second derivatives are not implemented; leave out create_graph=True")


def bias_gradient(g: Tensor) -> Tensor:
    """db [D] = the sum of g [..., D] over its rows."""
    return g.reshape(-1, g.shape[-1]).sum(0)


if TYPE_CHECKING:

    class PartsContext(torch.autograd.function.FunctionCtx):
        """What the forward pass of update_parts leaves for the backward pass."""

        needs_input_grad: tuple[bool, ...]
        saved_tensors: tuple[Tensor | None, Tensor]  # t, where v wants a gradient, and v
        frozen: tuple[Tensor, Tensor, Tensor | None, list[int], list[int], Backend]

        def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class TinyLoRAPartsUpdate(torch.autograd.Function):
    """The update of each part of a fused projection in place, with gradients into y, b and v. Saves t."""

    @staticmethod
    def forward(
        ctx: PartsContext, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, offset: Tensor | None,
        bias: Tensor | None, adapter_ids: Tensor | None, ends: list[int], groups: list[int], backend: str,
    ) -> Tensor:  # fmt: skip
        t = BACKENDS[backend].update_parts(y, basis, v, projection, offset, bias, None, None, adapter_ids, ends, groups)
        ctx.mark_dirty(y)
        ctx.frozen = basis, projection, adapter_ids, ends, groups, BACKENDS[backend]
        ctx.save_for_backward(t if ctx.needs_input_grad[2] else None, v)
        return y

    @staticmethod
    def backward(ctx: PartsContext, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("the update of a fused projection's parts")
        t, v = ctx.saved_tensors
        basis, projection, adapter_ids, ends, groups, backend = ctx.frozen
        needs_y, db = ctx.needs_input_grad[0], bias_gradient(g) if ctx.needs_input_grad[5] else None
        backward = (reference if modes.is_taken_apart(g) else backend).update_parts_backward
        g0, dv = backward(
            g.contiguous(), basis, v, projection, t, adapter_ids, ends, groups, needs_y
        )
        return (g0 if needs_y else None, None, None if t is None else dv, None, None, db, *(None,) * 4)
