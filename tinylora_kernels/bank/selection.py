"""What one ``use`` block of a bank selected: the ids of its rows, and the vectors they stand for."""
from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..common import modes
from ..common.scope import Block, Trace
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
        tenancies: [K] of the bank: how many adapters each slot has had.

    Of a frozen bank the selected rows are copied as the block opens, so that later changes cannot reach a batch that is
    running, and so that a table of a million adapters is neither converted nor moved. The tables of a trainable one are
    read live, with or without gradients: what a rollout samples by, and what is recomputed, is what was just learned.
    """

    def __init__(
        self, tables: Mapping[int, Tensor], own: OwnProjections | None, ids: Tensor, layouts: Layouts, tenancies: Tensor
    ):
        self.rows = Rows(ids, layouts)
        self.ids = ids
        self._tables, self._own, self._tenancies = tables, own, tenancies
        self.live = isinstance(next(iter(tables.values())), nn.Parameter)
        if self.rows.uniform:
            ids = ids.flatten()[:1]  # one entry, whatever the rows are
        used, compact = ids[ids != BARE].unique(return_inverse=True)
        self._used, self._tenancies_then = used, tenancies[used]
        self._arranged: dict[tuple[torch.device, Order], Tensor] = {}
        self._mixed: dict[int, tuple[int, Tensor]] = {}  # of a live table: its version, and M then, by position
        self._ids = ids
        if self.live:
            return
        self._ids = torch.full_like(ids, BARE)  # rows of the copies
        self._ids[ids != BARE] = compact
        rows = used if len(used) else torch.zeros(1, dtype=torch.int64, device="cpu")
        # of the used adapters, v by tie group [used, u], or M by the layer's position [used, r * r]
        self._copies = {group: table[rows.to(table.device)].float() for group, table in tables.items()}
        if own is not None:
            self._copies = dict(enumerate(own.mixing(rows)))

    @functools.cached_property
    def trace(self) -> Trace:
        numbers = () if self.live else tuple(table._version for table in self._tables.values())
        return Trace(hash((self.ids.numpy().tobytes(), self.rows.shape, *self._tenancies_then.tolist(), *numbers)) or 1)

    def entries_of(self, count: int) -> list[int] | None:
        """The id of each of so many rows of the model's calls; None where an entry is a token, or a row of others."""
        entries, *others = self.rows.shape
        if set(others) - {1} or (count != entries and (count != self.rows.beams or count % entries)):
            return None
        return self.ids.flatten().repeat_interleave(count // entries).tolist()

    def of(self, layer: TinyLoRALayer, device: torch.device, rows: Shape, flattened: bool = False) -> Chosen:
        """The vectors, their projection and the ids of a layer's rows; M in the vectors' place where it is given.

        Args:
            rows: shape of the layer's input, the features left out.
            flattened: its rows are known to be those of the model's input, in their order.

        Raises:
            ValueError: it cannot be told which entry a row belongs to.
            RuntimeError: the block reads the live table, and the slot of an adapter has another one by now; or M is of
                factors that the layer has no more.
        """
        own = self._own
        if own is not None and not torch.compiler.is_compiling():
            own.expect_factors(layer)
        order = self.rows.order(layer, rows, flattened)
        ids = self._arrange(device, order)
        projection = cast(Tensor, layer._buffers["projection"]) if own is None else own.ones.to(device)
        if self.live:
            return Chosen(self, self._live_vectors(layer, device), projection, ids, order.holds_for)
        key = layer.group if own is None else own.position[layer]
        if self._copies[key].device != device:
            with modes.out_of_sight():
                self._copies[key] = self._copies[key].to(device)
        return Chosen(self, self._copies[key], projection, ids, order.holds_for)

    def _live_vectors(self, layer: TinyLoRALayer, device: torch.device) -> Tensor:
        if not torch.compiler.is_compiling():
            self._expect_same_tenants()
        table = self._tables[layer.group]
        if self._own is None or torch.is_grad_enabled():
            table = table.to(device)
            return table if self._own is None else self._own.live_mixing(layer, table)
        position, version = self._own.position[layer], table._version
        held, mixed = self._mixed.get(position, (None, table))
        if held != version or mixed.device != device:
            with modes.out_of_sight():
                mixed = self._own.live_mixing(layer, table.detach().to(device))
            self._mixed[position] = version, mixed
        return mixed

    def _expect_same_tenants(self) -> None:
        handed_on = self._used[self._tenancies[self._used] != self._tenancies_then]
        if len(handed_on):
            raise RuntimeError(
                f"bank.use: the adapter with id {int(handed_on[0])} was removed inside the block, and another one has "
                "its place; a block that trains reads the live table: close it before bank.remove"
            )

    def _arrange(self, device: torch.device, order: Order) -> Tensor:
        """The ids in this order, kept for the layers that follow."""
        key = device, order._replace(holds_for=None)
        if key not in self._arranged:
            with modes.out_of_sight():
                self._arranged[key] = order.of(self._ids).to(device)
        return self._arranged[key]
