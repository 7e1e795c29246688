"""What supervised fine-tuning imitates: the base model's own correct replies, or correct replies in a foreign style."""
from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import islice

import torch

from demo import pretrain_tiny, tiny
from demo.generation import Completions, generate
from demo.models import LanguageModel
from demo.tasks import Problem, Task
from demo.training import score_replies

COUNT = 512  # demonstrations of each kind, from the training problems
SAMPLES = 8  # of the base model for each problem
SEED = 1_000  # of the problems and of the base model's samples; runs use small seeds
PROBLEMS_AT_ONCE = 32
MOST_PROBLEMS = 1024  # asked for own correct samples before giving up on COUNT


@dataclass(frozen=True)
class Demonstration:
    prompt: list[int]
    reply: list[int]  # with the end token


def own_samples(model: LanguageModel, task: Task, temperature: float) -> list[Demonstration]:
    """Correct replies of the base model, sampled (rejection sampling), in its own style."""
    problems = task.training(SEED)
    generator = torch.Generator().manual_seed(SEED)
    kept: list[Demonstration] = []
    for _ in range(MOST_PROBLEMS // PROBLEMS_AT_ONCE):
        batch = list(islice(problems, PROBLEMS_AT_ONCE))
        prompts = [model.encode(problem.prompt) for problem in batch]
        found = generate(model, prompts, [temperature] * SAMPLES, task.max_new_tokens, generator)
        ended = found.tokens[torch.arange(len(found.mask)), found.mask.sum(dim=1) - 1] == model.end_id
        correct = (score_replies(model, batch, found) >= 1.0) & ended
        for row in correct.nonzero().squeeze(1).tolist():
            kept.append(Demonstration(prompts[row // SAMPLES], found.tokens[row][found.mask[row]].tolist()))
        if len(kept) >= COUNT:
            break
    if not kept:
        raise ValueError(f"{task.name}: the base model answered none of {MOST_PROBLEMS} problems correctly")
    return kept[:COUNT]


def foreign_demonstrations(model: LanguageModel, task: Task) -> list[Demonstration]:
    """Correct replies written by a program in a style that the base model rarely or never uses."""
    rng = random.Random(SEED)
    return [
        Demonstration(model.encode(problem.prompt), foreign_reply(model, task, problem, rng))
        for problem in islice(task.training(SEED), COUNT)
    ]


def foreign_reply(model: LanguageModel, task: Task, problem: Problem, rng: random.Random) -> list[int]:
    """Token ids of a foreign reply, end token included."""
    if task.name == "digit-sums":  # the notation of 6% of the corpus
        digits = [int(digit) for digit in re.findall(r"\d", problem.prompt)]
        return tiny.encode(pretrain_tiny.write_reply(digits, "verbose", rng))
    if task.name == "addition":
        a, b = map(int, re.findall(r"\d+", problem.prompt))
        return model.encode_text(f"{a} plus {b} makes {a + b}") + [model.end_id]
    raise ValueError(f"{task.name}: it has no demonstrations in a foreign style; digit-sums and addition do")


def as_completions(demonstrations: list[Demonstration], pad: int) -> Completions:
    """One reply a prompt, padded on the right."""
    longest = max(len(one.reply) for one in demonstrations)
    tokens = torch.tensor([one.reply + [pad] * (longest - len(one.reply)) for one in demonstrations])
    mask = torch.tensor([[True] * len(one.reply) + [False] * (longest - len(one.reply)) for one in demonstrations])
    return Completions(tokens, mask, samples=1)
