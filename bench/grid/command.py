"""python -m bench.grid: what is run, for how long, and where the results go."""
from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from . import adapters, breakdown, busy, environment, layers, report, shapes, whole_model
from .contenders import NAMES

SUITES = ("layers", "model", "breakdown", "adapters", "report")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUICK_SECONDS, FULL_SECONDS = 0.5, 4.0  # of rounds for each case; ten times that for a whole model


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 1 where cases are left to another run."""
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    out = options.out or environment.results_directory()
    if options.quick:
        out = out / "quick"
    if options.busy:
        out = out / "busy"
    if options.restart:
        for name in (layers.TIMES_FILE, layers.MEMORY_FILE, whole_model.FILE, breakdown.FILE, adapters.FILE):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with busy.processes(options.busy):
        left = _measure(options, out)
    report.write(out)
    rest = f"; {left} cases left, run again" if left else ""
    print(f"{time.perf_counter() - begun:.0f} s; results in {out}{rest}")
    return 1 if left else 0


def _measure(options: argparse.Namespace, out: Path) -> int:
    """Every suite that is wanted; how many cases are left to another run."""
    left = 0
    if "layers" in options.suite:
        cases = shapes.quick_grid() if options.quick else shapes.full_grid()
        left = layers.run(
            [case for case in cases if _wanted(case, options)], out,
            seconds=options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS),
            max_seconds=options.max_seconds, compiled=not options.no_compile, only=options.contenders,
        )  # fmt: skip
    if "model" in options.suite:
        seconds = 10 * (options.seconds or FULL_SECONDS)
        whole_model.run(out, dtypes=_dtypes(options), quick=options.quick, seconds=seconds)
    if "breakdown" in options.suite:
        breakdown.run(out, dtypes=_dtypes(options), quick=options.quick)
    if "adapters" in options.suite:
        adapters.run(out, quick=options.quick)
    return left


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.grid", description=__doc__)
    p.add_argument("--quick", action="store_true", help="a sample of everything, under two minutes")
    p.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="parts to run (default: all)")
    p.add_argument("--out", type=Path, help="directory of the results (default: bench/results)")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: 2, or 1 on one core")
    p.add_argument("--busy", type=int, default=0, help="beside so many processes that keep a core busy each")
    p.add_argument("--max-seconds", type=float, help="begin no case after this long; run again to go on")
    p.add_argument("--seconds", type=float, help=f"of rounds for each case (default: {FULL_SECONDS:g})")
    p.add_argument("--tokens", nargs="+", type=int, choices=shapes.TOKENS, help="only these token counts")
    p.add_argument("--models", nargs="+", choices=list(shapes.MODELS), help="only layers of these models")
    p.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="only these dtypes")
    p.add_argument("--contenders", nargs="+", choices=NAMES, default=NAMES, help="only these beside the frozen layer")
    p.add_argument("--no-compile", action="store_true", help="leave out the contenders under torch.compile")
    p.add_argument("--restart", action="store_true", help="forget the results there are instead of adding to them")
    return p


def _dtypes(options: argparse.Namespace) -> list[torch.dtype]:
    return [DTYPES[name] for name in options.dtypes or DTYPES]


def _wanted(case: shapes.Case, options: argparse.Namespace) -> bool:
    return (
        case.tokens in (options.tokens or shapes.TOKENS)
        and case.shape.model in (options.models or shapes.MODELS)
        and case.dtype in _dtypes(options)
    )

