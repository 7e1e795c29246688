"""The adapter in a reused slot of a trainable bank is trained as if nobody had been there before."""
from __future__ import annotations

import gc

import pytest
import torch

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora, token_log_probs
from tinylora_kernels.rl import PopulationAdam, PopulationGRPO, PopulationSFT

TOKENS = torch.randint(0, 17, (6, 8, 6), generator=torch.Generator().manual_seed(0))
REWARDS = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
OPTIONS = {
    "plain": {}, "clipped, decayed": {"max_grad_norm": 1e-2, "weight_decay": 0.1}, "slow": {"betas": (0.99, 0.9999)}
}  # fmt: skip


def trainable_bank(capacity: int = 3, **options) -> AdapterBank:
    config = TinyLoRAConfig(trainable_dim=3, n_tie=5, target_modules=TARGETS, cache=False)
    model = apply_tiny_lora(tiny_decoder(), config, progress=False)
    return AdapterBank(model, capacity, trainable=True, **options)


START = 0.1 * torch.randn(3, 3, generator=torch.Generator().manual_seed(5))  # 14 modules in groups of 5


def train(bank, trainer, names, steps, first=0) -> None:
    for step in range(first, first + steps):
        adapters = [name for name in names for _ in range(8)]
        tokens = TOKENS[step].repeat(len(names), 1)
        with bank.use(adapters):
            log_probs = token_log_probs(bank.model(tokens)[:, :-1], tokens[:, 1:])
            if isinstance(trainer, PopulationGRPO):
                trainer.training_step(adapters, log_probs, None, REWARDS[step].repeat(len(names)))
            else:
                trainer.training_step(adapters, log_probs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("population", [PopulationSFT, PopulationGRPO])
@pytest.mark.parametrize("own_seeds", [False, True])
@pytest.mark.parametrize("name", ["other", "first"])  # the same name again is another adapter, too
def test_a_slot_that_is_reused(name, own_seeds, population, options):
    results = []
    for reused in (True, False):
        bank = trainable_bank(own_seeds=own_seeds)
        trainer = population(bank, lr=3e-2, **OPTIONS[options])
        seed = {"seed": 9} if own_seeds else {}
        if reused:
            assert bank.add("first") == 0
            bank.add("stays")
            train(bank, trainer, ["first", "stays"], 3)
            bank.remove("first")
        assert bank.add(name, START, **seed) == 0
        train(bank, trainer, [name], 3, first=3)
        results.append(bank.vectors(name))
    assert torch.equal(*results)


def test_the_others_keep_their_moments():
    results = []
    for reused in (True, False):
        bank = trainable_bank(names=["a", "b"])
        trainer = PopulationSFT(bank, lr=3e-2)
        train(bank, trainer, ["a", "b"], 3)
        if reused:
            bank.remove("a")
            bank.add("c")
        train(bank, trainer, ["b"], 3, first=3)
        results.append(bank.vectors("b"))
    assert torch.equal(*results)


def test_changing_an_adapters_numbers_is_not_changing_hands():
    bank = trainable_bank(names=["a"])
    trainer = PopulationSFT(bank)
    train(bank, trainer, ["a"], 2)
    bank.set("a", bank.vectors("a"))
    train(bank, trainer, ["a"], 1)
    assert float(trainer.optimizer.state[bank.parameters()[0]]["step"][0]) == 3


def test_a_gradient_that_waits_is_not_the_next_ones():
    bank = trainable_bank(names=["a", "b"])
    with bank.use(["a", "b"]):
        bank.model(TOKENS[0, :2]).square().sum().backward()
    assert all(table.grad[0].any() and table.grad[1].any() for table in bank.parameters())
    kept = [table.grad[1].clone() for table in bank.parameters()]
    bank.remove("a")
    bank.add("c")
    assert not any(table.grad[0].any() for table in bank.parameters())
    assert all(torch.equal(table.grad[1], rows) for table, rows in zip(bank.parameters(), kept, strict=True))


def step_of(bank, optimizer, names) -> None:
    with bank.use(names):
        bank.model(TOKENS[0, : len(names)]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_optimizers_that_keep_nothing_in_common_forget_too(options):
    results = []
    for reused in (True, False):
        bank = trainable_bank(2, names=["a", "b"])
        optimizer = torch.optim.SGD(bank.parameters(), lr=1e-3, **options)
        if reused:
            for _ in range(3):
                step_of(bank, optimizer, ["a", "b"])
            bank.remove("a")
            bank.add("c")
        else:
            bank.remove("a")
            bank.add("c")
        for _ in range(2):
            step_of(bank, optimizer, ["c"])
        results.append(bank.vectors("c"))
    assert torch.allclose(*results, rtol=1e-6) and results[0].any()


SHARED = {
    "Adam": lambda p: torch.optim.Adam(p), "AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p), "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p), "Adamax": lambda p: torch.optim.Adamax(p),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARED)
def test_optimizers_with_one_count_for_all_are_refused(kind):
    bank = trainable_bank(2, names=["a", "b"])
    optimizer = SHARED[kind](bank.parameters())
    step_of(bank, optimizer, ["a", "b"])
    bank.remove("a")
    bank.add("c")
    before = bank.vectors("b")
    for _ in range(2):  # not the first time alone
        with pytest.raises(RuntimeError, match=f"^{kind}: slot 0 of the bank has another adapter than it had") as error:
            step_of(bank, optimizer, ["c", "b"])
    assert "\n" not in str(error.value) and torch.equal(bank.vectors("b"), before)
    optimizer.zero_grad(set_to_none=True)
    step_of(bank, SHARED[kind](bank.parameters()), ["c", "b"])  # made again
    assert bank.vectors("c").any()


def test_optimizers_of_others_and_slots_never_used_are_left_alone():
    bank = trainable_bank(3, names=["a"])
    optimizer, other = torch.optim.Adam(bank.parameters()), torch.nn.Linear(3, 3)
    elsewhere = torch.optim.Adam(other.parameters())
    step_of(bank, optimizer, ["a"])
    bank.add("b")
    step_of(bank, optimizer, ["a", "b"])
    other(torch.ones(1, 3)).sum().backward()
    elsewhere.step()
    bank.remove("b")
    bank.add("c")
    elsewhere.step()


def test_frozen_banks_hand_on_nothing_and_nothing_is_kept_alive():
    config = TinyLoRAConfig(trainable_dim=3, n_tie=5, target_modules=TARGETS, cache=False)
    bank = AdapterBank(apply_tiny_lora(tiny_decoder(), config, progress=False), 1, names=["a"])
    bank.remove("a")
    bank.add("b")
    from tinylora_kernels.bank import tenancy

    gc.collect()
    before = len(tenancy._handed_on)
    bank = trainable_bank(1, names=["a"])
    optimizer = PopulationAdam(bank)
    bank.remove("a")
    bank.add("b")
    assert len(tenancy._handed_on) == before + len(bank.parameters())
    del bank, optimizer
    gc.collect()
    assert len(tenancy._handed_on) == before
