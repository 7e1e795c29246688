"""The demo's training loop: sample, check, score, one GRPO step."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinylora_kernels.rl import GRPOTrainer

from . import workers
from .generation import Completions, completion_log_probs, generate
from .models import LanguageModel
from .tasks import Problem, Task


@dataclass(frozen=True)
class Settings:
    """One run's hyperparameters; a step is prompts x samples completions and one optimizer step.

    lr is that of the first step; it falls linearly towards zero, so that the last steps do not lose what was learned to
    the noise of their few samples.
    """

    steps: int
    prompts: int
    samples: int
    lr: float
    temperature: float
    seed: int = 0


@dataclass
class History:
    """What a run left behind: the mean reward of each step, and where the time went, in seconds."""

    rewards: list[float] = field(default_factory=list)
    sampling_seconds: float = 0.0
    learning_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.sampling_seconds + self.learning_seconds


class Run:
    """GRPO on a task, one step at a time.

    Each batch is sampled from the current model and used once, so the old policy is the current one and the probability
    ratio is 1 when the gradient is taken (GRPOTrainer's ``old_log_probs=None``). Under torchrun each process takes its
    share of the prompts.
    """

    def __init__(self, model: LanguageModel, task: Task, settings: Settings):
        if settings.prompts % workers.count():
            count = workers.count()
            raise ValueError(f"prompts: expected a multiple of the {count} processes, found {settings.prompts}")
        self.model, self.task, self.settings = model, task, settings
        self.trainer = GRPOTrainer(
            model.module, group_size=settings.samples, lr=settings.lr, betas=(0.9, 0.95), max_grad_norm=1.0
        )
        self.problems = task.training(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed * workers.count() + workers.rank())
        self.history = History()

    def step(self) -> float:
        """Sample, check, learn; returns the mean reward."""
        begin = time.perf_counter()
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.settings.lr * max(0.0, 1 - len(self.history.rewards) / self.settings.steps)
        problems = list(islice(self.problems, self.settings.prompts))[workers.rank() :: workers.count()]
        prompts = [self.model.encode(problem.prompt) for problem in problems]
        temperatures = [self.settings.temperature] * self.settings.samples
        found = generate(self.model, prompts, temperatures, self.task.max_new_tokens, self.generator)
        rewards = score_replies(self.model, problems, found)  # [P * n]
        sampled = time.perf_counter()
        self._learn(prompts, found, rewards)
        self.history.sampling_seconds += sampled - begin
        self.history.learning_seconds += time.perf_counter() - sampled
        self.history.rewards.append(workers.total(rewards.mean().item()) / workers.count())
        return self.history.rewards[-1]

    def _learn(self, prompts: list[list[int]], found: Completions, rewards: Tensor) -> None:
        mixed = mixed_prompts(rewards, found.samples)  # [K]
        learning = workers.total(len(mixed))
        if not learning:
            return
        # The mean over processes is to be the mean over all these prompts, wherever they are; a process without one
        # takes part with a gradient of zero.
        share = len(mixed) * workers.count() / learning
        if not len(mixed):
            mixed = torch.zeros(1, dtype=torch.long)
        kept = found.select_prompts(mixed)
        log_probs = completion_log_probs(
            self.model, [prompts[i] for i in mixed.tolist()], kept, self.settings.temperature
        )
        if share != 1.0:
            log_probs.register_hook(lambda gradient: gradient * share)
        self.trainer.training_step(log_probs, None, rewards.view(-1, found.samples)[mixed].flatten(), mask=kept.mask)


def score_replies(model: LanguageModel, problems: Sequence[Problem], found: Completions) -> Tensor:
    """The reward of every reply, [P * n]."""
    replies = model.decode_all(found.tokens, found.mask)
    return torch.tensor([problems[row // found.samples].score(reply) for row, reply in enumerate(replies)])


def mixed_prompts(rewards: Tensor, samples: int) -> Tensor:
    """Indices [K] of the prompts whose replies did not all earn the same.

    The others have advantages of zero: they are left out before their log-probabilities are computed, and the loss
    averages over the mixed ones (DAPO, arXiv 2503.14476, section 3.2, without refilling).
    """
    grouped = rewards.view(-1, samples)
    return (grouped.amax(dim=1) > grouped.amin(dim=1)).nonzero().squeeze(1)


def train(run: Run, label: str, bar: Callable[..., Any] = tqdm) -> History:
    """All steps of a run, with a progress bar."""
    steps = bar(range(run.settings.steps), desc=label, unit="step")
    for _ in steps:
        reward = run.step()
        recent = run.history.rewards[-5:]
        steps.set_postfix(reward=f"{reward:.2f}", last5=f"{sum(recent) / len(recent):.2f}")
    return run.history
