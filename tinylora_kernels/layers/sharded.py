"""The update of a layer whose weight is a DTensor: a shard on this rank of what lives on many.

Every rank holds the whole adapter: v, and U and P' of each layer, none of which is ever gathered. What travels is

    column shards     y_p = x W_p^T + b_p on rank p:   t = sum_p (y_p - b_p) U_p,  a = sum_p g_p U_p   r numbers a token
    row shards        y = sum_p y_p before the engine's own reduction: the update is linear, y_p takes its share with
                      c / ranks, and dv = sum_p dv_p: u numbers a layer
    sharded rows      (sequence parallelism)  dv = sum_p dv_p

U_p being the rows of U that belong to the rank's outputs.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from ..base.attributes import bias_of
from ..base.kinds import CONVOLUTION, kind_of
from ..base.weights import bias_offset
from ..common import modes
from ..functional import tiny_lora_update
from ..ops import refuse_second_derivatives
from ..ops.reference import contract, contract_backward, product, project
from ..ops.schema import accumulation_dtype

Group = dist.ProcessGroup | None
Factors = tuple[Tensor, Tensor, Tensor, Tensor | None]  # basis, v, projection, adapter_ids


def sharded_forward(
    base: nn.Module, name: str, factors: Factors, update: Callable[..., Tensor], backend: str | None,
    args: tuple, kwargs: dict,
) -> Tensor:  # fmt: skip
    """base(*args, **kwargs) and its update, where the weight of base is a DTensor.

    A parallel style reduces and reshards the output in a forward hook of the base. The update goes before it, where
    the output is a DTensor that says which part of the whole each rank holds.

    Args:
        name: of the layer, in messages.
        factors: basis, v, projection and adapter_ids, whole on every rank.
        update: (y, *factors, bias) -> the update of an output that is whole and has the bias in it.

    Raises:
        RuntimeError: inside a transform of torch.func or forward mode.
    """
    if modes.differentiated_by_torch():  # a DTensor's own nodes refuse them in words of torch's inside
        raise RuntimeError(
            f"{name}: expected a weight that is whole for torch.func and forward mode, found one that is sharded; use "
            "torch.autograd, or a model that is not sharded"
        )

    def updated(module: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
        if isinstance(y, DTensor):
            return update_sharded(y, base, name, factors, backend)
        return update(y, *factors, bias_of(base))  # FSDP2 has gathered the weight for this one call

    handle = base.register_forward_hook(updated, prepend=True)
    try:
        return base(*args, **kwargs)
    finally:
        handle.remove()


def update_sharded(y: DTensor, base: nn.Module, name: str, factors: Factors, backend: str | None) -> DTensor:
    """The update of an output that is spread over a mesh; its layout stays as it was.

    Raises:
        ValueError: a layout without an update, rows of different adapters on shards, or a bias that is trained.
    """
    if kind_of(base) is CONVOLUTION:
        raise ValueError(
            f"{name}: expected a layer whose features are the last dimension, found a convolution with a sharded "
            "output; leave it out of target_modules"
        )
    basis, v, projection, adapter_ids = factors
    mesh, spread = y.device_mesh, [(i, p) for i, p in enumerate(y.placements) if not p.is_replicate()]
    known = all(type(p) is Shard or p == Partial("sum") for _, p in spread)
    if len(spread) > 1 or not known or y.shape[-1] != basis.shape[1]:
        raise ValueError(
            f"{name}: expected an output [..., {basis.shape[1]}] sharded, or partial by sum, over one mesh "
            f"dimension, found {list(y.shape)} {y.placements}; leave this module out of target_modules"
        )
    if adapter_ids is not None and spread:
        raise ValueError(
            f"{name}: an AdapterBank needs whole outputs on every rank, found {y.placements}; run the bank on "
            "a model that is not tensor parallel"
        )
    local, bias = y.to_local(), bias_of(base)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a frozen bias beside a weight that is sharded, found one that is trained (c = b U would "
            "be taken for a constant); freeze it with requires_grad_(False), or leave this module out of target_modules"
        )
    if not spread:
        offset = bias_offset(basis, bias)
        updated = tiny_lora_update(local, basis, v, projection, offset, adapter_ids, backend=backend)
    else:
        ((dimension, placement),) = spread
        group = mesh.get_group(dimension)
        if isinstance(placement, Shard) and placement.dim % y.dim() == y.dim() - 1:
            first = mesh.get_local_rank(dimension) * -(-y.shape[-1] // mesh.size(dimension))  # as torch.chunk cuts
            own = slice(first, first + local.shape[-1])
            offset = bias_offset(basis[:, own], _own_part(bias, own))  # c_p
            small = (basis[:, own], v, projection, offset)  # basis: [r, D_p]
            accumulate = accumulation_dtype(y.dtype)
            updated = _ColumnUpdate.apply(local, *(None if s is None else s.to(accumulate) for s in small), group)
        else:
            offset = bias_offset(basis, bias)
            if placement.is_partial() and offset is not None:
                offset = offset / mesh.size(dimension)
            v = _SumGradient.apply(v, group)
            updated = tiny_lora_update(local, basis, v, projection, offset, backend=backend)
    return DTensor.from_local(updated, mesh, y.placements, run_check=False, shape=y.shape, stride=y.stride())


def _own_part(bias: Tensor | None, own: slice) -> Tensor | None:
    """b_p [D_p] of the rank's columns, without a gather where b is sharded as they are."""
    if isinstance(bias, DTensor):
        local = bias.to_local()
        return local if len(local) == own.stop - own.start else bias.full_tensor()[own]
    return None if bias is None else bias[own]


class _ColumnUpdate(torch.autograd.Function):
    """The update where each rank holds some of the columns: y [..., D_p], basis [r, D_p], the rest whole."""

    @staticmethod
    def forward(ctx, y, basis, v, projection, offset, group):
        # t = sum_p (y_p U_p - c_p)
        t = _project(y, basis, offset, group)  # [N, r]
        ctx.frozen = basis, projection, group
        ctx.save_for_backward(t, v)
        # y_p + (t M^T) U_p^T
        return _add(y, product(t, contract(v, projection).T), basis)

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives("a layer whose columns are sharded")
        basis, projection, group = ctx.frozen
        t, v = ctx.saved_tensors
        # a = sum_p g_p U_p;  g0_p = g_p + (a M) U_p^T;  dM = a^T t, the same on every rank
        a = _project(g, basis, None, group)
        g0 = _add(g, product(a, contract(v, projection)), basis) if ctx.needs_input_grad[0] else None
        dv = contract_backward(product(a.T, t), projection) if ctx.needs_input_grad[2] else None
        return g0, None, dv, None, None, None


def _project(y: Tensor, basis: Tensor, offset: Tensor | None, group: Group) -> Tensor:
    """sum_p (y_p U_p - c_p), [N, r]."""
    t = project(y, basis) if offset is None else project(y, basis) - offset
    return _sum(t, group)


def _sum(tensor: Tensor, group: Group) -> Tensor:
    """Over the ranks, in a tensor of its own: a dispatch mode may hand out again what went in."""
    if modes.is_taken_apart(tensor):
        raise RuntimeError(
            "a sharded layer: expected one gradient at a time, found a batch (is_grads_batched, vectorize=True) or a "
            "tangent; call torch.autograd.grad once for each"
        )
    ranks = dist.distributed_c10d._get_default_group() if group is None else group
    return collectives.wait_tensor(collectives.all_reduce(tensor, "sum", ranks))


def _add(y: Tensor, gains: Tensor, basis: Tensor) -> Tensor:
    """y + gains U_p^T for gains [N, r], in the dtype of y."""
    with torch.autocast(y.device.type, enabled=False):
        return torch.addmm(y.reshape(-1, basis.shape[1]), gains.to(y.dtype), basis.to(y.dtype)).view(y.shape)


class _SumGradient(torch.autograd.Function):
    """v itself; its gradient is summed over ranks that each saw a part of the output."""

    @staticmethod
    def forward(ctx, v, group):
        ctx.group = group
        return v.view_as(v)

    @staticmethod
    def backward(ctx, dv):
        return _sum(dv, ctx.group), None
