"""The demo: train a frozen language model by a handful of numbers, beside two controls, and print what happened."""
from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from tinylora_kernels.model.targets import target_names
from tinylora_kernels.ops import choose
from tinylora_kernels.ops.native import library as native

from . import report, workers
from .evaluation import Evaluation
from .experiment import Trained, announced, score_in_fresh_process
from .models import PROJECTIONS, load_model
from .processes import Jobs, open_jobs
from .recipes import rates, recipe
from .report import RandomControl, Row
from .tasks import task
from .training import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """python -m demo; the options' defaults come from the environment, as ``make demo`` sets it.

    Under torchrun (torchrun --nproc-per-node 2 -m demo) the prompts of a step are split over the
    processes; the first one prints and writes.
    """
    try:
        with workers.joined():
            run(parse(argv))
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        way = "OMP_NUM_THREADS=1 trains one after the other, in one process"
        print(f"demo: one of its processes was killed, most likely for want of memory: {way}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)

    def option(name: str, kind, default, text: str) -> None:
        # a string default goes through ``kind`` like an argument does
        value = os.environ.get(name.upper()) or default
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"{text} (environment: {name.upper()})")

    option("model", str, "smollm2", "smollm2, tiny, or a local directory in transformers' format")
    option("task", str, None, "addition, subtraction, maximum, stories, digit-sums or reasoning_gym:<dataset>")
    option("params", str, None, "trained numbers, comma separated; 4x is four for each adapted module")
    option("steps", int, None, "optimizer steps")
    option("lr", float, None, "learning rate")
    option("seed", int, 0, "of sampling and of the order of training problems")
    option("draws", int, 10, "random adapters in the second control")
    option("out", Path, Path("demo-output"), "directory for adapters, plot and results")
    options = parser.parse_args(argv)
    for name in ("steps", "draws"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"{name.upper()}: expected at least 1, found {getattr(options, name)}")
    return options


def run(options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    defaults = recipe(options.model)
    settings = with_options(defaults.settings, options)
    problems = task(options.task or defaults.task)
    model = load_model(options.model)
    modules = len(target_names(model.module, PROJECTIONS))
    wanted = rates(defaults, options.params.split(",") if options.params else None, options.lr, modules)
    first = next(iter(wanted))
    out = options.out / Path(options.model).name
    out.mkdir(parents=True, exist_ok=True)
    print(introduction(model.name, problems.description, settings, wanted, modules, model.dtype))
    print(f"model loaded in {time.perf_counter() - begin:.0f} s")

    files = {numbers: out / f"adapter-{numbers}.safetensors" for numbers in wanted}
    with open_jobs(model, problems, settings, options.model, len(wanted)) as jobs:
        base, frozen, trained, control = rows(jobs, wanted, modules, files, defaults.control_steps, options.draws)
    if workers.rank():
        return
    fresh = score_in_fresh_process(options.model, problems.name, settings.temperature, files[first])

    table = [base, frozen, *(each.row for each in trained)]
    row, breakdown = trained[0].row, trained[0].breakdown
    print("\n" + report.table(table, control, settings.temperature))
    print(f"{len(problems.held_out)} problems never trained on; bytes as float32; time: of training, else of scoring")
    print(f"\n{row.label} beside its controls, exact McNemar test on the same problems:")
    print(report.verdict(row.evaluation, frozen.evaluation, "lr 0"))
    print(report.verdict(row.evaluation, control.best(), f"the best of {options.draws} random v"))
    print(f"\n{breakdown.describe()}")
    print(f"\n{report.fresh_process(files[first], row.evaluation, fresh)}")
    report.plot([each.row for each in trained], control, f"GRPO on {problems.name}, {model.name}", out / "reward.png")
    report.write_json(out / "results.json", table, control, facts(options, settings, breakdown))
    print(f"Reward curve: {out / 'reward.png'}; everything above and more: {out / 'results.json'}")
    print(f"The demo took {time.perf_counter() - begin:.0f} s.")


def rows(
    jobs: Jobs, wanted: dict[int, float], modules: int, files: dict[int, Path], control_steps: int, draws: int
) -> tuple[Row, Row, list[Trained], RandomControl]:
    """The base model, lr 0, every training, and the random control; what each scored is printed when it is done."""
    first = next(iter(wanted))
    base = jobs.submit("base_row")
    trainings = [
        jobs.submit("trained_row", numbers, modules, lr, files[numbers], numbers == first)
        for numbers, lr in wanted.items()
    ]
    controls: list[Future] = []
    drawn: list[tuple[Evaluation, float]] = []
    label = f"control: random v, {first} numbers, same norm"

    def done(job: Future) -> list[Future]:
        found = job.result()
        if job in controls[1:]:
            drawn.append(found)
            best = max(each.greedy.accuracy for each, _ in drawn)
            tqdm.write(f"  {label}, draw {len(drawn)} of {draws}: best greedy so far {100 * best:.1f}%")
            return []
        announced(found.row if isinstance(found, Trained) else found)
        if job is not trainings[0]:
            return []
        controls.append(jobs.submit("lr_zero_row", first, modules, control_steps))
        controls.extend(jobs.submit("random_draw", first, modules, found.norm, seed) for seed in range(draws))
        return controls

    jobs.watch([base, *trainings], done)
    trained = [job.result() for job in trainings]
    evaluations, seconds = zip(*(job.result() for job in controls[1:]), strict=True)
    control = RandomControl(first, trained[0].norm, list(evaluations), sum(seconds))
    return base.result(), controls[0].result(), trained, control


def with_options(settings: Settings, options: argparse.Namespace) -> Settings:
    """The recipe's settings with what was asked for in their place."""
    asked = {"steps": options.steps, "seed": options.seed}
    return replace(settings, **{name: value for name, value in asked.items() if value is not None})


def introduction(
    name: str, description: str, settings: Settings, wanted: dict[int, float], modules: int, dtype: torch.dtype
) -> str:
    return (
        f"{name}, frozen, {str(dtype).removeprefix('torch.')}; {modules} projections adapted; updates by backend "
        f"{choose('cpu', dtype, 2)!r} ({native.load().isa or 'no native library'}), {workers.count()} x "
        f"{torch.get_num_threads()} threads\n"
        f"task: {description}\n"
        f"GRPO: {settings.steps} steps of {settings.prompts} prompts x {settings.samples} samples "
        f"at T={settings.temperature:g}, seed {settings.seed}; "
        f"lr from {', '.join(f'{rate:g} for {count}' for count, rate in wanted.items())} numbers"
    )


def facts(options: argparse.Namespace, settings: Settings, breakdown) -> dict:
    """What a reader of the results needs to know about where they come from."""
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        "settings": vars(settings),
        "torch": torch.__version__,
        "processes": workers.count(),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "step_milliseconds": breakdown.total,
        "kernel_milliseconds": breakdown.kernel_total,
        "matrix_product_milliseconds": breakdown.products,
    }
