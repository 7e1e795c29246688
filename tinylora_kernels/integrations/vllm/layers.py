"""In each worker: the update on the output of vLLM's linear layers, behind the method that multiplies by their weight.

A fused layer holds several modules of the adapter (qkv_proj, gate_up_proj) and a rank of a tensor-parallel engine a
shard of each; column by column it is told which unit of the family a layer's output belongs to and which row of U that
is, and every run of one unit is a part of one update_parts over the whole output.

A row shard's output is a term of a sum, and the update of the sum is the sum of the updates. A column shard holds some
columns of y alone, so t comes from its whole input, t = x B.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ...common.words import listed
from ...files.format import AdapterError
from .family import Checkpoint, Unit, factorize
from .manager import Manager

_update_parts = torch.ops.tinylora.update_parts.default


@dataclass
class Held:
    """A linear layer of the engine that holds modules of the family."""

    layer: Any
    by_columns: bool  # its weight is sharded by output columns
    pieces: list[tuple[str | None, Tensor]] = field(default_factory=list)  # (module, its rows), in the order of y


def attach(model: nn.Module, model_config: Any, manager: Manager) -> None:
    """Put the family's update on every layer that it adapts.

    Raises:
        AdapterError: a module is not a linear layer here, or its weight is not the one the family was trained on.
    """
    held = find_layers(model, model_config, manager.family.modules)
    units = make_units(held, model_config, manager)
    manager.make_table(units)
    for one in held:
        wrap(one, units, manager)


# Which layers


def find_layers(model: nn.Module, model_config: Any, modules: dict[str, Any]) -> list[Held]:
    """The linear layers that hold modules of the family, each with the rows of the modules that this rank has."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase
    from vllm.model_executor.utils import get_packed_modules_mapping

    packed = get_packed_modules_mapping(model)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    rename = mapper.get_rename_mapper()._map_name if mapper is not None else lambda name: name
    served = {rename(name) or name: name for name in modules}  # the engine's name -> the family's
    mla = getattr(model_config, "use_mla", False)
    refused = {"kv_b_proj": "attention multiplies its weight into others"} if mla else {}
    found: list[Held] = []
    here: set[str] = set()
    others: dict[str, str] = {}
    for name, layer in model.named_modules():
        prefix, _, last = name.rpartition(".")
        children = [f"{prefix}.{child}" if prefix else child for child in packed.get(last, ())]
        own = [served.get(child) for child in children]
        if served.get(name) is None and not any(own):
            continue
        why = refused.get(last) or (None if isinstance(layer, LinearBase) else f"a {type(layer).__name__} here")
        if why is not None:
            others |= {child: why for child in (served.get(name), *own) if child is not None}
            continue
        one = Held(layer, isinstance(layer, ColumnParallelLinear) and layer.tp_size > 1)
        one.pieces = pieces_of(layer, served[name], modules) if served.get(name) else fused_pieces(layer, own)
        here.update(module for module, _ in one.pieces if module is not None)
        found.append(one)
    check_complete(model, modules, here, others)
    return found


def fused_pieces(layer: Any, own: list[str | None]) -> list[tuple[str | None, Tensor]]:
    """Of a layer made of several modules: the rows of each that this rank holds."""
    sizes = output_sizes(layer)
    if len(sizes) != len(own):
        raise AdapterError(f"{layer.prefix}: expected {len(own)} parts as its packed modules, found outputs {sizes}")
    rows = [torch.arange(size) + shard_of(layer, i) * size for i, size in enumerate(sizes)]
    return list(zip(own, rows, strict=True))


def pieces_of(layer: Any, module: str, modules: dict[str, Any]) -> list[tuple[str | None, Tensor]]:
    """Of a layer that is a module itself, all its outputs in one: the rows that this rank holds."""
    rows, begin = [], 0
    sizes = output_sizes(layer)
    whole = whole_sizes(layer)
    for i, (size, all_rows) in enumerate(zip(sizes, whole, strict=True)):
        rows.append(begin + torch.arange(size) + shard_of(layer, i) * size)
        begin += all_rows
    if begin != modules[module].shape[0]:
        raise AdapterError(f"{module}: {modules[module].shape[0]} outputs in the adapter, {begin} in the served model")
    return [(module, torch.cat(rows))]


def output_sizes(layer: Any) -> list[int]:
    """Outputs of each part on this rank."""
    return list(getattr(layer, "output_partition_sizes", None) or [layer.output_size])


def whole_sizes(layer: Any) -> list[int]:
    """Outputs of each part over all ranks."""
    if hasattr(layer, "num_kv_head_replicas"):
        sizes, tp = output_sizes(layer), layer.tp_size
        return [sizes[0] * tp, *(size * tp // layer.num_kv_head_replicas for size in sizes[1:])]
    if hasattr(layer, "output_sizes"):
        return list(layer.output_sizes)
    return [layer.output_size]


def shard_of(layer: Any, part: int) -> int:
    """Which shard of a part this rank holds; heads of k and v may be repeated on several ranks."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    if not isinstance(layer, ColumnParallelLinear) or layer.tp_size == 1:
        return 0
    replicas = layer.num_kv_head_replicas if part > 0 and hasattr(layer, "num_kv_head_replicas") else 1
    return layer.tp_rank // replicas


def check_complete(model: nn.Module, modules: dict[str, Any], here: set[str], others: dict[str, str]) -> None:
    """Every module of the family is on some stage of the pipeline, in a linear layer."""
    from vllm.distributed import get_pp_group

    stages = [(here, others)]
    group = get_pp_group()
    if group.world_size > 1:
        stages = [None] * group.world_size  # type: ignore[list-item]
        torch.distributed.all_gather_object(stages, (here, others), group=group.cpu_group)
    found = set().union(*(stage[0] for stage in stages))
    reasons = {name: why for stage in stages for name, why in stage[1].items()}
    missing = [name for name in modules if name not in found]
    if missing:
        named = [f"{name} ({reasons.get(name, 'no such layer')})" for name in missing]
        raise AdapterError(
            f"the served model carries adapters on the output of its linear layers; it cannot on {listed(named, 3)}; "
            "leave these out of target_modules"
        )


# Their factors


def make_units(held: list[Held], model_config: Any, manager: Manager) -> list[Unit]:
    """The units of all modules that the layers hold, in the family's order; each rank works on its share."""
    from vllm.distributed import get_tp_group

    family, group = manager.family, get_tp_group()
    by_columns = {module for one in held if one.by_columns for module, _ in one.pieces}
    present = {module for one in held for module, _ in one.pieces}
    names = [name for name in family.modules if name in present]
    checkpoint = Checkpoint(model_config.model, model_config.revision)
    config = family.adapter.config
    mine: dict[str, list[Unit]] | Exception
    try:
        mine = {
            name: factorize(family.modules[name], config, checkpoint.weight(name), name in by_columns)
            for name in names[group.rank_in_group :: group.world_size]
        }
    except Exception as error:  # told to the other ranks, which would wait
        mine = error
    everyones: list[Any] = [mine]
    if group.world_size > 1:
        everyones = [None] * group.world_size
        torch.distributed.all_gather_object(everyones, mine, group=group.cpu_group)
    merged: dict[str, list[Unit]] = {}
    for units in everyones:
        if isinstance(units, Exception):
            raise units
        merged |= units
    return [unit for name in names for unit in merged[name]]


# The update


@dataclass
class Run:
    """Neighbouring columns of a layer's output that belong to one unit, or to none."""

    unit: int | None
    rows: Tensor  # of the unit's U, one for each column


def runs_of(one: Held, manager: Manager) -> list[Run]:
    """The parts of the update of a layer, in the order of its columns."""
    runs = []
    for module, rows in one.pieces:
        if module is None:
            runs.append(Run(None, rows))
            continue
        sizes = manager.projections.parts[module]
        begins = [0, *accumulate(sizes)][:-1] if sizes else [0]
        part_of = torch.bucketize(rows, torch.tensor(begins), right=True) - 1  # [columns]
        parts, counts = torch.unique_consecutive(part_of, return_counts=True)
        for part, own_rows in zip(parts.tolist(), rows.split(counts.tolist()), strict=True):
            unit = manager.projections.position[module, part if sizes else None]
            runs.append(Run(unit, own_rows - begins[part]))
    return runs


def wrap(one: Held, units: list[Unit], manager: Manager) -> None:
    """layer.quant_method.apply updates what it returns; the method keeps its class for isinstance.

    All tensors are buffers of the layer: torch.compile takes them as inputs, and a sleeping engine saves them.
    """
    layer, runs = one.layer, runs_of(one, manager)
    rank, r = manager.rank, manager.family.rank
    ends = list(accumulate(len(run.rows) for run in runs))
    # Columns of no unit have a basis of zeros: t is zero there, and y stays.
    basis = torch.zeros(rank, ends[-1])
    right = torch.zeros(len(runs), rank, layer.input_size) if one.by_columns else None
    for n, (run, begin, end) in enumerate(zip(runs, [0, *ends[:-1]], ends, strict=True)):
        if run.unit is None:
            continue
        basis[:r, begin:end] = units[run.unit].basis[:, run.rows]
        own_right = units[run.unit].right
        if right is not None and own_right is not None:
            right[n, :r] = own_right
    groups, projection = manager.projections_of([run.unit for run in runs])
    held = {
        "ids": manager.ids, "table": manager.table, "basis": basis, "right": right, "projection": projection,
    }  # fmt: skip
    for name, tensor in held.items():
        moved = None if tensor is None else tensor.to(manager.device)
        layer.register_buffer(f"tinylora_{name}", moved, persistent=False)
    inner = layer.quant_method
    kind = type(inner)

    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = inner.apply(layer, x, None)  # the update wants the product alone, and adds the bias
        rows = y if y.dim() == 2 else y.view(-1, y.shape[-1])
        buffers = layer._buffers
        right = buffers["tinylora_right"]
        _update_parts(
            rows, buffers["tinylora_basis"], buffers["tinylora_table"], buffers["tinylora_projection"],
            None, bias, x if right is not None else None, right, buffers["tinylora_ids"][: rows.shape[0]], ends,
            groups,
        )  # fmt: skip
        return y

    layer.quant_method = copy.copy(inner)
    layer.quant_method.__class__ = type(f"TinyLoRA{kind.__name__}", (kind,), {"apply": apply})
