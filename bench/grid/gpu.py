"""python -m bench.grid.gpu: the layer grid on a GPU, into bench/results/<card>.csv.

The contenders are those of the CPU grid, with one "ours" for each GPU backend; the unit is the frozen layer under
cuBLAS. Every contender passes the gate before it is timed. Times are taken by events on the stream, forward and
backward together, interleaved; weights and activations of a round do not fit the L2 cache of the larger shapes, and
the smaller ones are timed as a training loop meets them, warm.
"""
from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from tinylora_kernels.ops import BACKENDS

from . import environment, gate, table
from .contenders import AGAIN, FROZEN, OURS, Contender, Problem, build, make_problem, names_for
from .layers import CASE, ENVIRONMENT, QUANTILES
from .shapes import RANK, Case, full_grid, quick_grid
from .timing import geometric_mean, interleave

COLUMNS = ["device", *CASE, "error_y", "error_dx", "error_dv", "rounds", *QUANTILES, *ENVIRONMENT]
GPU_BACKENDS = ("cuda", "triton")
STEPS_A_TURN = 10  # steps between two events: a single small one would measure the host


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("device: expected a GPU that this torch can use, found none; see python -m tinylora_kernels info")
        return 2
    card = torch.cuda.get_device_name() if options.device == "cuda" else environment.cpu_model()
    out = options.out or environment.results_directory()
    path = out / f"{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-').lower()}.csv"
    run(quick_grid() if options.quick else full_grid(), options.device, card, path, compiled=not options.no_compile)
    print(summary(path))
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.grid.gpu", description=__doc__)
    p.add_argument("--quick", action="store_true", help="a dozen cases")
    p.add_argument("--no-compile", action="store_true", help="leave out the contenders under torch.compile")
    p.add_argument("--out", type=Path, help="directory of the results (default: bench/results)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the harness without a card")
    return p


def run(cases: Iterable[Case], device: str, card: str, path: Path, *, compiled: bool, seconds: float = 1.0) -> None:
    """Append the cases that the file does not hold yet for this code."""
    facts = environment.describe()
    key = ("device", "model", "kind", "tokens", "dtype", "u", "code")
    done = {tuple(row[name] for name in key) for row in table.read(path)}
    for case in tqdm(list(cases), unit="case", dynamic_ncols=True):
        described = describe(case) | {"device": card}
        if tuple(str((described | facts)[name]) for name in key) not in done:
            rows = measure(case, device, compiled=compiled, seconds=seconds)
            table.append(path, COLUMNS, [described | row | facts for row in rows])


def measure(case: Case, device: str, *, compiled: bool, seconds: float) -> list[dict]:
    problem = make_problem(case)
    exact = gate.truth(problem)
    problem = on_device(problem, device)
    errors, contenders = {}, {}
    for name, contender in device_contenders(problem, device, compiled=compiled).items():
        errors[name] = {} if name in (FROZEN, AGAIN) else gate.check(contender, problem, exact)
        contenders[name] = contender
    steps = {name: turn(contender, problem, device) for name, contender in contenders.items()}
    times = interleave(steps, FROZEN, seconds=seconds, most=100)
    return [
        {"contender": name, "rounds": s.rounds}
        | {f"error_{key}": value for key, value in errors[name].items()}
        | dict(zip(QUANTILES, (s.p20, s.p50, s.p80, s.ratio_p20, s.ratio_p50, s.ratio_p80), strict=True))
        for name, phases in times.items()
        for s in phases.values()
    ]


def device_contenders(problem: Problem, device: str, *, compiled: bool) -> dict[str, Contender]:
    """The contenders of the CPU grid, with "ours" once for each backend that serves this device."""
    names = names_for(problem.case.dtype, compiled=compiled)
    contenders = build(problem, [name for name in names if name != OURS])
    candidates = GPU_BACKENDS if device == "cuda" else ("cpu",)
    for backend in candidates:
        if BACKENDS[backend].why_not(device, problem.case.dtype, RANK) is None:
            ours = build(problem, [OURS])[OURS]
            ours.module.backend = backend
            contenders[f"{OURS} {backend}"] = ours
    for contender in contenders.values():
        contender.module.to(device)
    return contenders


def turn(contender: Contender, problem: Problem, device: str) -> Callable[[], dict[str, float]]:
    """Seconds of one forward and backward, the mean over a turn."""
    x = problem.x.detach().requires_grad_()
    inputs = [x] if contender.v is None else [x, contender.v]

    def step() -> None:
        torch.autograd.grad(contender.forward(x), inputs, problem.g)

    def on_stream() -> dict[str, float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(STEPS_A_TURN):
            step()
        end.record()
        end.synchronize()
        return {"both": start.elapsed_time(end) * 1e-3 / STEPS_A_TURN}

    def on_host() -> dict[str, float]:
        begun = time.perf_counter()
        step()
        return {"both": time.perf_counter() - begun}

    return on_stream if device == "cuda" else on_host


def on_device(problem: Problem, device: str) -> Problem:
    tensors = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    return Problem(**{k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in tensors.items()})


def describe(case: Case) -> dict:
    s = case.shape
    return {
        "model": s.model, "kind": s.kind, "out_features": s.out_features, "in_features": s.in_features,
        "bias": int(s.bias), "tokens": case.tokens, "dtype": case.dtype_name, "u": case.numbers, "rank": RANK,
    }  # fmt: skip


def summary(path: Path) -> str:
    """Geometric mean and worst ratio to the frozen layer of each contender, by dtype."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in table.read(path):
        ratios.setdefault((row["contender"], row["dtype"]), []).append(float(row["ratio_p50"]))
    lines = [f"{'contender':<24} {'dtype':<6} {'cases':>5} {'mean':>7} {'worst':>7}   ratio to the frozen layer"]
    for (contender, dtype), values in sorted(ratios.items()):
        lines.append(f"{contender:<24} {dtype:<6} {len(values):>5} {geometric_mean(values):>7.3f} {max(values):>7.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
