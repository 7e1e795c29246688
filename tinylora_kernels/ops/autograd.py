"""Registration of the ops with torch (fakes, fallbacks) and their gradient.

A torch.autograd.Function outside the ops costs about 25 us a call pair less than register_autograd, and lets the
update stay in place on the frozen layer's fresh output.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import native, reference, triton_kernels
from .checks import check_arguments
from .dispatch import BACKENDS
from .schema import accumulation_dtype, library

# The library fills the CPU key and, if built for it, the CUDA key. Whatever is left falls to Triton or the reference.
status = native.load()
if not status.has_cuda and triton_kernels.why_not("cuda", torch.float32, 2) is None:
    library.impl("update", triton_kernels.update, "CUDA")
    library.impl("update_backward", triton_kernels.update_backward, "CUDA")
library.impl("update", reference.update, "CompositeExplicitAutograd")
library.impl("update_backward", reference.update_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tinylora::update")
def _(y, basis, v, projection, offset, adapter_ids):
    check_arguments("y", y, basis, v, projection, offset=offset, adapter_ids=adapter_ids)
    return y.new_empty((_rows(y), basis.shape[0]), dtype=accumulation_dtype(y.dtype))


@torch.library.register_fake("tinylora::update_backward")
def _(g, basis, v, projection, t, adapter_ids, need_input_grad):
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    g0 = g.new_empty(g.shape) if need_input_grad else g.new_empty(0)
    return g0, v.new_empty(v.shape if t is not None else (0,))


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
        if torch.is_grad_enabled():  # create_graph=True
            return _backward_once(ctx, g)
        return _backward(ctx, g)


def _backward(ctx, g):
    basis, projection, adapter_ids, update_backward = ctx.frozen
    t, v = ctx.saved_tensors
    need_input_grad = ctx.needs_input_grad[0]
    if g.stride(-1) != 1 or not g.is_contiguous():
        g = g.contiguous()  # expanded gradients (sum, mean) have stride 0
    g0, dv = update_backward(g, basis, v, projection, t, adapter_ids, need_input_grad)
    return (g0 if need_input_grad else None), None, (dv if t is not None else None), None, None, None, None


_backward_once = torch.autograd.function.once_differentiable(_backward)
