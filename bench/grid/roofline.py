"""The physical limit of the update: one read and one write of y, at the bandwidth this machine streams with."""
from __future__ import annotations

import time

import torch

from .shapes import Case
from .timing import no_collector

STREAM_BYTES = 1 << 28  # far beyond any last-level cache
PASSES = {"forward": 1, "backward": 1, "both": 2, "inference": 1}


def stream_bandwidth(repeats: int = 9) -> float:
    """Bytes a second, read and written together, of an in-place pass over memory with the current threads: the best."""
    tensor = torch.zeros(STREAM_BYTES // 4)
    times = []
    with no_collector():
        for _ in range(repeats):
            begun = time.perf_counter()
            tensor.add_(1.0)
            times.append(time.perf_counter() - begun)
    return 2 * STREAM_BYTES / min(times)


def limit_seconds(case: Case, phase: str, bandwidth: float) -> float:
    """Least time of the update in a phase: y (or the gradient) read once and written once, from and to memory.

    An output that still sits in a cache when the update reads it can be updated faster than this.
    """
    size = case.tokens * case.shape.out_features * case.dtype.itemsize
    return PASSES[phase] * 2 * size / bandwidth
