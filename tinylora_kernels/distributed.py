"""The adapter on torch's own engines: DDP, FSDP2 (fully_shard) and tensor parallelism (parallelize_module).

Every rank holds the whole adapter, and data parallelism sends the gradients of v: one all-reduce of v's bytes a
backward pass. What a layer does whose weight is sharded stands in layers/sharded.py; docs/distributed.md has the few
lines that each engine takes.
"""
from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .base.attributes import weight_of
from .base.kinds import weight_matrix
from .base.weights import is_sharded
from .common.atomic import write_atomically
from .factors.modules import factorize_matrix
from .factors.svd import Factors, RankError
from .files.adapter import describe_model, warn_of_what_is_left_out
from .files.format import encode
from .method.config import LoRAXSConfig, TinyLoRAConfig
from .model.adapted import trainable_vectors
from .model.targets import base_module, fused_parts, is_default, selected_names

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
        self.scheduled_in = -1  # a backward pass: the callback of one that ends in an error is dropped

    def schedule(self, v: nn.Parameter) -> None:
        backward_pass = torch._C._current_graph_task_id()
        if self.scheduled_in != backward_pass:
            self.scheduled_in = backward_pass
            torch.autograd.Variable._execution_engine.queue_callback(self.run)

    @torch.no_grad()
    def run(self) -> None:
        self.scheduled_in = -1
        vectors = [v for v in self.vectors if v.requires_grad]
        gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in vectors]
        there = torch.tensor([float(v.grad is not None) for v in vectors], device=vectors[0].device)
        flat = _flatten([*gradients, there])
        dist.all_reduce(flat, group=self.group)
        _spread(flat / dist.get_world_size(self.group), [*gradients, there])
        missing = [i for i, v in enumerate(vectors) if v.grad is None]
        # Used on no rank: no gradient, as in one process. Zeros would let an optimizer's momentum and decay move it.
        elsewhere = there[missing].tolist() if missing else []  # a GPU is waited for only then
        for i, share in zip(missing, elsewhere, strict=True):
            vectors[i].grad = gradients[i] if share else None


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one float32 (or float64) tensor."""
    return torch.cat([t.detach().flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
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
    bases = {name: base_module(model, name) for name in selected_names(model, config)[0]}
    parts = fused_parts(config, bases)
    me = dist.get_rank(group)
    shares = deal({name: weight_of(base).numel() for name, base in bases.items()}, dist.get_world_size(group))
    found, failed = {}, {}
    for turn in zip_longest(*shares):  # one matrix for each rank
        mine = None
        for owner, name in enumerate(turn):
            if name is not None and (owner == me or is_sharded(weight_of(bases[name]))):
                matrix = weight_matrix(bases[name])  # of a sharded weight: all ranks take part
                if owner == me:
                    mine = matrix
                del matrix
        if mine is None:
            continue
        try:
            found[turn[me]] = factorize_matrix(turn[me], mine, config.rank, parts, cache=config.cache)
        except RankError as error:
            if not is_default(config):  # the default leaves out what cannot carry the rank
                failed[turn[me]] = str(error)
        except ValueError as error:  # all raise it together below: a rank that stops here leaves the others waiting
            failed[turn[me]] = str(error)
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (found, failed), group=group)
    factors = {name: factor for part, _ in gathered for name, factor in part.items()}
    messages = {name: message for _, part in gathered for name, message in part.items()}
    for name in bases:
        if name in messages:
            raise ValueError(messages[name])
    return {name: factors[name] for name in bases if name in factors}


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
    model: nn.Module, path: str | os.PathLike[str], include_basis: bool = False, group: Group = None
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
    if dist.get_rank(group) == 0:
        warn_of_what_is_left_out(model, os.fspath(path))
