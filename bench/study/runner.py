"""Units of work over processes; every run becomes a row as it finishes, and rows that are there are not run again."""
from __future__ import annotations

import functools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from bench.grid import environment, table
from demo.evaluation import Evaluation
from demo.models import LanguageModel, load_model
from demo.tasks import Task, task
from demo.training import Settings

from .demonstrations import Demonstration, foreign_demonstrations, own_samples
from .design import Arm, Design
from .methods import Method, Run, attach
from .training import GRPO, SFT, base_scores, scores

VALIDATION_SEED = 2_000  # of the training problems on which learning rates are chosen
BASE = "base model"


@dataclass(frozen=True)
class Unit:
    """Runs of one objective that share their batches; none: the model as it comes."""

    design: Design
    objective: str = ""
    runs: tuple[tuple[Method, float, int], ...] = ()  # method, rate, seed

    @property
    def size(self) -> int:
        return max(1, len(self.runs))

    @property
    def label(self) -> str:
        return ", ".join(dict.fromkeys([self.objective, *(m.label for m, *_ in self.runs)])) if self.runs else BASE


def key_of(row: dict) -> tuple[str, ...]:
    """What a row is a row of; equal keys are the same run."""
    settings = ("task", "steps", "prompts", "samples", "temperature", "validation_count", "test_count")
    return tuple(str(row[name]) for name in ("method", "objective", "lr", "seed", *settings))


def described(design: Design, method: Method | None, objective: str, rate: float | None, seed: int | None) -> dict:
    """The columns that a run has before it has run, as they stand in the file."""
    settings = design.settings
    return {
        "method": method.label if method else BASE, "objective": objective,
        "lr": "" if rate is None else f"{rate:.5g}", "seed": "" if seed is None else str(seed), "task": design.task,
        "steps": settings.steps if method else "", "prompts": settings.prompts if method else "",
        "samples": settings.samples if method else "", "temperature": f"{settings.temperature:.5g}",
        "validation_count": design.validation, "test_count": design.held_out,
    }  # fmt: skip


COLUMNS = [
    "method", "objective", "lr", "seed", "task", "steps", "prompts", "samples", "temperature", "validation_count",
    "test_count", "kind", "numbers", "bytes", "validation", "validation_sampled", "test", "test_sampled", "length",
    "length_sampled", "reward_first5", "reward_last5", "moved", "seconds", "runs_in_batch", "rewards", "lengths",
    *environment.describe(),
]  # fmt: skip


def run(design: Design, path: Path, processes: int, until: float = math.inf) -> list[dict]:
    """All rows of the design, those already in the file included; no unit begins after ``until`` (time.monotonic)."""
    held = {key_of(row) for row in table.read(path)}
    carry_out(list(missing_units(design, held)), execute, path, COLUMNS, processes, f"study of {design.model}", until)
    return rows_there(design, path)


def rows_there(design: Design, path: Path) -> list[dict]:
    """The design's rows as far as the file holds them."""
    rows = {key_of(row): row for row in table.read(path)}
    return [rows[key] for row in rows_of(design) if (key := key_of(row)) in rows]


def carry_out(
    units: Sequence,
    execute: Callable[[object], list[dict]],
    path: Path,
    columns: list[str],
    processes: int,
    title: str,
    until: float = math.inf,
) -> None:
    """Append the rows of every unit to a file as it finishes; a bar counts rows. A unit has a label and a size."""
    total = sum(unit.size for unit in units)
    with tqdm(total=total, unit="run", desc=title, dynamic_ncols=True, smoothing=0) as bar:
        for unit, rows in finished(units, execute, processes, until):
            table.append(path, columns, rows)
            bar.update(len(rows))
            bar.set_postfix_str(unit.label)


def rows_of(design: Design) -> Iterator[dict]:
    """One description for every row that the design asks for."""
    yield described(design, None, "", None, None)
    for arm in design.arms:
        for method, rate, seed in runs_of(design, arm):
            yield described(design, method, arm.objective, rate, seed)


def runs_of(design: Design, arm: Arm) -> list[tuple[Method, float, int]]:
    return [(arm.method, rate, seed) for rate in arm.rates for seed in design.seeds]


def missing_units(design: Design, held: set) -> Iterator[Unit]:
    """What the file does not hold yet, runs grouped as they can share batches; GRPO first, slow units first."""
    if key_of(described(design, None, "", None, None)) not in held:
        yield Unit(design)
    families: dict[tuple[str, Method], list[tuple[Method, float, int]]] = {}
    for arm in sorted(design.arms, key=lambda arm: (arm.objective != "grpo", arm.method.many_at_once)):
        keys = {run: key_of(described(design, run[0], arm.objective, *run[1:])) for run in runs_of(design, arm)}
        families.setdefault((arm.objective, arm.method.family), []).extend(
            run for run, key in keys.items() if key not in held
        )
    for (objective, family), left in families.items():
        size = design.together if family.many_at_once else 1
        for start in range(0, len(left), size):
            yield Unit(design, objective, tuple(left[start : start + size]))


def finished(
    units: Sequence, execute: Callable[[object], list[dict]], processes: int, until: float = math.inf
) -> Iterator[tuple[object, list[dict]]]:
    """Units and their rows in the order they finish."""
    if processes == 1:
        for unit in units:
            if time.monotonic() > until:
                return
            yield unit, execute(unit)
        return
    # one thread each: the products of a small model are too small to share
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        pending = {pool.submit(execute, unit): unit for unit in units}
        try:
            for future in as_completed(pending):
                if not future.cancelled():
                    yield pending[future], future.result()
                if time.monotonic() > until:
                    for left in pending:
                        left.cancel()
        finally:
            for future in pending:
                future.cancel()


@functools.cache
def loaded(model: str, task_name: str) -> tuple[LanguageModel, Task]:
    return load_model(model), task(task_name)


@functools.cache
def demonstrations(model: str, task_name: str, objective: str, temperature: float) -> list[Demonstration]:
    base, problems = loaded(model, task_name)
    if objective == "sft-own":
        return own_samples(base, problems, temperature)
    if objective == "sft-foreign":
        return foreign_demonstrations(base, problems)
    raise ValueError(f"objective: expected grpo, sft-own or sft-foreign, found {objective!r}")


def execute(unit: Unit) -> list[dict]:
    """Train and score the runs of a unit; a row for each."""
    design, settings = unit.design, unit.design.settings
    base, problems = loaded(design.model, design.task)
    validation = list(islice(problems.training(VALIDATION_SEED), design.validation))
    test = problems.held_out[: design.held_out]
    begin = time.perf_counter()
    if not unit.runs:
        found = [base_scores(base, part, problems, settings.temperature) for part in (validation, test)]
        return [described(design, None, "", None, None) | outcome(found, time.perf_counter() - begin)]
    runs = [Run(*run) for run in unit.runs]
    learners = attach(base, runs, unit.objective, settings.samples)
    objective = objective_of(unit, problems, settings, runs)
    for _ in range(settings.steps):
        objective.step(learners)
    seconds = (time.perf_counter() - begin) / len(runs)
    rows = []
    for one in runs:
        found = [scores(learners, one, part, problems, settings.temperature) for part in (validation, test)]
        numbers = learners.numbers(one)
        rows.append(
            described(design, one.method, unit.objective, one.rate, one.seed)
            | outcome(found, seconds)
            | {
                "kind": one.method.kind, "numbers": numbers, "bytes": numbers * one.method.bytes_a_number,
                "moved": learners.norm(one), "runs_in_batch": len(runs),
                "reward_first5": mean(one.rewards[:5]), "reward_last5": mean(one.rewards[-5:]),
                "rewards": " ".join(f"{reward:.3f}" for reward in one.rewards),
                "lengths": " ".join(f"{length:.2f}" for length in one.lengths),
            }
        )  # fmt: skip
    return rows


def objective_of(unit: Unit, problems: Task, settings: Settings, runs: Sequence[Run]) -> GRPO | SFT:
    if unit.objective == "grpo":
        return GRPO(problems, settings, runs)
    design = unit.design
    return SFT(demonstrations(design.model, design.task, unit.objective, settings.temperature), settings, runs)


def outcome(found: Sequence[Evaluation], seconds: float) -> dict:
    """Accuracies, lengths of the replies, and where they were measured."""
    validation, test = found
    return environment.describe() | {
        "validation": validation.greedy.accuracy, "validation_sampled": validation.sampled.accuracy,
        "test": test.greedy.accuracy, "test_sampled": test.sampled.accuracy,
        "length": test.greedy.length, "length_sampled": test.sampled.length,
        "seconds": seconds, "numbers": 0, "bytes": 0,
    }  # fmt: skip
