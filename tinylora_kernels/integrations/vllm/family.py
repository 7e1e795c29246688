"""Which adapters fit an engine, and what its modules are frozen to: the factors of the file it was started with."""
from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...base.weights import right_factor
from ...common.words import listed
from ...factors.cache import weight_fingerprint
from ...factors.modules import factorize_matrix
from ...factors.svd import SKETCH_TOLERANCE, basis_sketch, compare_sketch
from ...files.format import METHODS, AdaptedModule, AdapterError, AdapterFile, encode_config, read
from ...method.config import IDENTITY_FIELDS, LoRAXSConfig, TinyLoRAConfig

Config = TinyLoRAConfig | LoRAXSConfig
RECIPES_KEPT = 8  # projections of so many configs are kept for the next adapter


class Recipe:
    """How the numbers of an adapter become its mixing matrices: everything of its file but v.

    Attributes:
        config: its method.
        names: its modules in the order of the file, by which P is numbered.
        groups: the tie group of each.
        text: all of it; equal texts are equal recipes.
    """

    # What chose modules, groups and first values, and how v was stored: the result stands beside it.
    SPENT = {"target_modules": None, "tying": "tiled", "n_tie": 1, "init": "zeros", "v_dtype": "float32"}

    def __init__(self, config: Config, names: Iterable[str], groups: Iterable[int]):
        self.config, self.names, self.groups = config, tuple(names), tuple(groups)
        method = next(name for name, kind in METHODS.items() if kind is type(config))
        values = [method, encode_config(config) | self.SPENT, self.names, self.groups]
        self.text = json.dumps(values, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> Recipe:
        """From the text, in a process that trusts the one it comes from."""
        method, values, names, groups = json.loads(text)
        return cls(METHODS[method](**values | {"v_dtype": torch.float32}), names, groups)

    @property
    def shape(self) -> tuple[int, int]:
        """Of v: [groups, u]."""
        return max(self.groups) + 1, self.config.numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def recipe_of(adapter: AdapterFile) -> Recipe:
    return Recipe(adapter.config, (m.name for m in adapter.modules), (m.group for m in adapter.modules))


def token_of(adapter: AdapterFile) -> str:
    """16 hex digits of all that the numbers of an adapter mean: its recipe and its base."""
    fingerprints = [module.fingerprint for module in adapter.modules]
    return hashlib.sha256(json.dumps([recipe_of(adapter).text, fingerprints]).encode()).hexdigest()[:16]


class Family:
    """The adapters that an engine serves: those of one base, one rank and modules among those of the first file.

    Args:
        path: an adapter file, or a directory whose first adapter file counts.
        own_seeds: whether adapters may differ in more than their numbers (settings.py).
        token: token_of the file that is expected there; empty: any.

    Raises:
        AdapterError, OSError: there is none, it is damaged, or it is another.
    """

    def __init__(self, path: str | os.PathLike, own_seeds: bool = True, token: str = ""):
        self.adapter = read(first_file(path))
        self.own_seeds = own_seeds
        self.recipe, self.token = recipe_of(self.adapter), token_of(self.adapter)
        if token and token != self.token:
            raise AdapterError(f"{first_file(path)}: it is another adapter than when the engine was configured")
        self.modules: dict[str, AdaptedModule] = {module.name: module for module in self.adapter.modules}

    @property
    def rank(self) -> int:
        return self.adapter.config.rank

    @property
    def holds_mixing(self) -> bool:
        """Whether the table holds M of each unit; the numbers of LoRA-XS are entries of M anyway."""
        return self.own_seeds or isinstance(self.adapter.config, LoRAXSConfig)

    def check(self, adapter: AdapterFile) -> None:
        """Raise AdapterError, in one line, unless the engine can run this adapter exactly."""
        config, own = adapter.config, self.adapter.config
        if config.rank != self.rank:
            raise AdapterError(f"its rank is {config.rank}, this engine serves rank {self.rank}")
        for field in ("fused",) if self.own_seeds else IDENTITY_FIELDS:
            theirs, ours = getattr(config, field, None), getattr(own, field, None)
            if theirs != ours:
                raise AdapterError(f"{field} is {theirs} there, this engine serves {ours}")
        strangers = [m.name for m in adapter.modules if m.name not in self.modules]
        if strangers:
            raise AdapterError(f"it adapts {listed(strangers, 3)}, which this engine was started without")
        if not self.own_seeds and recipe_of(adapter) != self.recipe:
            raise AdapterError("its modules or tie groups are not those that this engine was started with")
        pairs = [(module, self.modules[module.name]) for module in adapter.modules]
        wrong = [m.name for m, ours in pairs if (m.shape, m.fingerprint) != (ours.shape, ours.fingerprint)]
        if wrong:
            raise AdapterError(
                f"it was trained on other base weights: {len(wrong)} of {len(pairs)} differ, {listed(wrong, 3)}"
            )
        for module, ours in pairs:
            same = torch.equal(module.sketch, ours.sketch)  # the usual case, a hundred times faster
            if not same and compare_sketch(module.sketch, ours.sketch) > SKETCH_TOLERANCE:
                raise AdapterError(f"{module.name}: it was trained with other singular vectors than this engine serves")

    def check_vectors(self, v: Tensor, recipe: Recipe) -> None:
        if tuple(v.shape) != recipe.shape or not bool(torch.isfinite(v).all()):
            raise AdapterError(f"expected finite numbers of shape {list(recipe.shape)}, found {list(v.shape)}")


def first_file(path: str | os.PathLike) -> Path:
    """The file itself, or the first adapter file of a directory by name."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{path}: no adapter file (*.safetensors) in it; the first one says what is served")
    return files[0]


@dataclass(frozen=True)
class Unit:
    """One truncated SVD that is served: a module, or a part of one that is adapted part by part.

    Attributes:
        module, part: part is None for a whole module.
        basis: [r, rows] U^T.
        sigma: [r].
        right: [r, in] B^T = U^T W of the whole weight, where it was asked for.
    """

    module: str
    part: int | None
    basis: Tensor
    sigma: Tensor
    right: Tensor | None


def factorize(module: AdaptedModule, config: Config, weight: Tensor, with_right: bool) -> list[Unit]:
    """The units of a module of the family, from the weight that is served.

    Raises:
        AdapterError: the weight is not the one the family was trained on.
    """
    if tuple(weight.shape) != module.shape or weight_fingerprint(weight) != module.fingerprint:
        raise AdapterError(f"{module.name}: the adapters were trained on another base weight than the one served")
    sizes = config.parts(module.name, module.shape[0])
    if module.basis is not None and module.sigma is not None:
        basis, sigma = module.basis, module.sigma
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of degenerate spectra: their bases are in the file
            factors = factorize_matrix(module.name, weight, config.rank, {module.name: sizes} if sizes else {})
        basis, sigma = factors.basis, factors.sigma
        if compare_sketch(module.sketch, basis_sketch(basis)) > SKETCH_TOLERANCE:
            raise AdapterError(
                f"{module.name}: the singular vectors came out different here; save the first adapter with "
                "include_basis=True where it was trained"
            )
    ends = list(accumulate(sizes)) if sizes else [module.shape[0]]
    units = []
    for part, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = basis[:, begin:end].float().contiguous()
        right = right_factor(own, weight[begin:end]) if with_right else None
        units.append(Unit(module.name, part if sizes else None, own, sigma[part] if sizes else sigma, right))
    return units


class Projections:
    """P' of every unit for the recipes of the adapters that come in.

    Args:
        family: of the engine.
        units: of this worker, all of them; their order is that of the table's rows.
    """

    def __init__(self, family: Family, units: list[Unit]):
        self.position = {(unit.module, unit.part): n for n, unit in enumerate(units)}
        self.sigma = [unit.sigma for unit in units]
        self.parts = {name: family.adapter.config.parts(name, m.shape[0]) for name, m in family.modules.items()}
        self.rank = family.rank
        self.of = functools.lru_cache(RECIPES_KEPT)(self._of)

    def _of(self, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
        """(rows of the table [L], tie group of each [L], P' [L, u, r, r] or [L, r, r]) of the units this worker has."""
        rows, groups, projections = [], [], []
        for module, part, index, group in numbered(recipe, self.parts):
            row = self.position.get((module, part))
            if row is None:  # on another stage of a pipeline
                continue
            rows.append(row)
            groups.append(group)
            projections.append(recipe.config.projection(index, self.sigma[row].cpu()).float())
        stacked = torch.stack(projections) if projections else torch.zeros(0)
        return torch.tensor(rows), torch.tensor(groups), stacked

    def mixing(self, recipe: Recipe, v: Tensor) -> tuple[Tensor, Tensor]:
        """(rows [L], M [L, r, r] of each, float32), contracted as the kernels do it: in double, rounded once."""
        rows, groups, projections = self.of(recipe)
        if not len(rows):
            return rows, torch.zeros(0, self.rank, self.rank)
        by_unit = v.double()[groups]  # [L, u]
        if projections.dim() == 3:  # LoRA-XS: M = P' R, entry by entry
            return rows, (projections.double() * by_unit.view_as(projections)).float()
        # M = sum_i v_i P'_i
        return rows, (by_unit.unsqueeze(1) @ projections.double().flatten(2)).view(-1, self.rank, self.rank).float()


def numbered(recipe: Recipe, parts: dict[str, tuple[int, ...] | None]) -> Iterator[tuple[str, int | None, int, int]]:
    """(module, part, index of its P, tie group), as model.attach numbers them."""
    index = 0
    for name, group in zip(recipe.names, recipe.groups, strict=True):
        sizes = parts[name]
        for part in range(len(sizes)) if sizes else (None,):
            yield name, part, index, group
            index += 1


class Checkpoint:
    """The weights of the served model by module, one at a time, as they lie in its safetensors files.

    Args:
        model, revision: a directory, or the name of a model that is in the local cache of the hub.
    """

    def __init__(self, model: str, revision: str | None = None):
        root = Path(model)
        if not root.is_dir():
            from huggingface_hub import snapshot_download

            root = Path(snapshot_download(model, revision=revision, local_files_only=True))
        self.where: dict[str, Path] = {}
        index = root / "model.safetensors.index.json"
        if index.is_file():
            self.where = {key: root / name for key, name in json.loads(index.read_text())["weight_map"].items()}
        else:
            for file in sorted(root.glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    self.where.update(dict.fromkeys(opened.keys(), file))

    def weight(self, module: str) -> Tensor:
        """[out, in].

        Raises:
            AdapterError: the checkpoint has no such weight, or not in floating point.
        """
        key = f"{module}.weight"
        if key not in self.where:
            raise AdapterError(
                f"{module}: no {key} in the served checkpoint's safetensors files (quantised, or another model?)"
            )
        with safe_open(self.where[key], framework="pt") as opened:
            weight = opened.get_tensor(key)
        if not weight.is_floating_point():
            raise AdapterError(f"{module}: expected floating point in the served checkpoint, found {weight.dtype}")
        return weight


def without_path(error: Exception, path: str | os.PathLike) -> str:
    """The message of an AdapterError or OSError about a file, without where the file is."""
    if isinstance(error, OSError):
        return f"the adapter file cannot be read ({error.strerror or type(error).__name__})"
    return str(error).removeprefix(f"{os.fspath(path)}: ")


