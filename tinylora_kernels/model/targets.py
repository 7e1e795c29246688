"""Which modules of a model are adapted: names to modules, modules to parts, and back to the shortest list of names."""
from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from ..base.attributes import weight_of
from ..base.experts import ExpertSlice, expert_slices, is_experts
from ..base.kinds import OTHER, kind_of, matrix_shape, why_not_weight
from ..base.names import ENGINES, inside, is_of, named_modules, submodule
from ..base.trial import why_not_tried
from ..common.words import listed
from ..method.config import LoRAXSConfig, Method, TinyLoRAConfig
from ..method.selection import (
    ALL_LINEAR,
    Wanted,
    asked_numbers,
    entries,
    is_expression,
    layer_number,
    matched_by,
    names_match,
    suffixes,
)
from .adapted import adapted_layers

Selecting = TinyLoRAConfig | LoRAXSConfig
Candidate = tuple[str, nn.Module, tuple[str, ...]]  # name, module, the names it goes by

# What a LoRA's tensors are called in every library.
_LORA = re.compile(r"lora_?([ab]|down|up)(_.*|\d*)|lora_embedding_[ab]", re.IGNORECASE)
_LEAVE_OUT = "; leave it out by exclude_modules"
_OTHER_ADAPTER = (
    "merge it into the base first (PEFT: merge_and_unload()), take it out, or leave the module to it by exclude_modules"
)


def target_names(model: nn.Module, target_modules: Sequence[str] | str | None) -> list[str]:
    """Qualified names of the modules to adapt, in named_modules order, by a config that says no more than this.

    Raises:
        ValueError: as selected_names.
    """
    return selected_names(model, TinyLoRAConfig(frozen_rank=1, target_modules=target_modules))[0]


def is_default(config: Selecting) -> bool:
    """Whether the config names no module, so that what cannot be adapted is left out."""
    return config.target_modules is None or config.target_modules == ALL_LINEAR


def selected_names(
    model: nn.Module, config: Selecting, whole: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Qualified names of the modules to adapt, in named_modules order; and why the default skipped others, by name.

    Args:
        whole: target_modules holds full names, and "fc" does not mean "block.fc" as well.

    Raises:
        ValueError: the model is adapted already, an entry of target_modules, exclude_modules or layers_to_transform
            matches nothing, nothing is left, or what matches cannot be adapted.
    """
    if adapted_layers(model):
        raise ValueError("model: expected a bare model, found one that is adapted already; call remove_adapter first")
    if engine := next((module for module in model.modules() if is_of(module, ENGINES)), None):
        raise ValueError(
            f"model: {type(engine).__name__} has taken its parameters already and would not synchronise vectors that "
            "come now; adapt the model first and wrap it then"
        )
    candidates = _candidates(model)
    wanted = None if is_default(config) else config.target_modules
    if wanted is None:
        heads = output_heads(model)
        chosen = [each for each in candidates if kind_of(each[1]).by_default and each[1] not in heads]
    else:
        chosen = _matching(model, "target_modules", wanted, candidates)
        if whole:
            full = set(entries(wanted))
            chosen = [each for each in chosen if each[0] in full]
    if config.exclude_modules is not None:
        excluded = {name for name, _, _ in _matching(model, "exclude_modules", config.exclude_modules, candidates)}
        chosen = [each for each in chosen if each[0] not in excluded]
    if config.layers_to_transform is not None:
        full_names = [] if wanted is None or isinstance(wanted, str) else list(wanted)  # whatever their layer
        by_number = [each for each in chosen if set(full_names).isdisjoint(each[2])]
        numbers = asked_numbers(config.layers_to_transform)
        others = {name for name, _, _ in by_number}
        others.difference_update(name for name, _, _ in _of_layers(by_number, numbers, config.layers_pattern))
        chosen = [each for each in chosen if each[0] not in others]
    for name, base, _ in chosen:
        if reason := why_not_weight(base):
            raise ValueError(f"{name}: it cannot be adapted: {reason}")
        meant = getattr(base, "in_features", 1) and getattr(base, "out_features", 1)  # MobileBERT has one of 0
        if weight_of(base).numel() == 0 and meant:
            raise ValueError(
                f"{name}: its weight is empty on this rank, shape {list(weight_of(base).shape)}, as DeepSpeed's ZeRO-3 "
                "leaves it; adapt the model before deepspeed.initialize, or inside "
                "deepspeed.zero.GatheredParameters(model.parameters())"
            )
    skipped: dict[str, str] = {}
    if wanted is None:
        reasons = ((name, _why_not_by_default(base, config.rank)) for name, base, _ in chosen)
        skipped = {name: reason for name, reason in reasons if reason}
        chosen = [each for each in chosen if each[0] not in skipped]
    if not chosen:
        asked = "every linear layer" if wanted is None else listed(entries(wanted))
        left_out = [name for name in ("exclude_modules", "layers_to_transform") if getattr(config, name) is not None]
        of_rank = [name for name, reason in skipped.items() if reason.startswith("cannot carry")]
        left_out += [f"the rank {config.rank}"] if of_rank else []
        because = f" that {' and '.join(left_out)} leave" if left_out else ""
        because += "".join(f"; {name} {reason}" for name, reason in skipped.items() if name not in of_rank)[:300]
        raise ValueError(f"target_modules: no module matches {asked}{because}; the model has {_adaptable(candidates)}")
    for name, base, _ in chosen:
        if reason := kind_of(base).why_not(base) or _within_another_adapter(model, name):
            raise ValueError(f"{name}: it cannot be adapted: {reason}")
    return [name for name, _, _ in chosen], skipped


def _why_not_by_default(base: nn.Module, rank: int) -> str | None:
    """What nobody named is adapted where it is known to be right."""
    if min(matrix_shape(base)) < rank:
        return f"cannot carry rank {rank}"
    reason = kind_of(base).why_not(base) or why_not_tried(base)
    return f"cannot be adapted ({reason.removesuffix(_LEAVE_OUT)})" if reason else None


def _candidates(model: nn.Module) -> list[Candidate]:
    """All that has a kind. A shared module goes by all its names, and all go by that of a whole which they are in: an
    expert by its stack's, what another adapter is made of by the adapted module's.
    """
    found: dict[nn.Module, list[str]] = {}
    held: dict[str, str] = {}  # name -> of the module with another adapter that it is in
    for name, module in named_modules(model, remove_duplicate=False):
        parent = name.rpartition(".")[0]
        if parent in held:
            held[name] = held[parent]
        elif _other_adapter(module):
            held[name] = name
        if name and (is_experts(module) or kind_of(module) is not OTHER):
            found.setdefault(module, []).append(name)
    candidates: list[Candidate] = []
    for module, names in found.items():
        if not is_experts(module):
            wholes = (held[name] for name in names if name in held)
            candidates.append((names[0], module, (*wholes, *names)))
            continue
        for below, piece in expert_slices(module).items():
            known_as = (f"{name}{rest}" for name in names for rest in (f".{below}", f".{piece.stack}", ""))
            candidates.append((f"{names[0]}.{below}", piece, tuple(known_as)))
    return candidates


def _matching(model: nn.Module, field: str, wanted: Wanted, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that an entry of the field matches; raises where an entry matches none."""
    asked = str(wanted) if is_expression(wanted) else set(entries(wanted))
    matches = [(each, matched_by(asked, each[2])) for each in candidates]
    matched = {entry for _, by in matches for entry in by}
    unmatched = [entry for entry in entries(wanted) if entry not in matched]
    if unmatched:
        hint = _what_it_may_be(model, wanted, unmatched[0], candidates)
        raise ValueError(
            f"{field}: no module matches {listed(unmatched)}; {hint}the model has {_adaptable(candidates)}"
        )
    return [each for each, by in matches if by]


def _what_it_may_be(model: nn.Module, wanted: Wanted, entry: str, candidates: list[Candidate]) -> str:
    """Why an entry matches nothing, or what may have been meant."""
    if is_expression(entry):
        if is_expression(wanted):
            return "an expression has to match a whole name; "
        return "a regular expression is given as a string, not in a list; "
    last = {name: known_as[-1].rpartition(".")[2] for name, _, known_as in candidates}
    for name, module in named_modules(model):
        if names_match(name, entry):
            if below := {own for other, own in last.items() if other.startswith(f"{name}.")}:
                return f"it is above the modules {listed(sorted(below))}, which are named themselves; "
            return f"{name} is a {type(module).__name__}, which has no matrix [out, in]; "
    near = difflib.get_close_matches(entry.rpartition(".")[2], sorted(set(last.values())), 1)
    return f"did you mean {near[0]}? " if near else ""


def _of_layers(chosen: list[Candidate], asked: Collection[int], patterns: Wanted | None) -> list[Candidate]:
    """Those in the layers asked for; raises where there is no such layer."""
    numbers = [layer_number(name, patterns) for name, _, _ in chosen]
    missing = sorted(set(asked).difference(numbers))
    if missing:
        found = sorted({number for number in numbers if number is not None})
        has = f"0 to {found[-1]}" if found == list(range(len(found))) and found else listed(found, 8)
        raise ValueError(
            f"layers_to_transform: expected layers that hold what target_modules names, found {listed(missing)}; "
            + (f"there are {has}" if found else f"no name has a number after {listed(entries(patterns or 'any name'))}")
        )
    return [each for each, number in zip(chosen, numbers, strict=True) if number in asked]


def _within_another_adapter(model: nn.Module, name: str) -> str | None:
    """Whether a module belongs to an adapter of another method, whose function is not its weight's alone."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        above = ".".join(parts[:n])
        try:
            module = submodule(model, above)
        except AttributeError:  # one expert's matrix in a stack
            break
        if what := _other_adapter(module):
            return f"{above} holds an adapter already ({what}); {_OTHER_ADAPTER}"
    return None


def _other_adapter(module: nn.Module) -> str | None:
    """What a module has of another adapter: a class of PEFT's, or the tensors that a LoRA has in every library."""
    if any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__):
        return f"PEFT's {type(module).__name__}"
    return next((own for own in (*module._modules, *module._parameters) if _LORA.fullmatch(own)), None)


def _adaptable(candidates: list[Candidate]) -> str:
    """The names that target_modules may give, by kind: "linear layers q_proj, k_proj; embeddings embed_tokens"."""
    kinds: dict[str, set[str]] = {}
    for _, base, known_as in candidates:
        if kind_of(base).why_not(base) is None:
            kinds.setdefault(kind_of(base).name, set()).add(known_as[-1].rpartition(".")[2])
    by_kind = [f"{kind} {', '.join(sorted(names)[:12])}" for kind, names in kinds.items()]
    return "; ".join(by_kind) or "no layer that can be adapted"


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
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # an encoder that inherits the method, and has no head
        head = None
    return inside(head) if isinstance(head, nn.Module) else None


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Those of the model, and of models that somebody's module holds; of a list of heads (MusicGen), all."""
    heads = (output_head(module) for _, module in named_modules(model))
    return {part for head in heads if head is not None for part in head.modules()}


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
    known = {suffix for name in parts for own in (name, name.rpartition(".")[0]) for suffix in suffixes(own)}
    for pattern in patterns:
        if pattern not in known:
            raise ValueError(f"fused: no adapted module matches {pattern}; it names modules as target_modules does")
    return parts


def shortest_targets(model: nn.Module) -> list[str] | str:
    """What selects exactly the adapted modules by PEFT's rule, full name or dotted suffix: their last components, which
    servers expect, or their full names; where one of those is the end of another module's ("fc" and "block.fc") an
    expression, which has to match the whole name.
    """
    adapted = list(adapted_layers(model))
    bases = {name + ".base" for name in adapted}
    known = [name for name, _ in named_modules(model) if name not in bases]
    for names in (sorted({name.rpartition(".")[2] for name in adapted}), adapted):
        asked = set(names)
        if [name for name in known if not asked.isdisjoint(suffixes(name))] == adapted:
            return names
    return f"^(?:{'|'.join(map(re.escape, adapted))})$"
