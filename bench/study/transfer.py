"""Does an adapter trained on one task help on others, and do its replies grow longer as they get better?

SmolLM2 is trained on sums of two terms in one wording and scored on that and on tasks it never saw: the same sums in
other words, larger terms, three terms, subtraction, stories, and one that has nothing to do with sums.
"""
from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bench.grid import environment, table
from demo import tasks
from demo.tasks import Problem, number_problem

from .design import REAL, Design, tied, tinylora
from .methods import Method, Run, attach
from .runner import BASE, carry_out, loaded
from .training import GRPO, base_scores, scores

COUNT = 60  # problems of each task
RUNS: tuple[tuple[Method, float], ...] = ((tinylora(13, 210), 0.03), (tied(4, 1), 0.01))  # 13 and 840, best rates
KEY = ("method", "lr", "seed", "task", "count", "steps")
COLUMNS = [
    *KEY, "numbers", "greedy", "sampled", "length", "length_sampled", "dtype", *environment.describe(),
]  # fmt: skip


def pairs() -> list[tuple[int, int]]:
    """The sums that the study holds out."""
    found = (re.findall(r"\d+", problem.prompt) for problem in tasks.addition().held_out[:COUNT])
    return [(int(a), int(b)) for a, b in found]


def reworded(wording: str) -> list[Problem]:
    return [number_problem(wording.format(a=a, b=b), a + b) for a, b in pairs()]


def drawn(wording: str, terms: int, low: int, high: int) -> list[Problem]:
    rng = random.Random(0)
    numbers = [[rng.randint(low, high) for _ in range(terms)] for _ in range(COUNT)]
    return [number_problem(wording.format(" + ".join(map(str, own))), sum(own)) for own in numbers]


TRAINED = "What is {}? Answer with only the number."  # the wording of the training problems
TASKS: dict[str, Callable[[], list[Problem]]] = {
    "as trained": lambda: tasks.addition().held_out[:COUNT],
    "other words": lambda: reworded("Add {b} to {a}. Reply with the result and nothing else."),
    "bare formula": lambda: reworded("{a} + {b} ="),
    "larger terms": lambda: drawn(TRAINED, terms=2, low=21, high=60),
    "three terms": lambda: drawn(TRAINED, terms=3, low=1, high=20),
    "subtraction": lambda: tasks.subtraction().held_out[:COUNT],
    "stories": lambda: tasks.stories().held_out[:COUNT],
    "larger of two": lambda: tasks.maximum().held_out[:COUNT],
}


@dataclass(frozen=True)
class Unit:
    """Runs that share their batches, each scored on every task; none: the model as it comes."""

    design: Design
    runs: tuple[tuple[Method, float, int], ...] = ()

    @property
    def size(self) -> int:
        return len(TASKS) * max(1, len(self.runs))

    @property
    def label(self) -> str:
        return ", ".join(method.label for method, *_ in self.runs) or BASE


ROWS = len(TASKS) * (1 + len(RUNS) * len(REAL.seeds))


def units(design: Design) -> list[Unit]:
    families: dict[tuple[Method, int], list[tuple[Method, float, int]]] = {}
    for method, rate in RUNS:
        for seed in design.seeds:
            families.setdefault((method.family, seed), []).append((method, rate, seed))
    return [Unit(design), *(Unit(design, tuple(runs)) for runs in families.values())]


def described(design: Design, name: str, run: tuple[Method, float, int] | None = None) -> dict[str, str]:
    """The columns that are known before it has run, as they stand in the file."""
    method, rate, seed = (run[0].label, f"{run[1]:.5g}", str(run[2])) if run else (BASE, "", "")
    steps = str(design.settings.steps) if run else ""
    return dict(zip(KEY, (method, rate, seed, name, str(COUNT), steps), strict=True))


def key_of(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def run(path: Path, processes: int, until: float = math.inf, design: Design = REAL) -> list[dict]:
    """Every run on every task; rows that are in the file are not run again."""
    held = {key_of(row) for row in table.read(path)}
    left = [unit for unit in units(design) if not {key_of(row) for row in rows_of(unit)} <= held]
    carry_out(left, execute, path, COLUMNS, processes, "transfer to other tasks", until)
    rows = {key_of(row): row for row in table.read(path)}
    return [rows[key] for unit in units(design) for row in rows_of(unit) if (key := key_of(row)) in rows]


def rows_of(unit: Unit) -> list[dict[str, str]]:
    return [described(unit.design, name, run) for run in unit.runs or (None,) for name in TASKS]


def execute(unit: Unit) -> list[dict]:
    """Train on the design's task, score on all; a row for each run and task."""
    design, settings = unit.design, unit.design.settings
    base, problems = loaded(design.model, design.task)
    runs = [Run(*one) for one in unit.runs]
    learners = None
    if runs:
        learners = attach(base, runs, "grpo", settings.samples)
        objective = GRPO(problems, settings, runs)
        for _ in range(settings.steps):
            objective.step(learners)
    rows = []
    for one, own in zip(runs or [None], unit.runs or (None,), strict=True):
        for name, make in TASKS.items():
            wanted = make(), tasks.stories() if name == "stories" else problems, settings.temperature
            found = scores(learners, one, *wanted) if learners else base_scores(base, *wanted)
            rows.append(
                described(design, name, own)
                | environment.describe()
                | {
                    "numbers": learners.numbers(one) if learners else 0, "dtype": str(base.dtype).rpartition(".")[2],
                    "greedy": found.greedy.accuracy, "sampled": found.sampled.accuracy,
                    "length": found.greedy.length, "length_sampled": found.sampled.length,
                }
            )  # fmt: skip
    return rows


def text(rows: list[dict]) -> str:
    """Sampled and greedy accuracy in % and tokens of a greedy reply, mean over seeds: a line a task."""
    methods = {row["method"]: int(row["numbers"]) for row in rows}
    names = [BASE, *sorted((name for name in methods if name != BASE), key=methods.__getitem__)]
    heads = [name if name == BASE else f"{methods[name]} numbers" for name in names]
    lines = [
        "greedy / sampled accuracy, %, and tokens of a greedy reply; trained on the first line's task",
        f"{'':14}" + "".join(f"{head:>24}" for head in heads),
    ]
    for task in TASKS:
        cells = []
        for name in names:
            own = [row for row in rows if (row["method"], row["task"]) == (name, task)]
            greedy, sampled, length = (mean(float(row[c]) for row in own) for c in ("greedy", "sampled", "length"))
            cells.append(f"{100 * greedy:.0f} / {100 * sampled:.0f}, {length:.1f}")
        lines.append(f"{task:14}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
