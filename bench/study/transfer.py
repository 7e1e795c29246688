"""Does an adapter trained on one task help on others, and do its replies grow longer as they get better?

SmolLM2 is trained as the demo trains it, on sums of two terms in one wording, and scored on that and on tasks it never
saw: the same sums in other words, larger terms, three terms, subtraction, stories, and one that has nothing to do with
sums. An adapter is kept once it is trained, and every task is a row as it is scored.
"""
from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.grid import environment, table
from demo import recipes, tasks
from demo.evaluation import evaluate
from demo.models import PROJECTIONS, LanguageModel, load_model
from demo.tasks import Problem, Task, number_problem
from demo.training import Run, Settings, train
from tinylora_kernels import apply_tiny_lora, load_adapter, save_adapter
from tinylora_kernels.model.targets import target_names

from .runner import BASE, carry_out

COUNT = 60  # problems of each task
MODEL, RECIPE = "smollm2", recipes.REAL
ADAPTERS = ((0, 0), (840, 0))  # trained numbers, seed; none: the model as it comes
KEY = ("numbers", "seed", "task", "count", "steps")
COLUMNS = [*KEY, "lr", "greedy", "sampled", "length", "length_sampled", "dtype", *environment.describe()]


def pairs() -> list[tuple[int, int]]:
    """Sums that training leaves out."""
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
LONG = {"stories": 32}  # tokens that a reply may take, where 12 are too few


@dataclass(frozen=True)
class Unit:
    """One adapter on one task."""

    numbers: int
    seed: int
    task: str
    folder: Path  # of adapters
    size: int = 1

    @property
    def label(self) -> str:
        return f"{self.numbers} numbers, {self.task}" if self.numbers else f"{BASE}, {self.task}"

    @property
    def described(self) -> dict[str, str]:
        """The columns that are known before it has run, as they stand in the file."""
        steps = RECIPE.settings.steps if self.numbers else 0
        return dict(zip(KEY, map(str, (self.numbers, self.seed, self.task, COUNT, steps)), strict=True))


def run(out: Path, processes: int, until: float = math.inf) -> list[dict]:
    """Every adapter on every task, as far as the file holds them; rows that it holds are not run again."""
    path, folder = out / "transfer.csv", out / "adapters"
    units = [Unit(numbers, seed, name, folder) for numbers, seed in ADAPTERS for name in TASKS]
    held = {key_of(row) for row in table.read(path)}
    left = [unit for unit in units if key_of(unit.described) not in held]
    carry_out(left, execute, path, COLUMNS, processes, "transfer to other tasks", until)
    rows = {key_of(row): row for row in table.read(path)}
    return [rows[key] for unit in units if (key := key_of(unit.described)) in rows]


def key_of(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def execute(unit: Unit) -> list[dict]:
    model, rate = adapted(unit.numbers, unit.seed, unit.folder)
    limit = LONG.get(unit.task, 12)
    found = evaluate(model, TASKS[unit.task](), RECIPE.settings.temperature, limit)
    return [
        unit.described
        | environment.describe()
        | {
            "lr": rate, "dtype": str(model.dtype).removeprefix("torch."),
            "greedy": found.greedy.accuracy, "sampled": found.sampled.accuracy,
            "length": found.greedy.length, "length_sampled": found.sampled.length,
        }
    ]  # fmt: skip


@functools.lru_cache(maxsize=1)
def adapted(numbers: int, seed: int, folder: Path) -> tuple[LanguageModel, float | None]:
    """The model with its adapter, trained now where its file is not there, and the learning rate."""
    model = load_model(MODEL)
    if not numbers:
        return model, None
    modules = len(target_names(model.module, PROJECTIONS))
    rate = recipes.rates(RECIPE, [numbers], None, modules)[numbers]
    settings = replace(RECIPE.settings, lr=rate, seed=seed)
    file = folder / f"{MODEL}-{numbers}-lr{rate:g}-steps{settings.steps}-seed{seed}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_adapter(model, numbers, modules, settings, tasks.task(RECIPE.task))
        save_adapter(model.module, file)
    else:
        load_adapter(model.module, file, progress=False)
    return model, rate


def train_adapter(model: LanguageModel, numbers: int, modules: int, settings: Settings, task: Task) -> None:
    """As a row of the demo."""
    apply_tiny_lora(model.module, recipes.adapter_config(numbers, modules), progress=False)
    train(Run(model, task, settings), f"GRPO, {numbers} numbers")


def text(rows: list[dict]) -> str:
    """A line a task: accuracy in %, and tokens of a greedy reply."""
    cells = {(row["numbers"], row["task"]): row for row in rows}
    heads = list(dict.fromkeys(row["numbers"] for row in rows))
    lines = [
        "greedy, sampled accuracy, % : tokens of a greedy reply",
        f"{'':14}" + "".join(f"{BASE if head == '0' else f'{head} numbers':>18}" for head in heads),
    ]
    for name in TASKS:
        line = f"{name:14}"
        for head in heads:
            greedy, sampled, length = (float(cells[head, name][column]) for column in ("greedy", "sampled", "length"))
            line += f"{f'{100 * greedy:.0f}, {100 * sampled:.0f} : {length:.1f}':>18}"
        lines.append(line)
    return "\n".join(lines)
