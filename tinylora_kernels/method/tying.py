"""Which adapted modules share one trained vector.

The paper ties `v` across `n_tie` modules in two ways (arXiv 2602.04118, weight tying): "tiled" shares among modules of
nearby depth whatever their type, "structured" among modules of one type in nearby layers. A map says it by hand.
"""
from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence

from ..common.words import listed


def assign_groups(names: Sequence[str], n_tie: int, tying: str | Mapping[str, Hashable] = "tiled") -> list[int]:
    """The tie group of every module.

    Args:
        names: qualified module names, in `named_modules` order (shallow to deep).
        n_tie: modules per group, >= 1. Not used when `tying` is a map.
        tying: "tiled": consecutive groups of n_tie, ceil(len(names) / n_tie) of them, every group full but the last.
            "structured": the same within each kind of module, a kind being the name without its layer numbers, so
            "model.layers.0.mlp.up_proj" and "model.layers.1.mlp.up_proj" are one kind.
            {name: label}: modules with equal labels share; every name exactly once, labels any hashable values.

    Returns:
        Integers 0..G-1, numbered in order of first appearance.

    Raises:
        ValueError: it names the value of n_tie or tying, or the modules a map misses or does not know.
    """
    n_tie = _checked_n_tie(n_tie)
    if isinstance(tying, Mapping):
        return _number(_labels_from_map(names, tying))
    if tying == "tiled":
        return [position // n_tie for position in range(len(names))]
    if tying == "structured":
        return _number(_structured_labels(names, n_tie))
    raise ValueError(f'tying must be "tiled", "structured" or a map from module name to group, got {tying!r}')


def module_kind(name: str) -> str:
    """The module's name without its layer numbers: "layers.7.self_attn.q_proj" -> "layers.self_attn.q_proj"."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _checked_n_tie(n_tie: int) -> int:
    try:
        count = operator.index(n_tie)
    except TypeError:
        count = 0
    if isinstance(n_tie, bool) or count < 1:
        raise ValueError(f"n_tie must be a whole number of modules, at least 1, got {n_tie!r}")
    return count


def _structured_labels(names: Sequence[str], n_tie: int) -> list[tuple[str, int]]:
    seen: dict[str, int] = {}
    labels = []
    for name in names:
        kind = module_kind(name)
        position = seen.get(kind, 0)
        seen[kind] = position + 1
        labels.append((kind, position // n_tie))
    return labels


def _labels_from_map(names: Sequence[str], groups: Mapping[str, Hashable]) -> list[Hashable]:
    missing = [name for name in names if name not in groups]
    if missing:
        raise ValueError(f"tying map gives no group for {listed(missing)}; every adapted module needs one")
    known = set(names)
    unknown = [name for name in groups if name not in known]
    if unknown:
        raise ValueError(f"tying map names {listed(unknown)}, not among the adapted modules; names must match exactly")
    for name in names:
        if not isinstance(groups[name], Hashable):
            raise ValueError(f"tying map gives {name} the group {groups[name]!r}, which is not hashable")
    return [groups[name] for name in names]


def _number(labels: Iterable[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]
