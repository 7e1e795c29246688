"""What one ``use`` block of a bank selected: the ids of its rows, and the vectors they stand for."""
from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ..common import modes
from ..common.scope import Block
from ..layers.layer import TinyLoRALayer
from ..linear.plan import Chosen
from .ids import BARE
from .rows import Layouts, Order, Rows, Shape
from .seeds import OwnProjections


class Selection(Block):
    """The ids of one ``use`` block, and the vectors they stand for.

    Args:
        tables: of the bank, tie group -> [K, u].
        own: its adapters' own projections, where every one brings its seed.
        ids: int64, live ones or BARE; what their shape says is in rows.py.
        layouts: of the bank.

    Without gradients the selected rows are copied as the block opens, so that later changes of the bank cannot reach a
    batch that is running, and so that a table of a million adapters is neither converted nor moved.
    """

    def __init__(self, tables: Mapping[int, Tensor], own: OwnProjections | None, ids: Tensor, layouts: Layouts):
        self.rows = Rows(ids, layouts)
        self._tables, self._own = tables, own
        if self.rows.uniform:
            ids = ids.flatten()[:1]  # one entry, whatever the rows are
        used, compact = ids[ids != BARE].unique(return_inverse=True)
        compacted = torch.full_like(ids, BARE)
        compacted[ids != BARE] = compact
        self._ids = {True: ids, False: compacted}  # rows of the live tables, and of the copies
        self._arranged: dict[tuple[bool, torch.device, Order], Tensor] = {}
        rows = used if len(used) else torch.zeros(1, dtype=torch.int64, device="cpu")
        # of the used adapters, v by tie group [used, u], or M by the layer's position [used, r * r]
        self._copies = {group: table.detach()[rows.to(table.device)].float() for group, table in tables.items()}
        if own is not None:
            self._copies = dict(enumerate(own.mixing(rows, self._copies)))

    def of(self, layer: TinyLoRALayer, device: torch.device, rows: Shape, flattened: bool = False) -> Chosen:
        """The vectors, their projection and the ids of a layer's rows; M in the vectors' place where it is given.

        Args:
            rows: shape of the layer's input, the features left out.
            flattened: its rows are known to be those of the model's input, in their order.

        Raises:
            ValueError: it cannot be told which entry a row belongs to.
        """
        table, own = self._tables[layer.group], self._own
        live = table.requires_grad and torch.is_grad_enabled()
        order = self.rows.order(layer, rows, flattened)
        ids = self._arrange(live, device, order)
        projection = cast(Tensor, layer._buffers["projection"]) if own is None else own.ones.to(device)
        if live:
            table = table.to(device)
            vectors = table if own is None else own.live_mixing(layer, table)
            return Chosen(self, vectors, projection, ids, order.holds_for)
        key = layer.group if own is None else own.position[layer]
        if self._copies[key].device != device:
            with modes.out_of_sight():
                self._copies[key] = self._copies[key].to(device)
        return Chosen(self, self._copies[key], projection, ids, order.holds_for)

    def _arrange(self, live: bool, device: torch.device, order: Order) -> Tensor:
        """The ids in this order, kept for the layers that follow."""
        key = live, device, order._replace(holds_for=None)
        if key not in self._arranged:
            with modes.out_of_sight():
                self._arranged[key] = order.of(self._ids[live]).to(device)
        return self._arranged[key]
