"""The demo under torchrun: every process samples and learns from its share of the prompts, one adapter for all."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch import nn

from tinylora_kernels.method.config import TinyLoRAConfig
from tinylora_kernels.model.attach import apply_tiny_lora


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; all but the first then keep quiet."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    dist.init_process_group("gloo")
    try:
        with open(os.devnull, "w") as nowhere:
            if rank():
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    yield
            else:
                yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def total(value: float) -> float:
    """The sum over the processes."""
    if count() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.item()


def adapt(model: nn.Module, config: TinyLoRAConfig, progress: bool = True) -> None:
    """Adapt the same model in every process: each matrix is factorised in one, gradients are averaged over all."""
    if count() == 1:
        apply_tiny_lora(model, config, progress=progress)
        return
    from tinylora_kernels.distributed import factorize_shared, replicate_adapter

    apply_tiny_lora(model, config, factors=factorize_shared(model, config))
    replicate_adapter(model)
