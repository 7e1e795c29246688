"""The bare model's names, whatever stands around it or around its blocks.

torch.compile, DDP, FSDP, checkpointing and PEFT put a module around another one, and every name below gets a part that
the bare model does not know. What is written under such names fits nothing: readers drop it with a warning, or without.
So names are made here, by walks that step through what only stands around.
"""
from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import cast

from torch import nn

# What stands around a module: the attribute that holds the module, by class. By name: most are in packages, or in parts
# of torch, that need not be there.
WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "tinylora_kernels.integrations.peft_model.AdaptedTuner": "model",
}
# Of these the engine has taken the parameters: a vector that comes later is not synchronised.
ENGINES = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
COMPILED = ("OptimizedModule",)


def _held_as(module: nn.Module) -> str | None:
    """The attribute that holds what the module only stands around; None where it does more."""
    cls: type = type(module)
    return _held_by(cls)


@functools.cache
def _held_by(cls: type) -> str | None:
    rows = (WRAPPERS.get(f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__)
    return next(filter(None, rows), None)


def inside(module: nn.Module) -> nn.Module:
    """The module without what stands around it: itself where nothing does."""
    while (attribute := _held_as(module)) is not None:
        module = cast(nn.Module, module._modules[attribute])
    return module


def is_of(module: nn.Module, names: Collection[str]) -> bool:
    """Whether a module stands around another and is of one of these classes of WRAPPERS, by their last names."""
    return _held_as(module) is not None and any(base.__name__ in names for base in type(module).__mro__)


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """nn.Module.named_modules of the bare model: its modules under its names, in its order."""
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = inside(module)
        if module in seen:
            return
        if remove_duplicate:
            seen.add(module)
        yield name, module
        for below, child in module._modules.items():
            if child is not None:
                yield from walk(f"{name}.{below}" if name else below, child)

    return walk("", model)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """nn.Module.get_submodule by a name of the bare model.

    Raises:
        AttributeError: there is none.
    """
    module = inside(model)
    for part in name.split(".") if name else ():
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{name}: {type(module).__name__} has no module {part}")
        module = inside(child)
    return module


def bare_name(model: nn.Module, key: str) -> str | None:
    """The bare model's name of a tensor, by its key in model.state_dict(); None of what belongs to a wrapper itself.

    Some wrappers take their part out of the keys themselves, so it may be there or not.
    """
    module: nn.Module | None = model
    parts = []
    for part in key.split("."):
        while module is not None and (attribute := _held_as(module)) is not None:
            around, module = module, module._modules[attribute]
            if part == attribute:
                break
            if part in around._parameters or part in around._buffers or part in around._modules:
                return None
        else:
            parts.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def left_in(name: str) -> str | None:
    """The part that a wrapper has left in what should be a bare model's name, as far as names alone can tell."""
    first, *_ = parts = name.split(".")
    if first in ("module", "base_model"):
        return first
    return next((part for part in parts if part.startswith("_") and part in WRAPPERS.values()), None)
