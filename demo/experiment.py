"""The rows of the demo's table: the base model, trained adapters, and the two controls."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinylora_kernels.files.adapter import save_adapter
from tinylora_kernels.model.adapted import trainable_vectors
from tinylora_kernels.model.attach import remove_adapter

from . import workers
from .evaluation import Evaluation, evaluate
from .models import LanguageModel, load_model
from .profiling import Breakdown, profile_step
from .recipes import adapter_config
from .report import Row
from .tasks import Task, task
from .training import History, Run, Settings, train

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Trained:
    """A trained row, the norm of its v, and where a step's time goes if that was asked for."""

    row: Row
    norm: float
    breakdown: Breakdown | None


class Experiment:
    """One model, one task, one set of hyperparameters; its methods are the demo's jobs, in any order.

    Attributes:
        bar: draws a loop (tqdm or what stands for it): called with a sequence, desc and unit.
        progress: whether the factorisation draws its own.
    """

    def __init__(self, model: LanguageModel, task: Task, settings: Settings):
        self.model, self.task, self.settings = model, task, settings
        self.bar: Callable[..., Any] = tqdm
        self.progress = True
        self._numbers: int | None = None  # of the adapter that the model has

    @classmethod
    def named(cls, model: str, problems: str, settings: Settings) -> Experiment:
        return cls(load_model(model), task(problems), settings)

    def base_row(self) -> Row:
        """The bare model."""
        remove_adapter(self.model.module)
        self._numbers = None
        begin = time.perf_counter()
        return Row("base model", 0, self._evaluate(), time.perf_counter() - begin)

    def trained_row(self, numbers: int, modules: int, lr: float, path: Path, profiled: bool = False) -> Trained:
        """Adapt, train, save, score. The row's time is the training's."""
        self._adapt(numbers, modules)
        history = self._train(replace(self.settings, lr=lr), f"GRPO, {numbers} numbers")
        if not workers.rank():
            save_adapter(self.model.module, path)
        row = Row(f"TinyLoRA, {numbers} numbers", numbers, self._evaluate(), history.seconds, history.rewards)
        norm = nn.utils.parameters_to_vector(trainable_vectors(self.model.module)).norm().item()
        breakdown = profile_step(Run(self.model, self.task, replace(self.settings, lr=0.0))) if profiled else None
        return Trained(row, norm, breakdown)

    def lr_zero_row(self, numbers: int, modules: int, steps: int) -> Row:
        """The same loop with lr 0: only the optimizer moves v, so a few steps show that the rest changes nothing."""
        self._adapt(numbers, modules)
        history = self._train(replace(self.settings, lr=0.0, steps=steps), "control: lr 0")
        return Row(f"control: lr 0, {steps} steps", numbers, self._evaluate(), history.seconds, history.rewards)

    def random_draw(self, numbers: int, modules: int, norm: float, seed: int) -> tuple[Evaluation, float]:
        """The scores of a random v of this norm, and the seconds that they took."""
        if self._numbers != numbers:
            self._adapt(numbers, modules)
        begin = time.perf_counter()
        vectors = trainable_vectors(self.model.module)
        draw = random_direction(numbers, seed) * norm  # [numbers]
        nn.utils.vector_to_parameters(draw.to(vectors[0]), vectors)
        return self._evaluate(), time.perf_counter() - begin

    def _adapt(self, numbers: int, modules: int) -> None:
        remove_adapter(self.model.module)
        self._numbers = None
        workers.adapt(self.model.module, adapter_config(numbers, modules), self.progress)
        self._numbers = numbers

    def _train(self, settings: Settings, label: str) -> History:
        return train(Run(self.model, self.task, settings), label, self.bar)

    def _evaluate(self) -> Evaluation:
        return evaluate(self.model, self.task.held_out, self.settings.temperature, self.task.max_new_tokens)


def announced(row: Row) -> Row:
    """Print a row's scores above the progress bars."""
    scores = row.evaluation.greedy.accuracy, row.evaluation.sampled.accuracy
    tqdm.write(f"  {row.label}: greedy {100 * scores[0]:.1f}%, sampled {100 * scores[1]:.1f}%")
    return row


def random_direction(size: int, seed: int) -> Tensor:
    """A uniformly random unit vector."""
    draw = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return draw / draw.norm()


def score_in_fresh_process(model: str, task: str, temperature: float, adapter: Path) -> dict:
    """What ``demo.score`` finds for the file in a process of its own."""
    print(f"scoring {adapter} in a fresh process", flush=True)
    command = [sys.executable, "-m", "demo.score", "--adapter", adapter.resolve(), "--model", model]
    command += ["--task", task, "--temperature", str(temperature)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{adapter}: the fresh process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
