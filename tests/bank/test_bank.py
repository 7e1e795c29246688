"""Many adapters in one batch: each row as it would be alone, forward and gradient, whatever other threads do."""
import contextlib
import copy
import dataclasses
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.cases import error
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterError,
    LoRAXSConfig,
    TinyLoRAConfig,
    apply_lora_xs,
    apply_tiny_lora,
    load_adapter,
    refresh_factors,
    remove_adapter,
    save_adapter,
    trainable_vectors,
)
from tinylora_kernels.bank.bank import AdapterBank
from tinylora_kernels.linear import plan
from tinylora_kernels.model.adapted import adapted_layers


def adapted(**changes):
    config = TinyLoRAConfig(**{"trainable_dim": 3, "n_tie": 5, "target_modules": TARGETS, "cache": False, **changes})
    return apply_tiny_lora(tiny_decoder(bias=True), config)


def filled_bank(model, count=6, capacity=8, **options):
    bank = AdapterBank(model, capacity, **options)
    generator = torch.Generator().manual_seed(7)
    shape = (len(trainable_vectors(model)), trainable_vectors(model)[0].numel())
    vectors = {f"a{i}": 0.2 * torch.randn(shape, generator=generator) for i in range(count)}
    for name, v in vectors.items():
        bank.add(name, v)
    return bank, vectors


def alone(model, vectors, tokens):
    """The model with its own vectors set to one adapter's."""
    with torch.no_grad():
        for v, value in zip(trainable_vectors(model), vectors, strict=True):
            v.copy_(value)
        out = model(tokens)
        for v in trainable_vectors(model):
            v.zero_()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_row_equals_its_adapter_alone(dtype):
    model = adapted()
    bank, vectors = filled_bank(model, dtype=dtype)
    tokens = torch.randint(0, 17, (5, 4))
    batch = ["a3", None, "a0", "a3", "a5"]
    with torch.no_grad(), bank.use(batch):
        together = model(tokens)
    zeros = torch.zeros_like(vectors["a0"])
    for row, name in enumerate(batch):
        expected = alone(model, zeros if name is None else vectors[name].to(dtype).float(), tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(tokens)[1], alone(model, zeros, tokens)[1]), "outside the block the model is its own"


def test_ids_and_names_are_the_same_choice_and_rows_may_be_beams():
    model = adapted()
    bank, _ = filled_bank(model)
    tokens = torch.randint(0, 17, (2, 3)).repeat_interleave(2, 0)
    with torch.no_grad():
        with bank.use(["a1", None]):  # two prompts, two beams each
            by_name = model(tokens)
        with bank.use(torch.tensor([bank.slot("a1"), -1], dtype=torch.int32)):
            by_id = model(tokens)
        with bank.use(["a1", "a1", None, None]):
            row_by_row = model(tokens)
    assert torch.equal(by_name, by_id) and torch.equal(by_name, row_by_row)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "checkpointed"])
def test_gradients_are_those_of_each_adapter_alone(recompute):
    model = adapted()
    bank, vectors = filled_bank(model, trainable=True)
    tokens = torch.randint(0, 17, (6, 4))
    batch = ["a0", "a2", "a2", None, "a4", "a0"]
    run = (lambda t: checkpoint(model, t, use_reentrant=False)) if recompute else model
    with bank.use(batch):
        run(tokens).square().sum().backward()
    for name, value in vectors.items():
        rows = [i for i, n in enumerate(batch) if n == name]
        slot = bank.slot(name)
        if not rows:
            assert not any(table.grad[slot].any() for table in bank.parameters())
            continue
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for v, number in zip(trainable_vectors(twin), value, strict=True):
                v.copy_(number)
        twin(tokens[rows]).square().sum().backward()
        for table, v in zip(bank.parameters(), trainable_vectors(twin), strict=True):
            assert error(table.grad[slot], v.grad) < 1e-5
    assert all(v.grad is None for v in trainable_vectors(model))


def test_recomputing_outside_the_block_is_an_error_not_another_adapter():
    model = adapted()
    bank, _ = filled_bank(model, trainable=True)
    with bank.use(["a1"]):
        loss = checkpoint(model, torch.randint(0, 17, (2, 3)), use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="call backward\\(\\) inside"):
        loss.backward()


def test_add_set_remove_and_reuse():
    model = adapted()
    bank, vectors = filled_bank(model, count=3, capacity=3)
    with pytest.raises(RuntimeError, match="'more': the bank is full \\(3\\)"):
        bank.add("more")
    assert bank.names() == ["a0", "a1", "a2"] and len(bank) == 3 and "a1" in bank
    torch.testing.assert_close(bank.vectors("a1"), vectors["a1"])
    tokens = torch.randint(0, 17, (1, 3))
    with torch.no_grad(), bank.use(["a1"]):
        before = model(tokens)
        bank.remove("a1")
        bank.add("new", 2 * vectors["a1"])  # takes the slot that the open block still runs
        assert torch.equal(model(tokens), before)
    with pytest.raises(KeyError, match="'a1': it is not in the bank of 3"):
        with bank.use(["a1"]):
            pass
    with torch.no_grad(), bank.use(["new"]):
        assert not torch.equal(model(tokens), before)


@pytest.mark.parametrize("call, kind, message", [
    (lambda b: b.add("a0"), ValueError, "in the bank already"),
    (lambda b: b.add(3), ValueError, "integers are ids"),
    (lambda b: b.add("x", torch.zeros(1, 3)), ValueError, r"expected vectors \[groups, u\] = \(3, 3\), found \(1, 3\)"),
    (lambda b: b.add("x", torch.full((3, 3), float("nan"))), ValueError, "found nan"),
    (lambda b: b.add("x", seed=1), ValueError, r"'x': expected seed 0, .*, found 1; AdapterBank\(..., own_seeds=True"),
    (lambda b: b.remove("x"), KeyError, "not in the bank"),
    (lambda b: b.use([7]).__enter__(), IndexError, "adapter id 7: it is not in the bank of 6"),
    (lambda b: b.use([-2]).__enter__(), IndexError, "adapter id -2"),
    (lambda b: b.use(torch.tensor([2**40])).__enter__(), IndexError, "adapter id 1099511627776"),
    (lambda b: b.use([]).__enter__(), IndexError, "at least one entry"),
    (lambda b: AdapterBank(b.model, 2), ValueError, "found one; close it first"),
])  # fmt: skip
def test_bad_requests_are_refused(call, kind, message):
    bank, _ = filled_bank(adapted())
    with pytest.raises(kind, match=message):
        call(bank)
    assert len(bank) == 6


def test_rows_that_do_not_divide_are_refused_before_anything_is_written():
    model = adapted()
    bank, _ = filled_bank(model)
    with bank.use(["a0", "a1"]), pytest.raises(ValueError, match="expected a row for each of the 2 entries.*found 3"):
        model(torch.randint(0, 17, (3, 3)))


@pytest.fixture(params=["plan as it is", "plan in Python"])
def plans(request, monkeypatch):
    if request.param == "plan in Python":
        monkeypatch.setattr(plan, "twin", None)


def planned(model) -> int:
    return sum(layer._plan is not None for layer in adapted_layers(model).values())


@pytest.mark.parametrize("own_seeds", [False, True])
def test_a_block_is_planned_at_its_second_call_and_no_other_runs_by_its_plan(plans, own_seeds):
    model = adapted()
    bank, _ = filled_bank(model, own_seeds=own_seeds, trainable=True)
    tokens, layers = torch.randint(0, 17, (2, 3)), len(adapted_layers(model))
    found = {}
    for batch in (["a0", "a1"], ["a2", "a3"], ["a2", None]):
        with torch.no_grad(), bank.use(batch):
            found[tuple(batch)] = model(tokens)
            assert planned(model) == (layers if len(found) > 1 else 0)  # those of the block before are still there
            for _ in range(2):
                assert torch.equal(model(tokens), found[tuple(batch)])
            assert planned(model) == layers
    with bank.use(["a0", "a1"]):
        for _ in range(3):
            tables = list(bank.tables.values())
            out = model(tokens)
            torch.testing.assert_close(out.detach(), found["a0", "a1"])
            assert all(g[:2].any() and not g[2:].any() for g in torch.autograd.grad(out.square().sum(), tables))
            with torch.no_grad():  # and back
                assert torch.equal(model(tokens), found["a0", "a1"])
    with torch.no_grad():
        bare = model(tokens)
        bank.close()
        assert torch.equal(model(tokens), bare) and not torch.equal(bare, found["a0", "a1"])


def test_a_closed_bank_is_given_back():
    model = adapted()
    bank, _ = filled_bank(model)
    with torch.no_grad(), bank.use(["a0"]):
        for _ in range(3):
            model(torch.randint(0, 17, (1, 3)))
    assert planned(model)
    bank.close()
    gone = weakref.ref(bank)
    del bank
    gc.collect()
    assert gone() is None


def test_a_bare_model_and_copies_carry_no_bank():
    with pytest.raises(ValueError, match="found none"):
        AdapterBank(tiny_decoder(), 4)
    model = adapted()
    bank, _ = filled_bank(model)
    twin, tokens = copy.deepcopy(model), torch.randint(0, 17, (2, 3))
    with torch.no_grad(), bank.use(["a0"]):
        assert torch.equal(twin(tokens), alone(twin, torch.zeros(3, 3), tokens))
    bank.close()
    with pytest.raises(RuntimeError, match="bank.use: the bank was closed"), bank.use(["a0"]):
        model(tokens)
    assert torch.equal(model(tokens), twin(tokens))


def test_files_come_and_go_and_those_of_another_base_are_refused(tmp_path):
    model = adapted()
    bank, vectors = filled_bank(model)
    bank.save("a1", tmp_path / "a1.safetensors")
    bank.load("again", tmp_path / "a1.safetensors")
    assert torch.equal(bank.vectors("again"), vectors["a1"])
    alone_again = load_adapter(adapted(), tmp_path / "a1.safetensors")
    assert torch.equal(torch.stack([v.detach() for v in trainable_vectors(alone_again)]), vectors["a1"])

    other = apply_tiny_lora(tiny_decoder(seed=1, bias=True), model.layers[0].q_proj.config)
    with pytest.raises(AdapterError, match="trained on other base weights"):
        AdapterBank(other, 2).load("x", tmp_path / "a1.safetensors")
    with pytest.raises(AdapterError, match=r"seed is 0 there and 1 .*own_seeds=True\) holds adapters of any seed"):
        AdapterBank(adapted(seed=1), 2).load("x", tmp_path / "a1.safetensors")
    (tmp_path / "cut").write_bytes((tmp_path / "a1.safetensors").read_bytes()[:-1])
    with pytest.raises(AdapterError):
        bank.load("cut", tmp_path / "cut")
    assert len(bank) == 7


def filled_with_seeds(model, seeds, **options):
    bank, vectors = AdapterBank(model, 8, own_seeds=True, **options), {}
    generator = torch.Generator().manual_seed(7)
    for seed in seeds:
        vectors[f"s{seed}"] = 0.2 * torch.randn(3, 3, generator=generator)
        bank.add(f"s{seed}", vectors[f"s{seed}"], seed=seed)
    return bank, vectors


def with_vectors(model, vectors):
    with torch.no_grad():
        for v, value in zip(trainable_vectors(model), vectors, strict=True):
            v.copy_(value)
    return model


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_adapters_of_different_seeds_share_a_batch(trainable):
    model = adapted()
    bank, vectors = filled_with_seeds(model, (0, 1, 2**63), trainable=trainable)
    assert [bank.seed(name) for name in bank.names()] == [0, 1, 2**63]
    tokens = torch.randint(0, 17, (5, 4))
    batch = ["s1", None, f"s{2**63}", "s1", "s0"]
    with torch.no_grad(), bank.use(batch):
        together = model(tokens)
    for row, name in enumerate(batch):
        seed, value = (0, torch.zeros(3, 3)) if name is None else (bank.seed(name), vectors[name])
        expected = with_vectors(adapted(seed=seed), value)(tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    assert error(together[0], adapted()(tokens)[0].detach()) > 1e-2
    changed = with_vectors(adapted(seed=1), 2 * vectors["s1"])(tokens[:1])
    with torch.no_grad(), bank.use(["s1"]):
        for _ in range(3):
            assert torch.equal(model(tokens[:1]), together[:1])
        bank.set("s1", 2 * vectors["s1"])  # the open block keeps what it began with, unless the bank trains
        torch.testing.assert_close(model(tokens[:1]), changed if trainable else together[:1], rtol=1e-5, atol=1e-6)
    assert bank.seed("s1") == 1
    with torch.no_grad(), bank.use(["s1"]):
        torch.testing.assert_close(model(tokens[:1]), changed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "checkpointed"])
def test_gradients_of_adapters_of_different_seeds(recompute):
    model = adapted()
    bank, vectors = filled_with_seeds(model, (0, 5), trainable=True)
    tokens = torch.randint(0, 17, (4, 5))
    run = (lambda t: checkpoint(model, t, use_reentrant=False)) if recompute else model
    with bank.use(["s5", "s0", None, "s5"]):
        run(tokens).square().sum().backward()
    for name, rows in (("s0", [1]), ("s5", [0, 3])):
        twin = with_vectors(adapted(seed=bank.seed(name)), vectors[name])
        twin(tokens[rows]).square().sum().backward()
        for table, v in zip(bank.parameters(), trainable_vectors(twin), strict=True):
            assert error(table.grad[bank.slot(name)], v.grad) < 1e-5


def test_files_of_any_seed_come_and_go_where_seeds_are_their_own(tmp_path):
    tokens = torch.randint(0, 17, (1, 4))
    numbers = 0.2 * torch.randn(3, 3)
    expected = with_vectors(adapted(seed=9), numbers)
    save_adapter(expected, tmp_path / "nine")
    bank, _ = filled_with_seeds(adapted(), (0,))
    bank.load("nine", tmp_path / "nine")
    assert bank.seed("nine") == 9
    with torch.no_grad(), bank.use(["nine"]):
        torch.testing.assert_close(bank.model(tokens), expected(tokens), rtol=1e-5, atol=1e-6)
    bank.save("nine", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "nine").read_bytes()
    save_adapter(with_vectors(adapted(seed=9, alpha=2.0), numbers), tmp_path / "alpha")
    with pytest.raises(AdapterError, match="alpha is 2.0 there and 1.0"):
        bank.load("x", tmp_path / "alpha")


def test_seeds_of_their_own_need_a_random_projection():
    model = apply_lora_xs(tiny_decoder(), LoRAXSConfig(rank=2, target_modules=TARGETS, cache=False))
    with pytest.raises(ValueError, match="own_seeds: expected a model of apply_tiny_lora, .* found a LoRAXSConfig"):
        AdapterBank(model, 2, own_seeds=True)


def test_a_million_adapters_weigh_52_megabytes():
    model = adapted(trainable_dim=13, n_tie=100)
    bank = AdapterBank(model, 1_000_000)
    assert sum(table.nbytes for table in bank.tables.values()) == 52_000_000
    with torch.no_grad(), bank.use([None]):
        assert model(torch.randint(0, 17, (2, 3))).isfinite().all()


def test_generate_with_a_cache_and_with_beams_runs_each_prompt_with_its_adapter():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=31,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=3, n_tie=5, target_modules=TARGETS, cache=False))
    bank, vectors = filled_bank(model)
    for name in vectors:
        bank.set(name, 20 * vectors[name])  # strong enough to change what is generated
    prompts, batch = torch.randint(2, 31, (4, 5)), ["a0", "a1", None, "a0"]
    for options in (dict(num_beams=1), dict(num_beams=3)):
        call = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
        with bank.use(batch):
            together = model.generate(prompts, attention_mask=torch.ones_like(prompts), **call)
        singles = []
        for row, name in enumerate(batch):
            with bank.use([name]):
                one = prompts[row : row + 1]
                singles.append(model.generate(one, attention_mask=torch.ones_like(one), **call))
        assert torch.equal(together, torch.cat(singles))
        bare = model.generate(prompts, attention_mask=torch.ones_like(prompts), **call)
        assert not torch.equal(together, bare) and torch.equal(together[2], bare[2])


def test_threads_that_add_remove_and_switch_never_cross():
    """Four threads run batches of random adapters, bad ids among them, and three more change the bank all the time.

    A bank of few slots: one that a running batch still uses is handed to somebody else at once. Threads take turns
    every few microseconds, not every 5 ms.
    """
    model = adapted(n_tie=100, trainable_dim=1)
    bank = AdapterBank(model, 24)
    values = {f"s{i}": torch.full((1, 1), 0.02 * (i + 1)) for i in range(16)}
    for name, value in values.items():
        bank.add(name, value)
    names, tokens = list(values), torch.randint(0, 17, (1, 3))
    expected = {name: alone(model, value, tokens)[0] for name, value in values.items()}
    failures, refused, stop = [], [], threading.Event()

    def use_once_there(batch):
        while True:
            try:
                block = contextlib.ExitStack()
                block.enter_context(bank.use(batch))
                return block
            except KeyError:  # one of them is on the move
                continue

    def serve(seed):
        generator = torch.Generator().manual_seed(seed)

        def number(end):
            return int(torch.randint(0, end, (), generator=generator))

        for turn in range(40):
            pick = [names[number(16)] for _ in range(8)]
            bad = (10_000, 24, -2, 2**40, f"gone{seed}.{turn - 1}")[number(5)]
            with pytest.raises((IndexError, KeyError)):
                with bank.use([*pick[: number(8)], bad, *pick]):
                    failures.append(f"{bad} ran")
            refused.append(bad)
            passing = f"gone{seed}.{turn}"
            bank.add(passing, values[pick[0]])
            with torch.no_grad(), use_once_there([*pick, passing]):
                bank.remove(passing)  # its slot is anybody's from here on, while this batch still runs it
                out = model(tokens.expand(9, -1))
            for row, name in enumerate([*pick, pick[0]]):
                if not torch.allclose(out[row], expected[name], rtol=1e-5, atol=1e-6):
                    failures.append(name)

    def churn(label):
        turn = 0
        while not stop.is_set():
            name, value = f"{label}{turn}", torch.full((1, 1), -0.01 * (turn % 50))
            bank.add(name, -value)
            bank.set(name, value)
            if not torch.equal(bank.vectors(name), value):
                failures.append(name)
            bank.remove(name)
            turn += 1

    def move():
        """The first four adapters leave and come back all the time, to whatever slot is free."""
        generator = torch.Generator().manual_seed(99)
        while not stop.is_set():
            name = names[int(torch.randint(0, 4, (), generator=generator))]
            bank.remove(name)
            bank.add(name, values[name])

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as problem:  # pytest sees only the main thread
            failures.append(repr(problem))

    workers = [threading.Thread(target=guarded, args=(serve, i)) for i in range(4)]
    churners = [threading.Thread(target=guarded, args=args) for args in ((churn, "x"), (churn, "y"), (move,))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        for thread in (*workers, *churners):
            thread.start()
        for thread in workers:
            thread.join()
        stop.set()
        for thread in churners:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures and len(refused) == 4 * 40 and sorted(bank.names()) == sorted(names)
    assert all(torch.equal(bank.vectors(name), value) for name, value in values.items())


@pytest.mark.parametrize("own_seeds", [False, True])
def test_a_step_shows_at_once_with_and_without_gradients(plans, own_seeds):
    """A rollout in the block of its training runs what was just learned, not what the block began with."""
    model = adapted()
    bank, _ = filled_bank(model, own_seeds=own_seeds, trainable=True)
    tokens = torch.randint(0, 17, (2, 3))
    optimizer = torch.optim.SGD(bank.parameters(), 0.1)
    with bank.use(["a0", "a1"]):
        before = None
        for _ in range(4):
            with torch.no_grad():
                for _ in range(3):
                    rollout = model(tokens)
            trained = model(tokens)
            torch.testing.assert_close(rollout, trained.detach())
            assert before is None or error(rollout, before) > 1e-3
            before = rollout
            optimizer.zero_grad()
            trained.square().sum().backward()
            optimizer.step()


@pytest.mark.parametrize("own_seeds", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_slot_that_changes_hands_inside_a_block(plans, own_seeds, grad):
    model = adapted()
    tokens = torch.randint(0, 17, (2, 3))
    for trainable in (False, True):
        bank, _ = filled_bank(model, count=3, capacity=3, own_seeds=own_seeds, trainable=trainable)
        with torch.set_grad_enabled(grad), bank.use(["a0", "a1"]):
            for _ in range(3):
                before = model(tokens)
            bank.remove("a2")
            bank.add("another")
            bank.remove("a0")
            assert torch.equal(model(tokens), before)
            bank.add("b0")
            if trainable:
                with pytest.raises(RuntimeError, match="the adapter with id 0 was removed inside the block"):
                    model(tokens)
            else:
                assert torch.equal(model(tokens), before)
        bank.close()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_seeds_of_their_own_follow_new_factors(trainable):
    """P' = S P S^-1 is of the weights that the model has."""
    model = adapted()
    bank, vectors = filled_with_seeds(model, (0, 7), trainable=trainable)
    tokens = torch.randint(0, 17, (2, 4))
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            left, _, right = torch.linalg.svd(torch.randn_like(layer.base.weight), full_matrices=False)
            layer.base.weight.copy_((left * torch.logspace(0, -2, left.shape[1])) @ right)
    refresh_factors(model, progress=False)
    with torch.no_grad():
        with bank.use(["s7", "s0"]):
            found = model(tokens)
            before = found.clone()
        for row, name in enumerate(["s7", "s0"]):
            twin = copy.deepcopy(remove_adapter(copy.deepcopy(model)))
            config = dataclasses.replace(next(iter(adapted_layers(model).values())).config, seed=bank.seed(name))
            expected = with_vectors(apply_tiny_lora(twin, config, progress=False), vectors[name])(tokens[[row]])
            torch.testing.assert_close(found[[row]], expected, rtol=1e-4, atol=1e-5)
        with bank.use(["s7", "s0"]):
            model.double().float()  # moved, and the same
            assert torch.equal(model(tokens), before)
            for layer in adapted_layers(model).values():
                layer.base.weight.mul_(torch.linspace(0.5, 1, layer.base.weight.shape[1]))
            refresh_factors(model, progress=False)
            with pytest.raises(RuntimeError, match="q_proj: its factors were computed again while a block is open"):
                model(tokens)
            with pytest.raises(RuntimeError, match="close it first"), bank.use(["s7"]):
                pass


def test_a_model_that_was_put_into_another_one_goes_by_the_names_it_has_now(tmp_path):
    class Policy(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    config = TinyLoRAConfig(target_modules=["q_proj"], cache=False)
    policy = Policy(apply_tiny_lora(tiny_decoder(), config, progress=False))
    bank = AdapterBank(policy, 4)
    bank.add("a", torch.randn(2, 1))
    bank.save("a", tmp_path / "a.safetensors")
    bank.load("b", tmp_path / "a.safetensors")
    save_adapter(policy, tmp_path / "own.safetensors")
    bank.load("own", tmp_path / "own.safetensors")
    assert torch.equal(bank.vectors("a"), bank.vectors("b")) and not bank.vectors("own").any()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_bank_is_not_copied_in_silence(copied):
    bank = AdapterBank(apply_tiny_lora(tiny_decoder(), TinyLoRAConfig(cache=False), progress=False), 1)
    with pytest.raises(TypeError, match="^AdapterBank: it serves the layers of one model in one process; copy"):
        copied(bank)
    copy.deepcopy(bank.model)  # without it


def test_a_bank_that_nobody_holds_any_more_is_closed_by_what_the_error_says():
    model = apply_tiny_lora(tiny_decoder(), TinyLoRAConfig(cache=False), progress=False)
    AdapterBank(model, 1)
    with pytest.raises(ValueError, match="found one; close it first") as said:
        AdapterBank(model, 1)
    eval(str(said.value).rpartition("of any layer, ")[2], {"adapted_layers": adapted_layers, "model": model})
    AdapterBank(model, 1)
