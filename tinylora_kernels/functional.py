"""The update as a function of tensors, with gradients: what every layer, adapter bank and integration calls."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .common import modes
from .linear.node import FrozenLinear, apply_linear, order_of
from .method.parts import PartFactors
from .ops import BACKENDS, TinyLoRAPartsUpdate, TinyLoRAUpdate, TracedUpdate, choose, reference, run_update
from .ops.checks import check_parts
from .ops.schema import accumulation_dtype


def tiny_lora_update(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Adapt the output of a frozen linear layer: y + ((y U - c) M^T) U^T with M = sum_i v_i P'_i.

    This equals (W + alpha U S R V^T) x + b for y = W x + b (Morris et al., arXiv 2602.04118, the TinyLoRA update),
    since U^T W = S V^T.

    Args:
        y: [..., D] output of the frozen layer; float32, bfloat16, float16 or float64. Of elements that are not finite
            the update takes no notice, and leaves the others of their row finite.
        basis: [r, D] U^T, the left singular vectors as rows.
        v: [u] the trained numbers, or [K, u] for K adapters with adapter_ids.
        projection: [u, r, r] P', or [r, r] for LoRA-XS (then u = r * r and M = projection * v.view(r, r)).
        offset: [r] c = b U, where y has the layer's bias b in it.
        adapter_ids: [B] int32 or int64, B a divisor of the rows of y; -1 leaves a row alone.
        bias: [D] b, dtype of y, where y has not: the sum is made here. More exact than offset where b is large.
        inplace: write into y. Only for an output nobody else holds and no autograd node has saved.
        backend: "cuda", "triton", "cpu", "reference" or "inductor"; None chooses (TINYLORA_BACKEND, then the fastest).

    Returns:
        [..., D], dtype of y; on the memory of y with inplace=True where its layout allows.

    Gradients flow into y, v and bias, to any order, in forward mode and through torch.func as well; saved for the first
    are r numbers a row.

    Raises:
        ValueError, IndexError: an argument's shape, dtype, device or id is wrong; y is left untouched.
        RuntimeError: the backend asked for cannot run here.
    """
    if y.is_nested or y.layout is not torch.strided:
        given = basis, v, projection, offset, adapter_ids
        return _of_another_layout(
            y, lambda rows: tiny_lora_update(rows, *given, bias=bias, backend=backend), adapter_ids
        )
    if _is_overridden(y):
        return torch.overrides.handle_torch_function(
            tiny_lora_update, (y,), y, basis, v, projection, offset, adapter_ids, bias=bias, inplace=inplace,
            backend=backend,
        )  # fmt: skip
    basis, v, projection, offset, adapter_ids = _small_tensors(y.dtype, basis, v, projection, offset, adapter_ids)
    compiling = torch.compiler.is_compiling()
    if modes.differentiated_by_torch():
        return reference.updated(y, basis, v, projection, offset, bias, adapter_ids)[0]
    chosen = choose(y.device.type, y.dtype, basis.shape[0], backend)
    if not _dissolves(chosen):
        y = _writable(y, inplace and not compiling)
    bias = None if bias is None else bias.contiguous()
    tensors = y, basis, v, projection, offset, bias, adapter_ids
    if torch.is_grad_enabled() and (v.requires_grad or y.requires_grad or (bias is not None and bias.requires_grad)):
        return TracedUpdate.apply(*tensors, chosen) if compiling else TinyLoRAUpdate.apply(*tensors, chosen)[0]
    y = run_update(BACKENDS[chosen], *tensors)[0]
    if not compiling and not y.is_inference():
        torch.autograd.graph.increment_version(y)  # as an in-place op of torch's own would
    return y


def tiny_lora_update_parts(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    ends: Sequence[int],
    groups: Sequence[int],
    offset: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """tiny_lora_update of every part of a fused projection (q, k and v; gate and up) in one pass over its output.

    Args:
        y: [..., D] output of the frozen layer, the parts side by side.
        basis: [r, D] U_1^T, ..., U_k^T side by side.
        v: [G, u] the trained numbers of G tie groups, or [G, K, u] for K adapters with adapter_ids.
        projection: [k, u, r, r] P' of each part, or [k, r, r] for LoRA-XS.
        ends: the column after the last of each part, ascending up to D.
        groups: the tie group of each part.
        offset: [k, r] c of each part, for a layer with bias.
        adapter_ids, bias, inplace, backend: as in tiny_lora_update.

    Returns and errors: as tiny_lora_update. Gradients flow into y, bias and v, dv summed over the parts of a tie group;
    in forward mode and through torch.func too, but a gradient that is to be differentiated again is refused.
    """
    if y.is_nested or y.layout is not torch.strided:
        given = basis, v, projection, ends, groups, offset, adapter_ids
        return _of_another_layout(
            y, lambda rows: tiny_lora_update_parts(rows, *given, bias=bias, backend=backend), adapter_ids
        )
    if _is_overridden(y):
        return torch.overrides.handle_torch_function(
            tiny_lora_update_parts, (y,), y, basis, v, projection, ends, groups, offset, adapter_ids, bias=bias,
            inplace=inplace, backend=backend,
        )  # fmt: skip
    basis, v, projection, offset, adapter_ids = _small_tensors(y.dtype, basis, v, projection, offset, adapter_ids)
    ends, groups = list(ends), list(groups)
    compiling = torch.compiler.is_compiling()
    chosen = choose(y.device.type, y.dtype, basis.shape[0], backend)
    if _dissolves(chosen) or modes.differentiated_by_torch() or modes.seen_by_a_mode():
        check_parts("y", y, basis, v, projection, ends, groups, offset=offset, bias=bias, adapter_ids=adapter_ids)
        parts = []
        for n, (begin, end, group) in enumerate(zip([0, *ends[:-1]], ends, groups, strict=True)):
            own = None if bias is None else bias[begin:end]
            factors = basis[:, begin:end], v[group], projection[n], None if offset is None else offset[n], adapter_ids
            parts.append(tiny_lora_update(y[..., begin:end], *factors, bias=own, backend=backend))
        return torch.cat(parts, -1)
    y = _writable(y, inplace and not compiling)
    bias = None if bias is None else bias.contiguous()
    if torch.is_grad_enabled() and (v.requires_grad or y.requires_grad or (bias is not None and bias.requires_grad)):
        updated: Tensor = TinyLoRAPartsUpdate.apply(
            y, basis, v, projection, offset, bias, adapter_ids, ends, groups, chosen
        )
        return updated
    BACKENDS[chosen].update_parts(y, basis, v, projection, offset, bias, None, None, adapter_ids, ends, groups)
    if not compiling and not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return y


def _of_another_layout(y: Tensor, update: Callable[[Tensor], Tensor], adapter_ids: Tensor | None) -> Tensor:
    """The update of the rows of a nested tensor, nested as they were.

    Raises:
        ValueError: it is of another layout, or ids say which rows belong together.
    """
    if not y.is_nested or adapter_ids is not None:
        found = "a nested tensor beside adapter_ids" if y.is_nested else f"{y.layout}"
        how = "to_padded_tensor" if y.is_nested else "to_dense"
        raise ValueError(f"y: expected its rows in one dense tensor, found {found}; call {how} first")
    if y.layout is torch.strided:
        return torch.nested.as_nested_tensor([update(sample) for sample in y.unbind()])
    jagged = cast(Any, y)
    rows, begins = update(jagged.values()), jagged.offsets()
    return torch.nested.nested_tensor_from_jagged(rows, begins, jagged.lengths(), jagged._ragged_idx)


def _is_overridden(y: Tensor) -> bool:
    """Whether y is of a class of tensors that torch's functions hand themselves to: it gets back one of its own."""
    return type(y) not in (Tensor, torch.nn.Parameter) and torch.overrides.has_torch_function_unary(y)


def _dissolves(backend: str) -> bool:
    """Whether a compiler takes the update of this backend apart now: then nothing is written in place."""
    return torch.compiler.is_compiling() and BACKENDS[backend].updated is not None


def _writable(y: Tensor, inplace: bool) -> Tensor:
    """A tensor to update in place, rows in one stride: y itself with inplace, where its layout and autograd allow."""
    if not y.is_contiguous() and (y.dim() != 2 or y.stride(-1) != 1 or y.stride(0) < y.shape[-1]):
        return y.contiguous()  # a fresh copy
    if not inplace:
        return y.clone()  # while tracing y may be a view of a matmul; Inductor removes the copy again
    if torch.is_grad_enabled() and y._is_view():
        # nn.Linear with a bias returns a view of its matmul. Written through a view, autograd's backward makes three
        # passes over the whole gradient; as a tensor of its own on the same memory, none.
        return torch.ops.aten._unsafe_view.default(y, y.shape)
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
    samples: Tensor | None = None,
    parts: PartFactors | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer and its update, tiny_lora_update(x W^T, ..., bias=b), as one node of autograd.

    Args:
        x: [..., in], dtype of the weight.
        weight: [out, in] W, frozen: it gets no gradient.
        bias: [out] b, frozen, or None.
        basis, v, projection, adapter_ids, backend: as in tiny_lora_update, with D = out.
        offset: not needed, and not read: the bias is added after the update.
        right: [r, in] B^T = U^T W, dtype of the basis. With it the product may be added to a term made of x, and dx be
            updated in place of a copy of the incoming gradient, where that is faster: the same function.
        samples: on a GPU, of the weight that right is of, as torch.ops.tinylora.refresh_right keeps both: right is made
            again where the weight is another by now.
        parts: of a fused layer, whose basis and projection are of blocks (method.parts): the update goes part by part
            then, and right is not read.

    Returns:
        [..., out]. Gradients flow into x and v only, to any order, in forward mode and through torch.func as well.

    Raises:
        ValueError, IndexError, RuntimeError: as tiny_lora_update.
    """
    if x.is_nested or x.layout is not torch.strided:
        y = torch.nn.functional.linear(x, weight)
        return tiny_lora_update(y, basis, v, projection, None, adapter_ids, bias=bias, backend=backend)
    basis, v, projection, right, adapter_ids = _small_tensors(weight.dtype, basis, v, projection, right, adapter_ids)
    compiling = torch.compiler.is_compiling()
    if modes.differentiated_by_torch():
        y = torch.nn.functional.linear(x, weight)
        return reference.updated(y, basis, v, projection, None, bias, adapter_ids)[0]
    chosen = BACKENDS[choose(x.device.type, weight.dtype, basis.shape[0], backend)]
    bias = None if bias is None else bias.contiguous()
    if torch.is_autocast_enabled(x.device.type) or (compiling and chosen.updated is not None):
        # Two nodes: autocast gives the product, and its gradient, another dtype than W's; and a compiler fuses both.
        y = torch.nn.functional.linear(x, weight.detach())
        bias = None if bias is None else bias.detach().to(y.dtype)
        return tiny_lora_update(
            y, basis, v, projection, None, adapter_ids, bias=bias, inplace=True, backend=chosen.name
        )
    if modes.seen_by_a_mode() or (parts is not None and parts.basis.dtype is not basis.dtype):
        parts = None  # a mode hands y out again; float64 beside factors of float32
    order = 0 if right is None or parts is not None or modes.seen_by_a_mode() else order_of(weight, bias, chosen)
    frozen = FrozenLinear(weight, bias, basis, projection, adapter_ids, right, samples, order, parts, chosen)
    return apply_linear(x, v, frozen)


def _small_tensors(
    dtype: torch.dtype, basis: Tensor, v: Tensor, projection: Tensor, other: Tensor | None, adapter_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The small tensors contiguous, and all but the ids in the accumulation dtype of these activations."""
    accumulate = accumulation_dtype(dtype)
    if basis.dtype is not accumulate:
        basis, projection = basis.to(accumulate), projection.to(accumulate)
        other = None if other is None else other.to(accumulate)
    v = v if v.dtype is accumulate else v.to(accumulate)
    other, adapter_ids = (None if t is None else t.contiguous() for t in (other, adapter_ids))
    return basis.contiguous(), v.contiguous(), projection.contiguous(), other, adapter_ids
