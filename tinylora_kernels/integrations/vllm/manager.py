"""In each worker: what vLLM's model runner asks of a LoRA manager, for adapters that are a row of a table.

    table  [rows, K, numbers]   a row for each unit (M, r * r numbers) or, without own_seeds, tie group (v, u numbers)
    ids    [tokens] int32       the adapter of each token of the step, -1 for the bare base

Both lie where they are for ever, so that a compiled or captured model reads them. An adapter's numbers stay in host
memory while the engine core wants them; the table holds those that ran last.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...method.parts import padded_rank
from .adapters import FIRST_ID, decode
from .family import Family, Projections, Recipe, Unit
from .settings import Settings

BARE = -1


class Manager:
    """All that LoRAModelRunnerMixin asks of a manager.

    Args:
        settings: of the engine.
        max_tokens, max_sequences: most in a step.
        device: of the model.

    Raises:
        ValueError: a step may have more adapters than the table holds.
    """

    is_enabled = True

    def __init__(self, settings: Settings, max_tokens: int, max_sequences: int, device: torch.device):
        if settings.capacity < max_sequences:
            raise ValueError(
                f"additional_config['tinylora']: capacity is {settings.capacity}, and a step may run {max_sequences} "
                "adapters (max_num_seqs); raise the one or lower the other"
            )
        self.device, self.capacity = device, settings.capacity
        self.family = Family(settings.adapters, settings.own_seeds, settings.token)
        self.rank = padded_rank(self.family.rank)  # GPU kernels are made for these
        # Tokens beyond a step's (padding of a captured graph) keep ids of earlier steps, which are valid.
        self.ids = torch.full((max_tokens,), BARE, dtype=torch.int32, device=device)
        self._host: dict[int, tuple[Recipe, Tensor]] = {}
        self._slots: OrderedDict[int, int] = OrderedDict()  # id -> slot, the one that ran longest ago first
        self._free = list(range(self.capacity - 1, -1, -1))
        self._last: tuple[int, ...] | None = None  # the tokens that `ids` holds

    # The table

    def make_table(self, units: list[Unit]) -> None:
        """For these units, all that this worker has."""
        self.projections = Projections(self.family, units)
        if self.family.holds_mixing:
            rows, numbers = max(len(units), 1), self.rank**2
        else:
            rows, numbers = self.family.recipe.shape
        self.table = torch.zeros(rows, self.capacity, numbers, device=self.device)

    def projections_of(self, units: list[int | None]) -> tuple[list[int], Tensor]:
        """(row of the table, P') of each part of a layer, as update_parts takes them; None: a part of no unit."""
        if self.family.holds_mixing:  # the table holds M itself, in the form of LoRA-XS
            return [unit or 0 for unit in units], torch.ones(len(units), self.rank, self.rank)
        rows, groups, projections = self.projections.of(self.family.recipe)
        group_of = dict(zip(rows.tolist(), groups.tolist(), strict=True))
        own = dict(zip(rows.tolist(), projections, strict=True))
        bare = torch.zeros_like(projections[0])
        padded = [pad_square(own.get(unit, bare), self.rank) for unit in units]
        return [group_of.get(unit, 0) for unit in units], torch.stack(padded)

    # Adapters

    def add_adapter(self, request: Any) -> bool:
        """Keep the numbers of an id; they come from the engine core, which has checked them."""
        self._host[request.lora_int_id] = decode(request.lora_path, self.family)
        return True

    def remove_adapter(self, lora_id: int) -> bool:
        slot = self._slots.pop(lora_id, None)
        if slot is not None:
            self._free.append(slot)
            self._last = None
        return self._host.pop(lora_id, None) is not None

    def remove_all_adapters(self) -> None:
        """After warming up: those made up for it. An idle data-parallel rank steps like that too, among real ones."""
        for lora_id in [held for held in self._host if held < FIRST_ID]:
            self.remove_adapter(lora_id)

    def list_adapters(self) -> set[int]:
        return set(self._host)

    def pin_adapter(self, lora_id: int) -> bool:
        return lora_id in self._host

    def _slot(self, lora_id: int, running: set[int]) -> int:
        """Where the table holds an id; one that does not run gives way to it if there is no room."""
        slot = self._slots.get(lora_id)
        if slot is None:
            recipe, v = self._host[lora_id]
            if not self._free:
                oldest = next(held for held in self._slots if held not in running)
                self._free.append(self._slots.pop(oldest))
            slot = self._slots[lora_id] = self._free.pop()
            if self.family.holds_mixing:
                rows, mixing = self.projections.mixing(recipe, v)  # [L], [L, r, r]
                new = torch.zeros(len(self.table), self.rank**2)
                new[rows] = pad_square(mixing, self.rank).flatten(1)
                self.table[:, slot] = new.to(self.device)
            else:
                self.table[:, slot] = v.to(self.device)
        self._slots.move_to_end(lora_id)
        return slot

    # A step

    def set_active_adapters(self, requests: Any, mapping: Any) -> None:
        """Write the slot of each token of the step into `ids`; mapping.index_mapping has their adapters, 0 for none."""
        if mapping is None or mapping.index_mapping == self._last:
            return
        tokens = mapping.index_mapping
        running = set(tokens)
        slots = {lora_id: self._slot(lora_id, running) if lora_id > 0 else BARE for lora_id in running}
        step = np.fromiter(map(slots.__getitem__, tokens), np.int32, len(tokens))
        self.ids[: len(step)].copy_(torch.from_numpy(step))
        self._last = tokens

    # Warming up

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        recipe = self.family.recipe
        self._host[request.lora_int_id] = recipe, torch.zeros(recipe.shape)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        return False


def pad_square(matrices: Tensor, rank: int) -> Tensor:
    """[..., r, r] with zeros up to [..., rank, rank]."""
    short = rank - matrices.shape[-1]
    return nn.functional.pad(matrices, (0, short, 0, short))
