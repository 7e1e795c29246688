"""Decoder blocks of Qwen2.5-7B with their attention, frozen and adapted: device and host time, eager and as a graph.

    python -m bench.gpu.block [--device cpu] [--backends cuda triton]

Host time is what the host takes to ask for the work of one block, while the device is never waited for.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from tinylora_kernels.layers.layer import TinyLoRALayer
from tinylora_kernels.linear import node, plan

from .measure import emit

NUMBERS, BLOCKS, ROUNDS = 13, 2, 9
CASES = [  # tokens, backward, graph
    (8192, True, False), (8192, False, False), (2048, True, True), (2048, True, False), (1, False, True),
    (1, False, False), (64, False, True), (512, True, False),
]  # fmt: skip


class Block(nn.Module):
    """RMSNorm, grouped attention without positions, SwiGLU."""

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        head = width // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, kv_heads * head), nn.Linear(width, kv_heads * head)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.first_norm, self.second_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first_norm(x)
        q, k, v = (
            projection(h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection, heads in (
                (self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads)
            )
        )  # fmt: skip
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.second_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


def frozen_blocks(device: str) -> nn.Sequential:
    sizes = (3584, 18944, 28, 4) if device == "cuda" else (56, 296, 14, 2)
    torch.manual_seed(0)
    with torch.device(device):
        blocks = nn.Sequential(*(Block(*sizes) for _ in range(BLOCKS)))
    return blocks.to(torch.bfloat16).requires_grad_(False)


def adapted(frozen: nn.Sequential, backend: str) -> tuple[nn.Sequential, nn.Parameter]:
    """The same weights, every projection adapted by one shared v."""
    memo = {id(parameter): parameter for parameter in frozen.parameters()}
    blocks = copy.deepcopy(frozen, memo)
    device = next(frozen.parameters()).device
    v = nn.Parameter(torch.randn(NUMBERS, device=device) / NUMBERS**0.5)
    for block in blocks:
        for name, base in list(block.named_children()):
            if isinstance(base, nn.Linear):
                basis = torch.linalg.qr(torch.randn(base.out_features, 2, device=device))[0].T.contiguous()
                projection = torch.randn(NUMBERS, 2, 2, device=device)
                layer = TinyLoRALayer(base, basis, torch.ones(2, device=device), projection, v)
                layer.backend = backend
                setattr(block, name, layer)
    return blocks, v


def step_of(blocks: nn.Sequential, inputs: list[Tensor], g: Tensor | None) -> Callable[[], object]:
    if g is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return blocks(inputs[0])

        return forward
    return lambda: torch.autograd.grad(blocks(inputs[0]), inputs, g)


def turn_of(step: Callable[[], object], graph: bool, device: str) -> Callable[[], tuple[float, float]]:
    """(device, host) microseconds of a block."""
    for _ in range(3):
        step()
    if device == "cpu":

        def by_clock() -> tuple[float, float]:
            begun = time.perf_counter()
            step()
            return (time.perf_counter() - begun) / BLOCKS * 1e6, 0.0

        return by_clock
    run = step
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        run = captured.replay

    def turn() -> tuple[float, float]:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        clock = time.perf_counter()
        begun.record()
        for _ in range(3):
            run()
        ended.record()
        host = time.perf_counter() - clock
        ended.synchronize()
        return begun.elapsed_time(ended) / 3 / BLOCKS * 1e3, host / 3 / BLOCKS * 1e6

    return turn


def measure(tokens: int, backward: bool, graph: bool, contenders: dict, device: str) -> None:
    frozen = contenders["frozen"][0]
    width = frozen[0].q_proj.in_features
    tokens = tokens if device == "cuda" else min(tokens, 32)
    torch.manual_seed(tokens)
    x, g = (torch.randn(1, tokens, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    x.requires_grad_(backward)
    case = f"{tokens} {'both' if backward else 'forward'} {'graph' if graph else 'eager'}"
    turns, times = {}, {}
    for name, (blocks, v, in_python) in contenders.items():
        inputs = [x] if v is None else [x, v]
        with nodes(in_python):
            turns[name] = turn_of(step_of(blocks, inputs, g if backward else None), graph, device)
        times[name] = []
    for _ in range(ROUNDS if device == "cuda" else 1):
        for name, turn in turns.items():
            with nodes(contenders[name][2]):
                times[name].append(turn())
    for name, found in times.items():
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found, times["frozen"], strict=True))
        emit("block", case, name, statistics.median(t[0] for t in found), None if name == "frozen" else ratio)
        if not graph:
            emit("block, host", case, name, statistics.median(t[1] for t in found))


@contextlib.contextmanager
def nodes(in_python: bool) -> Iterator[None]:
    """With the node and the plan in Python, though those in C++ are there."""
    with contextlib.ExitStack() as stack:
        if in_python:
            for module in (node, plan):
                stack.enter_context(mock.patch.object(module, "twin", None))
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    options = parser.parse_args()
    frozen = frozen_blocks(options.device)
    contenders: dict = {"frozen": (frozen, None, False)}
    for backend in options.backends:
        contenders[backend] = (*adapted(frozen, backend), False)
    if node.twin is not None and options.backends[0] in node.TWIN_BACKENDS:
        blocks, v = adapted(frozen, options.backends[0])
        contenders[f"{options.backends[0]}, node in Python"] = blocks, v, True
    print(f"node in C++: {node.twin is not None} {node.why_no_twin or ''}", flush=True)
    for case in CASES:
        try:
            measure(*case, contenders, options.device)
        except Exception:
            print(f"WRONG {case}", traceback.format_exc(limit=4), flush=True)


if __name__ == "__main__":
    main()
