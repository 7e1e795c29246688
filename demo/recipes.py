"""What the demo runs unless told otherwise: one recipe for real models, one for the tiny decoder."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinylora_kernels.method.config import TinyLoRAConfig

from .models import PROJECTIONS
from .training import Settings


@dataclass(frozen=True)
class Recipe:
    """Defaults of one kind of model.

    Attributes:
        task: name of the task.
        numbers: trained numbers of each row of the table, and their learning rate; the first gets the controls.
        settings: of the training; the learning rate is that of other numbers.
        control_steps: steps of the lr 0 control; its model cannot change, so they only show that it does not.
    """

    task: str
    numbers: dict[int | str, float]
    settings: Settings
    control_steps: int


# 4 and 1 numbers for each module, and the paper's 13: 840, 210 and 13 of SmolLM2's 210 modules.
REAL = Recipe(
    task="addition",
    numbers={"4x": 0.01, "1x": 0.02, 13: 0.03},
    settings=Settings(steps=40, prompts=8, samples=8, lr=0.01, temperature=0.7),
    control_steps=3,
)
TINY = Recipe(
    task="digit-sums",
    numbers={13: 0.02},
    settings=Settings(steps=40, prompts=16, samples=16, lr=0.02, temperature=1.0),
    control_steps=3,
)


def recipe(model: str) -> Recipe:
    return TINY if model == "tiny" else REAL


def rates(recipe: Recipe, wanted: Sequence[int | str] | None, lr: float | None, modules: int) -> dict[int, float]:
    """Trained numbers and learning rate of each row of the table; wanted and lr are what was asked for instead."""
    known = {resolve_numbers(count, modules): rate for count, rate in recipe.numbers.items()}
    counts = [resolve_numbers(count, modules) for count in wanted or recipe.numbers]
    return {count: known.get(count, recipe.settings.lr) if lr is None else lr for count in counts}


def resolve_numbers(wanted: int | str, modules: int) -> int:
    """ "4x" is four for each module; anything else is the count itself."""
    text = str(wanted)
    count = int(text[:-1]) * modules if text.endswith("x") else int(text)
    if count < 1:
        raise ValueError(f"PARAMS: expected at least 1 trained number, found {wanted!r}")
    return count


def adapter_config(numbers: int, modules: int) -> TinyLoRAConfig:
    """Spread so many trained numbers over so many modules.

    A multiple of the modules gives each its own vector. Fewer are one number for each of as many groups of consecutive
    modules, where such groups exist, or else one vector that all modules share.
    """
    if numbers % modules == 0:
        return TinyLoRAConfig(trainable_dim=numbers // modules, n_tie=1, target_modules=PROJECTIONS)
    n_tie = -(-modules // numbers)  # ceil(modules / n_tie) == numbers is what is wanted
    if -(-modules // n_tie) == numbers:
        return TinyLoRAConfig(trainable_dim=1, n_tie=n_tie, target_modules=PROJECTIONS)
    return TinyLoRAConfig(trainable_dim=numbers, n_tie=modules, target_modules=PROJECTIONS)
