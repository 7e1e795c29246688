"""Interrupted anywhere, a change of a model, of a bank or of the process is finished or undone: never half of it."""
import contextlib
import copy
import linecache
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tinylora_kernels
from tests.models import tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    SFTTrainer,
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    load_adapter,
    merge,
    refresh_factors,
    remove_adapter,
    save_adapter,
    token_log_probs,
    trainable_vectors,
    unmerge,
)  # fmt: skip
from tinylora_kernels.common.interrupts import finish, undone_by
from tinylora_kernels.common.threads import one_thread_each
from tinylora_kernels.model.adapted import adapter_disabled
from tinylora_kernels.rl.population import PopulationAdam

PACKAGE = str(Path(tinylora_kernels.__file__).parent)
TOKENS = torch.tensor([[1, 5, 2], [7, 3, 11]])
POINTS = 120  # of each operation, besides its last ones


class Stop(BaseException):
    """What interrupts: not an error, like KeyboardInterrupt."""


def interrupted(action, at: int, error: type[BaseException] = Stop) -> int:
    """Run the action and raise at a line of the package's, the `at`-th that is run; returns how many were run.

    Not where a lock is held or about to be let go: Python lets no signal in between a block's end and its lock's.
    """
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        locking = "_lock:" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not locking:
            count += 1
            if count == at:
                raise error("here")
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return count


def bare():
    model = tiny_decoder(bias=True, blocks=1)
    model.lm_head.weight.requires_grad_(False)
    return model


def adapted(model=None, seed=0):
    config = TinyLoRAConfig(target_modules=["q_proj", "up_proj", "embedding"], trainable_dim=2, n_tie=2, cache=False)
    model = apply_tiny_lora(bare() if model is None else model, config, progress=False)
    for v in trainable_vectors(model):
        v.data.copy_(torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def state(model: nn.Module) -> list:
    """All that a user sees of a model."""
    with torch.no_grad():
        out = model(TOKENS)
    classes = [(name, type(module).__name__) for name, module in model.named_modules()]
    adapted = adapted_layers(model).values()
    layers = [(layer.enabled, layer.saved_weight is None, layer.bank is None) for layer in adapted]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = [tensor.clone() for layer in adapted for tensor in (layer.basis, layer.sigma, layer.projection)]
    required = [p.requires_grad for p in model.parameters()]
    return [out, classes, layers, tensors, factors, required, torch.get_num_threads()]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    save_adapter(adapted(seed=5), directory / "plain")
    save_adapter(adapted(seed=6), directory / "basis", include_basis=True)
    return directory


def _refresh(model):
    refresh_factors(model, progress=False)


def _other_weights():
    model = adapted()
    for layer in adapted_layers(model).values():
        layer.base.weight.data.mul_(torch.linspace(0.5, 1.5, layer.base.weight.shape[-1]))
    return model


def _disabled(model):
    with adapter_disabled(model), torch.no_grad():
        model(TOKENS)


# what is changed, and how
MODELS = {
    "merge": (adapted, lambda model, files: merge(model)),
    "unmerge": (lambda: merge(adapted()), lambda model, files: unmerge(model)),
    "merge and unmerge": (adapted, lambda model, files: unmerge(merge(model))),
    "apply_tiny_lora": (bare, lambda model, files: adapted(model)),
    "remove_adapter": (adapted, lambda model, files: remove_adapter(model)),
    "refresh_factors": (_other_weights, lambda model, files: _refresh(model)),
    "load_adapter": (adapted, lambda model, files: load_adapter(model, files / "plain", progress=False)),
    "load_adapter with bases": (adapted, lambda model, files: load_adapter(model, files / "basis", progress=False)),
    "load_adapter into a bare one": (
        bare, lambda model, files: load_adapter(model, files / "basis", cache=False, progress=False)
    ),
    "adapter_disabled": (adapted, lambda model, files: _disabled(model)),
    "a bank opened and closed": (adapted, lambda model, files: AdapterBank(model, 2, names=["a"]).close()),
}
TWO_STEPS = {"apply_tiny_lora", "merge and unmerge", "a bank opened and closed"}  # they may end between their steps


def points(total: int) -> list[int]:
    """Where to interrupt: everywhere in short work, else here and there, and in all of what comes last."""
    return sorted({*range(1, total + 1, max(1, total // POINTS)), *range(max(1, total - POINTS), total + 1)})


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_it_was_or_as_it_becomes(name, error, files):
    make, action = MODELS[name]
    start = make()
    before = state(start)
    for _ in range(2):  # the second without what is done once in a process
        done = copy.deepcopy(start)
        total = interrupted(lambda done=done: action(done, files), 0)
    after = state(done)
    for at in points(total):
        model = copy.deepcopy(start)
        with pytest.raises(error):
            interrupted(lambda: action(model, files), at, error)
        found = state(model)
        if name in TWO_STEPS and not (equal(found, before) or equal(found, after)):
            layers = adapted_layers(model).values()
            assert len({(layer.enabled, layer.saved_weight is None, layer.bank is None) for layer in layers}) == 1
            for layer in layers:
                if layer.bank is not None:
                    bank = layer.bank
            if name == "a bank opened and closed":
                bank.close()
            elif name == "merge and unmerge":
                unmerge(model)
            else:
                remove_adapter(model)
                for parameter in model.parameters():
                    parameter.requires_grad_(False)
                assert torch.equal(model(TOKENS), bare()(TOKENS))
                continue
            found = state(model)
        assert equal(found, before) or equal(found, after), f"line {at} of {total}"


def contents(bank: AdapterBank) -> list:
    slots = {name: bank.slot(name) for name in bank.names()}
    free = sorted(bank._free)
    assert sorted([*slots.values(), *free]) == list(range(bank.capacity))
    live = {slot for slot in range(bank.capacity) if bool(bank._live[slot])}
    assert live == set(slots.values())
    with torch.no_grad(), bank.use(["a", None]):
        out = bank.model(TOKENS)
    return [slots, {name: bank.vectors(name) for name in slots}, out]


BANKS = {
    "add": lambda bank, files: bank.add("new", torch.full((2, 2), 0.5)),
    "load": lambda bank, files: bank.load("new", files / "plain"),
    "set": lambda bank, files: bank.set("b", torch.full((2, 2), -0.5)),
    "remove": lambda bank, files: bank.remove("b"),
}


@pytest.mark.parametrize("own_seeds", [False, True])
@pytest.mark.parametrize("name", BANKS)
def test_a_bank_is_as_it_was_or_as_it_becomes(name, own_seeds, files):
    def make():
        bank = AdapterBank(adapted(), 4, own_seeds=own_seeds)
        bank.add("a", torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
        bank.add("b", torch.tensor([[0.5, 0.6], [0.7, 0.8]]))
        return bank

    bank = make()
    before = contents(bank)
    total = interrupted(lambda: BANKS[name](bank, files), 0)
    after = contents(bank)
    for at in points(total):
        bank = make()
        with pytest.raises(Stop):
            interrupted(lambda: BANKS[name](bank, files), at)
        found = contents(bank)
        assert equal(found, before) or equal(found, after), f"line {at} of {total}"
        bank.close()
        assert all(layer.bank is None for layer in adapted_layers(bank.model).values())


# Steps


class Interrupts(torch.optim.AdamW):
    """Ctrl-C at the n-th in-place write of a step."""

    at = 0

    def step(self, closure=None):
        with _AtWrite(self.at):
            return super().step(closure)


class _AtWrite(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return out


def _numbers(trainer) -> list:
    optimizer = trainer.optimizer
    slots = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in trainer.parameters if p in optimizer.state]
    gradients = [None if p.grad is None else p.grad.clone() for p in trainer.parameters]
    counts = [trainer.steps, trainer._pending, trainer._weight]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [[p.detach().clone() for p in trainer.parameters], slots, gradients, counts, groups]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_step_of_a_trainer_is_taken_or_not(first, foreach, accumulation_steps):
    model = adapted()

    def make():
        trainer = SFTTrainer(
            copy.deepcopy(model), accumulation_steps=accumulation_steps, max_grad_norm=0.01,
            optimizer=lambda p: Interrupts(p, lr=0.1, foreach=foreach),
        )  # fmt: skip
        for _ in range((not first) * accumulation_steps + accumulation_steps - 1):
            step(trainer)
        return trainer

    def step(trainer):
        trainer.training_step(token_log_probs(trainer.model(TOKENS), TOKENS))

    whole = make()
    before = _numbers(whole)
    step(whole)
    after, at = _numbers(whole), 0
    assert not equal(before[0], after[0])
    while True:
        at += 1
        trainer = make()
        trainer.optimizer.at = at
        try:
            step(trainer)
            break
        except KeyboardInterrupt:
            assert equal(_numbers(trainer), before), f"write {at}"
        trainer.optimizer.at = 0
        step(trainer)
        assert equal(_numbers(trainer), after), f"after an interrupt at write {at}"
    assert at > 4
    trainer = make()
    log_probs = token_log_probs(trainer.model(TOKENS), TOKENS)
    lines = interrupted(lambda: trainer.training_step(log_probs), 0) if foreach else 0
    for line in range(1, lines + 1):
        trainer = make()
        log_probs = token_log_probs(trainer.model(TOKENS), TOKENS)
        with contextlib.suppress(Stop):
            interrupted(lambda trainer=trainer, log_probs=log_probs: trainer.training_step(log_probs), line)
        found = _numbers(trainer)
        assert equal(found, before) or equal(found, after), f"line {line} of {lines}"


@pytest.mark.parametrize("steps", [0, 1])
def test_a_step_of_a_population_is_taken_or_not(steps):
    def make():
        model = adapted()
        bank = AdapterBank(model, 3, trainable=True, names=["a", "b"])
        optimizer = PopulationAdam(bank, 0.1)
        for n in range(steps + 1):
            for number, table in enumerate(bank.parameters()):
                table.grad = torch.full_like(table, 0.1 * number + 0.2 + n)
            if n < steps:
                optimizer.step(["a", "b"])
        return optimizer

    def numbers(optimizer):
        tables = optimizer.bank.parameters()
        state = [{k: v.clone() for k, v in optimizer._state_of(table).items()} for table in tables]
        return [[table.detach().clone() for table in tables], state]

    whole = make()
    before = numbers(whole)
    whole.step(["b"])
    after, outcomes = numbers(whole), set()
    counted = make()
    for at in range(1, interrupted(lambda: counted.step(["b"]), 0) + 1):
        optimizer = make()
        with contextlib.suppress(Stop):
            interrupted(lambda optimizer=optimizer: optimizer.step(["b"]), at)
        found = numbers(optimizer)
        assert equal(found, before) or equal(found, after), f"line {at}"
        outcomes.add(equal(found, before))
    assert outcomes == {True, False}


def test_threads_are_put_back():
    def action():
        with one_thread_each() as run:
            run(lambda n: n + 1, [1, 2, 3])

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for at in range(1, interrupted(action, 0) + 1):
            with pytest.raises(Stop):
                interrupted(action, at)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_peft_models_are_accelerated_or_not():
    peft = pytest.importorskip("peft", minversion="0.21", reason="it accelerates PEFT's models")
    from tests.integrations.tiny import llama, tokens
    from tinylora_kernels.integrations.peft import accelerate_peft, deaccelerate_peft

    def make():
        torch.manual_seed(0)
        config = peft.TinyLoraConfig(r=2, u=2, target_modules=["q_proj", "v_proj"], init_weights="uniform")
        return peft.get_peft_model(llama(num_hidden_layers=1), config).eval()

    def classes(model):
        return [type(module) for module in model.modules()], [sorted(vars(m)) for m in model.modules()]

    with torch.no_grad():
        plain, fast = make(), accelerate_peft(make())
        for start, action in ((plain, accelerate_peft), (fast, deaccelerate_peft)):
            done = copy.deepcopy(start)
            total = interrupted(lambda action=action, done=done: action(done), 0)
            for at in points(total):
                model = copy.deepcopy(start)
                with pytest.raises(Stop):
                    interrupted(lambda model=model, action=action: action(model), at)
                assert classes(model) in (classes(plain), classes(fast)), f"line {at} of {total}"
                model.load_state_dict(plain.state_dict())
                torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)


def test_adapters_of_as_peft_model_change_places_whole():
    pytest.importorskip("peft", minversion="0.21", reason="it is a PeftModel")
    pytest.importorskip("transformers", minversion="5.0", reason="of a PreTrainedModel")
    from tests.integrations.tiny import llama, tokens
    from tinylora_kernels.integrations.trl import as_peft_model

    model = apply_tiny_lora(llama(num_hidden_layers=1), TinyLoRAConfig(target_modules=["q_proj"], cache=False))
    wrapped = as_peft_model(model)
    wrapped.add_adapter("ref")
    for v in trainable_vectors(model):
        v.data.fill_(0.7)

    def seen(model):
        with torch.no_grad():
            logits = model(input_ids=tokens()).logits
        required = {name: [v.requires_grad for v in model._vectors_of(name)] for name in model.peft_config}
        return [model.active_adapter, logits, required]

    actions = {
        "set": lambda model: model.set_adapter("ref"), "delete": lambda model: model.delete_adapter("ref"),
        "add": lambda model: model.add_adapter("more"), "off": lambda model: model.disable_adapter_layers(),
    }  # fmt: skip
    for name, action in actions.items():
        done = copy.deepcopy(wrapped)
        total = interrupted(lambda done=done, action=action: action(done), 0)
        before, after = seen(wrapped), seen(done)
        for at in points(total):
            twin = copy.deepcopy(wrapped)
            with pytest.raises(Stop):
                interrupted(lambda twin=twin, action=action: action(twin), at)
            assert equal(seen(twin), before) or equal(seen(twin), after), f"{name}: line {at} of {total}"


# The mechanism itself


def test_what_has_begun_is_finished_and_the_interrupt_raised():
    for interrupts in (0, 1, 3):
        done, left = [], [Stop(str(n)) for n in range(interrupts)]

        def work(done=done, left=left):
            done.clear()
            done.append(1)
            if left:
                raise left.pop()
            done.append(2)

        if interrupts:
            with pytest.raises(Stop):
                finish(work)
        else:
            finish(work)
        assert done == [1, 2]


def test_work_that_cannot_be_done_says_so():
    calls = []

    def work():
        calls.append(1)
        raise ValueError("it cannot")

    with pytest.raises(ValueError, match="it cannot"):
        finish(work)
    assert len(calls) == 2
    with pytest.raises(Stop), undone_by(lambda: calls.clear()):
        raise Stop
    assert not calls
