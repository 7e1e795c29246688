"""The update as a function of tensors, with gradients: what every layer, adapter bank and integration calls."""
from __future__ import annotations

import torch
from torch import Tensor

from .linear.node import FrozenLinear, apply_linear, order_of
from .ops import BACKENDS, TinyLoRAUpdate, choose
from .ops.schema import accumulation_dtype


def tiny_lora_update(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Adapt the output of a frozen linear layer: y + ((y U - c) M^T) U^T with M = sum_i v_i P'_i.

    This equals (W + alpha U S R V^T) x + b for y = W x + b (Morris et al., arXiv 2602.04118, the TinyLoRA update),
    since U^T W = S V^T.

    Args:
        y: [..., D] output of the frozen layer; float32, bfloat16, float16 or float64.
        basis: [r, D] U^T, the left singular vectors as rows.
        v: [u] the trained numbers, or [K, u] for K adapters with adapter_ids.
        projection: [u, r, r] P', or [r, r] for LoRA-XS (then u = r * r and M = projection * v.view(r, r)).
        offset: [r] c = b U, for a layer with bias b.
        adapter_ids: [B] int32 or int64, B a divisor of the rows of y; -1 leaves a row alone.
        inplace: write into y. Only for an output nobody else holds and no autograd node has saved.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses (TINYLORA_BACKEND, then the fastest).

    Returns:
        [..., D], dtype of y; on the memory of y with inplace=True where its layout allows.

    Gradients flow into y and v only; only r numbers a row are saved for them. Second derivatives are not defined.

    Raises:
        ValueError, IndexError: an argument's shape, dtype, device or id is wrong; y is left untouched.
        RuntimeError: the backend asked for cannot run here.
    """
    basis, v, projection, offset = _as_accumulated(y.dtype, basis, v, projection, offset)
    if not y.is_contiguous() and (y.dim() != 2 or y.stride(-1) != 1 or y.stride(0) < y.shape[-1]):
        y = y.contiguous()  # a fresh copy, rows in one stride
    elif not inplace or torch.compiler.is_compiling():
        y = y.clone()  # while tracing y may be a view of a matmul; Inductor removes the copy again
    elif torch.is_grad_enabled() and y._is_view():
        # nn.Linear with a bias returns a view of its matmul. Written through a view, autograd's backward makes three
        # passes over the whole gradient; as a tensor of its own on the same memory, none.
        y = torch.ops.aten._unsafe_view.default(y, y.shape)
    chosen = choose(y.device.type, y.dtype, basis.shape[0], backend)
    if torch.is_grad_enabled() and (v.requires_grad or y.requires_grad):
        return TinyLoRAUpdate.apply(y, basis, v, projection, offset, adapter_ids, chosen)
    BACKENDS[chosen].update(y, basis, v, projection, offset, adapter_ids)
    return y


def tiny_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    *,
    right: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer and its update, tiny_lora_update(x W^T + b, ...), as one node of autograd.

    Args:
        x: [..., in], dtype of the weight.
        weight: [out, in] W, frozen: it gets no gradient.
        bias: [out] b, frozen, or None.
        basis, v, projection, offset, adapter_ids, backend: as in tiny_lora_update, with D = out.
        right: [r, in] B^T = U^T W, dtype of the basis. With it the CPU's backward pass updates dx in place of a copy of
            the incoming gradient: the same function, faster unless in is much larger than out.

    Returns:
        [..., out]. Gradients flow into x and v only. Second derivatives are not defined.

    Raises:
        ValueError, IndexError, RuntimeError: as tiny_lora_update.
    """
    basis, v, projection, offset = _as_accumulated(weight.dtype, basis, v, projection, offset)
    chosen = BACKENDS[choose(x.device.type, weight.dtype, basis.shape[0], backend)]
    order = 0 if right is None else order_of(weight, bias, chosen)
    return apply_linear(x, v, FrozenLinear(weight, bias, basis, projection, offset, adapter_ids, right, order, chosen))


def _as_accumulated(dtype: torch.dtype, basis, v, projection, offset):
    """The small tensors in the accumulation dtype of these activations."""
    accumulate = accumulation_dtype(dtype)
    if basis.dtype is not accumulate:
        basis, projection = basis.to(accumulate), projection.to(accumulate)
        offset = None if offset is None else offset.to(accumulate)
    return basis, v if v.dtype is accumulate else v.to(accumulate), projection, offset
