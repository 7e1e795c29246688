"""python -m bench.study: run what is missing, then tables and figures (make study)."""
from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.grid import environment, table
from demo.models import load_model

from . import figures, rollouts, rounding, runner, scaling, summary
from .design import OBJECTIVES, REAL_CURVE, TINY_CURVE, design, only

CURVES = {"tiny": TINY_CURVE}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("--model", default="tiny", help="tiny, smollm2 or a local directory in transformers' format")
    parser.add_argument("--task", help="another task, such as reasoning_gym:<dataset>; without sft-foreign then")
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="only these, by their labels in the table")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, help="only under these")
    parser.add_argument("--scaling", action="store_true", help="numbers needed against the model's size, instead")
    parser.add_argument("--models", nargs="+", default=scaling.MODELS, help="of --scaling, only these run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of --scaling: begin nothing after so long")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rates, seeds and steps: minutes")
    processes = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=processes, help=f"of one thread each (default: {processes})")
    parser.add_argument("--out", type=Path, default=environment.results_directory() / "study")
    options = parser.parse_args(argv)
    until = time.monotonic() + 60 * options.minutes
    try:
        if options.scaling:
            torch.set_num_threads(1)
            scaling.study(options.models, options.out, options.processes, until)
        else:
            study(options)
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def file_name(model: str, task: str | None) -> str:
    """Of the rows, the table and the figure, without what follows the dot."""
    return re.sub(r"[^\w.]+", "-", "-".join(filter(None, (Path(model).name, task)))).strip("-")


def study(options: argparse.Namespace) -> None:
    plan = only(design(options.model, options.quick, options.task), options.methods, options.objectives)
    name = file_name(options.model, options.task)
    out = options.out / "quick" if options.quick else options.out
    load_model(plan.model)  # converted once, before the processes want it; and a wrong name is an error here
    torch.set_num_threads(1)
    rows = runner.run(plan, out / f"{name}.csv", options.processes)
    on_curve = {method.label for method in CURVES.get(options.model, REAL_CURVE)}
    text = summary.table(rows, on_curve)
    (out / f"{name}.txt").write_text(text + "\n")
    print(text)
    figures.curve(rows, on_curve, plan.model, out / f"curve-{name}.png")
    if options.task is None and options.model in ("tiny", "smollm2"):
        rounding.run(options.model, out / "rounding.csv")
        figures.rounding(table.read(out / "rounding.csv"), trained_norms(out), out / "rounding.png")
    if options.model == "tiny" and not options.quick:
        figures.ablations(rows, out / "ablations.png")
        found = rollouts.run(plan, out / "rollouts.csv", options.processes)
        figures.rollout_sources(found, out / "rollouts.png")
    print(f"rows and figures: {out}")


def trained_norms(out: Path) -> dict[str, list[float]]:
    """|v| of the 13 numbers that GRPO trained, by model: of runs that ended better than they began."""
    return {
        model: [
            float(row["moved"])
            for row in table.read(out / f"{model}.csv")
            if row["objective"] == "grpo" and row["numbers"] == str(rounding.NUMBERS)
            and float(row["reward_last5"]) > float(row["reward_first5"])
        ]
        for model in ("tiny", "smollm2")
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
