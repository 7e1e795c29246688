"""What a block asks for holds where the block stands: in its own context, not in others, and never half."""
from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import ctypes
import functools
import gc
import sys
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.cases import error
from tests.guarantees.whole import dense_model
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import AdapterBank, GRPOTrainer, TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.common import scope
from tinylora_kernels.linear import plan
from tinylora_kernels.model.adapted import adapter_disabled

TOKENS = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(1))
LOST = "bank.use: a block is open in another thread or task, and this one has none"
FOREIGN = "a generator opened the block that is in force here"
NOT_INNERMOST = "is not the innermost one any more"


class Case:
    """A model of own vectors with a bank of "a" and "b", and what each of these gives."""

    def __init__(self, trainable=False):
        torch.manual_seed(0)
        config = TinyLoRAConfig(trainable_dim=3, n_tie=100, target_modules=TARGETS, cache=False)
        self.model = apply_tiny_lora(tiny_decoder(bias=True), config, progress=False)
        numbers = 0.3 * torch.randn(3, 1, 3)
        with torch.no_grad():
            trainable_vectors(self.model)[0].copy_(numbers[0, 0])
        named = {"own": numbers[0], "a": numbers[1], "b": numbers[2], "bare": torch.zeros(1, 3)}
        self.truths = {name: dense_model(self.model, v)(TOKENS).detach() for name, v in named.items()}
        self.bank = AdapterBank(self.model, 2, trainable=trainable)
        for name in ("a", "b"):
            self.bank.add(name, named[name])
        self.trainer = GRPOTrainer(self.model, 2, optimizer=lambda p: torch.optim.SGD(p, 0.1))

    def run(self):
        """Whose output the model gives here."""
        with torch.no_grad():
            found = self.model(TOKENS)
        return next(name for name, truth in self.truths.items() if error(found, truth) < 2e-5)

    def use(self, name):
        return self.bank.use([name, name])


@pytest.fixture(params=["plan as it is", "plan in Python"])
def case(request, monkeypatch):
    if request.param == "plan in Python":
        monkeypatch.setattr(plan, "twin", None)
    return Case()


def in_thread(work):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def plain_thread(work):
    found = []

    def guarded():
        try:
            found.append(work())
        except RuntimeError as problem:
            found.append(problem)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("elsewhere", [in_thread, plain_thread])
def test_a_thread_without_a_block_is_refused_while_another_has_one(case, elsewhere):
    assert elsewhere(case.run) == "own"
    with case.use("a"):
        for _ in range(3):  # with plans and without
            assert case.run() == "a"
            with pytest.raises(RuntimeError, match=LOST):
                elsewhere(case.run)

        def with_its_own():
            with case.use("b"):
                return [case.run() for _ in range(3)]

        def with_own_vectors():
            with case.bank.own_vectors():
                return [case.run() for _ in range(3)]

        assert elsewhere(with_its_own) == ["b"] * 3
        assert elsewhere(with_own_vectors) == ["own"] * 3
        carried = contextvars.copy_context()
        assert elsewhere(lambda: carried.run(case.run)) == "a"
        assert case.run() == "a"
    assert elsewhere(case.run) == case.run() == "own"


def test_tasks_have_the_block_they_were_started_in(case):
    async def main():
        begun, done = asyncio.Event(), asyncio.Event()

        async def under(name, first):
            with case.use(name):
                begun.set()
                await first.wait()
                found = [case.run(), await asyncio.to_thread(case.run), *await asyncio.gather(inside(), inside())]
                with pytest.raises(RuntimeError, match=LOST):
                    await asyncio.get_running_loop().run_in_executor(None, case.run)
                return found

        async def inside():
            await asyncio.sleep(0)
            return case.run()

        async def outside():
            await begun.wait()
            with pytest.raises(RuntimeError, match=LOST):
                case.run()
            with case.bank.own_vectors():
                found = case.run()
            done.set()
            return found

        a, b, own = await asyncio.gather(under("a", done), under("b", done), outside())
        assert (a, b, own) == (["a"] * 4, ["b"] * 4, "own")
        with case.use("a"):
            late = asyncio.create_task(inside())
        with pytest.raises(RuntimeError, match="copied from a block that has ended"):
            await late
        return case.run()

    assert asyncio.run(main()) == "own"


def generator(case, name, times=10):
    with case.use(name):
        for _ in range(times):
            yield case.run()


def test_a_generator_keeps_its_block_to_itself(case):
    items = generator(case, "a")
    assert [next(items) for _ in range(3)] == ["a"] * 3
    with pytest.raises(RuntimeError, match=FOREIGN):
        case.run()
    with case.use("b"):
        assert case.run() == "b"
    assert next(items) == "a"
    items.close()
    assert case.run() == "own"
    for found in generator(case, "b", 3):  # run to its end
        assert found == "b"
    assert case.run() == "own"


def test_generators_in_turn(case):
    first, second = generator(case, "a"), generator(case, "b")
    assert (next(first), next(second), next(second)) == ("a", "b", "b")
    with pytest.raises(RuntimeError, match=NOT_INNERMOST):
        next(first)  # which ends it
    assert next(second) == "b"
    second.close()
    assert case.run() == "own"
    first, second = generator(case, "a"), generator(case, "b")
    next(first), next(second)
    first.close()  # before the one that was opened inside it
    assert next(second) == "b"
    second.close()
    assert case.run() == "own"


def test_a_generator_begun_in_a_block_that_ends_before_it(case):
    with case.use("b"):
        assert case.run() == "b"
        items = generator(case, "a")
        assert next(items) == "a"
        with pytest.raises(RuntimeError, match=NOT_INNERMOST):
            case.run()
    assert next(items) == "a"
    with pytest.raises(RuntimeError, match=FOREIGN):
        case.run()
    del items
    gc.collect()
    assert case.run() == "own"


def test_a_generator_whose_block_was_left_for_the_consumers(case):
    def lazily():
        yield case.run()

    with case.use("a"):
        items = lazily()
        assert next(items) == "a"
    assert case.run() == "own"

    def in_and_out():
        for name in ("a", "b"):
            with case.use(name):
                found = [case.run() for _ in range(3)]
            yield found

    for found, name in zip(in_and_out(), ("a", "b"), strict=True):
        assert found == [name] * 3 and case.run() == "own"


def test_async_generators(case):
    async def stream(name):
        with case.use(name):
            for _ in range(2):
                yield await asyncio.to_thread(case.run)
                await asyncio.sleep(0)

    async def main():
        async for found in stream("a"):
            assert found == "a"
            with pytest.raises(RuntimeError, match=FOREIGN):
                case.run()
        return case.run()

    assert asyncio.run(main()) == "own"


def test_blocks_that_helpers_open(case):
    @contextlib.contextmanager
    def helper(name):
        with contextlib.ExitStack() as stack:
            stack.enter_context(case.use(name))
            yield

    with helper("a"):
        assert [case.run() for _ in range(3)] == ["a"] * 3
        with helper("b"), case.bank.own_vectors():
            assert case.run() == "own"
        assert case.run() == "a"
        with adapter_disabled(case.model):
            assert case.run() == "bare"
        assert case.run() == "a"

    @helper("b")
    def decorated():
        return case.run()

    assert decorated() == "b"
    block = case.use("a")
    block.__enter__()
    assert case.run() == "a"
    inner = case.use("b")
    inner.__enter__()
    block.__exit__(None, None, None)  # the outer one first
    assert case.run() == "b"
    inner.__exit__(None, None, None)
    assert case.run() == "own"


def test_a_reference_is_one_for_those_who_ask(case):
    case.bank.close()
    assert [case.run() for _ in range(3)] == ["own"] * 3
    inside, go_on = threading.Event(), threading.Event()

    def reference():
        with case.trainer.reference():
            found = [case.run()]
            inside.set()
            go_on.wait(30)
            return [*found, case.run()]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(reference)
        inside.wait(30)
        assert [case.run() for _ in range(3)] == ["own"] * 3, "another thread's reference"
        loss = case.model(TOKENS).square().sum()
        with case.trainer.reference():
            assert case.run() == "bare"
            with adapter_disabled(case.model):
                assert case.run() == "bare"
            assert case.run() == "bare"
            loss.backward()  # of a pass that was not
        go_on.set()
        assert other.result() == ["bare", "bare"] and [case.run() for _ in range(3)] == ["own"] * 3
    found = trainable_vectors(case.model)[0].grad.clone()
    trainable_vectors(case.model)[0].grad = None
    case.model(TOKENS).square().sum().backward()
    assert torch.equal(found, trainable_vectors(case.model)[0].grad)


def test_a_reference_in_tasks_and_generators(case):
    case.bank.close()

    def reference():
        with case.trainer.reference():
            while True:
                yield case.run()

    async def main():
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def scoring():
            with case.trainer.reference():
                inside.set()
                await go_on.wait()
                return case.run(), await asyncio.to_thread(case.run)

        async def rollout():
            await inside.wait()
            found = case.run()
            go_on.set()
            return found

        return await asyncio.gather(scoring(), rollout())

    assert asyncio.run(main()) == [("bare", "bare"), "own"]
    items = reference()
    assert next(items) == next(items) == "bare"
    with pytest.raises(RuntimeError, match=f"^adapter_disabled: {FOREIGN}"):
        case.run()
    items.close()
    assert case.run() == "own"


def test_threads_that_switch_and_threads_that_do_not(case):
    """Plans come and go while other threads open and end their blocks: nobody ever runs somebody else's."""
    case.bank.close()
    wrong, stop = [], threading.Event()

    def rollout():
        while not stop.is_set():
            if (found := case.run()) != "own":
                wrong.append(found)

    def score():
        for _ in range(60):
            with case.trainer.reference():
                if (found := case.run()) != "bare":
                    wrong.append(found)
            if (found := case.run()) != "own":
                wrong.append(found)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        rollouts = [pool.submit(rollout) for _ in range(2)]
        for scored in [pool.submit(score) for _ in range(2)]:
            scored.result()
        stop.set()
        for done in rollouts:
            done.result()
    assert not wrong


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_compiled_models_ask_as_well(compiled):
    case = Case()
    case.bank.close()
    torch._dynamo.reset()
    if compiled:
        case.model = torch.compile(case.model, backend="aot_eager")
    for _ in range(2):
        assert case.run() == "own"
        with case.trainer.reference():
            assert case.run() == "bare" and in_thread(case.run) == "own"


def deep(function, depth, x):
    """Reentrant checkpoints inside each other: beyond 60 of them autograd goes on in threads of its own."""
    if depth == 0:
        return function(x)
    return checkpoint(deep, function, depth - 1, x, use_reentrant=True)


@pytest.mark.parametrize("depth", [1, 70])
@pytest.mark.parametrize("trainable", [False, True])
def test_activations_recomputed_in_autograds_threads(trainable, depth):
    case = Case(trainable)
    threads, embed = set(), case.model.embedding
    x = embed(TOKENS).detach().requires_grad_()

    def body(x):
        threads.add(threading.get_ident())
        for layer in case.model.layers:
            x = layer(x)
        return x

    found = []
    with case.bank.use(["a", "b"]):
        for run in (body, lambda x: deep(body, depth, x)):
            run(x).square().sum().backward()
            tables = [table.grad for table in case.bank.parameters()]
            found.append([g.clone() for g in (x.grad, *tables)])
            for tensor in (x, *case.bank.parameters()):
                tensor.grad = None
    assert (len(threads) > 1) is (depth > 60)
    assert all(torch.equal(g, h) for g, h in zip(*found, strict=True)) and all(g.any() for g in found[0])
    with case.use("a"):
        out = deep(body, depth, x)
    if trainable:
        with pytest.raises(RuntimeError, match="recomputed outside the block that made them"):
            out.sum().backward()


@pytest.mark.parametrize("counts", [True, False], ids=["torch", "torch up to 2.11"])
def test_a_block_lives_as_long_as_somebody_holds_it(counts, monkeypatch):
    """Autograd's store of a thread gave back references that it had not taken: a crash of later garbage collection."""
    stash = torch._C._stash_obj_in_tls

    def steal(key, value):
        stash(key, value)
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(value))

    monkeypatch.setattr(torch._C, "_stash_obj_in_tls", stash if counts else steal)
    monkeypatch.setattr(scope, "_store_counts", functools.cache(scope._store_counts.__wrapped__))
    assert scope._store_counts() is counts
    assert not torch._C._is_key_in_tls("tinylora probe")  # every backward pass of this thread would copy it
    blocks = scope.Scope("test", "no way out")
    block = scope.Block()
    alone, ended = sys.getrefcount(block), weakref.ref(block)
    for _ in range(3):
        with blocks.holding(block):
            assert sys.getrefcount(block) > alone
        assert sys.getrefcount(block) == alone
    del block
    assert ended() is None
