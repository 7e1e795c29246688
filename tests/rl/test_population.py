"""A population trained in one batch ends where its members end alone."""
import copy

import pytest
import torch

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.bank.bank import AdapterBank
from tinylora_kernels.rl import (
    GRPOTrainer,
    PopulationAdam,
    PopulationGRPO,
    PopulationSFT,
    SFTTrainer,
    token_log_probs,
)

RATES = {"slow": 1e-3, "fast": 3e-2, "frozen": 0.0}
OPTIONS = dict(group_size=4, kl_coeff=0.0, clip_eps=0.2)


def adapted():
    config = TinyLoRAConfig(trainable_dim=3, n_tie=6, target_modules=TARGETS, cache=False, init="uniform")
    return apply_tiny_lora(tiny_decoder(), config)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 17, (8, 6), generator=generator)
    return tokens, (tokens[:, 1:] % 3 == 0).float().mean(1), torch.rand(8, 5, generator=generator) < 0.8


def population(model, **options):
    bank = AdapterBank(model, len(RATES), trainable=True)
    for name in RATES:
        bank.add(name, torch.stack([v.detach() for v in trainable_vectors(model)]))
    return bank, PopulationGRPO(bank, RATES, **OPTIONS, **options)


@pytest.mark.parametrize("options", [{}, dict(max_grad_norm=1e-3, weight_decay=0.1)], ids=["plain", "clipped, decayed"])
def test_a_sweep_in_one_run_equals_its_runs_one_after_another(options):
    bank, trainer = population(adapted(), **options)
    model = bank.model
    for step in range(4):
        tokens, rewards, mask = batch(step)
        present = [name for name in RATES if not (name == "slow" and step == 2)]  # one sits a step out
        adapters = [name for name in present for _ in range(8)]
        with bank.use(adapters):
            inputs = tokens.repeat(len(present), 1)
            log_probs = token_log_probs(model(inputs[:, :-1]), inputs[:, 1:])
            trainer.training_step(
                adapters, log_probs, None, rewards.repeat(len(present)), mask=mask.repeat(len(present), 1)
            )
    for name, rate in RATES.items():
        alone = adapted()
        single = GRPOTrainer(alone, lr=rate, **OPTIONS, **options)
        for step in range(4):
            if name == "slow" and step == 2:
                continue
            tokens, rewards, mask = batch(step)
            single.training_step(token_log_probs(alone(tokens[:, :-1]), tokens[:, 1:]), None, rewards, mask=mask)
        expected = torch.stack([v.detach() for v in trainable_vectors(alone)])
        torch.testing.assert_close(bank.vectors(name), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(bank.vectors("fast"), bank.vectors("slow"))


def test_supervised_runs_in_one_batch_equal_those_runs_one_after_another():
    model = adapted()
    bank = AdapterBank(model, len(RATES), trainable=True)
    for name in RATES:
        bank.add(name, torch.stack([v.detach() for v in trainable_vectors(model)]))
    trainer = PopulationSFT(bank, RATES, max_grad_norm=0.1)
    adapters = [name for name in RATES for _ in range(8)]
    for step in range(3):
        tokens, _, mask = batch(step)
        inputs = tokens.repeat(len(RATES), 1)
        with bank.use(adapters):
            log_probs = token_log_probs(model(inputs[:, :-1]), inputs[:, 1:])
            together = trainer.training_step(adapters, log_probs, mask.repeat(len(RATES), 1))
    for name, rate in RATES.items():
        alone = adapted()
        single = SFTTrainer(alone, lr=rate, max_grad_norm=0.1)
        for step in range(3):
            tokens, _, mask = batch(step)
            metrics = single.training_step(token_log_probs(alone(tokens[:, :-1]), tokens[:, 1:]), mask)
        expected = torch.stack([v.detach() for v in trainable_vectors(alone)])
        torch.testing.assert_close(bank.vectors(name), expected, rtol=1e-4, atol=1e-6)
        assert together[name]["tokens"] == metrics["tokens"]
        assert together[name]["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    with pytest.raises(ValueError, match="adapters: expected one a completion"):
        trainer.training_step(adapters[1:], log_probs)


def test_bad_input_names_the_adapter_and_moves_none():
    bank, trainer = population(adapted())
    before = {name: bank.vectors(name) for name in RATES}
    tokens, rewards, mask = batch(0)
    adapters = ["fast"] * 4 + ["slow"] * 4
    with bank.use(adapters):
        log_probs = token_log_probs(bank.model(tokens[:, :-1]), tokens[:, 1:])
        with pytest.raises(ValueError, match="adapter 'slow': rewards: 4 of 4 are not finite"):
            trainer.training_step(adapters, log_probs, None, rewards.index_fill(0, torch.arange(4, 8), float("nan")))
        with pytest.raises(ValueError, match=r"adapters: expected one a completion \[8\], found 3"):
            trainer.training_step(adapters[:3], log_probs, None, rewards)
        message = "adapter 'fast': rewards: 6 completions are not divisible by group_size 4"
        with pytest.raises(ValueError, match=message):
            trainer.training_step(["fast"] * 6 + ["slow"] * 2, log_probs, None, rewards)
    for name, vectors in before.items():
        assert torch.equal(bank.vectors(name), vectors)


def test_a_gradient_that_is_not_finite_moves_nobody():
    bank, _ = population(adapted())
    optimizer = PopulationAdam(bank, RATES)
    before = {name: bank.vectors(name) for name in RATES}
    for table in bank.parameters():
        table.grad = torch.ones_like(table)
    bank.parameters()[0].grad[bank.slot("slow"), 0] = float("inf")
    with pytest.raises(ValueError, match="adapter 'slow': its gradient is not finite"):
        optimizer.step(["fast", "slow"])
    assert all(torch.equal(bank.vectors(name), v) for name, v in before.items())
    with pytest.raises(KeyError, match="'unknown'"):
        optimizer.step(["unknown"])
    optimizer.step(["fast"])
    assert not torch.equal(bank.vectors("fast"), before["fast"])


def test_a_frozen_bank_cannot_be_trained():
    with pytest.raises(ValueError, match="trainable=True"):
        PopulationAdam(AdapterBank(adapted(), 2))


def test_optimizer_state_survives_a_copy():
    bank, _ = population(adapted())
    optimizer = PopulationAdam(bank, RATES)
    for table in bank.parameters():
        table.grad = torch.ones_like(table)
    optimizer.step(["fast"])
    state = copy.deepcopy(optimizer.state_dict())
    fresh = PopulationAdam(bank, RATES)
    fresh.load_state_dict(state)
    assert fresh.state_dict()["state"][0]["step"].tolist() == state["state"][0]["step"].tolist() == [0.0, 1.0, 0.0]
