"""Device times: CUDA graphs over buffers larger than L2, interleaved, ratios paired by round. And one line a figure.

Imports nothing of the package: products.py measures other builds of it as well.
"""
from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable

import torch

ROUNDS, TURN = 11, 300e-6  # rounds of a measurement; seconds of work in a graph, at least
FLUSH = 160e6  # bytes that the buffers of a round exceed: L2 is 50 to 60 MB
Run = Callable[[int], object]  # on the buffers of this number


def device_times(runs: dict[str, Run], copies: int, device: str) -> dict[str, tuple[float, float]]:
    """name -> (microseconds of a call, ratio to the first one's, the median over rounds). On the CPU by its clock."""
    turns = {name: _graph_turn(run, copies) if device == "cuda" else _host_turn(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS if device == "cuda" else 2):
        for name, turn in turns.items():
            times[name].append(turn())
    first = next(iter(times.values()))
    return {
        name: (statistics.median(found), statistics.median(a / b for a, b in zip(found, first, strict=True)))
        for name, found in times.items()
    }


def _graph_turn(run: Run, copies: int) -> Callable[[], float]:
    """Replays a graph of some calls on each of the buffers: microseconds a call."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run(0)
    torch.cuda.synchronize()
    begun.record()
    for i in range(copies):
        run(i)
    ended.record()
    torch.cuda.synchronize()
    repeats = max(1, min(20, math.ceil(TURN * 1e3 / max(begun.elapsed_time(ended), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for i in range(copies):
                run(i)

    def turn() -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) * 1e3 / (repeats * copies)

    return turn


def _host_turn(run: Run) -> Callable[[], float]:
    def turn() -> float:
        begun = time.perf_counter()
        run(0)
        return (time.perf_counter() - begun) * 1e6

    return turn


def emit(part: str, case: str, name: str, us: float, ratio: float | None = None) -> None:
    """One figure, for the process that started this one."""
    print("@" + json.dumps({"part": part, "case": case, "name": name, "us": us, "ratio": ratio}), flush=True)
