"""The demo: train a frozen language model by a handful of numbers, beside two controls, and print what happened."""
from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tinylora_kernels.files.adapter import save_adapter
from tinylora_kernels.model.targets import target_names
from tinylora_kernels.ops import choose
from tinylora_kernels.ops.native import library as native

from . import report, workers
from .experiment import Experiment, score_in_fresh_process
from .models import PROJECTIONS, load_model
from .profiling import profile_step
from .recipes import rates, recipe
from .tasks import task
from .training import Run, Settings


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
    first, *others = wanted
    out = options.out / Path(options.model).name
    out.mkdir(parents=True, exist_ok=True)
    print(introduction(model.name, problems.description, settings, wanted, modules, model.dtype))
    print(f"model loaded in {time.perf_counter() - begin:.0f} s")

    experiment = Experiment(model, problems, settings)
    base = experiment.base_row()
    trained = experiment.trained_row(first, modules, wanted[first])
    breakdown = profile_step(Run(model, problems, replace(settings, lr=0.0)))
    adapter = out / f"adapter-{first}.safetensors"
    if not workers.rank():
        save_adapter(model.module, adapter)
    control = experiment.random_control(first, options.draws)
    frozen = experiment.lr_zero_row(first, modules, defaults.control_steps)
    smaller = []
    for count in others:
        smaller.append(experiment.trained_row(count, modules, wanted[count]))
        if not workers.rank():
            save_adapter(model.module, out / f"adapter-{count}.safetensors")
    if workers.rank():
        return
    fresh = score_in_fresh_process(options.model, problems.name, settings.temperature, adapter)

    rows = [base, frozen, trained, *smaller]
    print("\n" + report.table(rows, control, settings.temperature))
    print(f"{len(problems.held_out)} problems never trained on; bytes as float32; time: of training, else of scoring")
    print(f"\n{trained.label} beside its controls, exact McNemar test on the same problems:")
    print(report.verdict(trained.evaluation, frozen.evaluation, "lr 0"))
    print(report.verdict(trained.evaluation, control.best(), f"the best of {options.draws} random v"))
    print(f"\n{breakdown.describe()}")
    print(f"\n{report.fresh_process(adapter, trained.evaluation, fresh)}")
    report.plot([trained, *smaller], control, f"GRPO on {problems.name}, {model.name}", out / "reward.png")
    report.write_json(out / "results.json", rows, control, facts(options, settings, breakdown))
    print(f"Reward curve: {out / 'reward.png'}; everything above and more: {out / 'results.json'}")
    print(f"The demo took {time.perf_counter() - begin:.0f} s.")


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
