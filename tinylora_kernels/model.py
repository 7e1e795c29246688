"""A whole model: find the modules, factorise them, share the vectors, freeze the rest."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .base_layers import kind_of
from .config import TinyLoRAConfig
from .direct_reads import warn_of_direct_reads
from .expert_layers import AdaptedExperts
from .experts import ExpertSlice, expert_slices, is_experts
from .factors import Factors
from .fused import block_basis, block_projection, factorize_modules, fused_parts, names_match
from .layer import TinyLoRALayer
from .projection import philox_projection, philox_uniform
from .tying import assign_groups

UNIFORM_BOUND = 0.01  # init="uniform": v ~ U(-0.01, 0.01)


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
        config: see TinyLoRAConfig; modules are taken in named_modules order.
        progress: show a bar while the weights are factorised.
        factors: the truncated SVD of every module, by name, where it is known already; nothing is factorised then. Of
            fused projections taken apart in the form that factorize_modules returns.

    Returns:
        The same model.

    Raises:
        ValueError: no module matched, one that cannot be adapted did, a rank above min(out, in), a weight with NaN or
            of lower rank, weights on the meta device, a model adapted already. The model is left as it was.
    """
    names = target_names(model, config.target_modules)
    groups = assign_groups(names, config.n_tie, config.tying)

    def initial(group: int) -> Tensor:
        if config.init == "zeros":
            return torch.zeros(config.trainable_dim)
        return philox_uniform(config.seed, group, config.trainable_dim, UNIFORM_BOUND)

    return attach(
        model, config, names, groups, config.frozen_rank,
        lambda index, sigma, lookup: tiny_lora_projection(config, index, sigma, lookup), initial,
        progress=progress, factors=factors,
    )  # fmt: skip


def tiny_lora_projection(config: TinyLoRAConfig, index: int, sigma: Tensor, lookup: bool = False) -> Tensor:
    """P' of one module: its random P between its singular values.

    Args:
        config: gives the seed, u, r, alpha and scaling.
        index: of the module's P; fused projections taken apart use one index a part from here on.
        sigma: [r] singular values, or [k, r] of k parts.
        lookup: the module is an embedding. Its rows get U S R V^T, which is y V R V^T on the output side: with V for
            the basis M = alpha R^T where S stands on the left ("left"), alpha S^1/2 R^T S^-1/2 where it is split
            ("sqrt").

    Returns:
        [u, r, r] float64, or [u, R, R] for parts, block-diagonal.
    """
    if sigma.dim() == 2:
        return block_projection([tiny_lora_projection(config, index + part, s) for part, s in enumerate(sigma)])
    fixed = philox_projection(config.seed, index, config.trainable_dim, config.frozen_rank)  # [u, r, r]
    if lookup:
        return lookup_projection(fixed, sigma, config.alpha, config.scaling)
    return scaled_projection(fixed, sigma, config.alpha, config.scaling)


def lookup_projection(fixed: Tensor, sigma: Tensor, alpha: float, scaling: str) -> Tensor:
    """P' of an embedding from its P [..., r, r]: alpha P^T ("left") or alpha sqrt(S) P^T sqrt(S)^-1 ("sqrt")."""
    if scaling == "left":
        return alpha * fixed.mT.double()
    return scaled_projection(fixed.mT, sigma, alpha, scaling)


def scaled_projection(fixed: Tensor, sigma: Tensor, alpha: float, scaling: str) -> Tensor:
    """P' from P: alpha S P S^-1 ("left") or alpha sqrt(S) P sqrt(S)^-1 ("sqrt"); P [..., r, r], sigma [r]."""
    sigma = sigma.double()
    s = sigma.sqrt() if scaling == "sqrt" else sigma
    # P'_jk = alpha s_j P_jk / s_k
    return alpha * s.unsqueeze(-1) * fixed.double() / s


def target_names(model: nn.Module, target_modules: Sequence[str] | str | None) -> list[str]:
    """Qualified names of the modules to adapt, in named_modules order.

    Raises:
        ValueError: the model is adapted already, nothing that can be adapted matches, or what matches cannot be.
    """
    if adapted_layers(model):
        raise ValueError("model: expected a bare model, found one that is adapted already; call remove_adapter first")
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
    for name, module in model.named_modules():
        if name and is_experts(module):
            for below, piece in expert_slices(module).items():
                yield f"{name}.{below}", piece, (f"{name}.{below}", f"{name}.{piece.stack}", name)
        elif name and kind_of(module) is not None:
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
        experts = model.get_submodule(parent)
        if is_experts(experts):
            return ExpertSlice(experts, rest[0], int(rest[1]))
    return model.get_submodule(name)


def output_head(model: nn.Module) -> nn.Module | None:
    """The language-model head, where the model says which one it is."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def attach(
    model: nn.Module,
    config,
    names: list[str],
    groups: list[int],
    rank: int,
    projection: Callable[[int, Tensor, bool], Tensor],
    initial: Callable[[int], Tensor],
    *,
    progress: bool = True,
    factors: Mapping[str, Factors] | None = None,
) -> nn.Module:
    """Replace the named modules by adapted layers; everything that can fail happens before the first replacement.

    Args:
        names, groups: the modules in order and the tie group of each.
        rank: singular triplets of each weight.
        projection: (index of the module's P, sigma [r] or [parts, r], is it an embedding) -> [u, r, r] or [r, r].
        initial: group -> [u], the starting values of its vector.
        factors: the truncated SVDs where they are known already.
    """
    bases = {name: base_module(model, name) for name in names}
    for name, base in bases.items():
        if base.weight.is_meta:
            raise ValueError(f"{name}: expected a weight on a real device, found meta; load the weights first")
    warn_of_direct_reads(model, [name for name, base in bases.items() if not isinstance(base, ExpertSlice)])
    parts = fused_parts(config, bases)
    if factors is None:
        factors = factorize_modules(bases, rank, parts, cache=config.cache, progress=progress)

    layers: dict[str, TinyLoRALayer] = {}
    owners: dict[int, TinyLoRALayer] = {}
    projection_index = 0
    for index, (name, group) in enumerate(zip(names, groups)):
        base, factor, sizes = bases[name], factors[name], parts.get(name)
        if sizes and factor.sigma.shape != (len(sizes), rank):
            raise ValueError(
                f"{name}: expected singular values {[len(sizes), rank]} of its parts, found "
                f"{list(factor.sigma.shape)}; fused.factorize_modules makes them"
            )
        basis = block_basis(factor.basis, sizes) if sizes else factor.basis
        v = owners.get(group)
        if v is None:
            v = nn.Parameter(initial(group).to(device=base.weight.device, dtype=config.v_dtype))
        layer = TinyLoRALayer(
            base, basis, factor.sigma, projection(projection_index, factor.sigma, kind_of(base).lookup), v,
            name=name, index=index, group=group, config=config, degenerate=factor.degenerate,
            parts=sizes, projection_index=projection_index,
        )  # fmt: skip
        projection_index += len(sizes) if sizes else 1
        layer.train(base.training)
        owners.setdefault(group, layer)
        layers[name] = layer

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    replace_modules(model, _replacements(layers))
    return model


def _replacements(layers: dict[str, TinyLoRALayer]) -> dict[nn.Module, nn.Module]:
    """Frozen module -> what takes its place: its adapted layer, or for experts all the layers of their module."""
    replacement: dict[nn.Module, nn.Module] = {}
    stacks: dict[nn.Module, dict[str, TinyLoRALayer]] = {}
    for name, layer in layers.items():
        if isinstance(layer.base, ExpertSlice):
            below = ".".join(name.rsplit(".", 2)[1:])
            stacks.setdefault(layer.base.experts, {})[below] = layer
        else:
            replacement[layer.base] = layer
    return replacement | {experts: AdaptedExperts(experts, own) for experts, own in stacks.items()}


def replace_modules(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> None:
    """Swap modules for others wherever they are referenced, shared references included."""
    for parent in list(model.modules()):
        if parent in replacement.values():
            continue
        for child_name, child in list(parent._modules.items()):
            if child in replacement:
                parent._modules[child_name] = replacement[child]


def remove_adapter(model: nn.Module) -> nn.Module:
    """Give the bare model back: the same base modules, frozen as they are; undoes apply_tiny_lora."""
    replace_modules(model, {wrapper: wrapper.base for wrapper in wrappers(model).values()})
    return model


def wrappers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, TinyLoRALayer | AdaptedExperts]:
    """Qualified name -> the module that stands where a frozen one stood before, and has it as ``base``."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=remove_duplicate)
        if isinstance(module, AdaptedExperts)
        or (isinstance(module, TinyLoRALayer) and not isinstance(module.base, ExpertSlice))
    }


def original_name(key: str, wrapped: Collection[str], layers: Collection[str]) -> str | None:
    """A tensor's name in the state dict before the model was adapted; None for a vector v.

    Args:
        key: its name in the adapted model.
        wrapped, layers: the names in wrappers(model, remove_duplicate=False), and of the adapted layers likewise.
    """
    owner, _, rest = key.rpartition(".base.")
    if owner in wrapped:
        return f"{owner}.{rest}"
    return None if key.removesuffix(".v") in layers else key


def adapted_layers(model: nn.Module) -> dict[str, TinyLoRALayer]:
    """Qualified name -> adapted layer, in named_modules order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TinyLoRALayer)}


def trainable_vectors(model: nn.Module) -> list[nn.Parameter]:
    """The vectors v, one for each tie group, in order of first use."""
    return list({id(layer.v): layer.v for layer in adapted_layers(model).values()}.values())


def count_trainable_params(model: nn.Module) -> dict[str, int]:
    """What is trained and what it weighs.

    Returns:
        trainable: numbers that require a gradient; total: all parameters; trainable_bytes_bf16, trainable_bytes_fp32:
        their size in bytes at 2 and 4 bytes a number; modules: adapted layers; groups: vectors v.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trainable": trainable,
        "total": sum(p.numel() for p in model.parameters()),
        "trainable_bytes_bf16": 2 * trainable,
        "trainable_bytes_fp32": 4 * trainable,
        "modules": len(adapted_layers(model)),
        "groups": len(trainable_vectors(model)),
    }
