"""Layers that read one x sum their dx where it is made (linear/siblings.inl): gradients, hooks and graphs are those of
layers that know nothing of each other, whatever the model does with x. Each case is compared with float64, and with the
same layers on copies of x, which autograd adds up.
"""
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.cases import error
from tests.layers.test_layer import dense, linear
from tinylora_kernels.linear import node

pytestmark = pytest.mark.skipif(node.extension is None, reason=f"the node in C++: {node.why_no_twin}")
NAME = "TinyLoRASiblings (C++)"
DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 8e-3)]


@pytest.fixture(autouse=True)
def together():
    """Whatever a test before has changed."""
    before = node.extension.share_dx_from(0)
    yield
    node.extension.share_dx_from(before)


class Three(nn.Module):
    """q, k and v; k is wide enough for the product to come first on the CPU, too."""

    def __init__(self, dtype=torch.float32, tied=False):
        super().__init__()
        self.q, self.k, self.v = linear(True, dtype, 24), linear(False, dtype, 6), linear(True, dtype, 40)
        for n, layer in enumerate(self.children()):
            nn.init.normal_(layer.v, generator=torch.Generator().manual_seed(n))
        if tied:
            for layer in (self.k, self.v):
                layer._parameters.pop("v")
                layer._owner = (self.q,)

    def forward(self, x, apart=False):
        """apart: each on its own copy of x, and so without siblings."""
        return [layer(x.view_as(x) if apart else x) for layer in self.children()]

    def vectors(self):
        return [layer.v for layer in self.children() if "v" in layer._parameters]


def warm(model, dtype=torch.float32):
    """Every layer has the plan by which it calls the node from its second call on."""
    for _ in range(2):
        sum(y.sum() for y in model(torch.randn(3, 16, dtype=dtype, requires_grad=True))).backward()
    model.zero_grad()
    return model


def gradients(model, x, run, g):
    """dx and every dv of `run`, a function of x [..., 16] to a list of outputs."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    ys = run(leaf * 1)
    torch.autograd.backward(ys, g[: len(ys)])
    return leaf.grad, [v.grad for v in model.vectors()]


def exact(model, x, g):
    leaf = x.double().requires_grad_()
    sum((dense(layer, leaf) * one.double()).sum() for layer, one in zip(model.children(), g, strict=True)).backward()
    return leaf.grad


def inputs(dtype=torch.float32, rows=(2, 5)):
    x = torch.randn(*rows, 16).to(dtype)
    return x, [torch.randn(*rows, width).to(dtype) for width in (24, 6, 40)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, bound", DTYPES, ids=str)
def test_gradients_are_those_of_layers_apart(dtype, bound, tied):
    model, (x, g) = warm(Three(dtype, tied), dtype), inputs(dtype)
    dx, dv = gradients(model, x, model, g)
    apart, dv_apart = gradients(model, x, lambda x: model(x, apart=True), g)
    truth = exact(model, x, g)
    assert error(dx, truth) <= max(error(apart, truth), bound / 4) < bound
    for one, other in zip(dv, dv_apart, strict=True):
        assert torch.equal(one, other) or tied  # a sum of three, in the order of the backward pass
        assert error(one, other) < 1e-6


def siblings_of(y):
    return y.grad_fn.next_functions[0][0]


def test_layers_that_read_one_x_share_a_node_and_nothing_is_added_beside_it():
    model, (x, g) = warm(Three()), inputs()
    h = x.requires_grad_() * 1
    ys = model(h)
    assert len({id(siblings_of(y)) for y in ys}) == 1 and siblings_of(ys[0]).name() == NAME
    with torch.autograd.profiler.profile() as profile:
        torch.autograd.backward(ys, g)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("aten::add", 0) == counts.get("aten::add_", 0) == 0
    with torch.autograd.profiler.profile() as profile:
        torch.autograd.backward(model(x * 1, apart=True), g)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("aten::add", 0) + counts.get("aten::add_", 0) >= 2


def test_a_short_sum_is_left_to_autograd():
    """The node costs more than to add a few rows."""
    model = warm(Three())
    node.extension.share_dx_from(4 * 16)
    for rows, shared in ((3, False), (4, True)):
        ys = model(torch.randn(rows, 16, requires_grad=True) * 1)
        assert all((siblings_of(y).name() == NAME) is shared for y in ys)


def test_sixteen_bits_on_the_cpu_keep_to_themselves():
    """rules.py: there an addition to what is there costs more than one of its own."""
    model = warm(Three(torch.bfloat16), torch.bfloat16)
    ys = model(torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True) * 1)
    assert all(siblings_of(y).name() != NAME for y in ys)


def changed_in_place(model, x):
    x = x.clone()
    q, k = model.q(x), model.k(x)
    x.mul_(3)
    return [q, k, model.v(x)]


def changed_through_a_view(model, x):
    x = x.clone()
    q = model.q(x)
    x[..., :4] *= 2
    return [q, model.k(x), model.v(x)]


def detached_between(model, x):
    return [model.q(x), model.k(x.detach()), model.v(x)]


def without_grad_between(model, x):
    with torch.no_grad():
        model.k(x)
    return [model.q(x), model.k(x), model.v(x)]


def one_used_twice(model, x):
    return [model.q(x) + model.q(x), model.k(x), model.v(x)]


def another_order(model, x):
    v, q, k = model.v(x), model.q(x), model.k(x)
    return [q, k, v]


def one_left_out(model, x):
    model.k(x)
    return [model.q(x), model.k(x), model.v(x)]


def used_beside(model, x):
    return [model.q(x) + x.sum(-1, keepdim=True), model.k(x) * x[..., :1], model.v(x)]


def another_x_between(model, x):
    other = x * 2
    q = model.q(x)
    k = model.k(other)
    return [q, k, model.v(x) + model.v(other)]


def by_checkpoint(reentrant, x_made_inside):
    def run(model, x):
        made = (lambda x: x * 1) if x_made_inside else (lambda x: x)

        def body(x):
            h = made(x)
            return model.q(h), model.k(h), model.v(h)

        return list(checkpoint(body, x, use_reentrant=reentrant))

    return run


def one_by_checkpoint(model, x):
    return [model.q(x), checkpoint(model.k, x, use_reentrant=False), model.v(x)]


def offloaded(model, x):
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return model(x)


def nested(model, x):
    """What one layer makes is the x of others."""
    inner = model.q(x)[..., :16]
    return [model.q(inner), model.k(inner), model.v(inner)]


WAYS = {
    way.__name__: way
    for way in (changed_in_place, changed_through_a_view, detached_between, without_grad_between, one_used_twice,
                another_order, one_left_out, used_beside, another_x_between, one_by_checkpoint, offloaded, nested)
} | {
    "reentrant checkpoint": by_checkpoint(True, False), "checkpoint": by_checkpoint(False, False),
    "reentrant checkpoint, x made inside": by_checkpoint(True, True),
    "checkpoint, x made inside": by_checkpoint(False, True),
}  # fmt: skip


class Apart(nn.Module):
    """The same layers, each call on a copy of its x."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        if name in ("q", "k", "v"):
            return lambda x: getattr(self.model, name)(x.view_as(x))
        return super().__getattr__(name)

    def forward(self, x):
        return self.model(x, apart=True)


@pytest.mark.parametrize("way", WAYS)
def test_whatever_the_model_does_with_x(way):
    model, (x, g) = warm(Three()), inputs()
    ours = gradients(model, x, lambda x: WAYS[way](model, x), g)
    apart = gradients(model, x, lambda x: WAYS[way](Apart(model), x), g)
    assert error(ours[0], apart[0]) < 1e-6
    for one, other in zip(ours[1], apart[1], strict=True):
        assert error(one, other) < 1e-6


def test_a_leaf_and_what_accumulates_in_it():
    model, (x, g) = warm(Three()), inputs()
    leaf = x.clone().requires_grad_()
    seen = []
    leaf.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    for _ in range(2):
        torch.autograd.backward(model(leaf), g)
    truth = exact(model, x, g)
    assert len(seen) == 2 and error(leaf.grad, 2 * truth) < 1e-6 and error(seen[0], truth) < 1e-6


def test_hooks_of_x_see_the_sum_once_and_may_change_it():
    model, (x, g) = warm(Three()), inputs()
    leaf, seen = x.clone().requires_grad_(), []
    h = leaf * 1
    h.retain_grad()
    q = model.q(h)
    h.register_hook(lambda d: seen.append(d.clone()) or 2 * d)
    torch.autograd.backward([q, model.k(h), model.v(h)], g)
    truth = exact(model, x, g)
    assert len(seen) == 1 and error(seen[0], truth) < 1e-6
    assert error(leaf.grad, 2 * truth) < 1e-6 and error(h.grad, 2 * truth) < 1e-6


@pytest.mark.parametrize("watched", ["q", "k", "v"])
def test_a_hook_on_a_layers_node_is_shown_its_own_dx(watched):
    model, (x, g) = warm(Three()), inputs()
    leaf = x.clone().requires_grad_()
    ys = dict(zip("qkv", model(leaf * 1), strict=True))
    seen = []
    ys[watched].grad_fn.register_hook(lambda grad_inputs, _: seen.append(grad_inputs[0].clone()))
    torch.autograd.backward(list(ys.values()), g)
    own = x.double().requires_grad_()
    (dense(model.get_submodule(watched), own) * g["qkv".index(watched)].double()).sum().backward()
    assert len(seen) == 1 and error(seen[0], own.grad) < 1e-6 and error(leaf.grad, exact(model, x, g)) < 1e-6


def test_a_node_called_by_hand_returns_its_dx():
    model, (x, g) = warm(Three()), inputs()
    y = model.q(x.requires_grad_() * 1)
    dx, _ = y.grad_fn(g[0])
    own = x.detach().double().requires_grad_()
    (dense(model.q, own) * g[0].double()).sum().backward()
    assert error(dx.detach(), own.grad) < 1e-6


def test_each_output_alone_and_then_the_others():
    """The graph of one is released; that of the others is not. And twice is once too often."""
    model, (x, g) = warm(Three()), inputs()
    leaf = x.clone().requires_grad_()
    ys = model(leaf)
    for y, one in zip(ys, g, strict=True):
        y.backward(one)
    assert error(leaf.grad, exact(model, x, g)) < 1e-6
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        ys[1].backward(g[1])


def test_twice_through_a_kept_graph_and_again_after_one_that_was_cut_off():
    model, (x, g) = warm(Three()), inputs()
    leaf = x.clone().requires_grad_()
    h = leaf * 1
    ys = model(h)
    cut = ys[0] * 1  # its gradient is the last to be asked for

    def stop(_):
        raise KeyError("cut off")

    handle = cut.register_hook(stop)
    for _ in range(2):
        with pytest.raises(KeyError):  # after k and v have left their sum behind
            torch.autograd.backward([ys[2], ys[1], cut], [g[2], g[1], g[0]], retain_graph=True)
    handle.remove()
    leaf.grad = None
    for n in (1, 2):
        torch.autograd.backward([ys[2], ys[1], cut], [g[2], g[1], g[0]], retain_graph=True)
        assert error(leaf.grad, n * exact(model, x, g)) < 1e-6


def test_only_what_is_asked_for():
    model, (x, g) = warm(Three()), inputs()
    leaf = x.clone().requires_grad_()
    h = leaf * 1
    ys = model(h)
    loss = sum((y * one).sum() for y, one in zip(ys, g, strict=True))
    (dv,) = torch.autograd.grad(loss, [model.k.v], retain_graph=True)
    (dh,) = torch.autograd.grad(loss, [h], retain_graph=True)
    (again,) = torch.autograd.grad(loss, [model.k.v])
    assert error(dh, exact(model, x, g)) < 1e-6 and torch.equal(dv, again)
    (unused,) = torch.autograd.grad(model(leaf)[0].sum(), [model.k.v], allow_unused=True)
    assert unused is None


def test_second_derivatives():
    model = warm(Three(torch.float64), torch.float64)
    x, _ = inputs(torch.float64, rows=(2,))

    def run(x):
        h = x.tanh()
        return sum((y * y).sum() for y in model(h))

    assert torch.autograd.gradgradcheck(run, (x.requires_grad_(),))


def test_threads_know_nothing_of_each_other():
    """Forward and backward of one model in four threads, and backward of one graph's outputs in two."""
    model, (x, g) = warm(Three()), inputs(rows=(64,))
    truth, found = exact(model, x, g), []

    def train():
        for _ in range(20):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(model(leaf * 1), leaf, g)[0])

    threads = [threading.Thread(target=train) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(found) == 80 and all(error(dx, truth) < 1e-6 for dx in found)
    for _ in range(20):
        leaf = x.clone().requires_grad_()
        ys, parts = model(leaf), {}

        def part(n, ys=ys, parts=parts, leaf=leaf):
            parts[n] = torch.autograd.grad(ys[n], leaf, g[n], retain_graph=True)[0]

        threads = [threading.Thread(target=part, args=(n,)) for n in range(3)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert error(sum(parts.values()), truth) < 1e-6


def test_nothing_is_kept_alive():
    """Neither x nor what it came from, from the moment that the last output is gone."""

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g

    model = warm(Three())
    saved = torch.randn(4, 16, requires_grad=True) * 1
    came_from = weakref.ref(saved)
    h = Watched.apply(saved)
    del saved
    ys = model(h)
    held = weakref.ref(h)
    del h
    gc.collect()
    assert held() is None and came_from() is not None
    del ys
    gc.collect()
    assert came_from() is None


def test_a_process_that_changed_nodes_leaves_the_sums_to_torch(monkeypatch):
    """Or dx would be rounded otherwise from some step on, nobody knows which."""
    for name in ("extension", "why_no_twin", "twin"):
        monkeypatch.setattr(node, name, getattr(node, name))
    node.take_twin(node.extension)
    model = warm(Three())
    x = torch.randn(2, 16, requires_grad=True) * 1
    assert {siblings_of(y).name() for y in model(x)} == {"MulBackward0"}
    node.extension.share_dx_from(0)
    assert {siblings_of(y).name() for y in model(x)} == {NAME}


def test_the_switch():
    code = (
        "import torch; from tests.layers.test_siblings import Three, warm\n"
        "ys = warm(Three())(torch.randn(600, 16, requires_grad=True) * 1)\n"
        "print({y.grad_fn.next_functions[0][0].name() for y in ys})"
    )
    for setting, expected in (("0", "MulBackward0"), ("1", NAME)):
        environment = {**os.environ, "TINYLORA_SIBLINGS": setting}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == str({expected}), done.stderr
