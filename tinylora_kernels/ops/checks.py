"""Argument checks shared by the backends written in Python (the C++ ones make the same checks before any launch)."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.words import dtype_name
from .schema import ACTIVATION_DTYPES, accumulation_dtype, samples_shape


def check_arguments(
    activation_name: str,
    activation: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    *,
    basis_name: str = "basis",
) -> None:
    """Raise a one-line ValueError that names the argument, what was expected and what was found."""
    if activation.dtype not in ACTIVATION_DTYPES:
        names = ", ".join(dtype_name(d) for d in ACTIVATION_DTYPES)
        raise ValueError(f"{activation_name}: expected dtype {names}, found {activation.dtype}")
    if activation.dim() < 1 or basis.dim() != 2:
        raise ValueError(
            f"{activation_name} [..., D] and {basis_name} [r, D] expected, "
            f"found {tuple(activation.shape)} and {tuple(basis.shape)}"
        )
    rank, features = basis.shape
    if activation.shape[-1] != features:
        raise ValueError(
            f"{activation_name}: expected last dimension {features} as in {basis_name} {tuple(basis.shape)}, "
            f"found {tuple(activation.shape)}"
        )
    _check_projection(v, projection, rank, adapter_ids)
    rows = activation.numel() // features if features else 0
    expected_shapes = {"offset": (offset, (rank,)), "t": (t, (rows, rank))}
    for name, (tensor, shape) in expected_shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")
    accumulate = accumulation_dtype(activation.dtype)
    for name, tensor in ((basis_name, basis), ("v", v), ("projection", projection), ("offset", offset), ("t", t)):
        if tensor is None:
            continue
        if tensor.dtype != accumulate:
            beside = f"beside {activation.dtype} activations"
            raise ValueError(f"{name}: expected {accumulate} {beside}, found {tensor.dtype}")
        if tensor.device != activation.device:
            raise ValueError(f"{name}: expected device {activation.device} as {activation_name}, found {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor; call .contiguous() first")
    if bias is not None:
        _check_bias(bias, activation_name, activation, features)
    if adapter_ids is not None:
        _check_adapter_ids(adapter_ids, rows, activation)


def check_low_rank(x: Tensor, right: Tensor, basis: Tensor, bias: Tensor | None) -> None:
    """The same for what low_rank takes beside x and right, which check_arguments has seen."""
    as_expected = basis.dim() == 2 and basis.shape[0] == right.shape[0] and basis.dtype == right.dtype
    if not as_expected or basis.device != x.device or not basis.is_contiguous():
        found = f"{basis.dtype} {tuple(basis.shape)} on {basis.device}"
        raise ValueError(f"basis: expected contiguous {right.dtype} ({right.shape[0]}, E) on {x.device}, found {found}")
    if bias is not None:
        _check_bias(bias, "x", x, basis.shape[1])


def check_input_grad(dx: Tensor, right: Tensor, g: Tensor, basis: Tensor) -> None:
    """The same for what update_input_grad takes beside g, which check_arguments has seen."""
    if dx.dtype != g.dtype or dx.device != g.device:
        raise ValueError(f"dx: expected {g.dtype} on {g.device} as g, found {dx.dtype} on {dx.device}")
    if dx.dim() < 1 or dx.numel() // max(dx.shape[-1], 1) != g.numel() // max(g.shape[-1], 1):
        raise ValueError(f"dx: expected the rows of g {tuple(g.shape)}, found {tuple(dx.shape)}")
    expected = basis.shape[0], dx.shape[-1]
    as_expected = tuple(right.shape) == expected and right.dtype == basis.dtype and right.device == g.device
    if not as_expected or not right.is_contiguous():
        found = f"{right.dtype} {tuple(right.shape)} on {right.device}"
        raise ValueError(f"right: expected contiguous {basis.dtype} {expected} on {g.device}, found {found}")


def check_refresh_right(right: Tensor, samples: Tensor, weight: Tensor, basis: Tensor) -> None:
    """Raise a one-line ValueError that names the argument of refresh_right, what was expected and what was found."""
    if weight.dim() != 2 or weight.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"weight: expected floating [D, E], found {weight.dtype} {tuple(weight.shape)}")
    features, width = weight.shape
    accumulate = accumulation_dtype(weight.dtype)
    expected = {
        "basis": (basis, accumulate, (basis.shape[0] if basis.dim() == 2 else "r", features)),
        "right": (right, accumulate, (basis.shape[0] if basis.dim() == 2 else "r", width)),
        "samples": (samples, torch.int32, samples_shape(width)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        as_expected = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.device == weight.device
        if not as_expected or not tensor.is_contiguous():
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}: expected contiguous {dtype} {shape} on {weight.device}, found {found}")


def _check_bias(bias: Tensor, activation_name: str, activation: Tensor, features: int) -> None:
    expected = activation.dtype, activation.device, (features,)
    if (bias.dtype, bias.device, tuple(bias.shape)) != expected or not bias.is_contiguous():
        found = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
        kind = f"contiguous {activation.dtype} ({features},) on {activation.device} as {activation_name}"
        raise ValueError(f"bias: expected {kind}, found {found}")


def check_parts(
    name: str,
    activation: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    ends: Sequence[int],
    groups: Sequence[int],
    *,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    x: Tensor | None = None,
    right: Tensor | None = None,
    t: Tensor | None = None,
    adapter_ids: Tensor | None = None,
) -> None:
    """The same for update_parts and update_parts_backward: every part is an update of its own columns."""
    parts, width = len(ends), activation.shape[-1] if activation.dim() else 0
    if not parts or list(ends) != sorted(set(ends)) or ends[0] < 1 or ends[-1] != width:
        wanted = f"ascending columns up to {width}, the last dimension of {name}"
        raise ValueError(f"ends: expected {wanted}, found {list(ends)}")
    if v.dim() < 2 or len(groups) != parts or not all(0 <= group < len(v) for group in groups):
        held = len(v) if v.dim() else 0
        raise ValueError(f"groups: expected {parts} numbers below {held}, the groups of v, found {list(groups)}")
    if projection.dim() not in (3, 4) or len(projection) != parts:
        raise ValueError(f"projection: expected [{parts}, u, r, r] or [{parts}, r, r], found {tuple(projection.shape)}")
    check_arguments(name, activation, basis, v[0], projection[0], bias=bias, adapter_ids=adapter_ids)
    rank, rows = len(basis), activation.numel() // width
    if (x is None) != (right is None) or (x is not None and offset is not None):
        raise ValueError("x and right: expected both or neither, and no offset beside them")
    expected = {"offset": (offset, (parts, rank)), "t": (t, (parts, rows, rank))}
    if x is not None:
        if x.dtype != activation.dtype or x.device != activation.device or x.numel() != rows * x.shape[-1]:
            found = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            wanted = f"{activation.dtype} rows as of {name} {tuple(activation.shape)}"
            raise ValueError(f"x: expected {wanted}, found {found}")
        expected["right"] = right, (parts, rank, x.shape[-1])
    for argument, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{argument}: expected shape {shape}, found {tuple(tensor.shape)}")
        if tensor.dtype != basis.dtype or tensor.device != basis.device:
            found = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{argument}: expected {basis.dtype} on {basis.device} as basis, found {found}")


def _check_projection(v: Tensor, projection: Tensor, rank: int, adapter_ids: Tensor | None) -> None:
    if projection.dim() not in (2, 3) or tuple(projection.shape[-2:]) != (rank, rank):
        raise ValueError(
            f"projection: expected [u, {rank}, {rank}] or [{rank}, {rank}] for a basis of rank {rank}, "
            f"found {tuple(projection.shape)}"
        )
    numbers = projection.shape[0] if projection.dim() == 3 else rank * rank
    expected_dims = 1 if adapter_ids is None else 2
    if v.dim() != expected_dims or v.shape[-1] != numbers or numbers == 0:
        expected = f"[{numbers}]" if adapter_ids is None else f"[K, {numbers}] with adapter_ids"
        raise ValueError(f"v: expected {expected}, at least one number, found {tuple(v.shape)}")


def _check_adapter_ids(adapter_ids: Tensor, rows: int, activation: Tensor) -> None:
    if adapter_ids.dtype not in (torch.int32, torch.int64) or adapter_ids.dim() != 1 or not adapter_ids.is_contiguous():
        found = f"{adapter_ids.dtype} {tuple(adapter_ids.shape)}"
        raise ValueError(f"adapter_ids: expected a contiguous 1-D int32 or int64 tensor, found {found}")
    if adapter_ids.device != activation.device:
        raise ValueError(f"adapter_ids: expected device {activation.device}, found {adapter_ids.device}")
    count = adapter_ids.numel()
    if (count == 0 and rows) or (count and rows % count):
        raise ValueError(f"adapter_ids: expected a length that divides the {rows} rows, found {count}")
