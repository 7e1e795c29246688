"""An adapted model: its layers and vectors, its tensors' names before it was adapted, and the adapter switched off."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..base.experts import ExpertSlice
from ..base.names import bare_name, inside, named_modules
from ..layers.experts import AdaptedExperts
from ..layers.layer import TinyLoRALayer
from ..layers.switch import switch_off

CLOSE_IT = "close it first: bank.close(), or that of any layer, next(iter(adapted_layers(model).values())).bank.close()"


def adapted_layers(model: nn.Module) -> dict[str, TinyLoRALayer]:
    """Qualified name -> adapted layer, in named_modules order.

    The names are those of the bare model, whatever stands around it or its blocks: torch.compile, DDP, FSDP,
    checkpointing, as_peft_model.
    """
    return {name: module for name, module in named_modules(model) if isinstance(module, TinyLoRALayer)}


def expect_one_adapter(layers: Mapping[str, TinyLoRALayer], who: str) -> None:
    """Raises ValueError where parts of a model were adapted apart: their tie groups are numbered from 0 each."""
    first: dict[int, tuple[str, TinyLoRALayer]] = {}
    for name, layer in layers.items():
        other, found = first.setdefault(layer.group, (name, layer))
        if found.owner is not layer.owner:
            raise ValueError(
                f"{who}: expected a model of one adapter, found {other} and {name} in tie group {layer.group} with a "
                "vector each, as parts have that were adapted apart; give the parts one by one, or adapt the whole"
            )


def expect_all_vectors(layers: Mapping[str, TinyLoRALayer], who: str) -> None:
    """Raises ValueError where a tie group's vector is on a layer that is not in the model: blocks were taken out, or
    one is used alone. It would be in no parameters() and in no state dict.
    """
    there = set(layers.values())
    for name, layer in layers.items():
        if layer.owner not in there:
            raise ValueError(
                f"{who}: the vector v of {name} was put on the layer that was {layer.owner.name}, which is not in this "
                "model; take blocks out of the bare model and adapt it then"
            )


def is_merged(layer: TinyLoRALayer) -> bool:
    """Whether the layer's update sits in its base weight."""
    return layer.saved_weight is not None


def expect_unmerged(
    layers: Mapping[str, TinyLoRALayer], who: str, way_out: str = "call unmerge(model) first",
    error: type[ValueError] = ValueError,
) -> None:  # fmt: skip
    """Asked by whoever needs the base and the update apart: raises where the update of a layer sits in its weight."""
    merged = [name for name, layer in layers.items() if is_merged(layer)]
    if merged:
        some = "is" if len(merged) == 1 else f"and {len(merged) - 1} more modules are"
        raise error(f"{who}: {merged[0]} {some} merged; {way_out}")


def trainable_vectors(model: nn.Module) -> list[nn.Parameter]:
    """The vectors v, one for each tie group, in order of first use."""
    return list({id(layer.v): layer.v for layer in adapted_layers(model).values()}.values())


def count_trainable_params(model: nn.Module) -> dict[str, int]:
    """What is trained and what it weighs.

    Returns:
        trainable: numbers that require a gradient; total: all parameters; trainable_bytes_bf16, trainable_bytes_fp32:
        their size in bytes at 2 and 4 bytes a number; modules: adapted layers; groups: vectors v.

    Raises:
        ValueError: a vector is held by a layer that is not in the model.
    """
    layers = adapted_layers(model)
    expect_all_vectors(layers, "count_trainable_params")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trainable": trainable,
        "total": sum(p.numel() for p in model.parameters()),
        "trainable_bytes_bf16": 2 * trainable,
        "trainable_bytes_fp32": 4 * trainable,
        "modules": len(layers),
        "groups": len(trainable_vectors(model)),
    }


def trained_beside(model: nn.Module) -> list[str]:
    """The bare model's names of what trains beside the vectors, and so is in no adapter: parameters that require a
    gradient, and statistics that a normalisation layer in training mode takes of its inputs.
    """
    vectors, original_name = {id(v) for v in trainable_vectors(model)}, original_names(model)
    trained = [
        original_name(key) or key for key, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in vectors
    ]  # fmt: skip
    for name, module in named_modules(model):
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            trained.append(f"{name}.running_mean")
    return trained


def wrappers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, TinyLoRALayer | AdaptedExperts]:
    """Qualified name -> the module that stands where a frozen one stood before, and has it as ``base``."""
    return {
        name: module
        for name, module in named_modules(model, remove_duplicate)
        if isinstance(module, AdaptedExperts)
        or (isinstance(module, TinyLoRALayer) and not isinstance(module.base, ExpertSlice))
    }


def original_names(model: nn.Module) -> Callable[[str], str | None]:
    """A function from a tensor's name in the adapted model, or in what stands around it, to its name in the bare one.

    None for a vector v, and for what the bare model does not have.
    """
    wrapped = wrappers(model, remove_duplicate=False)
    layers = {name for name, module in named_modules(model, False) if isinstance(module, TinyLoRALayer)}

    def original_name(key: str) -> str | None:
        name = bare_name(model, key)
        if name is None or name.removesuffix(".v") in layers:
            return None
        owner, _, rest = name.rpartition(".base.")
        return f"{owner}.{rest}" if owner in wrapped else name

    return original_name


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base model under its names before it was adapted: no copy, no vectors."""
    model = inside(model)
    original_name = original_names(model)
    named = ((original_name(key), tensor) for key, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The bare base model for the duration, in the context that asks: threads and tasks beside it keep their own.

    Raises:
        ValueError: the model is merged; a layer that is merged inside the block is a RuntimeError when it is called.
    """
    layers = adapted_layers(model)
    expect_unmerged(layers, "adapter_disabled")
    with switch_off(layers.values()):
        yield
