"""What is left of the update when it is merged into weights of low precision: a report, module by module."""
from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from ..base.weights import slabs
from ..common.finite import as_finite
from ..common.words import dtype_name
from ..method.tying import module_kind
from ..ops.reference import product
from .merging import delta_factors, mergeable_layers, original_weight

ROWS_SHOWN = 40  # longer reports are summarised by kind of module


@dataclass(frozen=True)
class ModuleFidelity:
    """What one module's update becomes when it is merged.

    With D the exact update W' - W and D^ = cast(W + D) - cast(W) the one that the merged weight carries:

    Attributes:
        name, dtype: the module and the dtype it is cast to.
        norm: ||D||, Frobenius.
        survived: <D^, D> / <D, D>, how much of the intended update is left along itself: 1 all, 0 nothing.
        error: ||D^ - D|| / ||D||, everything that went wrong, rounding noise across the update included.  A cast that
            drops the update whole has 1; one that amplifies its noise has more.
        changed: share of the weight's elements whose bits differ after the merge.
    """

    name: str
    dtype: torch.dtype
    norm: float
    survived: float
    error: float
    changed: float


@dataclass(frozen=True)
class MergeFidelity:
    """``merge_fidelity``'s report: one row per module and the totals over all; ``print`` shows a table.

    Attributes:
        rows: one ModuleFidelity per adapted module.
        survived, error: as in the rows, over all modules taken as one vector.
    """

    rows: list[ModuleFidelity]
    survived: float
    error: float

    def __str__(self) -> str:
        head: tuple[str, ...] = ("module", "cast to", "||dW||", "survived", "error", "changed")
        if len(self.rows) <= ROWS_SHOWN:
            body: list[tuple[str, ...]] = [
                (row.name, dtype_name(row.dtype), f"{row.norm:.3g}", f"{row.survived:.1%}", f"{row.error:.3g}",
                 f"{row.changed:.1%}") for row in self.rows
            ]  # fmt: skip
        else:
            head = ("kind of module", "modules", "cast to", "||dW||", "survived", "worst", "error")
            body = [_summary(kind, rows) for kind, rows in self._by_kind().items()]
        table = _table([head, *body])
        return f"{table}\nall modules: {self.survived:.1%} of the update survives the cast, error {self.error:.3g}"

    def _by_kind(self) -> dict[str, list[ModuleFidelity]]:
        kinds: dict[str, list[ModuleFidelity]] = {}
        for row in self.rows:
            kinds.setdefault(module_kind(row.name), []).append(row)
        return kinds


@torch.no_grad()
def merge_fidelity(model: nn.Module, dtype: torch.dtype | None = None) -> MergeFidelity:
    """How much of the update survives being merged, for each module; the model is not changed.

    A low-precision weight swallows an update below half its last place.  Warns (UserWarning) when more than half of
    the whole update would be lost: export_lora keeps it beside the weights then, or train with ``tis_cap`` in mind.

    Args:
        model: an adapted model, merged or not.
        dtype: the dtype a rollout engine would hold the weights in; default each weight's own.

    Raises:
        ValueError: no adapter, a quantised base, a weight shared with another module, or numbers beyond the dtype.
    """
    rows, dots, energies, errors = [], 0.0, 0.0, 0.0
    for name, layer in mergeable_layers(model).items():
        weight = original_weight(layer)
        cast = dtype or weight.dtype
        left, right = delta_factors(layer)
        changed = energy = dot = error = 0.0
        for part in slabs(len(weight)):
            exact = weight[part].double()
            delta = product(left[part], right)  # D
            before, after = (as_finite(f"{name}: its weight", w, cast) for w in (exact, exact + delta))
            merged_delta = after.double().sub_(before.double())  # D^
            changed += float((before != after).sum()) / weight.numel()
            energy += float(delta.square().sum())
            dot += float((merged_delta * delta).sum())
            error += float((merged_delta - delta).square().sum())
        rows.append(
            ModuleFidelity(
                name, cast, energy**0.5, dot / energy if energy else 1.0, (error / energy) ** 0.5 if energy else 0.0,
                changed,
            )  # fmt: skip
        )
        dots, energies, errors = dots + dot, energies + energy, errors + error
    report = MergeFidelity(
        rows, dots / energies if energies else 1.0, (errors / energies) ** 0.5 if energies else 0.0
    )
    if report.survived < 0.5:
        warnings.warn(
            f"merging would swallow {1 - report.survived:.0%} of the update; export_lora(model, directory) keeps all "
            "of it beside the weights",
            stacklevel=3,
        )
    return report


def _summary(kind: str, rows: list[ModuleFidelity]) -> tuple[str, ...]:
    energy = sum(row.norm**2 for row in rows)
    survived = sum(row.survived * row.norm**2 for row in rows) / energy if energy else 1.0
    error = (sum((row.error * row.norm) ** 2 for row in rows) / energy) ** 0.5 if energy else 0.0
    worst = min(row.survived for row in rows)
    return (
        kind, str(len(rows)), dtype_name(rows[0].dtype), f"{energy**0.5:.3g}", f"{survived:.1%}", f"{worst:.1%}",
        f"{error:.3g}",
    )  # fmt: skip


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)
