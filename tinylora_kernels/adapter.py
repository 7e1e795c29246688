"""Saving and loading what was trained: 13 numbers in a file that knows which model they belong to.

The file (adapter_format.py) holds v, the config, and for each adapted module its name, shape, tie group, a fingerprint
of the frozen weight and a sketch of its basis.  P comes from its seed and U from the weight again; a basis travels in
the file only where the weight does not determine it.  Loading checks all of it before it touches the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .adapter_format import (
    AdaptedModule,
    AdapterError,
    AdapterFile,
    config_rank,
    encode,
    encode_config,
    one_line,
    read,
    write_atomically,
)
from .base_layers import kind_of, weight_matrix
from .config import TinyLoRAConfig
from .factors import Factors, basis_sketch, compare_sketch, weight_fingerprint
from .frozen import dense
from .fused import block_basis, factorize_modules, fused_parts, singular_basis
from .layer import TinyLoRALayer
from .lora_xs import LoRAXSConfig, apply_lora_xs, ratio_projection
from .merge import is_merged, original_weight
from .model import adapted_layers, apply_tiny_lora, base_module, target_names, tiny_lora_projection
from .tying import assign_groups, module_kind

# Accepted deviation of a recomputed basis, as compare_sketch estimates it: the solver proves 1e-6 and rounds to
# float32; the update then agrees to about this.
BASIS_TOL = 1e-5

# What makes two adapters the same function; the other fields say how modules and groups were chosen, and those are
# compared as the lists they led to.
IDENTITY_FIELDS = ("frozen_rank", "rank", "trainable_dim", "alpha", "scaling", "seed", "v_dtype", "fused")


def save_adapter(model: nn.Module, path: str | os.PathLike, include_basis: bool = False) -> None:
    """Write the trained numbers of an adapted model, merged or not, and what is needed to check them again.

    Args:
        model: adapted by apply_tiny_lora or apply_lora_xs.
        path: the file; it is replaced whole or, when anything fails, left as it was.
        include_basis: store U of every module (4 r out bytes each), so that loading needs no SVD.  Modules whose
            singular values coincide get theirs stored always.

    Raises:
        AdapterError: the model has no adapter, is only a part of the adapted model, or its v holds NaN.
        OSError: the file cannot be written.
    """
    write_atomically(path, encode(describe_model(model, include_basis)))


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    backend: str | None = None,
    cache: bool = True,
    progress: bool = True,
) -> nn.Module:
    """Put the file's numbers into a model: a bare one is adapted first, an adapted one must match the file's config.

    Args:
        model: the model the adapter was trained on, bare or adapted.  The parameters v keep their identity.
        path: a file of save_adapter.
        backend, cache, progress: for a bare model, as in TinyLoRAConfig and apply_tiny_lora.

    Returns:
        The same model.

    Raises:
        AdapterError: the file is damaged or of another version, or the model has other modules, weights or bases, or
            another config.  Everything is checked first: the model is as it was, a bare one is still bare.
        OSError: the file cannot be read.
    """
    adapter = read(path)
    try:
        if adapted_layers(model):
            _load_into_adapted(model, adapter)
        else:
            _load_into_bare(model, adapter, backend, cache, progress)
    except AdapterError as error:
        raise AdapterError(f"{os.fspath(path)}: {error}") from error.__cause__
    return model


def inspect_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read and check a file without any model; ``format_adapter`` prints the result.

    Raises:
        AdapterError: it is not an intact adapter file.
        OSError: it cannot be read.
    """
    return read(path)


def format_adapter(adapter: AdapterFile, every_module: bool = False, width: int = 100) -> str:
    """A table of at most ``width`` columns: one line per kind of module, or per module."""
    v = adapter.v.double()
    config = ", ".join(f"{key}={value!r}" for key, value in encode_config(adapter.config).items())
    lines = [
        f"{type(adapter.config).__name__.removesuffix('Config')} adapter, {adapter.size:,} bytes",
        f"trained  {v.numel()} numbers = {v.shape[0]} groups x {v.shape[1]}, "
        f"{str(adapter.v.dtype).removeprefix('torch.')}, {adapter.v.nbytes} bytes",
        f"v        norm {float(v.norm()):.4g}, largest {float(v.abs().max()):.4g}",
        *textwrap.wrap(f"config   {config}", width, subsequent_indent=" " * 9),
        "",
    ]
    if every_module:
        head = ("module", "shape", "group", "weight", "basis")
        rows = [
            (m.name, _shape(m), str(m.group), m.fingerprint[:8], "stored" if m.basis is not None else "from the weight")
            for m in adapter.modules
        ]
    else:
        head = ("kind of module", "modules", "shape", "groups", "bases stored")
        kinds: dict[tuple[str, str], list[AdaptedModule]] = {}
        for module in adapter.modules:
            kinds.setdefault((module_kind(module.name), _shape(module)), []).append(module)
        rows = [
            (kind, str(len(ms)), shape, _span([m.group for m in ms]), str(sum(m.basis is not None for m in ms)))
            for (kind, shape), ms in kinds.items()
        ]
    columns = [max(map(len, column)) for column in zip(head, *rows)]
    # The name gives way first: the other columns are what one compares.
    columns[0] = max(8, min(columns[0], width - sum(columns[1:]) - 2 * (len(columns) - 1)))
    for row in (head, *rows):
        name = row[0] if len(row[0]) <= columns[0] else "..." + row[0][3 - columns[0] :]
        cells = [name.ljust(columns[0]), *(cell.rjust(n) for cell, n in zip(row[1:], columns[1:]))]
        lines.append("  ".join(cells))
    return "\n".join(line if len(line) <= width else line[: width - 3] + "..." for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tinylora_kernels inspect FILE``: print the table, or one line on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="python -m tinylora_kernels inspect", description="Show an adapter file.")
    parser.add_argument("file")
    parser.add_argument("--all", action="store_true", help="a line for each module instead of each kind")
    arguments = parser.parse_args(argv)
    try:
        adapter = inspect_adapter(arguments.file)
    except (AdapterError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(format_adapter(adapter, arguments.all, shutil.get_terminal_size((100, 24)).columns))
    return 0


def describe_model(model: nn.Module, include_basis: bool = False, v: Tensor | None = None) -> AdapterFile:
    """What save_adapter writes: the model's own vectors, or v [groups, u] in their place."""
    layers = adapted_layers(model)
    if not layers:
        raise AdapterError("model: it has no adapter to save; call apply_tiny_lora(model, config) first")
    config = _config_of(layers)
    modules, vectors = [], {}
    for position, (name, layer) in enumerate(layers.items()):
        if layer.index != position:
            raise AdapterError(
                f"{name}: it was adapted as module {layer.index} and is module {position} here; "
                "save the whole model that was given to apply_tiny_lora"
            )
        weight = original_weight(layer)
        store, basis = include_basis or layer.degenerate, singular_basis(layer)
        modules.append(
            AdaptedModule(
                name, tuple(weight.shape), layer.group, weight_fingerprint(weight), basis_sketch(basis),
                basis if store else None, layer.sigma if store else None,
            )  # fmt: skip
        )
        vectors.setdefault(layer.group, layer.v.detach().cpu())
    if v is None:
        v = torch.stack([vectors[group] for group in range(len(vectors))])  # [groups, u]
    if not bool(torch.isfinite(v).all()):
        raise AdapterError("model: a trained vector v holds NaN or infinity; nothing was written")
    return AdapterFile(config, v, modules)


def _load_into_bare(model: nn.Module, adapter: AdapterFile, backend, cache: bool, progress: bool) -> None:
    config = dataclasses.replace(adapter.config, backend=backend, cache=cache)
    names = [module.name for module in adapter.modules]
    try:
        found = target_names(model, config.target_modules)
        _check_names(found, names)
        groups = assign_groups(names, config.n_tie, config.tying)
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"it does not fit this model: {one_line(error)}") from error
    if groups != [module.group for module in adapter.modules]:
        raise AdapterError("its tie groups do not follow from its config; the file was not written by save_adapter")
    bases = {name: base_module(model, name) for name in names}
    _check_weights(lambda name: weight_matrix(bases[name]), adapter)
    try:
        parts = fused_parts(config, bases)
    except ValueError as error:
        raise AdapterError(f"it does not fit this model: {one_line(error)}") from error

    stored = {m.name: Factors(m.basis, m.sigma, True, 0.0) for m in adapter.modules if m.basis is not None}
    wanted = {name: base for name, base in bases.items() if name not in stored}
    rank = config_rank(config)
    computed = factorize_modules(wanted, rank, parts, cache=cache, progress=progress) if wanted else {}
    factors = stored | computed
    _check_bases({name: factors[name].basis for name in names}, adapter)

    apply = apply_lora_xs if isinstance(config, LoRAXSConfig) else apply_tiny_lora
    apply(model, config, progress=progress, factors=factors)
    _set_vectors(adapted_layers(model), adapter.v)


def check_fits(layers: dict[str, TinyLoRALayer], adapter: AdapterFile) -> None:
    """Raise AdapterError unless the file was trained on these layers: names, config, groups, weights and bases."""
    merged = [name for name, layer in layers.items() if is_merged(layer)]
    if merged:
        raise AdapterError(f"the model is merged ({merged[0]}); call unmerge(model) first")
    _check_names(list(layers), [module.name for module in adapter.modules])
    _check_config(_config_of(layers), adapter.config)
    for position, (layer, module) in enumerate(zip(layers.values(), adapter.modules)):
        if layer.index != position or layer.group != module.group:
            raise AdapterError(
                f"{module.name} is module {position} in tie group {module.group} there, and module {layer.index} in "
                f"group {layer.group} of this model"
            )
    _check_weights(lambda name: layers[name].weight_matrix(), adapter)
    _check_bases(
        {m.name: m.basis if m.basis is not None else singular_basis(layers[m.name]) for m in adapter.modules},
        adapter,
    )


def _load_into_adapted(model: nn.Module, adapter: AdapterFile) -> None:
    layers = adapted_layers(model)
    check_fits(layers, adapter)
    for layer, module in zip(layers.values(), adapter.modules):
        if module.basis is not None:
            _set_factors(layer, module.basis, module.sigma)
    _set_vectors(layers, adapter.v)


@torch.no_grad()
def _set_factors(layer: TinyLoRALayer, basis: Tensor, sigma: Tensor) -> None:
    """Give an adapted layer the basis its numbers were trained with: P' and the offset follow from it."""
    lookup = kind_of(layer.base).lookup
    if isinstance(layer.config, LoRAXSConfig):
        projection = ratio_projection(layer.config, sigma, lookup)
    else:
        projection = tiny_lora_projection(layer.config, layer.projection_index, sigma, lookup)
    layer.basis.copy_(block_basis(basis, layer.parts) if layer.parts else basis)
    layer.sigma.copy_(sigma)
    layer.projection.copy_(projection)
    if layer.offset is not None:
        layer.offset.copy_(layer.basis @ dense(layer.base.bias.detach()).to(layer.basis))


@torch.no_grad()
def _set_vectors(layers: dict[str, TinyLoRALayer], v: Tensor) -> None:
    for layer in layers.values():
        if layer.owner is layer:
            layer.v.copy_(v[layer.group])


def _config_of(layers: dict[str, TinyLoRALayer]) -> TinyLoRAConfig | LoRAXSConfig:
    configs = [layer.config for layer in layers.values()]
    if not isinstance(configs[0], (TinyLoRAConfig, LoRAXSConfig)) or any(c != configs[0] for c in configs):
        raise AdapterError("model: its layers do not share one TinyLoRAConfig or LoRAXSConfig")
    return configs[0]


def _check_names(found: list[str], expected: list[str]) -> None:
    if found == expected:
        return
    known, wanted = set(found), set(expected)
    missing = [name for name in expected if name not in known]
    extra = [name for name in found if name not in wanted]
    if not missing and not extra:
        raise AdapterError("it is for the same modules in another order")
    parts = [f"this model lacks {_some(missing)}"] if missing else []
    parts += [f"it knows nothing of {_some(extra)}"] if extra else []
    raise AdapterError("it is for another model: " + " and ".join(parts))


def _check_config(found, expected) -> None:
    if type(found) is not type(expected):
        raise AdapterError(f"it holds a {type(expected).__name__}, the model was adapted with a {type(found).__name__}")
    for field in IDENTITY_FIELDS:
        ours, theirs = getattr(found, field, None), getattr(expected, field, None)
        if ours != theirs:
            raise AdapterError(f"config: {field} is {theirs} there and {ours} in this model")


def _check_weights(matrix_of: Callable[[str], Tensor], adapter: AdapterFile) -> None:
    wrong = []
    for module in adapter.modules:  # one matrix at a time: a quantised or a sharded one is made here
        weight = matrix_of(module.name)
        if tuple(weight.shape) != module.shape:
            raise AdapterError(f"{module.name}: expected a weight of {list(module.shape)}, found {list(weight.shape)}")
        if weight.is_meta:
            raise AdapterError(f"{module.name}: its weight is on the meta device; load the weights first")
        if weight_fingerprint(weight) != module.fingerprint:
            wrong.append(module.name)
    if wrong:
        raise AdapterError(
            f"it was trained on other base weights: {len(wrong)} of {len(adapter.modules)} differ, {_some(wrong)}"
        )


def _check_bases(bases: dict[str, Tensor], adapter: AdapterFile) -> None:
    wrong = [m.name for m in adapter.modules if compare_sketch(m.sketch, basis_sketch(bases[m.name])) > BASIS_TOL]
    if wrong:
        raise AdapterError(
            f"the singular vectors came out different for {len(wrong)} of {len(adapter.modules)} modules, "
            f"{_some(wrong)}; save it again with include_basis=True where it was trained"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _shape(module: AdaptedModule) -> str:
    return "x".join(map(str, module.shape))


def _span(groups: list[int]) -> str:
    low, high = min(groups), max(groups)
    return str(low) if low == high else f"{low}..{high}"
