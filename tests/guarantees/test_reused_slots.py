"""The adapter in a reused slot of a trainable bank is trained as if nobody had been there before."""
from __future__ import annotations

import copy
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


# States that are saved and loaded


def resumed(bank, state=None) -> PopulationSFT:
    trainer = PopulationSFT(bank, lr=3e-2)
    if state is not None:
        trainer.optimizer.load_state_dict(state)
    return trainer


def moved_to(old: AdapterBank, new: AdapterBank, names) -> AdapterBank:
    for name in names:
        new.add(name, old.vectors(name))
    return new


WAYS = {  # bank before -> bank after, of the same adapters a and b
    "the same bank": lambda bank: bank,
    "a new one": lambda bank: moved_to(bank, trainable_bank(2), ["a", "b"]),
    "other slots": lambda bank: moved_to(bank, trainable_bank(2), ["b", "a"]),
    "a larger one": lambda bank: moved_to(bank, trainable_bank(7, names=["c", "d", "e"]), ["b", "a"]),
    "a reused slot": lambda bank: moved_to(bank, reused_bank(), ["b", "a"]),
}


def reused_bank() -> AdapterBank:
    bank = trainable_bank(3, names=["x", "y"])
    train(bank, PopulationSFT(bank, lr=3e-2), ["x", "y"], 1)
    bank.remove("x")
    bank.remove("y")
    return bank


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("through", ["memory", "file"])
@pytest.mark.parametrize("slots", ["fresh", "reused"])
def test_a_population_goes_on_by_its_names(slots, through, way, tmp_path):
    def start():
        bank = reused_bank() if slots == "reused" else trainable_bank(3)
        bank.add("a", START)
        bank.add("b")
        trainer = resumed(bank)
        train(bank, trainer, ["a", "b"], 3)
        return bank, trainer

    whole, trainer = start()
    train(whole, trainer, ["a", "b"], 3, first=3)
    bank, trainer = start()
    state = copy.deepcopy(trainer.optimizer.state_dict())
    if through == "file":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    bank = WAYS[way](bank)
    train(bank, trainer := resumed(bank, state), ["a", "b"], 3, first=3)
    for name in ("a", "b"):
        assert torch.equal(bank.vectors(name), whole.vectors(name))
        assert float(trainer.optimizer.state[bank.parameters()[0]]["step"][bank.slot(name)]) == 6


@pytest.mark.parametrize("when", ["saved, then changed, then loaded", "loaded, then changed", "changed, then saved"])
def test_a_state_is_not_the_next_ones(when):
    results = []
    for fresh in (False, True):
        bank = trainable_bank(2, names=["a", "b"])
        trainer = resumed(bank)
        train(bank, trainer, ["a", "b"], 3)
        state = copy.deepcopy(trainer.optimizer.state_dict())
        if when == "loaded, then changed":
            trainer = resumed(bank, state)
        bank.remove("a")
        bank.add("c", START)
        if when == "changed, then saved":  # before any step of c's
            state = copy.deepcopy(trainer.optimizer.state_dict())
        if when != "loaded, then changed":
            trainer = resumed(bank, state)
        if fresh:
            for table in bank.parameters():
                for kept in trainer.optimizer.state[table].values():
                    kept[0] = 0
        train(bank, trainer, ["c", "b"], 3, first=3)
        results.append([bank.vectors("c"), bank.vectors("b"), trainer.optimizer.state[bank.parameters()[0]]["step"]])
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))
    assert results[0][2].tolist() == [3, 6]


def test_a_state_without_names_is_taken_slot_by_slot():
    bank = reused_bank()
    bank.add("a")
    bank.add("b")
    trainer = resumed(bank)
    train(bank, trainer, ["a", "b"], 2)
    state = copy.deepcopy(trainer.optimizer.state_dict())
    del state["adapters"]
    with pytest.warns(UserWarning, match="^population state: it does not say whose its rows are; they are taken slot"):
        trainer = resumed(bank, state)
    train(bank, trainer, ["a", "b"], 1)
    assert trainer.optimizer.state[bank.parameters()[0]]["step"].tolist() == [3, 3, 0]


BROKEN = {
    "no state": lambda s: s.clear(), "no groups": lambda s: s.update(param_groups=3),
    "two groups": lambda s: s["param_groups"].append(s["param_groups"][0]),
    "other settings": lambda s: s["param_groups"][0].pop("betas"),
    "other tables": lambda s: s["param_groups"][0]["params"].pop(),
    "a table too many": lambda s: s["state"].update({9: s["state"][0]}),
    "another optimizer": lambda s: s["state"][0].pop("exp_avg"), "a scalar": lambda s: s["state"][0].update(step=1.0),
    "a width": lambda s: s["state"][0].update(exp_avg=torch.zeros(3, 2)),
    "too few rows": lambda s: s["state"][0].update(exp_avg=torch.zeros(1, 3)),
    "NaN": lambda s: s["state"][0]["exp_avg_sq"].fill_(float("nan")),
    "names in a list": lambda s: s.update(adapters=["a", "b"]), "no slots": lambda s: s.update(adapters={"a": "0"}),
    "a slot below": lambda s: s.update(adapters={"a": -1}),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(how):
    bank = trainable_bank(names=["a", "b"])
    trainer = resumed(bank)
    train(bank, trainer, ["a", "b"], 2)
    state, before = copy.deepcopy(trainer.optimizer.state_dict()), copy.deepcopy(trainer.optimizer.state_dict())
    BROKEN[how](state)
    with pytest.raises(ValueError, match="^population state: ") as error:
        trainer.optimizer.load_state_dict(state)
    after = trainer.optimizer.state_dict()
    assert "\n" not in str(error.value) and after["param_groups"] == before["param_groups"]
    for index, slots in before["state"].items():
        assert all(torch.equal(after["state"][index][name], value) for name, value in slots.items())


@pytest.mark.parametrize("changed", ["before", "after"])
@pytest.mark.parametrize("kind", ["SGD", *SHARED])
def test_what_optimizers_of_torch_load_does_not_say_whose_it_is(kind, changed):
    """So it counts as the last one's where a slot has changed hands: begun again, or refused."""
    make = SHARED.get(kind, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    bank = trainable_bank(2, names=["a", "b"])
    optimizer = make(bank.parameters())
    step_of(bank, optimizer, ["a", "b"])
    state = copy.deepcopy(optimizer.state_dict())
    loaded = make(bank.parameters())
    if changed == "after":
        loaded.load_state_dict(state)
    bank.remove("a")
    bank.add("c", START)
    if changed == "before":
        loaded.load_state_dict(state)
    if kind == "SGD":
        before = bank.vectors("c")
        with bank.use(["c", "b"]):
            bank.model(TOKENS[0, :2]).square().mean().backward()
        slope = torch.stack([table.grad[0] for table in bank.parameters()])
        loaded.step()
        assert torch.allclose(bank.vectors("c"), before - 1e-3 * slope) and slope.any()
    else:
        with pytest.raises(RuntimeError, match="or make the optimizer again after bank.add and load no state$"):
            step_of(bank, loaded, ["c", "b"])
