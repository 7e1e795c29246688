"""Which backend runs an update: a table of (backend, reason why not), asked outside traced code and cached.

The automatic choice takes the first backend that can serve the request and says once why a faster one could not; in
code that torch.compile traces for a GPU it takes "inductor", whose operations become part of the kernels around it. An
explicit choice (the ``backend`` argument, set_backend() or the environment variable TINYLORA_BACKEND) is honoured or
raises.
"""
from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import inductor, reference
from .native import library as native
from .schema import (
    LowRank,
    RefreshRight,
    Update,
    UpdateBackward,
    Updated,
    UpdateInputGrad,
    UpdateParts,
    UpdatePartsBackward,
)
from .triton import launch as triton


class Backend(NamedTuple):
    """One implementation of the ops; the callables take the arguments of the op schemas, all positional.

    Attributes:
        why_not: (device type, activation dtype, rank) -> None if the backend serves that, else the reason.
        low_rank, update_input_grad: the update around the product of a frozen linear layer, where that pays, else None.
        refresh_right: what looks, where the CPU cannot without waiting, whether B^T is still that of its weight.
        updated: (y, t) of ``update`` with y0 left as it is, for traced code: where the ops are operations that a
            compiler takes apart, what is written in place is one it cannot compute again. None: ``update`` is a kernel.
    """

    name: str
    update: Update
    update_backward: UpdateBackward
    update_parts: UpdateParts
    update_parts_backward: UpdatePartsBackward
    why_not: Callable[[str, torch.dtype, int], str | None]
    low_rank: LowRank | None = None
    update_input_grad: UpdateInputGrad | None = None
    refresh_right: RefreshRight | None = None
    updated: Updated | None = None


# fmt: off
BACKENDS: dict[str, Backend] = {  # in order of preference; none after the reference, which runs everywhere
    # The parts by whatever the library or, without a kernel there, ops/autograd.py has registered for CUDA tensors.
    "cuda": Backend(
        "cuda", native.update, native.update_backward, native.update_parts, native.update_parts_backward,
        native.why_not_cuda, native.low_rank, native.update_input_grad, native.refresh_right,
    ),
    "triton": Backend(
        "triton", triton.update, triton.update_backward, triton.update_parts, triton.update_parts_backward,
        triton.why_not, triton.low_rank, triton.update_input_grad, triton.refresh_right,
    ),
    "cpu": Backend(
        "cpu", native.update, native.update_backward, native.update_parts, native.update_parts_backward,
        native.why_not_cpu, native.low_rank, native.update_input_grad,
    ),
    "reference": Backend(
        "reference", reference.update, reference.update_backward, reference.update_parts,
        reference.update_parts_backward, reference.why_not,
    ),
    "inductor": Backend(
        "inductor", inductor.update, inductor.update_backward, reference.update_parts,
        reference.update_parts_backward, inductor.why_not, updated=inductor.updated,
    ),
}
# fmt: on
ON_GPU = ("cuda", "triton")  # passed over in silence for tensors that live elsewhere

requested: str | None = os.environ.get("TINYLORA_BACKEND") or None  # set by set_backend alone


def set_backend(name: str | None) -> None:
    """Ask for one backend for every later call; None chooses automatically.

    Args:
        name: "cuda", "triton", "cpu", "reference" or "inductor". What torch.compile has traced keeps what it found.
    """
    global requested
    if name is not None:
        _check_name(name)
    requested = name


def requested_backend() -> str | None:
    """What set_backend() or TINYLORA_BACKEND asked for; None where the choice is automatic."""
    return requested


def choose(device_type: str, dtype: torch.dtype, rank: int, backend: str | None = None) -> str:
    """Name of the backend for activations of this device and dtype at this rank.

    Raises:
        RuntimeError: an explicitly requested backend cannot be honoured; the message says why.
    """
    if torch.compiler.is_compiling():
        return _choose_while_tracing(device_type, dtype, _plain_int(rank), backend)
    return _choose(device_type, dtype, rank, backend or requested)


def _choose_while_tracing(device_type: str, dtype: torch.dtype, rank: int, backend: str | None) -> str:
    name = backend or requested
    if name is None and device_type != "cpu" and inductor.why_not(device_type, dtype, rank) is None:
        return "inductor"
    return _choose(device_type, dtype, rank, name)


# torch.compiler.assume_constant_result, which sets this mark, imports torch._dynamo: half of torch's own import time
# again.
vars(_choose_while_tracing)["_dynamo_marked_constant"] = True


def _plain_int(size: int) -> int:
    """The value of a size that tracing may have made symbolic: the comparison that holds specialises it."""
    for value in range(1, 4096):
        if value == size:
            return value
    return size


@functools.cache
def _choose(device_type: str, dtype: torch.dtype, rank: int, name: str | None) -> str:
    if name is not None:
        _check_name(name)
        reason = BACKENDS[name].why_not(device_type, dtype, rank)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for but cannot run: {reason}")
        return name
    for candidate in BACKENDS.values():
        if candidate.name in ON_GPU and device_type == "cpu":
            continue  # Triton's interpreter could, a thousand times slower: for who asks for it by name
        reason = candidate.why_not(device_type, dtype, rank)
        if reason is None:
            return candidate.name
        if (candidate.name in ON_GPU) == (device_type != "cpu"):
            warnings.warn(f"tinylora_kernels: backend {candidate.name!r} is not used: {reason}", stacklevel=4)
    raise AssertionError("the reference backend runs everywhere")


def table(device_type: str, dtype: torch.dtype = torch.float32, rank: int = 2) -> list[tuple[str, str | None]]:
    """(backend, reason why it cannot run here or None), in order of preference."""
    return [(b.name, b.why_not(device_type, dtype, rank)) for b in BACKENDS.values()]


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {name!r}")
