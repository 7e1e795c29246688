"""The grid of single layers: gate, time and weigh every contender on every case."""
from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from . import environment, gate, memory, table
from .contenders import AGAIN, FROZEN, NAMES, OURS, Contender, Problem, build, make_problem, names_for
from .roofline import limit_seconds, stream_bandwidth
from .shapes import RANK, Case
from .timing import interleave

CASE = ["model", "kind", "out_features", "in_features", "bias", "tokens", "dtype", "u", "rank", "contender"]
ENVIRONMENT = list(environment.describe())
QUANTILES = ["p20_us", "p50_us", "p80_us", "ratio_p20", "ratio_p50", "ratio_p80"]
TIMES = [*CASE, "phase", "rounds", *QUANTILES, "limit_us", "stream_gb_s", *ENVIRONMENT]
MEMORY = [*CASE, "error_y", "error_dx", "error_dv", "saved_bytes", "peak_bytes", "written_bytes", *ENVIRONMENT]
TIMES_FILE, MEMORY_FILE = "layers.csv.gz", "memory.csv"

INFERENCE_TOKENS = 128  # up to here the forward without autograd, that of generation, is timed as well
MEMORY_TOKENS = 128  # bytes are proportional to tokens: up to here they are counted


def run(
    cases: Iterable[Case], out: Path, *, seconds: float = 4.0, most_rounds: int = 60, max_seconds: float | None = None,
    compiled: bool = True, only: Collection[str] = NAMES, say: Callable[[str], None] = tqdm.write,
) -> int:  # fmt: skip
    """Measure the cases that the files under `out` do not hold yet for this code and thread count.

    Args:
        seconds, most_rounds: how long a case is timed for, and a bound on its rounds.
        max_seconds: no case is begun after this long; None: run to the end.
        compiled: with the contenders under torch.compile.
        only: these contenders; the frozen layer always.

    Returns:
        How many cases are left.
    """
    facts = environment.describe()
    done = {_key(row) for row in table.read(out / TIMES_FILE)}
    waiting = [case for case in cases if _case_key(case, facts) not in done]
    if not waiting:
        return 0
    bandwidth = stream_bandwidth()
    begun = time.perf_counter()
    bar = tqdm(waiting, unit="case", dynamic_ncols=True)
    for position, case in enumerate(bar):
        if max_seconds is not None and time.perf_counter() - begun > max_seconds:
            bar.close()
            return len(waiting) - position
        bar.set_description(str(case)[:60])
        names = [name for name in names_for(case.dtype, compiled=compiled) if name in (FROZEN, *only)]
        times, weights = measure(case, names, seconds=seconds, most_rounds=most_rounds, say=say)
        table.append(out / MEMORY_FILE, MEMORY, [_describe(case, row) | facts for row in weights])
        table.append(
            out / TIMES_FILE, TIMES,
            [
                _describe(case, row) | facts
                | {"limit_us": limit_seconds(case, row["phase"], bandwidth) * 1e6, "stream_gb_s": bandwidth / 1e9}
                for row in times
            ],
        )  # fmt: skip
    return 0


def measure(
    case: Case, names: Iterable[str], *, seconds: float, most_rounds: int, say: Callable[[str], None] = tqdm.write
) -> tuple[list[dict], list[dict]]:
    """Rows of times and rows of errors and bytes, for every contender of these that passes the gate."""
    problem = make_problem(case)
    exact = gate.truth(problem)
    contenders, weights = {}, []
    for name in names:
        try:
            contender = build(problem, [name])[name]
        except ImportError as error:
            say(f"{name} is left out: {error}")
            continue
        try:
            found = {} if name in (FROZEN, AGAIN) else gate.check(contender, problem, exact)
        except gate.WrongResult as error:
            if name == OURS:
                raise
            say(f"not timed: {error}")
            continue
        row = {"contender": name} | {f"error_{key}": value for key, value in found.items()}
        if case.tokens <= MEMORY_TOKENS and name != AGAIN:
            counted = memory.measure(contender, problem)
            row |= {"saved_bytes": counted.saved, "peak_bytes": counted.peak, "written_bytes": counted.written}
        weights.append(row)
        contenders[name] = contender
    steps = {name: training_step(contender, problem) for name, contender in contenders.items()}
    times = []
    for name, phases in interleave(steps, FROZEN, seconds=seconds, most=most_rounds).items():
        for phase, s in phases.items():
            quantiles = (s.p20, s.p50, s.p80, s.ratio_p20, s.ratio_p50, s.ratio_p80)
            measured = dict(zip(QUANTILES, quantiles, strict=True))
            times.append({"contender": name, "phase": phase, "rounds": s.rounds} | measured)
    return times, weights


def training_step(contender: Contender, problem: Problem) -> Callable[[], dict[str, float]]:
    """Forward with autograd and backward to x and v; for few tokens also the forward of generation."""
    x = problem.x.detach().requires_grad_()
    inputs = [x] if contender.v is None else [x, contender.v]
    forward, g, clock, grad = contender.forward, problem.g, time.perf_counter, torch.autograd.grad
    inference = problem.case.tokens <= INFERENCE_TOKENS

    def step() -> dict[str, float]:
        begun = clock()
        y = forward(x)
        turned = clock()
        gradients = grad(y, inputs, g)
        ended = clock()
        phases = {"forward": turned - begun, "backward": ended - turned, "both": ended - begun}
        del y, gradients
        if inference:
            with torch.no_grad():
                begun = clock()
                y = forward(x)
                phases["inference"] = clock() - begun
                del y
        return phases

    return step


def _describe(case: Case, row: dict) -> dict:
    s = case.shape
    return row | {
        "model": s.model, "kind": s.kind, "out_features": s.out_features, "in_features": s.in_features,
        "bias": int(s.bias), "tokens": case.tokens, "dtype": case.dtype_name, "u": case.numbers, "rank": RANK,
    }  # fmt: skip


def _case_key(case: Case, facts: dict[str, str]) -> tuple[str, ...]:
    return _key({key: str(value) for key, value in _describe(case, {}).items()} | facts)


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "kind", "tokens", "dtype", "u", "threads", "code"))
