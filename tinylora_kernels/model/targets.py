"""Which modules of a model are adapted: names to modules, modules to parts, and back to the shortest list of names."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..base.experts import ExpertSlice, expert_slices, is_experts
from ..base.kinds import OTHER, kind_of, matrix_shape
from ..base.names import ENGINES, inside, is_of, named_modules, submodule
from ..method.config import Method
from ..method.parts import names_match
from .adapted import adapted_layers


def target_names(model: nn.Module, target_modules: Sequence[str] | str | None) -> list[str]:
    """Qualified names of the modules to adapt, in named_modules order.

    Raises:
        ValueError: the model is adapted already, nothing that can be adapted matches, or what matches cannot be.
    """
    if adapted_layers(model):
        raise ValueError("model: expected a bare model, found one that is adapted already; call remove_adapter first")
    if engine := next((module for module in model.modules() if is_of(module, ENGINES)), None):
        raise ValueError(
            f"model: {type(engine).__name__} has taken its parameters already and would not synchronise vectors that "
            "come now; adapt the model first and wrap it then"
        )
    candidates = list(_candidates(model))
    if target_modules is None or target_modules == "all-linear":
        head = output_head(model)
        names = [name for name, base, _ in candidates if kind_of(base).by_default and base is not head]
        wanted: Sequence[str] = ["every linear layer"]
    else:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        matched = [
            (name, base) for name, base, known_as in candidates
            if any(names_match(known, pattern) for pattern in wanted for known in known_as)
        ]  # fmt: skip
        for name, base in matched:
            if reason := kind_of(base).why_not(base):
                raise ValueError(f"{name}: it cannot be adapted: {reason}")
        names = [name for name, _ in matched]
    if not names:
        found = _adaptable(candidates)
        raise ValueError(f"target_modules: no module matches {', '.join(wanted)}; the model has {found}")
    return names


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """(name, module, names it goes by) of all that has a kind; the experts of a stack go by its names as well."""
    for name, module in named_modules(model):
        if name and is_experts(module):
            for below, piece in expert_slices(module).items():
                yield f"{name}.{below}", piece, (f"{name}.{below}", f"{name}.{piece.stack}", name)
        elif name and kind_of(module) is not OTHER:
            yield name, module, (name,)


def _adaptable(candidates: list[tuple[str, nn.Module, tuple[str, ...]]]) -> str:
    """The names that target_modules may give, by kind: "linear layers q_proj, k_proj; embeddings embed_tokens"."""
    kinds: dict[str, set[str]] = {}
    for _, base, known_as in candidates:
        if kind_of(base).why_not(base) is None:
            kinds.setdefault(kind_of(base).name, set()).add(known_as[-1].rpartition(".")[2])
    listed = [f"{kind} {', '.join(sorted(names)[:12])}" for kind, names in kinds.items()]
    return "; ".join(listed) or "no layer that can be adapted"


def base_module(model: nn.Module, name: str) -> nn.Module:
    """The frozen module of a bare model by a name of target_names: a submodule, or one expert's matrix in a stack."""
    parent, *rest = name.rsplit(".", 2)
    if len(rest) == 2 and rest[1].isdigit():
        experts = submodule(model, parent)
        if is_experts(experts):
            return ExpertSlice(experts, rest[0], int(rest[1]))
    return submodule(model, name)


def output_head(model: nn.Module) -> nn.Module | None:
    """The language-model head, where the model says which one it is."""
    get = getattr(inside(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    return None if head is None else inside(head)


def fused_parts(config: Method, bases: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Module name -> the sizes of its parts, for the modules that the config takes apart.

    Raises:
        ValueError: an entry of the config names none of the modules, its sizes do not add up, or a module's rows are
            not in one piece for each part.
    """
    patterns = getattr(config, "fused", None)
    if not patterns:
        return {}
    found = {name: config.parts(name, matrix_shape(base)[0]) for name, base in bases.items()}
    parts = {name: sizes for name, sizes in found.items() if sizes is not None}
    for name in parts:
        base = bases[name]
        if isinstance(base, nn.Embedding):
            raise ValueError(f"fused: {name} is an embedding, which holds no projections; leave it out of fused")
        if isinstance(base, ExpertSlice) and base.experts.has_gate and not base.experts.is_concatenated:
            raise ValueError(f"fused: {name} interleaves its gate and up rows, which are not parts one after the other")
    for pattern in patterns:
        names = [known for name in parts for known in (name, name.rpartition(".")[0])]
        if not any(names_match(name, pattern) for name in names):
            raise ValueError(f"fused: no adapted module matches {pattern}; it names modules as target_modules does")
    return parts


def shortest_targets(model: nn.Module) -> list[str]:
    """The shortest list that selects exactly the adapted modules by PEFT's rule: full name or dotted suffix."""
    adapted = list(adapted_layers(model))
    bases = {name + ".base" for name in adapted}
    last = {name.rpartition(".")[2] for name in adapted}
    # Servers expect "q_proj"; where that would select a module that is not adapted, only full names will do.
    by_suffix = [name for name, _ in named_modules(model) if name not in bases and name.rpartition(".")[2] in last]
    return sorted(last) if by_suffix == adapted else adapted
