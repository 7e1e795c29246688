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


# What is named is what ran

NAMED = ["a", "a", "b", "b"]
RAN = {  # entries of the block, rows of what ran in it
    "others in its place": ["c"] * 4, "turned over": ["b", "b", "a", "a"], "one row": ["a", "b", "b", "b"],
    "one for all": ["b"] * 4, "bare": [None, None, "b", "b"], "nested": [["b"], ["b"], ["a"], ["a"]],
    "an adapter beside": ["a", "a", "b", "c"], "bare, one row": [None, "a", "b", "b"],
}  # fmt: skip
UNSEEN = {*RAN} - {"others in its place", "an adapter beside"}  # after the block: only adapters named have a gradient


def of_three(kind, **options):
    bank = AdapterBank(adapted(), 3, trainable=True, names=["a", "b", "c"])
    trainer = PopulationGRPO(bank, 0.1, group_size=2, **options) if kind == "grpo" else PopulationSFT(bank, 0.1)

    def step(log_probs, names=NAMED, **others):
        if kind == "grpo":
            return trainer.training_step(names, log_probs, None, [1.0, 0.0, 0.0, 1.0], **others)
        return trainer.training_step(names, log_probs, **others)

    return bank, trainer, step


def log_probs_of(bank, tokens=None):
    tokens = batch(0)[0][:4] if tokens is None else tokens
    return token_log_probs(bank.model(tokens[:, :-1]), tokens[:, 1:])


def everything(bank, trainer):
    state = trainer.optimizer.state
    kept = [{k: v.tolist() for k, v in state[table].items()} for table in bank.parameters() if state.get(table)]
    gradients = [None if p.grad is None else p.grad.tolist() for p in [*bank.parameters(), *bank.model.parameters()]]
    return [table.tolist() for table in bank.parameters()], kept, gradients


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("ran", RAN)
@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_adapters_that_did_not_run_are_not_stepped(kind, ran, inside, steps):
    bank, trainer, step = of_three(kind)
    for _ in range(steps):
        with bank.use(NAMED):
            step(log_probs_of(bank))
    before, lines = everything(bank, trainer), []
    with bank.use(torch.tensor([[bank.slot(n) for n in e] for e in RAN[ran]]) if ran == "nested" else RAN[ran]):
        log_probs = log_probs_of(bank)
        if inside:
            with pytest.raises(ValueError, match="^adapters: expected .* at row .*, as in this block") as error:
                step(log_probs)
            lines.append(str(error.value))
    if not inside and ran not in UNSEEN:
        with pytest.raises(ValueError, match="^log_probs: they depend on adapter 'c', expected") as error:
            step(log_probs)
        lines.append(str(error.value))
    assert len(lines) == (inside or ran not in UNSEEN) and not any("\n" in line for line in lines)
    assert everything(bank, trainer) == before


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_log_probs_of_no_adapter_are_one_line_and_change_nothing(kind):
    bank, trainer, step = of_three(kind)
    for p in bank.model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = everything(bank, trainer)
    with pytest.raises(ValueError, match="^log_probs: they do not depend on this bank's adapters; compute them under"):
        step(log_probs_of(bank))  # the model's own
    with pytest.raises(ValueError, match="^log_probs: no gradient flows through them"), bank.use(NAMED):
        step(log_probs_of(bank).detach())
    with pytest.raises(KeyError, match="adapter 'x': it is not in the bank"), bank.use(NAMED):
        step(log_probs_of(bank), ["a", "a", "x", "x"])
    with pytest.raises(ValueError, match="^gradient: expected one of the bank's tables, found none"):
        PopulationAdam(bank).step(["a"])
    assert everything(bank, trainer) == before


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_ways_to_call_it_that_are_right(kind):
    results, ways = [], ["inside", "after", "in another block", "in a block of more", "by ids", "[n, 1]", "permuted"]
    for way in [*ways, "of equal rows"]:
        bank, _, step = of_three(kind)
        names, tokens = NAMED, None
        entries = {"by ids": [0, 0, 1, 1], "[n, 1]": torch.tensor([[0], [0], [1], [1]]), "of equal rows": ["a", "b"]}
        if way == "of equal rows":  # taken for beams; in GRPO their advantages cancel out
            tokens = batch(0)[0][[0, 0, 1, 1]]
        with bank.use(entries.get(way, NAMED)):
            log_probs = log_probs_of(bank, tokens)
            if way in ("inside", *entries):
                step(log_probs)
        if way == "after":
            step(log_probs)
        if way == "permuted":
            with bank.use(["a"]):  # of another batch
                step(log_probs[[2, 3, 0, 1]][[2, 3, 0, 1]], names)
        if way == "in another block":
            with bank.use(["a", "b", "c"]):
                step(log_probs)
        if way == "in a block of more":
            with bank.use([*NAMED, "c", "c"]):
                step(log_probs)
        if way == "of equal rows":
            with bank.use(["a", "b"]), pytest.raises(ValueError, match="^adapters: expected adapter 'a' at row 1"):
                step(log_probs_of(bank, tokens), ["a", "b", "a", "b"])
            continue
        results.append(torch.stack([bank.vectors(name) for name in "abc"]))
    assert results[0][:2].abs().amin(-1).all() and not results[0][2].any()
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_adapters_with_nothing_to_learn_are_stepped():
    bank, trainer, step = of_three("grpo")
    with bank.use(NAMED):
        metrics = trainer.training_step(NAMED, log_probs_of(bank), None, [1.0, 1.0, 0.0, 1.0])  # a flat group
    assert metrics["a"]["grad_norm"] == 0 < metrics["b"]["grad_norm"]
    bank, _, step = of_three("sft")
    with bank.use(NAMED):
        step((log_probs_of(bank) - 1e-9).clamp(max=-1e-9) * torch.tensor([[0.0], [0.0], [1.0], [1.0]]))  # certain
    assert not bank.vectors("a").any() and bank.vectors("b").any()


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_rows_of_a_population_in_any_form_or_one_line(kind):
    mask = (torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.7).long()
    results = []
    for given in (mask, mask.tolist(), mask.numpy(), mask.bool()):
        bank, trainer, step = of_three(kind)
        with bank.use(NAMED):
            step(log_probs_of(bank), mask=given)
        results.append(bank.vectors("a"))
    assert results[0].any() and all(torch.equal(results[0], result) for result in results)
    for bad in ([[1, 0], [1]] * 2, mask[:3], mask[0], "mask", object()):
        with bank.use(NAMED), pytest.raises(ValueError, match="mask: expected") as error:
            step(log_probs_of(bank), mask=bad)
        assert "\n" not in str(error.value)
    if kind == "grpo":
        for name in ("ref_log_probs", "rollout_log_probs"):
            for bad in ([[0.0] * 5] * 4, torch.zeros(3, 5), torch.zeros(4, 4)):
                with bank.use(NAMED), pytest.raises(ValueError, match=f"{name}: expected the shape of log_probs"):
                    step(log_probs_of(bank), **{name: bad})


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
