"""The ops in plain PyTorch: any device, any dtype, the oracle of every test and benchmark.

Run it in float64 for the truth; it accumulates in float32 for lower activations, as the kernels do.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_arguments, check_input_grad, check_low_rank, check_parts, check_refresh_right
from .schema import RIGHT_COLUMNS, RIGHT_SAMPLES


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of both, whatever autocast and torch.set_float32_matmul_precision ask of products."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype is torch.float32 and not _products_are_exact():
            return (a.double() @ b.double()).float()
        return a @ b


def _products_are_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by backend: torch.backends.*.fp32_precision
        return False


vars(_products_are_exact)["_dynamo_marked_constant"] = True  # torch.compiler.assume_constant_result, without its import


def contract(v: Tensor, projection: Tensor) -> Tensor:
    """M = sum_i v_i P'_i, or projection * v for LoRA-XS: v [u] -> [r, r];  v [n, u] -> [n, r, r]."""
    rank = projection.shape[-1]
    flat = product(v, projection.flatten(1)) if projection.dim() == 3 else v * projection.flatten()
    mixing: Tensor = flat.unflatten(-1, (rank, rank))
    return mixing


def contract_backward(d_mixing: Tensor, projection: Tensor) -> Tensor:
    """dv_i = <P'_i, dM>, or projection * dM for LoRA-XS: dM [r, r] -> [u];  dM [n, r, r] -> [n, u]."""
    rank = projection.shape[-1]
    flat = d_mixing.reshape(*d_mixing.shape[:-2], rank * rank)  # flatten has no rule for a batch of gradients
    return product(flat, projection.flatten(1).T) if projection.dim() == 3 else flat * projection.flatten()


def check_ids(adapter_ids: Tensor, adapters: int) -> None:
    """Raise where an id is neither -1 nor in [0, K); while tracing nobody can look."""
    if adapter_ids.numel() and not torch.compiler.is_compiling():
        low, high = int(adapter_ids.min()), int(adapter_ids.max())
        if low < -1 or high >= adapters:
            bad = low if low < -1 else high
            raise IndexError(f"adapter_ids: expected -1 or an id below {adapters}, found {bad}")


def _row_ids(adapter_ids: Tensor, rows: int, adapters: int) -> Tensor:
    """One id a row, [N] int64."""
    check_ids(adapter_ids, adapters)
    repeats = rows // max(adapter_ids.numel(), 1)
    return adapter_ids.long().repeat_interleave(repeats)


def gains(
    coefficients: Tensor, v: Tensor, projection: Tensor, adapter_ids: Tensor | None, transposed: bool = False
) -> Tensor:
    """t M^T of each row's adapter, or a M if transposed; zero for rows to leave alone.  [N, r] -> [N, r]"""
    if adapter_ids is None:
        mixing = contract(v, projection)
        return product(coefficients, mixing if transposed else mixing.T)
    ids = _row_ids(adapter_ids, len(coefficients), len(v))  # [N]
    mixing = contract(v[ids.clamp(min=0)], projection)  # [N, r, r]
    gains = product(mixing.mT if transposed else mixing, coefficients.unsqueeze(-1)).squeeze(-1)
    return torch.where((ids >= 0).unsqueeze(-1), gains, 0)


def project(rows: Tensor, basis: Tensor) -> Tensor:
    """[..., D] times basis^T in the accumulation dtype, [N, r]."""
    return product(rows.reshape(-1, basis.shape[1]).to(basis.dtype), basis.T)


def updated(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y0 + b + (t M^T) U^T, t), out of place, in plain operations, which torch differentiates to any order."""
    # t = y0 U - c over the finite elements of y0
    t = project(torch.where(torch.isfinite(y), y, 0), basis)  # [N, r]
    if offset is not None:
        t = t - offset
    # y = y0 + b + (t M^T) U^T
    delta = product(gains(t, v, projection, adapter_ids), basis).view(y.shape)
    wide = y.to(delta.dtype) if bias is None else y.to(delta.dtype) + bias.to(delta.dtype)
    return (wide + delta).to(y.dtype), t


def update(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    """y <- y0 + b + (t M^T) U^T in place; returns t = y0 U - c, [N, r]. Shapes and dtypes: see schema.py."""
    check_arguments("y", y, basis, v, projection, offset=offset, bias=bias, adapter_ids=adapter_ids)
    changed, t = updated(y, basis, v, projection, offset, bias, adapter_ids)
    y.copy_(changed)
    return t


def vector_gradient(a: Tensor, t: Tensor | None, v: Tensor, projection: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """dv_i = <P'_i, a^T t>; empty without t."""
    if t is None:
        return v.new_empty(0)
    if adapter_ids is None:
        return contract_backward(product(a.T, t), projection)
    ids = _row_ids(adapter_ids, len(a), len(v))  # [N]
    keep = ids >= 0
    outer = a[keep].unsqueeze(-1) * t[keep].unsqueeze(-2)  # dM of each row  [n, r, r]
    return torch.zeros_like(v).index_add(0, ids[keep], contract_backward(outer, projection))


def update_backward(
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(g0, dv): g0 = g + ((g U) M) U^T and dv_i = <P'_i, (g U)^T t>; what is not asked for comes back empty."""
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    a = project(g, basis)  # [N, r]
    g0 = g.new_empty(0)
    if need_input_grad:
        # g0 = g + (a M) U^T
        delta = product(gains(a, v, projection, adapter_ids, transposed=True), basis)
        g0 = (g.to(delta.dtype) + delta.view(g.shape)).to(g.dtype)
    return g0, vector_gradient(a, t, v, projection, adapter_ids)


def low_rank(
    x: Tensor,
    right: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, t): t = x B, [N, r], and y = b + (t M^T) U^T, which x W^T is to be added to."""
    check_arguments("x", x, right, v, projection, adapter_ids=adapter_ids, basis_name="right")
    check_low_rank(x, right, basis, bias)
    # t = x B
    t = project(x, right)  # [N, r]
    # y = b + (t M^T) U^T
    y = product(gains(t, v, projection, adapter_ids), basis)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).view(*x.shape[:-1], basis.shape[1]), t


def update_input_grad(
    dx: Tensor,
    right: Tensor,
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
    add: bool,
) -> Tensor:
    """dx = ((g U) M) B^T in place, or dx += the same with add; returns dv as update_backward does."""
    check_arguments("g", g, basis, v, projection, t=t, adapter_ids=adapter_ids)
    check_input_grad(dx, right, g, basis)
    a = project(g, basis)  # [N, r]
    # dx (+)= (a M) B^T
    delta = product(gains(a, v, projection, adapter_ids, transposed=True), right).view(dx.shape)
    dx.copy_(dx.to(delta.dtype) + delta if add else delta)
    return vector_gradient(a, t, v, projection, adapter_ids)


def samples_of(weight: Tensor) -> Tensor:
    """The bits of W [D, E] at [ceil(E / 64), 256] places; of 64 bits the two halves combined. [blocks, 256] int32"""
    rows, columns = weight.shape
    i = torch.arange(RIGHT_SAMPLES, device=weight.device)
    golden = i * 0x9E3779B9 % 2**32  # columns by the golden ratio, and rows within their band
    row = (i * rows + (golden * rows >> 32)) // RIGHT_SAMPLES
    first = torch.arange(0, columns, RIGHT_COLUMNS, device=weight.device)
    column = (first[:, None] + (golden >> 26)).clamp(max=columns - 1)
    found = weight.detach()[row, column].contiguous()  # [blocks, 256]
    if found.itemsize == 8:
        bits = found.view(torch.int64)
        return (bits ^ (bits >> 32)).int()
    return found.view(torch.int32) if found.itemsize == 4 else found.view(torch.int16).int() & 0xFFFF


def refresh_right(right: Tensor, samples: Tensor, weight: Tensor, basis: Tensor, force: bool) -> None:
    """B^T [r, E] of the weight as it is, where a sample of it says that it is another or `force` does."""
    check_refresh_right(right, samples, weight, basis)
    if not weight.numel():
        return
    found = samples_of(weight)
    # B^T = U^T W
    fresh = product(basis, weight.detach().to(basis.dtype))
    stale = force | (found != samples).any(dim=1).repeat_interleave(RIGHT_COLUMNS)[: right.shape[1]]
    right.copy_(torch.where(torch.as_tensor(stale, device=right.device), fresh, right))
    samples.copy_(found)


def update_parts(
    y: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    right: Tensor | None,
    adapter_ids: Tensor | None,
    ends: Sequence[int],
    groups: Sequence[int],
) -> Tensor:
    """update of each part's columns of y in place; returns t [k, N, r]."""
    check_parts(
        "y", y, basis, v, projection, ends, groups, offset=offset, bias=bias, x=x, right=right, adapter_ids=adapter_ids
    )
    coefficients = []
    for part, columns in enumerate(_columns(ends)):
        piece, own_v, own_projection = y[..., columns], v[groups[part]], projection[part]
        own_bias = None if bias is None else bias[columns]
        if x is None or right is None:
            own_offset = None if offset is None else offset[part]
            changed, t = updated(piece, basis[:, columns], own_v, own_projection, own_offset, own_bias, adapter_ids)
        else:
            # t_p = x B_p;  y_p = y0_p + b_p + (t_p M_p^T) U_p^T
            t = project(x, right[part])  # [N, r]
            delta = product(gains(t, own_v, own_projection, adapter_ids), basis[:, columns]).view(piece.shape)
            wide = piece.to(delta.dtype) if own_bias is None else piece.to(delta.dtype) + own_bias.to(delta.dtype)
            changed = (wide + delta).to(y.dtype)
        piece.copy_(changed)
        coefficients.append(t)
    return torch.stack(coefficients)


def update_parts_backward(
    g: Tensor,
    basis: Tensor,
    v: Tensor,
    projection: Tensor,
    t: Tensor | None,
    adapter_ids: Tensor | None,
    ends: Sequence[int],
    groups: Sequence[int],
    need_input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(g0, dv) of update_parts, dv summed over the parts of a tie group; what is not asked for comes back empty."""
    check_parts("g", g, basis, v, projection, ends, groups, t=t, adapter_ids=adapter_ids)
    pieces, dv = [], list(torch.zeros_like(v))
    for part, columns in enumerate(_columns(ends)):
        piece, own_basis, own_v = g[..., columns], basis[:, columns], v[groups[part]]
        a = project(piece, own_basis)  # [N, r]
        if need_input_grad:
            # g0_p = g_p + (a_p M_p) U_p^T
            delta = product(gains(a, own_v, projection[part], adapter_ids, transposed=True), own_basis)
            pieces.append((piece.to(delta.dtype) + delta.view(piece.shape)).to(g.dtype))
        if t is not None:
            # dv_i = sum_p <P'_{p,i}, a_p^T t_p>
            dv[groups[part]] = dv[groups[part]] + vector_gradient(a, t[part], own_v, projection[part], adapter_ids)
    g0 = torch.cat(pieces, -1) if need_input_grad else g.new_empty(0)
    return g0, torch.stack(dv) if t is not None else v.new_empty(0)


def _columns(ends: Sequence[int]) -> list[slice]:
    """The columns of each part."""
    return [slice(begin, end) for begin, end in zip([0, *ends][:-1], ends, strict=True)]


def why_not(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """The reference runs everywhere."""
    return None
