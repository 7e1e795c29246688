"""Adapters that are off for a block of code, in one context: another thread's rollout keeps its own."""
from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from ..common.scope import Block, Scope, Trace
from ..linear.plan import note_change


class Off(Block):
    """The layers that run their bare base in a block."""

    def __init__(self, layers: Collection[nn.Module]):
        self.layers = frozenset(layers)

    @functools.cached_property
    def trace(self) -> Trace:
        outer = self.outer
        while outer is not None and outer.ended:
            outer = outer.outer
        off = frozenset() if outer is None else outer.trace.layers or frozenset()
        return Trace(1, off | frozenset(map(id, self.layers)))


switched_off = Scope("adapter_disabled", "call backward() inside `with adapter_disabled(...)`")


@contextmanager
def switch_off(layers: Collection[nn.Module]) -> Iterator[None]:
    """The bare base of these layers for the duration. No layer has a plan then, in any thread: a plan does not ask."""
    with switched_off.holding(Off(layers)):
        note_change()
        yield


def is_off(layer: nn.Module) -> bool:
    """Whether the layer is off in the block that runs here; to be asked where ``switched_off.matters()``."""
    block = switched_off.now(layer)
    while block is not None and (block.ended or layer not in cast(Off, block).layers):
        block = block.outer
    return block is not None
