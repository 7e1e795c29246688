"""Activations that are recomputed run what the forward pass ran, or it is an error, whatever block that happens in."""
import contextlib
import contextvars
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.guarantees.test_context_local_state import TOKENS, Case, in_thread
from tinylora_kernels.common import scope
from tinylora_kernels.linear import plan
from tinylora_kernels.model.adapted import adapter_disabled

RECOMPUTATIONS = {"reentrant": True, "not reentrant": False}
REFUSED = "activations are being recomputed outside the block that made them"


@pytest.fixture(params=["plan as it is", "plan in Python"], autouse=True)
def plans(request, monkeypatch):
    if request.param == "plan in Python":
        monkeypatch.setattr(plan, "twin", None)


class Work:
    """A pass of the layers in a block of `kind`, and its gradient."""

    def __init__(self, trainable, reentrant):
        self.case, self.reentrant = Case(trainable), reentrant
        self.x = self.case.model.embedding(TOKENS).detach().requires_grad_()
        own = list(self.case.model.parameters())
        self.wanted = [self.x, *(p for p in own if p.requires_grad), *self.case.bank.parameters()]

    def block(self, kind):
        if kind == "own":
            return contextlib.nullcontext()
        if kind == "own vectors":
            return self.case.bank.own_vectors()
        if kind == "off":
            return adapter_disabled(self.case.model)
        return self.case.bank.use([*kind])

    def layers(self, x):
        for layer in self.case.model.layers:
            x = layer(x)
        return x

    @classmethod
    @functools.cache
    def known(cls, trainable, reentrant, in_python):
        return cls(trainable, reentrant)

    def forward(self, kind, recomputed=True):
        with self.block(kind):
            if not recomputed:
                return self.layers(self.x).square().sum()
            return checkpoint(self.layers, self.x, use_reentrant=self.reentrant).square().sum()

    def gradient(self, loss):
        for tensor in self.wanted:
            tensor.grad = None
        loss.backward()
        return [None if tensor.grad is None else tensor.grad.clone() for tensor in self.wanted]

    def expect(self, loss, kind, within, refused):
        right = self.gradient(self.forward(kind, recomputed=False))
        with self.block(within):
            if refused:
                with pytest.raises(RuntimeError, match=REFUSED):
                    self.gradient(loss)
                return
            found = self.gradient(loss)
        assert any(g is not None and g.any() for g in found)
        assert all(f is r is None or torch.equal(f, r) for f, r in zip(found, right, strict=True))


@pytest.fixture(params=RECOMPUTATIONS)
def reentrant(request):
    return RECOMPUTATIONS[request.param]


SAME = [{"own", "own vectors"}, {"ab"}, {"ba"}, {"off"}]
KINDS = sorted(set().union(*SAME))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("within", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_in_another_block(kind, within, trainable, reentrant):
    work = Work.known(trainable, reentrant, plan.twin is None)
    for _ in range(2):  # the second with the plans of the first
        work.forward(kind, recomputed=False)
    same = any({kind, within} <= kinds for kinds in SAME)
    work.expect(work.forward(kind), kind, within, refused=not same)
    work.expect(work.forward(kind), kind, kind, refused=False)


@pytest.mark.parametrize("within", ["ab", "off"])
def test_the_first_block_of_a_process(within, reentrant, monkeypatch):
    monkeypatch.setattr(scope, "nodes_in_blocks", False)
    work = Work(False, reentrant)
    loss = work.forward("own")
    with torch.no_grad():
        for _ in range(3):
            with work.block("ab"):
                work.layers(work.x)
    work.expect(loss, "own", within, refused=True)


def test_losses_of_several_blocks_in_one_backward_pass(reentrant):
    work = Work(True, reentrant)
    loss = work.forward("ab") + work.forward("ba")
    for within in ("own", "ab", "ba"):
        with work.block(within), pytest.raises(RuntimeError, match=REFUSED):
            loss.backward(retain_graph=True)


def test_blocks_within_blocks(reentrant):
    work = Work(True, reentrant)
    with work.block("ab"):
        outer = work.forward("ab")
        inner = work.forward("ba")
        with work.block("ba"), pytest.raises(RuntimeError, match=REFUSED):
            outer.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            inner.backward()
        work.expect(outer, "ab", "ab", refused=False)


def test_the_adapter_of_another_model_is_off():
    work, other = Work(False, False), Work(False, False)
    with other.block("off"):
        loss = work.forward("own")
    work.expect(loss, "own", "own", refused=False)
    loss = work.forward("own")
    with other.block("off"):
        work.expect(loss, "own", "own", refused=False)


def test_many_blocks_are_forgotten_and_the_last_ones_known(reentrant, monkeypatch):
    monkeypatch.setattr(scope.Trail, "KEPT", 3)
    work = Work(True, reentrant)
    for _ in range(4):
        for kind in ("ab", "ba", "aa"):
            with work.block(kind):
                work.forward(kind).backward()
    work.expect(work.forward("ab"), "ab", "ba", refused=True)
    work.expect(work.forward("ab"), "ab", "ab", refused=False)


def test_a_thread_of_its_own_for_each_loss(reentrant):
    work = Work(True, reentrant)
    work.forward("ba").detach()

    def train(kind):
        with work.block(kind):
            return work.gradient(work.forward(kind))

    for kind in ("ab", "aa"):
        found, right = in_thread(lambda kind=kind: train(kind)), work.gradient(work.forward(kind, recomputed=False))
        assert all(f is r is None or torch.equal(f, r) for f, r in zip(found, right, strict=True))


def test_a_backward_pass_of_another_thread(reentrant):
    """Numbers of nodes are a thread's own: of a bank that trains, what nobody can place is refused."""
    for trainable in (False, True):
        work = Work(trainable, reentrant)
        loss = work.forward("ab")
        if trainable:
            with pytest.raises(RuntimeError, match=REFUSED):
                in_thread(loss.backward)
    with work.block("ab"):
        loss, context = work.forward("ab"), contextvars.copy_context()
        found = in_thread(lambda: context.run(work.gradient, loss))
    right = work.gradient(work.forward("ab", recomputed=False))
    assert all(f is r is None or torch.equal(f, r) for f, r in zip(found, right, strict=True))


def test_a_second_derivative_through_recomputed_layers():
    work = Work(True, False)
    found = []
    with work.block("ab"):
        for recomputed in (False, True):
            (dx,) = torch.autograd.grad(work.forward("ab", recomputed), work.x, create_graph=True)
            found.append(work.gradient(dx.square().sum()))
    for one, two in zip(*found, strict=True):
        assert one is two is None or torch.allclose(one, two, rtol=1e-5, atol=1e-5 * one.abs().max().item())
