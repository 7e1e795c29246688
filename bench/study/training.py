"""One step of GRPO or SFT for all runs that share a batch, and their held-out scores."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from demo.evaluation import BATCH, Evaluation, evaluate
from demo.generation import Completions, completion_log_probs, generate
from demo.models import LanguageModel
from demo.tasks import Problem, Task
from demo.tiny import TinyDecoder
from demo.training import Settings, mixed_prompts, score_replies

from .demonstrations import Demonstration, as_completions
from .methods import Alone, Run, Together


@dataclass
class Batch:
    """One step's replies of all runs; each run has as many prompts, side by side."""

    runs: Sequence[Run]
    problems: list[Problem]  # [P]
    replies: Completions
    rewards: Tensor  # [P * n]

    def of(self, k: int) -> Batch:
        """Those of the k-th run."""
        count = len(self.problems) // len(self.runs)
        rows = torch.arange(k * count, (k + 1) * count)
        rewards = self.rewards.view(len(self.runs), -1)[k]
        problems = self.problems[k * count : (k + 1) * count]
        return Batch([self.runs[k]], problems, self.replies.select_prompts(rows), rewards)


class GRPO:
    """Sample, check, score, step.

    A run draws its own problems and one random number a reply and token, so that what it learns does not depend on
    which runs share its batch.
    """

    def __init__(self, task: Task, settings: Settings, runs: Sequence[Run]):
        self.task, self.settings, self.runs = task, settings, runs
        self.problems = {run.name: task.training(run.seed) for run in runs}

    def step(self, learners: Together | Alone) -> Batch:
        batch = self.sample(learners)
        self.learn(learners, batch)
        return batch

    def sample(self, learners: Together | Alone) -> Batch:
        """Replies of every run to problems of its own."""
        settings, model = self.settings, learners.model
        problems = [p for run in self.runs for p in islice(self.problems[run.name], settings.prompts)]
        shape = settings.prompts * settings.samples, self.task.max_new_tokens
        uniform = torch.cat([torch.rand(shape, generator=run.generator, dtype=torch.float64) for run in self.runs])
        found = generate(
            model, [model.encode(problem.prompt) for problem in problems], [settings.temperature] * settings.samples,
            self.task.max_new_tokens, uniform=uniform, adapters=learners.assignment(self._owners(self.runs)),
        )  # fmt: skip
        batch = Batch(self.runs, problems, found, score_replies(model, problems, found))
        lengths = found.mask.sum(dim=1).double()
        for values, of in ((batch.rewards, "rewards"), (lengths, "lengths")):
            for run, value in zip(self.runs, values.view(len(self.runs), -1).mean(dim=1).tolist(), strict=True):
                getattr(run, of).append(value)
        return batch

    def learn(self, learners: Together | Alone, batch: Batch) -> None:
        """One optimizer step of every run that has a prompt with mixed rewards."""
        samples, model = self.settings.samples, learners.model
        mixed = mixed_prompts(batch.rewards, samples)  # [K]
        if not len(mixed):
            return
        every = self._owners(batch.runs)
        owners, kept = [every[i] for i in mixed.tolist()], batch.replies.select_prompts(mixed)
        prompts = [model.encode(batch.problems[i].prompt) for i in mixed.tolist()]
        adapters = learners.assignment(owners)
        log_probs = completion_log_probs(model, prompts, kept, self.settings.temperature, adapters)
        rewards = batch.rewards.view(-1, samples)[mixed].flatten()
        learners.step([run for run in owners for _ in range(samples)], log_probs, None, rewards, mask=kept.mask)

    def _owners(self, runs: Sequence[Run]) -> list[Run]:
        return [run for run in runs for _ in range(self.settings.prompts)]  # [P]


class SFT:
    """Maximum likelihood of demonstrations, as many a step as GRPO samples replies."""

    def __init__(self, demonstrations: list[Demonstration], settings: Settings, runs: Sequence[Run]):
        self.demonstrations, self.settings, self.runs = demonstrations, settings, runs
        self.batch = min(settings.prompts * settings.samples, len(demonstrations))

    def step(self, learners: Together | Alone) -> None:
        model, chosen = learners.model, []
        for run in self.runs:
            order = torch.randperm(len(self.demonstrations), generator=run.generator)[: self.batch]
            chosen += [self.demonstrations[i] for i in order.tolist()]
        owners = [run for run in self.runs for _ in range(self.batch)]
        replies = as_completions(chosen, model.pad_id)
        log_probs = completion_log_probs(
            model, [one.prompt for one in chosen], replies, temperature=1.0, adapters=learners.assignment(owners)
        )
        metrics = learners.step(owners, log_probs, mask=replies.mask)
        for run in self.runs:
            run.rewards.append(-metrics[run.name]["loss"])


def scores(
    learners: Together | Alone, run: Run, problems: Sequence[Problem], task: Task, temperature: float
) -> Evaluation:
    """A run's greedy and sampled replies."""
    return evaluate(
        learners.model, problems, temperature, task.max_new_tokens, batch=at_once(learners.model),
        assign=lambda count: learners.assignment([run] * count),
    )  # fmt: skip


def base_scores(model: LanguageModel, problems: Sequence[Problem], task: Task, temperature: float) -> Evaluation:
    """The same of the model as it comes."""
    return evaluate(model, problems, temperature, task.max_new_tokens, batch=at_once(model))


def at_once(model: LanguageModel) -> int:
    """Prompts scored at a time: a small model's steps cost Python more than arithmetic."""
    return 500 if isinstance(model.module, TinyDecoder) else BATCH
