"""What a contender keeps, allocates and writes: counted, not timed."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora_kernels.common import modes

from .contenders import Contender, Problem

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces every start and stop


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward.

    Attributes:
        saved: kept between forward and backward, weights and buffers apart; an input kept alive counts.
        peak: most memory held above the start of the step, y and dx included (torch's allocator).
        written: by the ops of forward and backward, in place or into fresh tensors; None under torch.compile, whose
            generated kernels are out of sight.
    """

    saved: int
    peak: int
    written: int | None


def measure(contender: Contender, problem: Problem) -> Memory:
    written = None if contender.name.endswith("compiled") else written_bytes(contender, problem)
    return Memory(saved_bytes(contender, problem), peak_bytes(contender, problem), written)


def _step(contender: Contender, problem: Problem) -> tuple[Tensor, ...]:
    x = problem.x.detach().requires_grad_()
    inputs = [x] if contender.v is None else [x, contender.v]
    return torch.autograd.grad(contender.forward(x), inputs, problem.g)


def saved_bytes(contender: Contender, problem: Problem) -> int:
    """Bytes that autograd keeps of one forward of a contender."""
    x = problem.x.detach().requires_grad_()
    return saved_by(lambda: contender.forward(x), contender.module)


def saved_by(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes of the distinct storages that autograd packs in forward(), the module's parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    held: dict[int, int] = {}
    kept = []  # alive until counted, or an address could be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor.detach()  # the tensor itself, if the graph made it, would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    kept.clear()  # it holds tensors, whose graphs hold `pack`, which holds it: a ring that no collector sees
    return sum(held.values())


def peak_bytes(contender: Contender, problem: Problem) -> int:
    """Highest balance of allocations and frees that torch's CPU allocator reported during the step."""
    _step(contender, problem)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(contender, problem)
    balance = highest = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        balance += event.nbytes()
        highest = max(highest, balance)
    return highest


class _WriteCounter(TorchDispatchMode):
    """Adds up the bytes of what each op writes: results with memory of their own, and arguments it mutates."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty):
            return result  # memory that nothing is written to yet
        specs = func._schema.arguments
        named = zip(specs, args, strict=False)  # the rest is in kwargs, or left to its default
        arguments = {spec.name: value for spec, value in named} | kwargs
        written = [arguments.get(spec.name) for spec in specs if spec.alias_info and spec.alias_info.is_write]
        results = result if isinstance(result, (tuple, list)) else [result]
        held = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, Tensor)}
        written += [r for r in results if isinstance(r, Tensor) and r.untyped_storage().data_ptr() not in held]
        self.bytes += sum(value.nbytes for value in written if isinstance(value, Tensor))
        return result


def written_bytes(contender: Contender, problem: Problem) -> int:
    _step(contender, problem)  # what the first step alone does is not counted
    # It keeps nothing of what it sees, so the layer need not make copies for it, as it does for other modes.
    with mock.patch.object(modes, "seen_by_a_mode", return_value=False), _WriteCounter() as counter:
        _step(contender, problem)
    return counter.bytes
