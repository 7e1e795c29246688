"""What an adapter is: its hyperparameters, validated where they are written down, and what follows from them."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..common.finite import finite_number
from .parts import padded_rank, part_sizes
from .projection import normal_vector, random_projection, ratio_projection, uniform_vector
from .selection import checked_expression, checked_names, checked_numbers, entries, is_expression

SCALINGS = ("left", "sqrt")
TINY_LORA_INITS = ("zeros", "uniform")
LORA_XS_INITS = ("zeros", "normal")
MAX_PROJECTION = 1 << 22  # numbers of P' [u, r, r] of one module: 1,024 for a rank of 64
V_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Method(Protocol):
    """What adapting a model asks of a config; TinyLoRAConfig and LoRAXSConfig answer it, and so does PEFT's adapter."""

    @property
    def v_dtype(self) -> torch.dtype:
        """Storage of v."""

    @property
    def backend(self) -> str | None:
        """Of the ops; None: the first available."""

    @property
    def cache(self) -> bool:
        """Whether factors are kept on disk."""

    @property
    def rank(self) -> int:
        """r, singular triplets of each weight."""

    @property
    def numbers(self) -> int:
        """u, trained numbers in each tie group."""

    @property
    def projection_sketch(self) -> Tensor | None:
        """Of P' that came with its factors, and follows from no field and for no other factors: a few numbers [1, 4]
        that tell it from others. None of P' that follows from the fields and from sigma.
        """

    def parts(self, name: str, out_features: int) -> tuple[int, ...] | None:
        """The output rows of each part of a module that is adapted part by part; None of one that is not."""

    def projection(self, index: int, sigma: Tensor, lookup: bool = False) -> Tensor:
        """P' of one module, [u, r, r] or [r, r], by the index of its P and its singular values [r] or [parts, r]."""

    def initial(self, group: int) -> Tensor:
        """v [u] of one tie group before training."""


class Kept:
    """A config that may be written into, until a model has it: from then on it says what that model computes."""

    def __setattr__(self, name: str, value: object) -> None:
        if "_kept" in vars(self):
            raise AttributeError(
                f"{name}: this config says what an adapted model computes, and changes nothing there; adapt the bare "
                f"model with dataclasses.replace(config, {name}=...)"
            )
        super().__setattr__(name, value)


@dataclass
class TinyLoRAConfig(Kept):
    """Hyperparameters of TinyLoRA (Morris et al., "Learning to Reason in 13 Parameters", arXiv 2602.04118).

    W' = W + alpha U S (sum_i v_i P_i) V^T, with v shared by the modules of a tie group.

    Attributes:
        frozen_rank: r, how many singular triplets of W span the update; the paper finds 2 best.
        trainable_dim: u, trained numbers in each tie group.
        n_tie: modules that share one v; ceil(modules / n_tie) groups when tiled.
        target_modules: what to adapt: a list of names, each a module's full name, its last component ("q_proj") or a
            dotted suffix ("self_attn.q_proj"); a string with one such name, or with a regular expression that a full
            name has to match. None or "all-linear": every linear layer but the output head and what cannot carry the
            rank, which a warning names. Convolutions, embeddings and the experts of mixture models ("experts",
            "experts.down_proj") are adapted where named.
        tying: "tiled" (consecutive modules), "structured" (within a kind of module), or {module name: group}.
        alpha: scale of the update.
        scaling: "left", R acts between S and V^T (the paper); "sqrt", S is split evenly on both sides of R (as PEFT
        does).
        seed: key of the fixed random P.
        init: "zeros" starts at the base model; "uniform" draws v from U(-0.01, 0.01) by the seed.
        v_dtype: of v in adapter files. It is trained in float32 (float64 where that is asked for): in 16 bits the steps
            of an optimizer are soon smaller than what rounding takes away.
        backend: "cuda", "triton", "cpu", "reference", "inductor" or None (automatic).
        cache: keep truncated SVDs on disk, keyed by the weight's content.
        fused: layers that hold several projections, taken apart: {"qkv_proj": (2048, 512, 512), "gate_up_proj": 2}
            gives each part an SVD and a P of its own; names match as in target_modules, values are the output rows of
            each part or the number of equal parts. The layer stays one module with one v. None: one SVD a layer.
        exclude_modules: what of it to leave out: a list of names, a name or a regular expression, as target_modules.
        layers_to_transform: layers by number, one, a list or a range; of the others nothing is adapted.
        layers_pattern: where names have several numbers, the list of layers that is meant ("layers", "h"); default the
            first number in a name.
    """

    frozen_rank: int = 2
    trainable_dim: int = 1
    n_tie: int = 1
    target_modules: Sequence[str] | str | None = None
    tying: str | Mapping[str, object] = "tiled"
    alpha: float = 1.0
    scaling: str = "left"
    seed: int = 0
    init: str = "zeros"
    v_dtype: torch.dtype = torch.float32
    backend: str | None = None
    cache: bool = True
    fused: Mapping[str, int | Sequence[int]] | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        check_positive_int("frozen_rank", self.frozen_rank)
        check_positive_int("trainable_dim", self.trainable_dim)
        check_common_fields(self, TINY_LORA_INITS)
        self.fused = checked_fused(self.fused)
        self._fused_order = {pattern: position for position, pattern in enumerate(self.fused or ())}
        parts = (entry if isinstance(entry, int) else len(entry) for entry in (self.fused or {}).values())
        check_projection_size(self.trainable_dim, self.frozen_rank, max(parts, default=1))

    projection_sketch = None

    @property
    def rank(self) -> int:
        return self.frozen_rank

    @property
    def numbers(self) -> int:
        return self.trainable_dim

    def parts(self, name: str, out_features: int) -> tuple[int, ...] | None:
        return part_sizes(self.fused or {}, self._fused_order, name, out_features)

    def projection(self, index: int, sigma: Tensor, lookup: bool = False) -> Tensor:
        return random_projection(self.seed, index, self.numbers, sigma, self.alpha, self.scaling, lookup)

    def initial(self, group: int) -> Tensor:
        if self.init == "zeros":
            return torch.zeros(self.numbers, device="cpu")
        return uniform_vector(self.seed, group, self.numbers)


@dataclass
class LoRAXSConfig(Kept):
    """Hyperparameters of LoRA-XS (Balazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
    Parameters", arXiv 2405.17604), on the same layer and the same ops.

    W' = W + alpha U S R V^T with R itself trained, r * r numbers in each tie group.

    Attributes:
        rank: r; r * r numbers are trained in each tie group.
        n_tie: modules that share one R; the paper shares none.
        target_modules: names to adapt, as in TinyLoRAConfig.
        tying: "tiled", "structured" or {module name: group}, as in TinyLoRAConfig.
        alpha: scale of the update.
        scaling: "left", R acts between S and V^T (the paper); "sqrt", S is split evenly on both sides of R.
        seed: key of the random initial R.
        init: "zeros" starts at the base model; "normal" draws R from N(0, 1e-5 squared), as the paper does.
        v_dtype: of R in adapter files; it is trained in float32 or float64, as in TinyLoRAConfig.
        backend: "cuda", "triton", "cpu", "reference", "inductor" or None (automatic).
        cache: keep truncated SVDs on disk, keyed by the weight's content.
        exclude_modules, layers_to_transform, layers_pattern: as in TinyLoRAConfig.
    """

    rank: int = 4
    n_tie: int = 1
    target_modules: Sequence[str] | str | None = None
    tying: str | Mapping[str, object] = "tiled"
    alpha: float = 1.0
    scaling: str = "left"
    seed: int = 0
    init: str = "zeros"
    v_dtype: torch.dtype = torch.float32
    backend: str | None = None
    cache: bool = True
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_common_fields(self, LORA_XS_INITS)

    projection_sketch = None

    @property
    def numbers(self) -> int:
        return self.rank**2

    def parts(self, name: str, out_features: int) -> None:
        return None

    def projection(self, index: int, sigma: Tensor, lookup: bool = False) -> Tensor:
        return ratio_projection(sigma, self.alpha, self.scaling, lookup)

    def initial(self, group: int) -> Tensor:
        if self.init == "zeros":
            return torch.zeros(self.numbers, device="cpu")
        return normal_vector(self.seed, group, self.numbers)


Selecting = TypeVar("Selecting", bound=TinyLoRAConfig | LoRAXSConfig)


def own_copy(config: Selecting) -> Selecting:
    """The config as it is now, checked again, with lists and maps of its own: sweeps write into theirs afterwards."""
    return dataclasses.replace(config)


def kept(config: Method) -> Method:
    """The same config, to be written into no more."""
    if isinstance(config, Kept):
        vars(config)["_kept"] = True
    return config


def by_names(config: Selecting, names: Sequence[str]) -> Selecting:
    """The config with the modules that it selected named one by one."""
    return dataclasses.replace(
        config, target_modules=names, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def is_literal(config: TinyLoRAConfig | LoRAXSConfig) -> bool:
    """Whether it selects by names, or by default, and by nothing else."""
    more = config.exclude_modules is not None or config.layers_to_transform is not None
    return not more and not is_expression(config.target_modules)


def trained_dtype(v_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers are trained that are stored in v_dtype."""
    return torch.promote_types(v_dtype, torch.float32)


# What makes two adapters the same function; the other fields say how modules and groups were chosen, and those are
# compared as the lists they led to.
IDENTITY_FIELDS = ("frozen_rank", "rank", "trainable_dim", "alpha", "scaling", "seed", "v_dtype", "fused")


def check_common_fields(config: TinyLoRAConfig | LoRAXSConfig, inits: Sequence[str]) -> None:
    """What TinyLoRAConfig and LoRAXSConfig have in common; ValueError names the field."""
    check_positive_int("n_tie", config.n_tie)
    if isinstance(config.tying, str) and config.tying not in ("tiled", "structured"):
        raise ValueError(f"tying: expected 'tiled', 'structured' or a map of names to groups, found {config.tying!r}")
    if isinstance(config.tying, Mapping):
        config.tying = dict(config.tying)
    config.alpha = finite_number("alpha", config.alpha)
    check_choice("scaling", config.scaling, SCALINGS)
    check_seed(config.seed)
    check_choice("init", config.init, inits)
    check_choice("v_dtype", config.v_dtype, V_DTYPES)
    config.target_modules = checked_names("target_modules", config.target_modules)
    config.exclude_modules = checked_names("exclude_modules", config.exclude_modules)
    config.layers_to_transform = checked_numbers("layers_to_transform", config.layers_to_transform)
    config.layers_pattern = checked_names("layers_pattern", config.layers_pattern)
    for pattern in entries(config.layers_pattern or []):
        checked_expression("layers_pattern", pattern)
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise ValueError("layers_pattern: expected layers_to_transform beside it, found None; it says which layers")


def check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, found {value!r}")


def check_projection_size(numbers: int, rank: int, parts: int) -> None:
    """A file of a few kB may ask for any u, r and number of parts: P' of a module stays within MAX_PROJECTION."""
    wide = padded_rank(parts * rank) if parts > 1 else rank
    if numbers * wide**2 > MAX_PROJECTION:
        raise ValueError(
            f"trainable_dim, frozen_rank: expected at most {MAX_PROJECTION} numbers in the projections of one module, "
            f"found {numbers} of {wide} x {wide}"
        )


def check_seed(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"seed: expected an integer in [0, 2**64), found {value!r}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, found {value!r}")


def checked_fused(fused: object) -> dict[str, int | tuple[int, ...]] | None:
    """{module name: how many equal parts, or their sizes in order}, sizes as tuples; None for an empty map."""
    if fused is None:
        return None
    if not isinstance(fused, Mapping):
        raise ValueError(f"fused: expected a map of module names to parts, found {fused!r}")
    parts: dict[str, int | tuple[int, ...]] = {}
    for name, entry in fused.items():
        equal = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 2
        sizes = tuple(entry) if isinstance(entry, Sequence) and not isinstance(entry, (str, bytes)) else ()
        listed = len(sizes) >= 2 and all(type(size) is int and size >= 1 for size in sizes)
        if not isinstance(name, str) or not name or not (equal or listed):
            raise ValueError(
                "fused: expected a module name and its number of equal parts (2 or more) or the sizes of two or more "
                f"parts, found {name!r}: {entry!r}"
            )
        parts[name] = entry if equal else sizes
    return parts or None
