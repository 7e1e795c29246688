"""Saving and loading what was trained: 13 numbers in a file that knows which model they belong to.

The file (format.py) holds v, the config, and for each adapted module its name, shape, tie group, a fingerprint
of the frozen weight and a sketch of its basis.  P comes from its seed and U from the weight again; a basis travels in
the file only where the weight does not determine it.  Loading checks all of it before it touches the model.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..base.kinds import weight_matrix
from ..base.weights import right_factor, slabs
from ..common import modes
from ..common.atomic import write_atomically
from ..common.finite import as_finite
from ..common.words import listed, one_line
from ..factors.cache import weight_fingerprint
from ..factors.modules import factorize_modules
from ..factors.svd import SKETCH_TOLERANCE, Factors, basis_sketch, compare_sketch
from ..layers.layer import TinyLoRALayer, kept_unless_done
from ..method.config import IDENTITY_FIELDS, LoRAXSConfig, TinyLoRAConfig, by_names, is_literal
from ..method.parts import row_slices
from ..method.tying import assign_groups
from ..model.adapted import adapted_layers, expect_unmerged, is_merged, trained_beside
from ..model.attach import attach
from ..model.merging import original_weight
from ..model.targets import base_module, fused_parts, selected_names
from .format import AdaptedModule, AdapterError, AdapterFile, encode, read

SIGMA_TOLERANCE, APPROXIMATE = 1e-4, 0.1  # relative, of stored singular values: exact ones, and approximate ones


def save_adapter(model: nn.Module, path: str | os.PathLike[str], include_basis: bool = False) -> None:
    """Write the trained numbers of an adapted model, merged or not, and what is needed to check them again.

    Args:
        model: adapted by apply_tiny_lora or apply_lora_xs.
        path: the file; it is replaced whole or, when anything fails, left as it was.
        include_basis: store U of every module (4 r out bytes each), so that loading needs no SVD.  Always stored is
            what the weights here do not give again: where singular values coincide, and where the weight was cast to
            fewer bits, quantised or trained since it was adapted.

    Raises:
        AdapterError: the model has no adapter, is only a part of the adapted model, a weight has changed since it was
            adapted, or v holds NaN.
        OSError: the file cannot be written.

    Warns:
        UserWarning: something trains beside the vectors (a head, a bias, statistics): it is not in the file.
    """
    write_atomically(path, encode(describe_model(model, include_basis)))
    warn_of_what_is_left_out(model, os.fspath(path))
    averaged = [name for name, layer in adapted_layers(model).items() if layer.has_another_rounding()]
    if averaged:
        warnings.warn(
            f"{os.fspath(path)}: the frozen weights of {listed(averaged, 3)} are not those adapted to but other "
            "roundings of them, as an average of models leaves them, and the file loads beside such weights alone; "
            "copy the averaged vectors into the model that was trained, and save that",
            stacklevel=2,
        )


@modes.outside_inference_mode
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
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
    with _naming(path):
        if adapted_layers(model):
            _load_into_adapted(model, adapter)
        else:
            _load_into_bare(model, adapter, backend, cache, progress)
    return model


@modes.outside_inference_mode
def load_beside_others(model: nn.Module, path: str | os.PathLike[str], who: str) -> None:
    """As load_adapter, into an adapted model on whose layers others keep vectors too: U has to stay what it is.

    Args:
        who: the others, in the error.
    """
    adapter = read(path)
    with _naming(path):
        _load_into_adapted(model, adapter, who)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{os.fspath(path)}: {error}") from error.__cause__


def warn_of_what_is_left_out(model: nn.Module, written: object, stacklevel: int = 3) -> None:
    """Say what was trained beside the vectors: an adapter has no place for it.

    Args:
        written: the file or directory, for the message.
    """
    beside = trained_beside(model)
    if beside:
        warnings.warn(
            f"{written}: it holds the vectors v alone, and {listed(beside)} train beside them; save those too, with "
            "torch.save or in a whole model (integrations.transformers.save_pretrained), or freeze them",
            stacklevel=stacklevel,
        )


def describe_model(model: nn.Module, include_basis: bool = False, v: Tensor | None = None) -> AdapterFile:
    """What save_adapter writes: the model's own vectors, or v [groups, u] in their place."""
    layers = adapted_layers(model)
    if not layers:
        raise AdapterError("model: it has no adapter to save; call apply_tiny_lora(model, config) first")
    config = _config_of(layers)
    whole = next(iter(layers.values())).count
    modules: list[AdaptedModule] = []
    vectors: dict[int, Tensor] = {}  # tie group -> v
    for position, (name, layer) in enumerate(layers.items()):
        if layer.index != position:
            raise AdapterError(
                f"{name}: it was adapted as module {layer.index} and is module {position} here; "
                "save the whole model that was given to apply_tiny_lora"
            )
        if layer.count != whole or whole not in (None, len(layers)):
            raise AdapterError(
                f"{name}: it was adapted as one of {layer.count} modules and is one of {len(layers)} here; "
                "save the whole model that was given to apply_tiny_lora"
            )
        weight = original_weight(layer)
        if weight.is_meta:
            raise AdapterError(f"{name}: its weight is on the meta device (offloaded?); bring it back, then save")
        in_doubt = not layer.weight_determines_factors()  # then U is of the weight as it was, before a cast perhaps
        store = include_basis or layer.degenerate or in_doubt
        basis = layer.singular_basis()
        module = AdaptedModule(
            name, (weight.shape[0], weight.shape[1]), layer.group, weight_fingerprint(weight), basis_sketch(basis),
            basis if store else None, layer.sigma if store else None,
        )  # fmt: skip
        if in_doubt and not _sigma_is_of(weight, module, config):
            raise AdapterError(
                f"{name}: its weight has changed since it was adapted, and no reader of the adapter could tell U and "
                "sigma from wrong ones; save the model merged (merged_weights, or save_pretrained(..., merged=True) of "
                "integrations.transformers), or call refresh_factors(model) and train v again"
            )
        modules.append(module)
        vectors.setdefault(layer.group, layer.v.detach().cpu())
    if v is None:
        v = torch.stack([vectors[group] for group in range(len(vectors))])  # [groups, u]
    try:
        v = as_finite("model: its trained vectors v", v, config.v_dtype)
    except ValueError as error:
        raise AdapterError(f"{error}; nothing was written") from None
    return AdapterFile(config if is_literal(config) else by_names(config, list(layers)), v, modules)


def _load_into_bare(
    model: nn.Module, adapter: AdapterFile, backend: str | None, cache: bool, progress: bool
) -> None:
    config = dataclasses.replace(adapter.config, backend=backend, cache=cache)
    names = [module.name for module in adapter.modules]
    try:
        # A list of all its modules is one of full names: by_names wrote it, where suffixes could select others.
        targets = config.target_modules
        whole = targets is not None and not isinstance(targets, str) and set(targets) == set(names)
        found, _ = selected_names(model, config, whole)
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

    stored = {m.name: Factors(*m.stored, degenerate=True, residual=0.0) for m in adapter.modules if m.stored}
    wanted = {name: base for name, base in bases.items() if name not in stored}
    computed = factorize_modules(wanted, config.rank, parts, cache=cache, progress=progress) if wanted else {}
    factors = stored | computed
    _check_bases({name: factors[name].basis for name in names}, adapter)

    attach(model, config, names, groups, factors, adapter.v)


def check_fits(
    layers: dict[str, TinyLoRALayer], adapter: AdapterFile, computed: Mapping[str, Factors] | None = None
) -> None:
    """Raise AdapterError unless the file was trained on these layers: names, config, groups, weights and bases (some of
    them computed again).
    """
    expect_unmerged(layers, "model", error=AdapterError)
    _check_names(list(layers), [module.name for module in adapter.modules])
    _check_config(_config_of(layers), adapter.config)
    for position, (layer, module) in enumerate(zip(layers.values(), adapter.modules, strict=True)):
        if layer.index != position or layer.group != module.group:
            raise AdapterError(
                f"{module.name} is module {position} in tie group {module.group} there, and module {layer.index} in "
                f"group {layer.group} of this model"
            )
    _check_weights(lambda name: layers[name].weight_matrix(), adapter)
    held = {name: layer.singular_basis() for name, layer in layers.items()}
    held |= {name: factors.basis for name, factors in (computed or {}).items()}
    _check_bases({m.name: held[m.name] if m.basis is None else m.basis for m in adapter.modules}, adapter)


def expect_shared_bases(layers: Mapping[str, TinyLoRALayer], adapter: AdapterFile, who: str) -> None:
    """Asked where others have their vectors on these layers: another U would make other functions of them.

    Raises:
        AdapterError: the file carries another basis.
    """
    for module in adapter.modules:
        if module.basis is not None and not torch.equal(module.basis, layers[module.name].singular_basis().cpu()):
            raise AdapterError(f"{module.name} has its own basis; {who} shares the model's: load it into another model")


def _load_into_adapted(model: nn.Module, adapter: AdapterFile, who: str | None = None) -> None:
    layers = adapted_layers(model)
    computed = _factors_of_the_weights(layers, adapter)
    check_fits(layers, adapter, computed)
    if any(layer.bank is not None for layer in layers.values()):
        who = "the model's AdapterBank"
    if who is not None:
        expect_shared_bases(layers, adapter, who)
        for name in computed:
            raise AdapterError(
                f"{name} has the weight's basis; {who} shares one that a file brought: load it into another model"
            )
    stored = {m.name: Factors(*m.stored, degenerate=True, residual=0.0) for m in adapter.modules if m.stored}
    with kept_unless_done(layers.values()):
        for name, factors in (stored | computed).items():
            layers[name].set_factors(factors.basis, factors.sigma)
            layers[name].degenerate = factors.degenerate  # of what is stored, the weight need not determine it
        _set_vectors(layers, adapter.v)


def _factors_of_the_weights(layers: Mapping[str, TinyLoRALayer], adapter: AdapterFile) -> dict[str, Factors]:
    """Of layers that hold factors which some file brought, where this one was trained with those of the weights."""
    wanted = {
        module.name: layers[module.name] for module in adapter.modules
        if module.stored is None and (layer := layers.get(module.name)) is not None and layer.degenerate
        and compare_sketch(module.sketch, basis_sketch(layer.singular_basis())) > SKETCH_TOLERANCE
    }  # fmt: skip
    if not wanted or any(is_merged(layer) for layer in wanted.values()):
        return {}
    parts = {name: layer.parts for name, layer in wanted.items() if layer.parts}
    bases = {name: layer.base for name, layer in wanted.items()}
    return factorize_modules(bases, adapter.config.rank, parts, cache=adapter.config.cache, progress=False)


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
    parts = [f"this model lacks {listed(missing, 3)}"] if missing else []
    parts += [f"it knows nothing of {listed(extra, 3)}"] if extra else []
    raise AdapterError("it is for another model: " + " and ".join(parts))


def _check_config(found: TinyLoRAConfig | LoRAXSConfig, expected: TinyLoRAConfig | LoRAXSConfig) -> None:
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
        elif not _sigma_is_of(weight, module, adapter.config):
            raise AdapterError(
                f"{module.name}: its stored singular values are not those of its stored basis and the weight; save it "
                "again where it was trained"
            )
    if wrong:
        raise AdapterError(
            f"it was trained on other base weights: {len(wrong)} of {len(adapter.modules)} differ, {listed(wrong, 3)}"
        )


def _sigma_is_of(weight: Tensor, module: AdaptedModule, config: TinyLoRAConfig | LoRAXSConfig) -> bool:
    """Whether sigma_i = ||W^T u_i|| of what the file carries, part by part; True where it carries nothing.

    As exactly as u_i is a singular vector: an approximate basis, which is as good, has approximate singular values.
    """
    if module.stored is None:
        return True
    basis, sigma = (stored.to(weight.device, torch.float64) for stored in module.stored)  # [r, out], [r] or [k, r]
    sizes = config.parts(module.name, module.shape[0]) or module.shape[:1]
    for rows, s in zip(row_slices(sizes), sigma.view(-1, config.rank), strict=True):
        u, matrix = basis[:, rows], weight[rows]
        v = right_factor(u, matrix) / s.unsqueeze(1)  # [r, in], of length 1
        lengths = v.norm(dim=1, keepdim=True)
        back = torch.cat([matrix[slab].double() @ (v / lengths).T for slab in slabs(len(matrix))]).T  # sigma u [r, out]
        inexact = (back / (s.unsqueeze(1) * lengths) - u).norm(dim=1)
        if not bool(((lengths.squeeze(1) - 1).abs() <= SIGMA_TOLERANCE + inexact.clamp(max=APPROXIMATE)).all()):
            return False
        if not bool(((u @ u.T).fill_diagonal_(0).abs() <= SIGMA_TOLERANCE).all()):
            return False
    return True


def _check_bases(bases: dict[str, Tensor], adapter: AdapterFile) -> None:
    deviations = {m.name: compare_sketch(m.sketch, basis_sketch(bases[m.name])) for m in adapter.modules}
    wrong = [name for name, deviation in deviations.items() if deviation > SKETCH_TOLERANCE]
    if wrong:
        raise AdapterError(
            f"the singular vectors came out different for {len(wrong)} of {len(adapter.modules)} modules, "
            f"{listed(wrong, 3)}; save it again with include_basis=True where it was trained"
        )
