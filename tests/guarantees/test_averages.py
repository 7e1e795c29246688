"""Accumulated, a step is that of the whole batch, however its tokens are dealt out; and nothing counts as zero."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    GRPOTrainer,
    SFTTrainer,
    TinyLoRAConfig,
    apply_tiny_lora,
    token_log_probs,
    trainable_vectors,
)
from tinylora_kernels.rl import PopulationGRPO, PopulationSFT

WORDS, LENGTH = 17, 7
TOKENS = torch.randint(0, WORDS, (12, LENGTH), generator=torch.Generator().manual_seed(0))
REWARDS = torch.rand(12, generator=torch.Generator().manual_seed(1))
LENGTHS = {  # tokens selected in each sequence
    "equal": [4] * 12, "unequal": [1, 6, 2, 5, 6, 6, 1, 1, 1, 1, 3, 2], "one long": [6] + [1] * 11,
    "none in the first": [0] * 4 + [3, 1, 2, 6, 4, 2, 1, 1], "none in the last": [5, 1, 2, 3, 1, 1, 1, 1] + [0] * 4,
    "none in some": [0, 3, 0, 1, 6, 0, 0, 2, 4, 0, 1, 0], "one at all": [0] * 9 + [1, 0, 0], "none at all": [0] * 12,
}  # fmt: skip
DEALS = [(4, 4, 4), (8, 4), (4, 8), (2, 10), (2, 2, 2, 2, 2, 2), (12,)]
LOSSES = {
    "grpo": {"loss_type": "grpo"}, "dapo": {"loss_type": "dapo"}, "kl": {"loss_type": "dapo", "kl_coeff": 0.3},
    "dr_grpo": {"loss_type": "dr_grpo", "max_tokens": LENGTH, "scale_rewards": False}, "sums": {},
    "tis": {"loss_type": "dapo", "tis_cap": 1.1},
}  # fmt: skip


def model_of() -> nn.Module:
    config = TinyLoRAConfig(trainable_dim=3, n_tie=5, target_modules=TARGETS, cache=False, init="uniform")
    return apply_tiny_lora(tiny_decoder(vocabulary=WORDS), config, progress=False).double()


def selected(lengths) -> torch.Tensor:
    return torch.arange(LENGTH - 1) < torch.tensor(lengths).unsqueeze(1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def moved(trainer_of, step, deal) -> torch.Tensor:
    """How far one optimizer step moves v, the batch dealt out to micro-batches of these sizes."""
    model = model_of()
    before = torch.cat([v.detach().clone() for v in trainable_vectors(model)])
    trainer = trainer_of(model, optimizer=sgd, accumulation_steps=len(deal))
    for rows in torch.arange(12).split(deal):
        metrics = step(trainer, model, rows)
        assert all(np.isfinite(value) for value in metrics.values())
    assert trainer.steps == 1 and all(p.grad is None for p in trainer.parameters)
    return before - torch.cat([v.detach() for v in trainable_vectors(model)])


def same(found: torch.Tensor, truth: torch.Tensor) -> None:
    assert (found - truth).norm() <= 1e-6 * truth.norm() + 1e-12


def log_probs_of(model, rows):
    return token_log_probs(model(TOKENS[rows])[:, :-1], TOKENS[rows, 1:])


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("form", ["log_probs", "labels"])
def test_sft(form, lengths, deal):
    mask = selected(LENGTHS[lengths])

    def step(trainer, model, rows):
        if form == "log_probs":
            return trainer.training_step(log_probs_of(model, rows), mask[rows])
        labels = TOKENS[rows].masked_fill(~torch.cat([mask[rows][:, :1], mask[rows]], 1), -100)
        return trainer.training_step(logits=model(TOKENS[rows]), labels=labels)

    model = model_of()  # - sum log p / tokens of the whole batch, by torch alone
    logits, targets = model(TOKENS)[:, :-1].log_softmax(-1), TOKENS[:, 1:].unsqueeze(2)
    kept = logits.gather(2, targets).squeeze(2)[mask]
    (-kept.sum() / max(len(kept), 1)).backward()
    same(moved(SFTTrainer, step, deal), torch.cat([v.grad for v in trainable_vectors(model)]))


@pytest.mark.parametrize("deal", DEALS)
def test_sft_of_whole_sequences(deal):
    def step(trainer, model, rows):
        return trainer.training_step(log_probs_of(model, rows).sum(1))

    same(moved(SFTTrainer, step, deal), moved(SFTTrainer, step, (12,)))


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_grpo(loss, lengths, deal):
    mask, generator = selected(LENGTHS[lengths]), torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(12, LENGTH - 1, generator=generator, dtype=torch.float64)

    def trainer_of(model, **options):
        return GRPOTrainer(model, group_size=2, **LOSSES[loss], **options)

    def step(trainer, model, rows):
        log_probs = log_probs_of(model, rows)
        old = log_probs.detach() + noise[rows]
        if loss == "sums":
            return trainer.training_step(log_probs.sum(1), old.sum(1), REWARDS[rows])
        others = {"kl": {"ref_log_probs": old - 0.1}, "tis": {"rollout_log_probs": old - 0.2}}.get(loss, {})
        return trainer.training_step(log_probs, old, REWARDS[rows], mask=mask[rows], **others)

    truth = moved(trainer_of, step, (12,))
    same(moved(trainer_of, step, deal), truth)
    if not any(LENGTHS[lengths]) and loss != "sums":
        assert not truth.any()


@pytest.mark.parametrize("trainer", [SFTTrainer, GRPOTrainer])
def test_clipped_and_by_adam(trainer):
    """What is clipped and stepped is the gradient of the whole batch; the norm that is told is of it, too."""
    mask, results = selected(LENGTHS["unequal"]), []
    options = {"group_size": 2, "loss_type": "dapo"} if trainer is GRPOTrainer else {}
    for deal in ((2, 10), (12,)):
        model = model_of()
        one = trainer(model, lr=0.1, max_grad_norm=1e-3, accumulation_steps=len(deal), **options)
        for rows in torch.arange(12).split(deal):
            given = (None, REWARDS[rows]) if trainer is GRPOTrainer else ()
            metrics = one.training_step(log_probs_of(model, rows), *given, mask=mask[rows])
        results.append((torch.cat([v.detach() for v in trainable_vectors(model)]), metrics["grad_norm"]))
    same(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)


def test_windows_do_not_mix_and_a_failure_leaves_them_as_they_were():
    mask = selected(LENGTHS["unequal"])
    truth = None
    for faults in (False, True):
        model = model_of()
        trainer = SFTTrainer(model, optimizer=sgd, accumulation_steps=2)
        for _ in range(2):
            for rows in torch.arange(12).split((3, 9)):
                if faults:
                    with pytest.raises(ValueError, match="not finite"):
                        trainer.training_step(log_probs_of(model, rows) * torch.inf, mask[rows])
                trainer.training_step(log_probs_of(model, rows), mask[rows])
        found = torch.cat([v.detach() for v in trainable_vectors(model)])
        truth = found if truth is None else truth
        assert trainer.steps == 2 and torch.equal(found, truth)


def test_completions_of_no_length():
    model = model_of()
    empty = log_probs_of(model, torch.arange(4))[:, :0]
    metrics = GRPOTrainer(model, 2, optimizer=sgd).training_step(empty, None, REWARDS[:4])
    assert SFTTrainer(model, optimizer=sgd).training_step(log_probs_of(model, torch.arange(4))[:, :0])["tokens"] == 0
    assert metrics["loss"] == metrics["grad_norm"] == 0 and metrics["steps"] == 1
    with pytest.raises(ValueError, match=r"^log_probs: expected non-empty \[B\] or \[B, T\], found \[0, 3\]"):
        SFTTrainer(model).training_step(log_probs_of(model, torch.arange(4))[:0, :3])


@pytest.mark.parametrize("population", [PopulationSFT, PopulationGRPO])
def test_an_adapter_of_a_population_without_a_token_counts_as_zero(population):
    model = model_of()
    bank = AdapterBank(model, 2, trainable=True, names=["a", "b"])
    mask = selected([0, 0, 3, 6])
    adapters = ["a", "a", "b", "b"]
    with bank.use(adapters):
        rewards = (None, REWARDS[:4].tolist()) if population is PopulationGRPO else ()
        options = {"group_size": 2} if population is PopulationGRPO else {}
        trainer = population(bank, lr=0.1, **options)
        metrics = trainer.training_step(adapters, log_probs_of(model, torch.arange(4)), *rewards, mask=mask)
    assert metrics["a"]["loss"] == 0 and metrics["a"]["grad_norm"] == 0 and not bank.vectors("a").any()
    assert bank.vectors("b").any()


class Reward:
    pass


NO_REWARDS = {
    "None among them": ([1.0, None, 0.0, None], "found None at 1 .2 of 4.; give a number, or leave its whole group"),
    "None alone": ([None] * 4, "found None at 0 .4 of 4."), "a tuple": ((None, 1, 1, 1), "found None at 0 .1 of 4."),
    "not given": (None, "found a NoneType"), "words": (["good"] * 4, "found a list"), "a word": ("1.0", "found a str"),
    "objects": ([Reward()] * 4, "found a list"), "a dict": ({0: 1.0}, "found a dict"),
    "NumPy's None": (np.array([1.0, None, 0, 1]), "found a ndarray"), "ragged": ([[1.0], [1.0, 2.0]], "found a list"),
    "complex": ([1j, 0, 1, 0], "found complex numbers"), "huge": ([10**400, 0, 0, 0], "found a list"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_REWARDS)
def test_rewards_that_are_no_numbers(kind):
    rewards, found = NO_REWARDS[kind]
    model = model_of()
    before = [v.detach().clone() for v in trainable_vectors(model)]
    bank = AdapterBank(model_of(), 1, trainable=True, names=["a"])
    expected = f"rewards: expected one number per completion, {found}"
    with pytest.raises(ValueError, match=f"^{expected}") as error:
        GRPOTrainer(model, 2).training_step(log_probs_of(model, torch.arange(4)), None, rewards)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=expected), bank.use(["a"] * 4):
        log_probs = log_probs_of(bank.model, torch.arange(4))
        PopulationGRPO(bank, group_size=2).training_step(["a"] * 4, log_probs, None, rewards)
    assert all(torch.equal(a, b) for a, b in zip(before, trainable_vectors(model), strict=True))


FORMS = [
    [1, 0, 0, 1], (1.0, 0.0, 0.0, 1.0), [True, False, False, True], np.array([1, 0, 0, 1], dtype=np.int8),
    np.array([1, 0, 0, 1.0]), [np.float32(1), 0, 0, 1], [torch.tensor(1.0), 0, 0, 1], torch.tensor([1, 0, 0, 1]),
    torch.tensor([1, 0, 0, 1], dtype=torch.float16), torch.tensor([True, False, False, True]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_rewards_in_any_form(number):
    def step(rewards):
        return lambda trainer, model, rows: trainer.training_step(log_probs_of(model, torch.arange(4)), None, rewards)

    def trainer_of(model, **options):
        return GRPOTrainer(model, group_size=2, **options)

    truth = moved(trainer_of, step([1.0, 0.0, 0.0, 1.0]), (12,))
    assert torch.equal(moved(trainer_of, step(FORMS[number]), (12,)), truth)
    assert truth.any()
