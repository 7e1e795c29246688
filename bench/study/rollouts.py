"""Rollouts from other weights than the trained ones, as a serving engine makes them.

The trainer runs a bfloat16 model with the update in float32 beside it. Its rollouts come from

    own           the same model: what is sampled is what is trained
    merged        the update merged into the bfloat16 weights, which swallow a part of it
    merged, TIS   the same, the gradient weighted by min(p_train / p_rollout, cap) (GRPOTrainer's rollout_log_probs)
    LoRA export   the update as export_lora writes it, loaded by PEFT: beside the weights again, all of it
"""
from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean

import torch

from bench.grid import environment, table
from demo.evaluation import evaluate
from demo.generation import completion_log_probs, generate
from demo.models import PROJECTIONS, LanguageModel
from demo.tasks import Problem, Task
from demo.training import Settings, mixed_prompts, score_replies
from tinylora_kernels import export_lora, merge, merge_fidelity, remove_adapter, trainable_vectors, unmerge
from tinylora_kernels.model.targets import target_names
from tinylora_kernels.rl import GRPOTrainer

from .design import Design, tinylora
from .methods import OPTIMIZER, adapt
from .runner import carry_out, loaded

OWN, MERGED, TIS, LORA_EXPORT = SOURCES = ("own", "merged", "merged, TIS", "LoRA export")
NUMBERS = 13
RATES = (0.0003, 0.001, 0.003, 0.01)
KEY = ("rollouts", "lr", "seed", "steps", "samples")
COLUMNS = [
    *KEY, "prompts", "numbers", "test", "test_sampled", "test_merged", "test_merged_sampled", "survived",
    "reward_first5", "reward_last5", "tis_weight_mean", "moved", *environment.describe(),
]  # fmt: skip


@dataclass(frozen=True)
class RolloutRun:
    design: Design
    source: str
    rate: float
    seed: int
    size: int = 1

    @property
    def label(self) -> str:
        return f"rollouts: {self.source}"

    def described(self) -> dict[str, str]:
        """The columns that are known before it has run, as they stand in the file."""
        settings = self.design.settings
        values = (self.source, f"{self.rate:.5g}", self.seed, settings.steps, settings.samples)
        return dict(zip(KEY, map(str, values), strict=True))


def run(design: Design, path: Path, processes: int) -> list[dict]:
    """Every source, rate and seed; rows that are in the file are not run again."""
    wanted = [
        RolloutRun(design, source, rate, seed) for source in SOURCES for rate in RATES for seed in design.seeds
    ]
    held = {tuple(row[name] for name in KEY) for row in table.read(path)}
    left = [unit for unit in wanted if tuple(unit.described().values()) not in held]
    carry_out(left, execute, path, COLUMNS, processes, "rollouts from other weights")
    rows = {tuple(row[name] for name in KEY): row for row in table.read(path)}
    return [rows[tuple(unit.described().values())] for unit in wanted]


def execute(unit: RolloutRun) -> list[dict]:
    """Train once with rollouts from this source; score the exact model and the merged one."""
    design, settings = unit.design, unit.design.settings
    base, problems = loaded(design.model, design.task)
    model = replace(base, module=copy.deepcopy(base.module).bfloat16())
    modules = len(target_names(model.module, PROJECTIONS))
    adapt(model.module, tinylora(NUMBERS, modules), seed=unit.seed)
    trainer = GRPOTrainer(model.module, group_size=settings.samples, lr=unit.rate, **OPTIMIZER)
    generator = torch.Generator().manual_seed(unit.seed)
    training = problems.training(unit.seed)
    rewards, weights = [], [1.0]
    for _ in range(settings.steps):
        batch = list(islice(training, settings.prompts))
        reward, metrics = step(model, trainer, problems, batch, settings, unit.source, generator)
        rewards.append(reward)
        weights += [metrics["tis_weight_mean"]] if metrics else []
    test = problems.held_out[: design.held_out]
    exact = evaluate(model, test, settings.temperature, problems.max_new_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that much is lost is what this measures
        survived = merge_fidelity(model.module).survived
    merge(model.module)
    merged = evaluate(model, test, settings.temperature, problems.max_new_tokens)
    vector = torch.cat([v.detach() for v in trainable_vectors(model.module)])
    return [
        unit.described()
        | environment.describe()
        | {
            "prompts": settings.prompts, "numbers": NUMBERS,
            "test": exact.greedy.accuracy, "test_sampled": exact.sampled.accuracy,
            "test_merged": merged.greedy.accuracy, "test_merged_sampled": merged.sampled.accuracy,
            "survived": survived, "reward_first5": mean(rewards[:5]), "reward_last5": mean(rewards[-5:]),
            "tis_weight_mean": mean(weights), "moved": vector.norm().item(),
        }
    ]  # fmt: skip


def step(
    model: LanguageModel, trainer: GRPOTrainer, task: Task, batch: list[Problem], settings: Settings, source: str,
    generator: torch.Generator,
) -> tuple[float, dict | None]:  # fmt: skip
    """One GRPO step on rollouts from a source; the mean reward, and the trainer's metrics where it learned."""
    prompts = [model.encode(problem.prompt) for problem in batch]
    with rollout_model(model, source) as sampler:
        found = generate(sampler, prompts, [settings.temperature] * settings.samples, task.max_new_tokens, generator)
        rewards = score_replies(model, batch, found)
        mixed = mixed_prompts(rewards, settings.samples)
        if not len(mixed):
            return rewards.mean().item(), None
        kept, chosen = found.select_prompts(mixed), [prompts[i] for i in mixed.tolist()]
        rollout = None
        if source == TIS:
            with torch.no_grad():
                rollout = completion_log_probs(sampler, chosen, kept, settings.temperature)
    log_probs = completion_log_probs(model, chosen, kept, settings.temperature)
    metrics = trainer.training_step(
        log_probs, None, rewards.view(-1, settings.samples)[mixed].flatten(),
        mask=kept.mask, rollout_log_probs=rollout,
    )  # fmt: skip
    return rewards.mean().item(), metrics


@contextlib.contextmanager
def rollout_model(model: LanguageModel, source: str) -> Iterator[LanguageModel]:
    """The model that samples; the trained one is as it was afterwards."""
    if source == OWN:
        yield model
    elif source in (MERGED, TIS):
        merge(model.module)
        try:
            yield model
        finally:
            unmerge(model.module)
    else:
        yield replace(model, module=exported(model))


def exported(model: LanguageModel) -> torch.nn.Module:
    """The base with the LoRA that export_lora writes, as PEFT loads it."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "lora")
        export_lora(model.module, directory)
        base = copy.deepcopy(model.module)
        remove_adapter(base)
        return PeftModel.from_pretrained(base, directory).eval()
