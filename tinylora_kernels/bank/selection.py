"""What one ``use`` block of a bank selected: the ids of its rows, and the vectors they stand for."""
from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ..common import modes
from ..layers.layer import TinyLoRALayer
from .seeds import OwnProjections

BARE = -1  # the id of a row that runs the frozen base alone


class Selection:
    """The ids of one ``use`` block, and the vectors they stand for.

    Args:
        tables: of the bank, tie group -> [K, u].
        own: its adapters' own projections, where every one brings its seed.
        ids: [B] int64, live ones or BARE.

    Without gradients the selected rows are copied as the block opens, so that later changes of the bank cannot reach a
    batch that is running, and so that a table of a million adapters is neither converted nor moved.
    """

    def __init__(self, tables: Mapping[int, Tensor], own: OwnProjections | None, ids: Tensor):
        self._tables, self._own, self._ids = tables, own, ids
        used, compact = ids[ids != BARE].unique(return_inverse=True)
        self._compact = torch.full_like(ids, BARE)
        self._compact[ids != BARE] = compact
        rows = used if len(used) else torch.zeros(1, dtype=torch.int64, device="cpu")
        # of the used adapters, v by tie group [used, u], or M by the layer's position [used, r * r]
        self._copies = {group: table.detach()[rows.to(table.device)].float() for group, table in tables.items()}
        if own is not None:
            self._copies = dict(enumerate(own.mixing(rows, self._copies)))

    def of(self, layer: TinyLoRALayer, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(vectors [K, u], projection, ids [B]) for a layer's rows; vectors [K, r * r] where M is given as it is."""
        table, own = self._tables[layer.group], self._own
        live = table.requires_grad and torch.is_grad_enabled()
        ids = self._move("_ids" if live else "_compact", device)
        projection = cast(Tensor, layer._buffers["projection"]) if own is None else own.ones.to(device)
        if live:
            table = table.to(device)
            return table if own is None else own.live_mixing(layer, table), projection, ids
        key = layer.group if own is None else own.position[layer]
        if self._copies[key].device != device:
            with modes.out_of_sight():
                self._copies[key] = self._copies[key].to(device)
        return self._copies[key], projection, ids

    def _move(self, name: str, device: torch.device) -> Tensor:
        ids = getattr(self, name)
        if ids.device != device:
            with modes.out_of_sight():
                ids = ids.to(device)
            setattr(self, name, ids)
        return ids
