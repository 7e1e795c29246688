"""A slot of a trainable bank that changes hands: what an optimizer remembers of one adapter is not for the next.

Optimizers keep their moments by the table, and know nothing of slots. So each is asked before its next step, by a hook
that torch calls before every step of any optimizer, once a slot has changed hands at all. What one has that never was
asked may be of any time before, a state that was loaded too: only who knows the names (rl.PopulationAdam) can say that
its rows are those of the present adapters (`is_of_now`).
"""
from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_counter = itertools.count(1)
_handed_on = WeakIdKeyDictionary()  # table [K, u] -> {slot: when it changed hands last}
_seen: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()  # what it was asked up to


def hand_on(tables: Iterable[Tensor], slot: int) -> None:
    """From now on the slot has another adapter: no gradient, no moments, no count of steps is left of the last one."""
    _install()
    now = next(_counter)
    for table in tables:
        if table.grad is not None:
            table.grad[slot] = 0
        _handed_on.setdefault(table, {})[slot] = now


def is_of_now(optimizer: torch.optim.Optimizer) -> None:
    """What the optimizer keeps is of the adapters that are in the slots now."""
    _seen[optimizer] = next(_counter)


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(forget)


def forget(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
    """Have the optimizer keep nothing of adapters whose slots others have now.

    Raises:
        RuntimeError: it keeps something of all slots together, which cannot be forgotten for one.
    """
    seen, now = _seen.get(optimizer, 0), next(_counter)
    rows: list[tuple[Tensor, list[int]]] = []
    for table in (table for group in optimizer.param_groups for table in group["params"]):
        slots = [slot for slot, when in _handed_on.get(table, {}).items() if when > seen]
        if slots and (state := optimizer.state.get(table)):
            rows += [(kept, slots) for kept in _kept_by_row(optimizer, table, state, slots)]
    for kept, slots in rows:
        kept[slots] = 0
    _seen[optimizer] = now


def _kept_by_row(optimizer: torch.optim.Optimizer, table: Tensor, state: dict, slots: list[int]) -> list[Tensor]:
    """What the optimizer keeps of each slot; raises where it keeps something of all of them together."""
    held = {name: value for name, value in state.items() if value is not None}
    by_row = {
        name: value for name, value in held.items()
        if isinstance(value, Tensor) and value.dim() and len(value) == len(table)
    }  # fmt: skip
    shared = next((name for name in held if name not in by_row), None)
    if shared is not None and any(bool(value[slots].any()) for value in by_row.values()):
        raise RuntimeError(
            f"{type(optimizer).__name__}: slot {slots[0]} of the bank has another adapter than it had, and {shared!r} "
            "is one for all slots there; use rl.PopulationAdam, whose state has the adapters' names, or make the "
            "optimizer again after bank.add and load no state"
        )
    return list(by_row.values())
