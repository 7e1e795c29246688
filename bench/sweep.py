"""A sweep over learning rates and seeds in one run, against the same runs one after another.

    python bench/sweep.py                      the tiny decoder: 4 rates x 3 seeds, a few minutes
    python bench/sweep.py --model smollm2      SmolLM2-135M-Instruct on additions, fewer and shorter runs

Together: one AdapterBank, an adapter for each run; a step samples, scores and learns for all of them in the same
batches. Alone: a copy of the model with a vector of its own. Both take turns, step by step, so that
whatever else the machine does falls on both. Float32 throughout.

A run draws its own problems and its own random numbers, one a reply and token, so alone and together it samples the
same replies, unless a random number falls within rounding of the border between two tokens. Then the two runs go apart
for good, as any two runs on different hardware do, and the equality of what they learn can no longer be seen. Such a
run is run alone once more on the replies that it got together. Column `compared`: "own replies", or "given replies
from step s on".

The script fails where final vectors differ by more than rounding: by more than TOLERANCE, and by more than ten times
what the same run alone, on the same replies, ends away from itself when it starts one rounding of a step away from
zero (column `sensitivity`, measured where it matters). At rates that are too high a run amplifies any rounding without
bound.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.grid import environment, table  # noqa: E402
from bench.grid.timing import quantile  # noqa: E402
from bench.study.design import tinylora  # noqa: E402
from bench.study.methods import Alone, Method, Run, Together, attach  # noqa: E402
from bench.study.training import GRPO, Batch, base_scores, scores  # noqa: E402
from demo.models import PROJECTIONS, LanguageModel, load_model  # noqa: E402
from demo.recipes import recipe, resolve_numbers  # noqa: E402
from demo.tasks import Task, task  # noqa: E402
from demo.training import Settings  # noqa: E402
from tinylora_kernels.model.targets import target_names  # noqa: E402

FILE, PLOT = "sweep.csv", "sweep.png"
# Of |v together - v alone| / |v alone|. Sums of another order differ by 1e-6; Adam divides a gradient by its own size,
# so a component whose gradient is small beside the others' passes on a larger relative error.
TOLERANCE = 1e-3
SENSITIVITY_FACTOR = 10.0
ROUNDING = 2.0**-24  # of float32


@dataclass(frozen=True)
class Sweep:
    """What is swept, and the settings that all runs share."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    numbers: str
    settings: Settings
    held_out: int


SWEEPS = {
    "tiny": Sweep(
        (0.003, 0.01, 0.03, 0.1), (0, 1, 2), "13",
        replace(recipe("tiny").settings, steps=40, prompts=4, samples=4), held_out=200,
    ),
    "smollm2": Sweep(
        (0.001, 0.003, 0.01), (0, 1), "4x",
        replace(recipe("smollm2").settings, steps=6, prompts=4, samples=4), held_out=100,
    ),
}


def same_replies(a: Batch, b: Batch) -> bool:
    return torch.equal(a.replies.mask, b.replies.mask) and torch.equal(
        a.replies.tokens[a.replies.mask], b.replies.tokens[b.replies.mask]
    )


def compared(apart: int | None) -> str:
    """On which replies the two ways were compared; apart: the first step whose replies differ."""
    return "own replies" if apart is None else f"given replies from step {apart} on"


@dataclass
class Outcome:
    """Times of every step in seconds, the first step whose replies differ for each run, and both results."""

    together_seconds: list[float]
    alone_seconds: list[list[float]]  # [steps][runs]
    apart: list[int | None]
    vectors: list[Tensor]  # of each run together, [groups, u]
    deviations: list[float]
    sensitivities: list[float | None]


def train(model: LanguageModel, task_: Task, sweep: Sweep, method: Method) -> tuple[Together, Outcome]:
    """Both ways, step by step in turns; then the runs that went apart once more on the replies they got together."""
    settings = sweep.settings
    pairs = [(rate, seed) for rate in sweep.rates for seed in sweep.seeds]

    def learners(of: Sequence[tuple[float, int]], alone: bool) -> tuple[Together | Alone, GRPO]:
        runs = [Run(rate, seed) for rate, seed in of]
        return attach(model, method, runs, "grpo", settings.samples, alone), GRPO(task_, settings, runs)

    together, joint = learners(pairs, alone=False)
    alone = [learners([pair], alone=True) for pair in pairs]
    history: list[list[Batch]] = [[] for _ in pairs]
    outcome = Outcome([], [], [None] * len(pairs), [], [], [])
    bar = tqdm(range(settings.steps), unit="step", desc=f"{len(pairs)} runs together and alone", dynamic_ncols=True)
    for step in bar:
        begun = time.perf_counter()
        batch = joint.step(together)
        outcome.together_seconds.append(time.perf_counter() - begun)
        seconds = []
        for k, (learner, objective) in enumerate(alone):
            history[k].append(batch.of(k))
            begun = time.perf_counter()
            own = objective.step(learner)
            seconds.append(time.perf_counter() - begun)
            if outcome.apart[k] is None and not same_replies(own, history[k][-1]):
                outcome.apart[k] = step
        outcome.alone_seconds.append(seconds)
        bar.set_postfix(together=f"{outcome.together_seconds[-1]:.2f} s", alone=f"{sum(seconds):.2f} s")

    def on_given_replies(k: int, start: float = 0.0) -> Tensor:
        learner, objective = learners([pairs[k]], alone=True)
        for v in learner.trained:
            v.detach().fill_(start)
        for batch in history[k]:
            objective.learn(learner, batch)
        return vectors_of(learner)

    for k, run in enumerate(tqdm(joint.runs, desc="comparing", unit="run", dynamic_ncols=True)):
        found = together.bank.vectors(run.name).double()
        expected = vectors_of(alone[k][0]) if outcome.apart[k] is None else on_given_replies(k)
        deviation, sensitivity = distance(found, expected), None
        if not deviation <= TOLERANCE:
            sensitivity = distance(on_given_replies(k, run.rate * ROUNDING), expected)
        outcome.vectors.append(found)
        outcome.deviations.append(deviation)
        outcome.sensitivities.append(sensitivity)
    return together, outcome


def vectors_of(learner: Alone) -> Tensor:
    """[groups, u]"""
    return torch.stack([v.detach() for v in learner.trained]).double()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def run_sweep(name: str, sweep: Sweep, out: pathlib.Path) -> None:
    """Train, check, score, and put the rows of this model in sweep.csv anew."""
    model, task_ = load_model(name), task(recipe(name).task)
    model.module.float()
    modules = len(target_names(model.module, PROJECTIONS))
    numbers = resolve_numbers(sweep.numbers, modules)
    together, outcome = train(model, task_, sweep, tinylora(numbers, modules))
    runs = together.runs
    accepted = True
    for k, run in enumerate(runs):
        deviation, sensitivity = outcome.deviations[k], outcome.sensitivities[k]
        beside = "" if sensitivity is None else f", one rounding away at the start {sensitivity:.2g}"
        print(f"{run.name:<18} together against alone {deviation:<8.2g} {compared(outcome.apart[k])}{beside}")
        accepted &= deviation <= (TOLERANCE if sensitivity is None else SENSITIVITY_FACTOR * sensitivity)
    same = sum(step is None for step in outcome.apart)
    print(f"{same} of {len(runs)} runs sampled the same replies in all {sweep.settings.steps} steps")
    if not accepted:
        raise SystemExit("sweep: a run ended elsewhere than alone, by more than rounding explains; see above")
    rows = result_rows(name, sweep, numbers, together, outcome, model, task_)
    others = [row for row in table.read(out / FILE) if row["model"] != name]
    (out / FILE).unlink(missing_ok=True)
    table.append(out / FILE, list(rows[0]), [*others, *rows])
    plot(table.read(out / FILE), out / PLOT)


def result_rows(
    name: str, sweep: Sweep, numbers: int, together: Together, outcome: Outcome, base: LanguageModel, task_: Task
) -> list[dict]:
    """A row for each run; the times of the whole sweep stand in every row."""
    runs, held_out, temperature = together.runs, task_.held_out[: sweep.held_out], sweep.settings.temperature
    greedy_base, _ = base_scores(base, held_out, task_, temperature)
    ratios = [sum(alone) / joint for alone, joint in zip(outcome.alone_seconds, outcome.together_seconds, strict=True)]
    p20, p50, p80 = (quantile(ratios, q) for q in (0.2, 0.5, 0.8))
    print(
        f"{len(runs)} runs of {sweep.settings.steps} steps: {sum(outcome.together_seconds):.1f} s together, "
        f"{sum(map(sum, outcome.alone_seconds)):.1f} s one after another; "
        f"step by step {p50:.2f} times as long (p20 to p80: {p20:.2f} to {p80:.2f})"
    )
    facts = environment.describe()
    rows = []
    bar = tqdm(list(enumerate(runs)), unit="run", desc=f"scoring on {len(held_out)} held-out problems")
    for k, run in bar:
        greedy, _ = scores(together, run, held_out, task_, temperature)
        rows.append(
            {
                "model": name, "numbers": numbers, "lr": run.rate, "seed": run.seed, "steps": sweep.settings.steps,
                "prompts": sweep.settings.prompts, "samples": sweep.settings.samples, "dtype": "fp32",
                "reward_last5": statistics.mean(run.rewards[-5:]), "greedy": greedy, "greedy_base": greedy_base,
                "held_out": len(held_out), "v_norm": float(outcome.vectors[k].norm()),
                "deviation": outcome.deviations[k], "sensitivity": outcome.sensitivities[k],
                "compared": compared(outcome.apart[k]),
                "seconds_alone": sum(alone[k] for alone in outcome.alone_seconds),
                "sweep_seconds_alone": sum(map(sum, outcome.alone_seconds)),
                "sweep_seconds_together": sum(outcome.together_seconds),
                "alone_over_together_p20": p20, "alone_over_together_p50": p50, "alone_over_together_p80": p80,
                "load": os.getloadavg()[0],
            }
            | facts
        )  # fmt: skip
    return rows


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """For each model: accuracy against the rate with its spread over seeds, and the time of both ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(
        len(models), 2, figsize=(9, 3.4 * len(models)), squeeze=False, width_ratios=(2, 1), layout="constrained"
    )
    for (left, right), model in zip(axes, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        rates = sorted({float(row["lr"]) for row in own})
        scores = [[100 * float(row["greedy"]) for row in own if float(row["lr"]) == rate] for rate in rates]
        left.fill_between(rates, list(map(min, scores)), list(map(max, scores)), alpha=0.2, label="all seeds")
        left.plot(rates, list(map(statistics.mean, scores)), marker="o", label="mean")
        for rate, values in zip(rates, scores, strict=True):
            left.plot([rate] * len(values), values, ".", color="0.3", ms=4)
        left.axhline(100 * float(own[0]["greedy_base"]), color="0.4", ls=":", label="base model")
        left.set(xscale="log", xlabel="learning rate", ylabel="greedy accuracy, %", ylim=(0, 101))
        left.set_xticks(rates, [f"{rate:g}" for rate in rates])
        left.minorticks_off()
        left.set_title(f"{model}: {own[0]['numbers']} numbers, {own[0]['steps']} steps", fontsize=10)
        left.legend(fontsize=8, frameon=False)
        seconds = [float(own[0][f"sweep_seconds_{way}"]) for way in ("together", "alone")]
        bars = right.barh(["together", "one after\nanother"], seconds, color=["C0", "0.6"])
        right.bar_label(bars, [f"{value:.0f} s" for value in seconds], padding=3)
        right.set(xlim=(0, 1.2 * max(seconds)), xlabel="seconds")
        right.set_title(f"{len(own)} runs, {own[0]['threads']} thread(s)", fontsize=10)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SWEEPS), default="tiny")
    parser.add_argument("--steps", type=int, help="of every run")
    parser.add_argument("--seeds", type=int, help="how many seeds for each rate")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: 2")
    parser.add_argument("--out", type=pathlib.Path, default=environment.results_directory())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sweep = SWEEPS[options.model]
    if options.steps:
        sweep = replace(sweep, settings=replace(sweep.settings, steps=options.steps))
    if options.seeds:
        sweep = replace(sweep, seeds=tuple(range(options.seeds)))
    run_sweep(options.model, sweep, options.out)


if __name__ == "__main__":
    main()
