"""A whole model: find the modules, factorise them, share the vectors, freeze the rest."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import TinyLoRAConfig
from .factors import Factors, factorize_many
from .layer import TinyLoRALayer, is_linear_like, weight_matrix
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
        model: any nn.Module; its linear layers (nn.Linear, transformers' Conv1D) may be adapted.
        config: see TinyLoRAConfig; modules are taken in named_modules order.
        progress: show a bar while the weights are factorised.
        factors: the truncated SVD of every module, by name, where it is known already; nothing is factorised then.

    Returns:
        The same model.

    Raises:
        ValueError: no module matched, a rank above min(out, in), a weight with NaN or of lower rank, weights on the meta
            device, a model adapted already. The model is left as it was.
    """
    names = target_names(model, config.target_modules)
    groups = assign_groups(names, config.n_tie, config.tying)

    def initial(group: int) -> Tensor:
        if config.init == "zeros":
            return torch.zeros(config.trainable_dim)
        return philox_uniform(config.seed, group, config.trainable_dim, UNIFORM_BOUND)

    return attach(
        model, config, names, groups, config.frozen_rank,
        lambda index, sigma: tiny_lora_projection(config, index, sigma), initial, progress=progress, factors=factors,
    )  # fmt: skip


def tiny_lora_projection(config: TinyLoRAConfig, index: int, sigma: Tensor) -> Tensor:
    """P' [u, r, r] of the module at this index: its random P between its singular values."""
    fixed = philox_projection(config.seed, index, config.trainable_dim, config.frozen_rank)  # [u, r, r]
    return scaled_projection(fixed, sigma, config.alpha, config.scaling)


def scaled_projection(fixed: Tensor, sigma: Tensor, alpha: float, scaling: str) -> Tensor:
    """P' from P: alpha S P S^-1 ("left") or alpha sqrt(S) P sqrt(S)^-1 ("sqrt"); P [..., r, r], sigma [r]."""
    sigma = sigma.double()
    s = sigma.sqrt() if scaling == "sqrt" else sigma
    # P'_jk = alpha s_j P_jk / s_k
    return alpha * s.unsqueeze(-1) * fixed.double() / s


def target_names(model: nn.Module, target_modules: Sequence[str] | str | None) -> list[str]:
    """Qualified names of the modules to adapt, in named_modules order."""
    if adapted_layers(model):
        raise ValueError("model: expected a bare model, found one that is adapted already; call remove_adapter first")
    linear = {name: module for name, module in model.named_modules() if name and is_linear_like(module)}
    if target_modules is None or target_modules == "all-linear":
        head = output_head(model)
        names = [name for name, module in linear.items() if module is not head]
        wanted: Sequence[str] = ["every linear layer"]
    else:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        names = [name for name in linear if any(name == w or name.endswith("." + w) for w in wanted)]
    if not names:
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        found = ", ".join(kinds[:12]) or "no linear layer at all"
        raise ValueError(f"target_modules: no module matches {', '.join(wanted)}; the model's linear layers are: {found}")
    return names


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
    projection: Callable[[int, Tensor], Tensor],
    initial: Callable[[int], Tensor],
    *,
    progress: bool = True,
    factors: Mapping[str, Factors] | None = None,
) -> nn.Module:
    """Replace the named modules by adapted layers; everything that can fail happens before the first replacement.

    Args:
        names, groups: the modules in order and the tie group of each.
        rank: singular triplets of each weight.
        projection: (module index, sigma [r]) -> [u, r, r] or [r, r].
        initial: group -> [u], the starting values of its vector.
        factors: the truncated SVDs where they are known already.
    """
    bases = {name: model.get_submodule(name) for name in names}
    for name, base in bases.items():
        if base.weight.is_meta:
            raise ValueError(f"{name}: expected a weight on a real device, found meta; load the weights first")
    if factors is None:
        items = [(name, lambda base=base: weight_matrix(base)) for name, base in bases.items()]
        factors = dict(factorize_many(items, rank, cache=config.cache, progress=progress))

    layers: dict[str, TinyLoRALayer] = {}
    owners: dict[int, TinyLoRALayer] = {}
    for index, (name, group) in enumerate(zip(names, groups)):
        base, factor = bases[name], factors[name]
        v = owners.get(group)
        if v is None:
            v = nn.Parameter(initial(group).to(device=base.weight.device, dtype=config.v_dtype))
        layer = TinyLoRALayer(
            base, factor.basis, factor.sigma, projection(index, factor.sigma), v,
            name=name, index=index, group=group, config=config, degenerate=factor.degenerate,
        )  # fmt: skip
        layer.train(base.training)
        owners.setdefault(group, layer)
        layers[name] = layer

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    replace_modules(model, {bases[name]: layer for name, layer in layers.items()})
    return model


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
    replace_modules(model, {layer: layer.base for layer in adapted_layers(model).values()})
    return model


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
