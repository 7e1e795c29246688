"""Adapter directories of PEFT's TinyLoRA: into an adapted model, and out of one.

    base_model.model.<module>.tinylora_A    [r, in]     sqrt(S) V^T
    base_model.model.<module>.tinylora_B    [out, r]    U sqrt(S)
    base_model.model.<module>.tinylora_P    [u, r, r]   unless the config says save_projection=False
    base_model.tinylora_v.<group>           [u]

PEFT adds B (sum_i v_i P_i) A x. Its modules are numbered in named_modules order; the number gives P its seed and, with
weight_tying, the module its group.
"""
from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..base.kinds import is_linear_like, kind_of, matrix_shape, weight_matrix
from ..base.names import inside, named_modules, submodule
from ..common.atomic import write_directory
from ..common.finite import as_finite
from ..common.words import one_line
from ..factors.svd import Factors, basis_sketch
from ..files.adapter import warn_of_what_is_left_out
from ..files.beside import expect_beside
from ..layers.layer import TinyLoRALayer, kept_unless_done
from ..method.selection import suffixes
from ..model.adapted import adapted_layers, base_state_dict, expect_unmerged
from ..model.attach import attach
from ..model.targets import shortest_targets
from .peft_factors import FitError, output_side

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FACTORS = (".tinylora_A", ".tinylora_B", ".tinylora_P")
KIND = len(FACTORS[0])


@dataclass(frozen=True)
class PeftAdapterConfig:
    """The config of a model that from_peft adapted: its P is PEFT's, so it is saved by to_peft and not by save_adapter.

    Attributes:
        peft: PEFT's own adapter_config.json.
        projections: P' of each module.
        vectors: v of each tie group.
        v_dtype, backend: as in TinyLoRAConfig.
    """

    peft: dict
    projections: list[Tensor] = field(repr=False, compare=False)
    vectors: list[Tensor] = field(repr=False, compare=False)
    v_dtype: torch.dtype = torch.float32
    backend: str | None = None
    cache: bool = False

    @property
    def rank(self) -> int:
        return self.peft["r"]

    @property
    def numbers(self) -> int:
        return self.peft["u"]

    @functools.cached_property
    def projection_sketch(self) -> Tensor:
        return basis_sketch(torch.cat([projection.flatten().cpu() for projection in self.projections]).unsqueeze(0))

    def parts(self, name: str, out_features: int) -> None:
        return None

    def projection(self, index: int, sigma: Tensor, lookup: bool = False) -> Tensor:
        return self.projections[index]

    def initial(self, group: int) -> Tensor:
        return self.vectors[group]


def from_peft(directory: str | os.PathLike[str], model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """Adapt a bare model with a TinyLoRA adapter that PEFT saved; the same function to about 1e-6 in float32.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        model: the base model the adapter was made for, not wrapped by PEFT. Adapted in place and frozen but for v.
        backend: as in TinyLoRAConfig.

    Returns:
        The same model; groups, v and P are PEFT's. Where the directory has no P it is drawn from projection_seed as
        PEFT would.

    Raises:
        ValueError: not a whole TinyLoRA directory, modules missing from the model, factors that do not belong to its
            weights, embeddings adapted, or parts that have no place here (modules_to_save, trained biases).
    """
    directory = Path(os.fsdecode(directory))
    config, tensors = _read(directory)
    names = _module_names(model, tensors, directory)
    modules = {name: submodule(model, name) for name in names}
    groups = _groups(len(names), config["weight_tying"])
    _expect_whole(directory, config, tensors, model, modules, groups)
    expect_beside(model, modules, "load it with PEFT and call accelerate_peft")
    factors, projections = {}, []
    for index, name in enumerate(names):
        key = f"{PREFIX}{name}."
        right, left = tensors[key + "tinylora_A"], tensors[key + "tinylora_B"]
        try:
            side = output_side(left, right, weight_matrix(modules[name]))
        except FitError as error:
            raise ValueError(f"{directory}: {name}: {error}") from error
        fixed = tensors.get(key + "tinylora_P")
        if fixed is None:
            fixed = _regenerated(config["projection_seed"] + index, config["u"], len(right))
        projections.append(side.projection(fixed.to(side.basis.device)))
        factors[name] = Factors(side.basis, side.norms.square(), True, 0.0)  # B = U sqrt(S): the norms are sqrt(S)
    vectors = [tensors[f"base_model.tinylora_v.{group}"] for group in range(max(groups) + 1)]
    adapter = PeftAdapterConfig(config, projections, vectors, vectors[0].dtype, backend)
    return attach(model, adapter, names, groups, factors)


def to_peft(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write an adapted model as a TinyLoRA directory that PeftModel.from_pretrained(base, directory) loads.

    Args:
        model: adapted by apply_tiny_lora, apply_lora_xs or from_peft, and not merged.
        directory: made if it is not there. One that holds nothing but an earlier adapter is exchanged for the new one
            in one step; in another, and in one that has to stay (the working directory, a mount point), the two files
            are replaced one after the other, each whole.

    P is always written: PEFT's generator cannot draw ours. Where no value of weight_tying gives this model's groups,
    each module gets a copy of its v: the function is the same, training it further in PEFT unties the copies (warned).

    Raises:
        ValueError: no adapter, a merged model, layers of different u or rank, one beside which PEFT would compute
            another update (docs/layers.md), or numbers that are not finite. Nothing was written.
        RuntimeError: a weight that is not the one adapted to. Nor then.
    """
    from peft import TinyLoraConfig

    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; call apply_tiny_lora(model, config) first")
    expect_unmerged(layers, "model")
    for name, layer in layers.items():
        if layer.parts or not is_linear_like(layer.base):
            found = "a fused projection in parts" if layer.parts else kind_of(layer.base).name
            raise ValueError(
                f"{name}: PEFT's TinyLoRA has linear layers of one rank, found {found}; use save_adapter or export_lora"
            )
    expect_beside(model, layers)
    weight_tying, groups = _tied(layers)
    if weight_tying is None:
        warnings.warn(
            "to_peft: PEFT's weight_tying cannot express these tie groups; every module gets a copy of its v",
            stacklevel=2,
        )
        weight_tying = 0.0
    rank = max(len(layer.basis) for layer in layers.values())
    for name, layer in layers.items():
        if len(layer.basis) != min(rank, *matrix_shape(layer.base)):
            raise ValueError(
                f"model: PEFT has one rank for all modules, found {len(layer.basis)} in {name} and {rank} in others"
            )

    tensors = {}
    for (name, layer), group in zip(layers.items(), groups, strict=True):
        for kind, tensor in zip("ABP", _peft_tensors(layer), strict=True):
            tensors[f"{PREFIX}{name}.tinylora_{kind}"] = as_finite(f"{name}: its {kind} as PEFT has it", tensor)
        v = as_finite(f"{name}: its vector v", layer.v.detach().float().cpu())
        tensors[f"base_model.tinylora_v.{group}"] = v.clone()  # of one that several modules share
    numbers = {len(tensor) for key, tensor in tensors.items() if ".tinylora_v." in key}
    if len(numbers) > 1:
        raise ValueError(f"model: PEFT has one u for all modules, found {sorted(numbers)}")
    config = TinyLoraConfig(
        r=rank, u=numbers.pop(), weight_tying=weight_tying,
        target_modules=shortest_targets(model), save_projection=True,
        fan_in_fan_out=not all(isinstance(layer.base, nn.Linear) for layer in layers.values()),
        base_model_name_or_path=getattr(inside(model), "name_or_path", None) or None, inference_mode=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:  # PEFT writes its config into directories alone
        config.save_pretrained(scratch)
        files = {CONFIG: Path(scratch, CONFIG).read_bytes(), WEIGHTS: save(tensors, metadata={"format": "pt"})}
    write_directory(os.path.realpath(os.fsdecode(directory)), files)
    warn_of_what_is_left_out(model, os.fspath(directory))


def is_from_peft(model: nn.Module) -> bool:
    """Whether from_peft adapted this model: its P is PEFT's."""
    return any(isinstance(layer.config, PeftAdapterConfig) for layer in adapted_layers(model).values())


@torch.no_grad()
def load_peft_vectors(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Copy the vectors of a directory that to_peft wrote from this model back into it."""
    _, tensors = _read(Path(os.fsdecode(directory)))
    layers = adapted_layers(model)
    keys = [f"base_model.tinylora_v.{group}" for group in _tied(layers)[1]]
    vectors = {key: layer.v.shape for key, layer in zip(keys, layers.values(), strict=True)}
    _expect_tensors(directory, {key: tensors[key] for key in tensors if ".tinylora_v." in key}, vectors)
    with kept_unless_done(layers.values()):
        for layer, key in zip(layers.values(), keys, strict=True):
            layer.v.copy_(tensors[key])


@torch.no_grad()
def _peft_tensors(layer: TinyLoRALayer) -> tuple[Tensor, Tensor, Tensor]:
    """A = S^-1/2 U^T W [r, in], B = U S^1/2 [out, r], P = S^-1/2 P' S^1/2 [u, r, r]: B P A = U P' U^T W, exactly."""
    s = layer.sigma.sqrt().to(layer.basis)
    right = layer.right_factor() / s.unsqueeze(1)
    left = layer.basis.T * s
    projection = layer.projection
    if projection.dim() == 2:  # LoRA-XS: one matrix for each number of R
        projection = torch.diag(projection.flatten()).unflatten(1, projection.shape)
    fixed = projection * s / s.unsqueeze(1)
    right, left, fixed = (tensor.float().contiguous().cpu() for tensor in (right, left, fixed))
    return right, left, fixed


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: expected {name}, found no such file; save with PEFT's save_pretrained")
    try:
        config = json.loads((directory / CONFIG).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory / CONFIG}: it is damaged, and no JSON: {one_line(error)}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "TINYLORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{directory}: expected peft_type TINYLORA, found {found}")
    _expect_number(directory, config, "r")
    _expect_number(directory, config, "u")
    _expect_number(directory, config, "weight_tying", 0, 1, (int, float))
    if config.get("tinylora_dropout"):
        warnings.warn(f"{directory}: tinylora_dropout is dropped: it has no equivalent on the output", stacklevel=3)
    try:
        return config, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS}: it is damaged, or no safetensors file: {one_line(error)}") from None


def _module_names(model: nn.Module, tensors: dict[str, Tensor], directory: Path) -> list[str]:
    """The adapted modules in named_modules order, each one a linear layer of the model."""
    wanted = {key.removeprefix(PREFIX)[:-KIND] for key in tensors if key[-KIND:] in FACTORS}
    if not wanted:
        raise ValueError(f"{directory / WEIGHTS}: expected tinylora_A and tinylora_B of some module, found none")
    modules = {name: module for name, module in named_modules(model) if name in wanted}
    missing = sorted(wanted - modules.keys())
    if missing:
        raise ValueError(
            f"{directory}: this model has no module {missing[0]} ({len(missing)} of {len(wanted)} missing)"
        )
    for name, module in modules.items():
        if not is_linear_like(module):
            raise ValueError(
                f"{directory}: {name} is a {type(module).__name__}, expected a linear layer; load it with PEFT and "
                "call accelerate_peft"
            )
    return list(modules)


def _expect_whole(
    directory: Path, config: dict, tensors: dict[str, Tensor], model: nn.Module, modules: dict[str, nn.Module],
    groups: list[int],
) -> None:  # fmt: skip
    """Raises ValueError unless the directory holds all of these modules, and nothing else that makes a difference."""
    targets = config.get("target_modules")
    if isinstance(targets, list) and not any(config.get(name) for name in ("exclude_modules", "layers_to_transform")):
        named = (name for name, _ in named_modules(model) if not set(targets).isdisjoint(suffixes(name)))
        if absent := [name for name in named if name not in modules]:
            raise ValueError(f"{directory}: it is not whole: target_modules names {absent[0]}, which has no tensors")
    # PEFT draws P again only where it was told not to save it
    drawn = config.get("save_projection") is False and not any(key.endswith(".tinylora_P") for key in tensors)
    if drawn:
        _expect_number(directory, config, "projection_seed", least=0)
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        out, width = matrix_shape(module)
        rank = min(config["r"], out, width)
        shapes = [(rank, width), (out, rank), *([] if drawn else [(config["u"], rank, rank)])]
        expected |= {f"{PREFIX}{name}{kind}": shape for kind, shape in zip(FACTORS, shapes, strict=False)}
    expected |= {f"base_model.tinylora_v.{group}": (config["u"],) for group in groups}
    own = base_state_dict(model)
    for key in [key for key in tensors if ".tinylora_" not in key]:
        # the weight of an adapted head, which PEFT saves without being asked
        ours = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if ".base_layer." not in key or ours is None:
            raise ValueError(f"{directory}: {key} has no place in an adapted model (modules_to_save or bias)")
        if ours.shape != tensors[key].shape or not torch.equal(tensors[key].to(ours), ours):
            raise ValueError(f"{directory}: {key} is not this model's; load the base that the adapter was made for")
    _expect_tensors(directory, {key: tensors[key] for key in tensors if ".tinylora_" in key}, expected)


def _expect_tensors(
    directory: str | os.PathLike[str], found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]
) -> None:
    """Raises ValueError unless these are the tensors, of these shapes."""
    where = f"{os.fspath(directory)}: it is not whole, or its config is another adapter's:"
    for key in (*expected, *found):
        if key not in found:
            raise ValueError(f"{where} {key} is missing")
        if key not in expected:
            raise ValueError(f"{where} {key} belongs to nothing that it adapts")
        if tuple(found[key].shape) != tuple(expected[key]):
            raise ValueError(f"{where} {key}: expected {list(expected[key])}, found {list(found[key].shape)}")


def _expect_number(
    directory: Path, config: dict, name: str, least: int = 1, most: float = math.inf, kinds: tuple[type, ...] = (int,)
) -> None:
    """Raises ValueError unless the config's field is a number in these bounds."""
    value = config.get(name)
    if type(value) not in kinds or not least <= value <= most:  # type: ignore[operator]
        what = f"a number from {least} to {most}" if float in kinds else f"an integer >= {least}"
        raise ValueError(f"{directory / CONFIG}: {name}: expected {what}, found {value!r}")


def _groups(modules: int, weight_tying: float) -> list[int]:
    """PEFT's tie group of each module: round(n (1 - weight_tying)) groups, the last one takes what is left over."""
    count = max(1, round(modules * (1.0 - weight_tying)))
    size = max(1, modules // count)
    return [min(index // size, count - 1) for index in range(modules)]


def _tied(layers: dict[str, TinyLoRALayer]) -> tuple[float | None, list[int]]:
    """The weight_tying of these layers, and the number of each one's v as PEFT has it: its own where there is none."""
    numbers: dict[TinyLoRALayer, int] = {}  # not the layers' group: two adapters in a model count from 0 each
    groups = [numbers.setdefault(layer.owner, len(numbers)) for layer in layers.values()]
    weight_tying = _weight_tying(groups)
    return weight_tying, groups if weight_tying is not None else list(range(len(groups)))


def _weight_tying(groups: list[int]) -> float | None:
    """The weight_tying that gives these groups, None if there is none."""
    value = 1.0 - len(set(groups)) / len(groups)
    return value if _groups(len(groups), value) == groups else None


def _regenerated(seed: int, u: int, r: int) -> Tensor:
    """PEFT's P of one module: torch's CPU generator, N(0, 1/r)."""
    return torch.normal(0.0, r**-0.5, size=(u, r, r), generator=torch.Generator().manual_seed(seed))
