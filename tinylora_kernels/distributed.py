"""The adapter on torch's own engines: DDP, FSDP2 (fully_shard) and tensor parallelism (parallelize_module).

Every rank holds the whole adapter: v, and U, P' and c of each layer, none of which is ever gathered. What travels is

    data parallel     the gradients of v, one all-reduce of v's bytes a backward pass
    column shards     y_p = x W_p^T + b_p on rank p:   t = sum_p y_p U_p - c,   a = sum_p g_p U_p    r numbers a token
    row shards        y = sum_p y_p before the engine's own reduction: the update is linear, y_p takes its share with
                      c / ranks, and dv = sum_p dv_p: u numbers a layer
    sharded rows      (sequence parallelism)  dv = sum_p dv_p

U_p being the rows of U that belong to the rank's outputs. docs/distributed.md has the few lines each engine takes.
"""
from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from .adapter import describe_model
from .adapter_format import config_rank, encode, write_atomically
from .base_layers import CONVOLUTION, kind_of, weight_matrix
from .config import TinyLoRAConfig
from .factors import Factors
from .frozen import is_sharded
from .functional import tiny_lora_update
from .fused import factorize_matrix, fused_parts
from .layer import TinyLoRALayer
from .lora_xs import LoRAXSConfig
from .model import base_module, target_names, trainable_vectors
from .ops.reference import contract, contract_backward
from .ops.schema import accumulation_dtype

Group = dist.ProcessGroup | None


def replicate_adapter(model: nn.Module, group: Group = None) -> set[nn.Parameter]:
    """Keep one adapter on many ranks: from now on every backward pass ends with the mean of v's gradients.

    That alone is data parallelism of an adapted model, in one all-reduce of v's bytes. FSDP2 must leave v alone:
    ``fully_shard(block, ignored_params=replicate_adapter(model))``. DDP does the same itself and needs none of this.

    Args:
        model: an adapted model, its vectors on one device; call once for each, before or after sharding.
        group: the ranks that see different data; default all.

    Returns:
        The vectors v. Those of the group's first rank replace the others', so that all start alike.

    Gradients accumulated over several backward passes come out right: the mean of what is already a mean is itself.
    """
    vectors = trainable_vectors(model)
    with torch.no_grad():
        flat = _flatten(vectors)
        dist.broadcast(flat, group_src=0, group=group)
        _spread(flat, vectors)
    average = _GradientMean(vectors, group)
    for v in vectors:
        v.register_post_accumulate_grad_hook(average.schedule)
    return set(vectors)


class _GradientMean:
    """The mean over ranks of all gradients, once, as a backward pass ends."""

    def __init__(self, vectors: list[nn.Parameter], group: Group):
        self.vectors, self.group = vectors, group
        self.scheduled = False

    def schedule(self, v: nn.Parameter) -> None:
        if not self.scheduled:
            self.scheduled = True
            torch.autograd.Variable._execution_engine.queue_callback(self.run)

    @torch.no_grad()
    def run(self) -> None:
        self.scheduled = False
        for v in self.vectors:
            if v.grad is None:  # used on other ranks, perhaps
                v.grad = torch.zeros_like(v)
        gradients = [v.grad for v in self.vectors]
        flat = _flatten(gradients)
        dist.all_reduce(flat, group=self.group)
        _spread(flat / dist.get_world_size(self.group), gradients)


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one float32 (or float64) tensor."""
    return torch.cat([t.detach().flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def factorize_shared(
    model: nn.Module, config: TinyLoRAConfig | LoRAXSConfig, group: Group = None
) -> dict[str, Factors]:
    """The truncated SVD of every module to adapt, each matrix on one rank and the results on all.

        apply_tiny_lora(model, config, factors=factorize_shared(model, config))

    Every rank must call it. Weights that are sharded already are gathered one matrix at a time: beside its shards a
    rank holds the matrix it works on and, for a moment, one on its way to another rank.

    Args:
        model: the bare model, the same on every rank, its weights whole or sharded.
        config: as for apply_tiny_lora or apply_lora_xs.
        group: the ranks that share the work; default all.

    Raises:
        ValueError: on every rank, what the factorisation of any matrix raised on one.
    """
    bases = {name: base_module(model, name) for name in target_names(model, config.target_modules)}
    parts = fused_parts(config, bases)
    me = dist.get_rank(group)
    shares = deal({name: base.weight.numel() for name, base in bases.items()}, dist.get_world_size(group))
    found, failed = {}, {}
    for turn in zip_longest(*shares):  # one matrix for each rank
        mine = None
        for owner, name in enumerate(turn):
            if name is not None and (owner == me or is_sharded(bases[name].weight)):
                matrix = weight_matrix(bases[name])  # of a sharded weight: all ranks take part
                if owner == me:
                    mine = matrix
                del matrix
        if mine is None:
            continue
        try:
            found[turn[me]] = factorize_matrix(turn[me], mine, config_rank(config), parts, cache=config.cache)
        except ValueError as error:  # all raise it together below: a rank that stops here leaves the others waiting
            failed[turn[me]] = str(error)
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (found, failed), group=group)
    factors = {name: factor for part, _ in gathered for name, factor in part.items()}
    messages = {name: message for _, part in gathered for name, message in part.items()}
    for name in bases:
        if name in messages:
            raise ValueError(messages[name])
    return {name: factors[name] for name in bases}


def deal(sizes: dict[str, int], hands: int) -> list[list[str]]:
    """Share names out so that the sums of their sizes come out even: largest first, each to the lightest hand."""
    shares: list[list[str]] = [[] for _ in range(hands)]
    loads = [(0, hand) for hand in range(hands)]  # a heap
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):  # stable: the same on every rank
        load, hand = loads[0]
        shares[hand].append(name)
        heapq.heapreplace(loads, (load + sizes[name], hand))
    return shares


def save_adapter_once(
    model: nn.Module, path: str | os.PathLike, include_basis: bool = False, group: Group = None
) -> None:
    """save_adapter for a model on many ranks: all take part, since sharded weights are gathered for their fingerprints,
    and the group's first rank writes. Returns, or raises what the writing raised, on all ranks together.
    """
    data = encode(describe_model(model, include_basis))
    outcome: list = [None]
    if dist.get_rank(group) == 0:
        try:
            write_atomically(path, data)
        except OSError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


def sharded_forward(
    layer: TinyLoRALayer, v: Tensor, projection: Tensor, adapter_ids: Tensor | None, args: tuple, kwargs: dict
) -> Tensor:
    """The layer's forward where its weight is a DTensor.

    A parallel style reduces and reshards the output in a forward hook of the base. The update goes before it, where
    the output is a DTensor that says which part of the whole each rank holds.
    """

    def update(module: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
        if isinstance(y, DTensor):
            return update_sharded(y, layer, v, projection, adapter_ids)
        # FSDP2 has gathered the weight for this one call
        return layer._update(y, layer.basis, v, projection, layer.offset, adapter_ids, backend=layer.backend)

    handle = layer.base.register_forward_hook(update, prepend=True)
    try:
        return layer.base(*args, **kwargs)
    finally:
        handle.remove()


def update_sharded(
    y: DTensor, layer: TinyLoRALayer, v: Tensor, projection: Tensor, adapter_ids: Tensor | None
) -> DTensor:
    """The update of an output that is spread over a mesh; its layout stays as it was.

    Raises:
        ValueError: a layout without an update, or rows of different adapters on shards.
    """
    if kind_of(layer.base) is CONVOLUTION:
        raise ValueError(
            f"{layer.name}: expected a layer whose features are the last dimension, found a convolution with a sharded "
            "output; leave it out of target_modules"
        )
    mesh, spread = y.device_mesh, [(i, p) for i, p in enumerate(y.placements) if not p.is_replicate()]
    known = all(type(p) is Shard or p == Partial("sum") for _, p in spread)
    if len(spread) > 1 or not known or y.shape[-1] != layer.basis.shape[1]:
        raise ValueError(
            f"{layer.name}: expected an output [..., {layer.basis.shape[1]}] sharded, or partial by sum, over one mesh "
            f"dimension, found {list(y.shape)} {y.placements}; leave this module out of target_modules"
        )
    if adapter_ids is not None and spread:
        raise ValueError(
            f"{layer.name}: an AdapterBank needs whole outputs on every rank, found {y.placements}; run the bank on "
            "a model that is not tensor parallel"
        )
    local, basis, offset = y.to_local(), layer.basis, layer.offset
    if not spread:
        updated = tiny_lora_update(local, basis, v, projection, offset, adapter_ids, backend=layer.backend)
    else:
        ((dimension, placement),) = spread
        group = mesh.get_group(dimension)
        if isinstance(placement, Shard) and placement.dim % y.dim() == y.dim() - 1:
            first = mesh.get_local_rank(dimension) * -(-y.shape[-1] // mesh.size(dimension))  # as torch.chunk cuts
            own = basis[:, first : first + local.shape[-1]]  # [r, D_p]
            small = (None if s is None else s.to(accumulation_dtype(y.dtype)) for s in (own, v, projection, offset))
            updated = _ColumnUpdate.apply(local, *small, group)
        else:
            if placement.is_partial() and offset is not None:
                offset = offset / mesh.size(dimension)
            v = _SumGradient.apply(v, group)
            updated = tiny_lora_update(local, basis, v, projection, offset, backend=layer.backend)
    return DTensor.from_local(updated, mesh, y.placements, run_check=False, shape=y.shape, stride=y.stride())


class _ColumnUpdate(torch.autograd.Function):
    """The update where each rank holds some of the columns: y [..., D_p], basis [r, D_p], the rest whole."""

    @staticmethod
    def forward(ctx, y, basis, v, projection, offset, group):
        # t = sum_p y_p U_p - c
        t = _project(y, basis, group)  # [N, r]
        if offset is not None:
            t -= offset
        ctx.frozen = basis, projection, group
        ctx.save_for_backward(t, v)
        # y_p + (t M^T) U_p^T
        return _add(y, t @ contract(v, projection).T, basis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        basis, projection, group = ctx.frozen
        t, v = ctx.saved_tensors
        # a = sum_p g_p U_p;  g0_p = g_p + (a M) U_p^T;  dM = a^T t, the same on every rank
        a = _project(g, basis, group)
        g0 = _add(g, a @ contract(v, projection), basis) if ctx.needs_input_grad[0] else None
        dv = contract_backward(a.T @ t, projection) if ctx.needs_input_grad[2] else None
        return g0, None, dv, None, None, None


def _project(y: Tensor, basis: Tensor, group: Group) -> Tensor:
    """sum_p y_p U_p, [N, r]."""
    t = y.reshape(-1, basis.shape[1]).to(basis.dtype) @ basis.T
    dist.all_reduce(t, group=group)
    return t


def _add(y: Tensor, z: Tensor, basis: Tensor) -> Tensor:
    """y + z U_p^T for z [N, r], in the dtype of y."""
    return torch.addmm(y.reshape(-1, basis.shape[1]), z.to(y.dtype), basis.to(y.dtype)).view(y.shape)


class _SumGradient(torch.autograd.Function):
    """v itself; its gradient is summed over ranks that each saw a part of the output."""

    @staticmethod
    def forward(ctx, v, group):
        ctx.group = group
        return v.view_as(v)

    @staticmethod
    def backward(ctx, dv):
        dv = dv.clone()
        dist.all_reduce(dv, group=ctx.group)
        return dv, None
