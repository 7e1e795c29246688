"""Adapting a model in place, and giving the bare one back: factorise modules, share vectors, freeze the rest."""
from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..base.attributes import weight_of
from ..base.direct_reads import warn_of_direct_reads
from ..base.experts import ExpertSlice, StackedExperts
from ..base.kinds import weight_matrix
from ..base.names import COMPILED, is_of
from ..common import modes
from ..common.finite import as_finite
from ..common.interrupts import finish, undone_by
from ..common.words import listed
from ..factors.modules import expect_factors_of, factorize_modules
from ..factors.svd import Factors
from ..layers.experts import AdaptedExperts
from ..layers.layer import TinyLoRALayer, finite_projection, kept_unless_done
from ..method.config import LoRAXSConfig, Method, TinyLoRAConfig, by_names, kept, own_copy, trained_dtype
from ..method.parts import block_basis
from ..method.tying import assign_groups
from .adapted import CLOSE_IT, adapted_layers, expect_unmerged, wrappers
from .targets import base_module, fused_parts, is_default, selected_names


def apply_tiny_lora(
    model: nn.Module,
    config: TinyLoRAConfig,
    *,
    progress: bool = True,
    factors: Mapping[str, Factors] | None = None,
) -> nn.Module:
    """Adapt a model in place with TinyLoRA and freeze everything but the vectors v.

    Args:
        model: any nn.Module; its linear layers, convolutions, embeddings and experts may be adapted (docs/layers.md).
        config: see TinyLoRAConfig; modules are taken in named_modules order. The model keeps a copy: what is written
            into the config later is for the next model.
        progress: show a bar while the weights are factorised.
        factors: the truncated SVD of every module, by name, where it is known already; nothing is factorised then, but
            each is proven by its weight, to the residual that it claims (a tenth of the time that it took). They are
            copied. Of fused projections taken apart in the form that factorize_modules returns.

    Returns:
        The same model.

    Raises:
        ValueError: no module matched, one that cannot be adapted did, a rank above min(out, in), a weight with NaN or
            of lower rank, factors of another weight, weights on the meta device, a model adapted already. The model is
            left as it was.
    """
    return adapt(model, config, progress=progress, factors=factors)


def apply_lora_xs(
    model: nn.Module,
    config: LoRAXSConfig,
    *,
    progress: bool = True,
    factors: Mapping[str, Factors] | None = None,
) -> nn.Module:
    """Adapt a model in place with LoRA-XS and freeze everything but the matrices R.

    Args:
        model, progress, factors: as in apply_tiny_lora.
        config: see LoRAXSConfig; modules are taken in named_modules order.

    Returns:
        The same model.  Each layer's ``v`` [r * r] is R flattened by rows.

    Raises:
        ValueError: as apply_tiny_lora; the model is left as it was.
    """
    return adapt(model, config, progress=progress, factors=factors)


@modes.outside_inference_mode
def adapt(
    model: nn.Module,
    config: TinyLoRAConfig | LoRAXSConfig,
    *,
    progress: bool = True,
    factors: Mapping[str, Factors] | None = None,
) -> nn.Module:
    """apply_tiny_lora or apply_lora_xs, by the config."""
    config = own_copy(config)
    names, skipped = selected_names(model, config)
    groups = assign_groups(names, config.n_tie, config.tying)
    brought = factors is not None
    if factors is None:
        bases = _bases(model, names)
        parts, skip = fused_parts(config, bases), is_default(config)
        factors = factorize_modules(bases, config.rank, parts, cache=config.cache, progress=progress, skip=skip)
    without_rank = [name for name in names if name not in factors]
    if without_rank and not is_default(config):
        raise ValueError(f"factors: expected those of every module to adapt, found none of {listed(without_rank)}")
    skipped |= dict.fromkeys(without_rank, f"cannot carry rank {config.rank}")
    if without_rank:
        names = [name for name in names if name in factors]
        if not names:
            none = listed(list(skipped))
            raise ValueError(f"target_modules: none of {none} can carry rank {config.rank}; use a lower one")
        config = by_names(config, names)  # shapes follow from the model that a file is loaded into, weights do not
        groups = assign_groups(names, config.n_tie, config.tying)
    attach(model, config, names, groups, factors, brought=brought)
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, own in skipped.items() if own == reason]
        warnings.warn(
            f"target_modules: {listed(names)} {reason} and stay as they are; name them in exclude_modules to hear no "
            "more of it",
            stacklevel=4,
        )
    return model


@modes.outside_inference_mode
def attach(
    model: nn.Module, config: Method, names: list[str], groups: list[int], factors: Mapping[str, Factors],
    vectors: Tensor | None = None, brought: bool = False,
) -> nn.Module:  # fmt: skip
    """Replace the named modules by adapted layers; everything that can fail happens before anything is changed.

    Args:
        names, groups: the modules in order and the tie group of each.
        factors: the truncated SVDs.
        vectors: v of each group, [groups, u]; default the config's.
        brought: the factors are the caller's, and the weights are asked whether they are theirs.
    """
    config = kept(config)
    bases = _bases(model, names)
    warn_of_direct_reads(model, [name for name, base in bases.items() if not isinstance(base, ExpertSlice)])
    parts = fused_parts(config, bases)

    layers: dict[str, TinyLoRALayer] = {}
    owners: dict[int, TinyLoRALayer] = {}
    projection_index = 0
    for index, (name, group) in enumerate(zip(names, groups, strict=True)):
        base, factor, sizes = bases[name], factors[name], parts.get(name)
        if sizes and factor.sigma.shape != (len(sizes), config.rank):
            raise ValueError(
                f"{name}: expected singular values {[len(sizes), config.rank]} of its parts, found "
                f"{list(factor.sigma.shape)}; factors.modules.factorize_modules makes them"
            )
        basis = as_finite(f"{name}: its basis U", block_basis(factor.basis, sizes) if sizes else factor.basis)
        v: nn.Parameter | TinyLoRALayer | None = owners.get(group)
        if v is None:
            numbers = config.initial(group) if vectors is None else vectors[group]
            numbers = as_finite(f"{name}: its vector v", numbers, trained_dtype(config.v_dtype))
            v = nn.Parameter(numbers.to(weight_of(base).device, copy=True))
        projection = finite_projection(name, config, projection_index, factor.sigma, base, basis.dtype)
        if brought:
            expect_factors_of(name, weight_matrix(base), factor, config.rank, parts)
        layer = TinyLoRALayer(
            base, basis, factor.sigma, projection, v, name=name, index=index, group=group, count=len(names),
            config=config, degenerate=factor.degenerate, parts=sizes, projection_index=projection_index,
        )  # fmt: skip
        projection_index += len(sizes) if sizes else 1
        layer.train(base.training)
        owners.setdefault(group, layer)
        layers[name] = layer

    replacements = _replacements(layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def undo() -> None:
        replace_modules(model, {new: old for old, new in replacements.items()})
        _allow_resizing(model)
        for parameter in trained:
            parameter.requires_grad_(True)

    with undone_by(undo):
        for parameter in trained:
            parameter.requires_grad_(False)
        replace_modules(model, replacements)
        _refuse_resizing(model)
    return model


def _bases(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Name -> frozen module, each with a weight that has values."""
    bases = {name: base_module(model, name) for name in names}
    for name, base in bases.items():
        if weight_of(base).is_meta:
            raise ValueError(f"{name}: expected a weight on a real device, found meta; load the weights first")
    return bases


def _replacements(layers: dict[str, TinyLoRALayer]) -> dict[nn.Module, nn.Module]:
    """Frozen module -> what takes its place: its adapted layer, or for experts all the layers of their module."""
    replacement: dict[nn.Module, nn.Module] = {}
    stacks: dict[StackedExperts, dict[str, TinyLoRALayer]] = {}
    for name, layer in layers.items():
        if isinstance(layer.base, ExpertSlice):
            below = ".".join(name.rsplit(".", 2)[1:])
            stacks.setdefault(layer.base.experts, {})[below] = layer
        else:
            replacement[layer.base] = layer
    return replacement | {experts: AdaptedExperts(experts, own) for experts, own in stacks.items()}


def replace_modules(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> None:
    """Swap modules for others wherever they are referenced, shared references and plain attributes included; done
    again, it changes nothing but what was left.
    """
    new = set(replacement.values())
    for parent in list(model.modules()):
        # a wrapper and its base keep what is their own: accelerate's _old_forward
        for key in () if parent in new or parent in replacement else vars(parent).keys() - _REGISTERS:
            held = parent.__dict__[key]
            if (swapped := _swapped(held, replacement)) is not held:
                parent.__dict__[key] = swapped
        for child_name, child in list(parent._modules.items()):
            if child in replacement and replacement[child] is not parent:
                child = parent._modules[child_name] = replacement[child]
            if child in new and is_of(parent, COMPILED):  # it calls what it held when it was made
                parent.__setstate__(parent.__getstate__())


_REGISTERS = frozenset(vars(nn.Module()))  # what every module has: its children, tensors and hooks


def _swapped(held: Any, replacement: Mapping[nn.Module, nn.Module], depth: int = 4) -> Any:
    """What a module holds beside its registered children (MaskFormer calls its layers from a list), with the
    replacements in it; the same object where there is none, and where it could be changed in place.
    """
    if isinstance(held, nn.Module):
        return replacement.get(held, held)
    if isinstance(held, MethodType) and isinstance(held.__self__, nn.Module):
        other = replacement.get(held.__self__)
        return held if other is None else getattr(other, held.__name__)
    if depth == 0:
        return held
    if isinstance(held, functools.partial):
        old = held.func, held.args, held.keywords
        func, args, keywords = new = _swapped(old, replacement, depth)
        return held if new is old else functools.partial(func, *args, **keywords)
    if type(held) is tuple:
        items = tuple(_swapped(item, replacement, depth - 1) for item in held)
        return held if all(a is b for a, b in zip(items, held, strict=True)) else items
    if type(held) in (list, dict, OrderedDict):
        for key, item in list(enumerate(held) if type(held) is list else held.items()):
            if (swapped := _swapped(item, replacement, depth - 1)) is not item:
                held[key] = swapped
    return held


@modes.outside_inference_mode
def refresh_factors(model: nn.Module, *, progress: bool = True) -> nn.Module:
    """Compute U and sigma of every adapted layer again, of the weights it holds now; v keeps its numbers.

    For a base that was replaced after adapting. The adapter is another function then, and v is usually to be trained
    again; a base of the same weights needs none of this.

    Raises:
        ValueError: no adapter, a merged model, one of from_peft (its P' is of PEFT's own factors), or a weight without
            the rank. The layers are as they were.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; call apply_tiny_lora(model, config) first")
    expect_unmerged(layers, "refresh_factors")
    for layer in layers.values():
        layer.expect_a_rule_for_projections()
    factors: dict[str, Factors] = {}
    for config in {id(layer.method): layer.method for layer in layers.values()}.values():  # parts adapted apart
        own = {name: layer for name, layer in layers.items() if layer.method is config}
        bases = {name: layer.base for name, layer in own.items()}
        parts = {name: layer.parts for name, layer in own.items() if layer.parts}
        factors |= factorize_modules(bases, config.rank, parts, cache=config.cache, progress=progress)
    with kept_unless_done(layers.values()):
        for name, layer in layers.items():
            layer.set_factors(factors[name].basis, factors[name].sigma)
            layer.degenerate = factors[name].degenerate
    return model


def remove_adapter(model: nn.Module) -> nn.Module:
    """Give the bare model back: the same base modules, frozen as they are; undoes apply_tiny_lora.

    Raises:
        ValueError: the model is merged, or has an AdapterBank.  Nothing has changed then.
    """
    layers = adapted_layers(model)
    way_out = "call unmerge(model) first, or the bits of its own weights would be lost; merged_weights(model) has both"
    expect_unmerged(layers, "remove_adapter", way_out)
    for name, layer in layers.items():
        if layer.bank is not None:
            raise ValueError(f"remove_adapter: {name} has an AdapterBank, which would serve no layer; {CLOSE_IT}")
    return unwrap(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The base modules in the place of the adapted layers, with the weights that they have now."""
    replacement: dict[nn.Module, nn.Module] = {wrapper: wrapper.base for wrapper in wrappers(model).values()}

    def remove() -> None:
        replace_modules(model, replacement)
        _allow_resizing(model)

    finish(remove)
    return model


def _refuse_resizing(model: nn.Module) -> None:
    """transformers' resize_token_embeddings puts another embedding and head in the place of the old ones, one after the
    other; what is adapted there is asked first.
    """
    for module in model.modules():
        if hasattr(type(module), "resize_token_embeddings"):
            module.__dict__["resize_token_embeddings"] = functools.partial(_resize, module)


def _allow_resizing(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("resize_token_embeddings", None)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not isinstance(layer, TinyLoRALayer):
            continue
        have = len(layer.weight)
        wanted = have if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != have:
            raise ValueError(
                f"resize_token_embeddings: {layer.name} is adapted with {have} rows, and U and sigma of {wanted} would "
                "be others; resize the bare model and adapt it then"
            )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
