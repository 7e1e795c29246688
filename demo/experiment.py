"""The rows of the demo's table: the base model, trained adapters, and the two controls."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinylora_kernels.model.adapted import trainable_vectors
from tinylora_kernels.model.attach import remove_adapter

from . import workers
from .evaluation import Evaluation, evaluate
from .models import LanguageModel
from .recipes import adapter_config
from .report import RandomControl, Row
from .tasks import Task
from .training import Run, Settings, train

ROOT = Path(__file__).resolve().parents[1]


class Experiment:
    """One model, one task, one set of hyperparameters."""

    def __init__(self, model: LanguageModel, task: Task, settings: Settings):
        self.model, self.task, self.settings = model, task, settings

    def base_row(self) -> Row:
        """The bare model."""
        print(f"scoring {self.model.name} as it comes on {len(self.task.held_out)} held-out problems", flush=True)
        begin = time.perf_counter()
        return announced(Row("base model", 0, self._evaluate(), time.perf_counter() - begin))

    def trained_row(self, numbers: int, modules: int, lr: float) -> Row:
        """Adapt, train, score; the adapted model stays. The time is the training's."""
        self._adapt(numbers, modules)
        history = train(Run(self.model, self.task, replace(self.settings, lr=lr)), f"GRPO, {numbers} numbers")
        label = f"TinyLoRA, {numbers} numbers"
        return announced(Row(label, numbers, self._evaluate(), history.seconds, history.rewards))

    def lr_zero_row(self, numbers: int, modules: int, steps: int) -> Row:
        """The same loop with lr 0: only the optimizer moves v, so a few steps show that the rest changes nothing."""
        self._adapt(numbers, modules)
        history = train(Run(self.model, self.task, replace(self.settings, lr=0.0, steps=steps)), "control: lr 0")
        label = f"control: lr 0, {steps} steps"
        return announced(Row(label, numbers, self._evaluate(), history.seconds, history.rewards))

    def random_control(self, numbers: int, draws: int) -> RandomControl:
        """Score random v of the current adapter's norm; the adapter is put back."""
        vectors = trainable_vectors(self.model.module)
        trained = nn.utils.parameters_to_vector(vectors).detach().clone()  # [numbers]
        begin = time.perf_counter()
        found = []
        bar = tqdm(range(draws), desc="control: random v, same norm", unit="draw")
        for seed in bar:
            draw = random_direction(numbers, seed) * trained.norm()
            nn.utils.vector_to_parameters(draw.to(trained), vectors)
            found.append(self._evaluate())
            bar.set_postfix(best=f"{max(e.greedy.accuracy for e in found):.3f}")
        nn.utils.vector_to_parameters(trained, vectors)
        return RandomControl(numbers, trained.norm().item(), found, time.perf_counter() - begin)

    def _adapt(self, numbers: int, modules: int) -> None:
        remove_adapter(self.model.module)
        workers.adapt(self.model.module, adapter_config(numbers, modules))

    def _evaluate(self) -> Evaluation:
        return evaluate(self.model, self.task.held_out, self.settings.temperature, self.task.max_new_tokens)


def announced(row: Row) -> Row:
    """Print a row's scores as soon as they are known."""
    scores = row.evaluation.greedy.accuracy, row.evaluation.sampled.accuracy
    print(f"  {row.label}: greedy {100 * scores[0]:.1f}%, sampled {100 * scores[1]:.1f}%", flush=True)
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
