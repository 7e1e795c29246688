"""Interleaved timing: every contender once a round, in a fresh random order, ratios taken round by round."""
from __future__ import annotations

import ctypes
import gc
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TURN_SECONDS = 1e-3  # a turn repeats a short step until it lasts this long
MOST_REPEATS = 10
SHORT_STEP = 5e-3  # seconds; such a step runs once unrecorded in each turn: in a model, too, its code was used just now
LONG_STEP = 0.2  # seconds; one call warms up such a step


@dataclass(frozen=True)
class Summary:
    """Quantiles over rounds, of the time in microseconds and of its ratio to the baseline of the same round."""

    rounds: int
    p20: float
    p50: float
    p80: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the nearest ranks."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@contextmanager
def no_collector() -> Iterator[None]:
    """Garbage is collected before and after, never in between."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """glibc's malloc keeps freed memory for the next call instead of handing it back to the system page by page.

    A step whose tensors are larger than 32 MB gets them from the system anew each time, zeroed, 4 KB an interrupt:
    0.2 to 0.4 s of a step of 1.2 s with the logits of 49152 tokens, whoever is timed. Elsewhere than on glibc nothing
    changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        yield
        return
    most_maps, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    set_option(most_maps, 0), set_option(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        set_option(most_maps, 65536), set_option(trim_threshold, 128 * 1024)  # as malloc starts with


def interleave(
    steps: dict[str, Callable[[], dict[str, float]]],
    baseline: str,
    *,
    seconds: float,
    least: int = 15,
    most: int = 60,
    longest: float | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Summary]]:
    """Time steps against each other.

    Args:
        steps: name -> a function that runs one step and returns the seconds of each of its phases.
        baseline: the name that ratios refer to.
        seconds: how long to go on, within [least, most] rounds.
        longest: no round is begun after this many seconds once there are three (default: 4 x seconds). It bites where
            one round takes seconds.
        seed: of the order within rounds.

    Returns:
        name -> phase -> Summary.
    """
    longest = 4 * seconds if longest is None else longest
    order = list(steps)
    repeats, short = {}, set()
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in order}
    shuffle = random.Random(seed)
    with no_collector():
        for name, step in steps.items():  # warm-up, and how often a step fits into a turn
            duration = sum(step().values())
            if duration < LONG_STEP:
                duration = min(sum(step().values()) for _ in range(2))
            repeats[name] = max(1, min(MOST_REPEATS, math.ceil(TURN_SECONDS / max(duration, 1e-9))))
            if duration < SHORT_STEP:
                short.add(name)
        begun = time.perf_counter()
        for done in range(most):
            elapsed = time.perf_counter() - begun
            if (done >= least and elapsed > seconds) or (done >= 3 and elapsed > longest):
                break
            shuffle.shuffle(order)
            for name in order:
                if name in short:
                    steps[name]()
                turn = [steps[name]() for _ in range(repeats[name])]
                for phase in turn[0]:
                    mean = sum(phases[phase] for phases in turn) / len(turn)
                    samples[name].setdefault(phase, []).append(mean)
    return {
        name: {phase: _summary(values, samples[baseline][phase]) for phase, values in phases.items()}
        for name, phases in samples.items()
    }


def _summary(values: list[float], reference: list[float]) -> Summary:
    ratios = [value / unit for value, unit in zip(values, reference, strict=True)]
    quantiles = [quantile(values, q) * 1e6 for q in (0.2, 0.5, 0.8)] + [quantile(ratios, q) for q in (0.2, 0.5, 0.8)]
    return Summary(len(values), *quantiles)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
