"""The node in C++ calls the kernels past the dispatcher (linear/direct.inl): to the bit what the ops give, with their
words for what they refuse, and by the ops where somebody watches them.
"""
import ctypes

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.cases import error
from tests.layers.test_layer import dense
from tests.layers.test_layer import linear as linear_on_cpu
from tinylora_kernels.linear import node
from tinylora_kernels.linear.rules import GPU_ROWS
from tinylora_kernels.ops.native import library

from .places import DEVICES

pytestmark = pytest.mark.skipif(node.extension is None, reason=f"the node in C++: {node.why_no_twin}")
(DEVICE,) = DEVICES
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 2e-3}
if DEVICE != "cpu":
    del DTYPES[torch.float64]
WIDTHS = {"last": 40, "first": 6}  # of the output for 16 inputs: where the product comes in fp32
MANY = GPU_ROWS + 3  # rows whose product comes last on a GPU too


def linear(bias=True, dtype=torch.float32, out_features=40):
    return linear_on_cpu(bias, dtype, out_features).to(DEVICE)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def watched():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.fixture
def through_the_ops():
    """Calls inside run the ops: through_the_ops(call)."""

    def call(run):
        kernels = node.extension.use_kernels(0, 0)
        assert kernels == library.kernels() != (0, 0)
        try:
            return run()
        finally:
            node.extension.use_kernels(*kernels)

    return call


@pytest.fixture
def planted():
    """Every kernel that is called directly fails with the word "planted"."""
    word = ctypes.create_string_buffer(b"planted")
    fails = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 3)  # whatever its arguments: Status::error
    says = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(word))
    table = (ctypes.c_void_p * 7)(*[ctypes.cast(each, ctypes.c_void_p) for each in (*[fails] * 6, says)])
    kernels = node.extension.use_kernels(ctypes.addressof(table), ctypes.addressof(table))
    yield
    node.extension.use_kernels(*kernels)


class Seen(TorchDispatchMode):
    """Names of the package's ops that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tinylora":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def step(layer, x, g):
    """y, dx and dv."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.v], g.view_as(y))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16,), (1, 16), (MANY, 16), (2, 3, 16)], ids=str)
def test_the_same_bits_as_through_the_ops(through_the_ops, shape, dtype, order, bias):
    layer = linear(bias, dtype, WIDTHS[order])
    x, g = random(*shape, dtype=dtype), random(*shape[:-1], WIDTHS[order], dtype=dtype)
    for _ in range(2):  # with the plan, from the second call on
        direct = step(layer, x, g)
    ops = through_the_ops(lambda: step(layer, x, g))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(direct, ops, strict=True))
    assert error(direct[0], dense(layer, x)) < DTYPES[dtype]
    with torch.inference_mode():
        assert torch.equal(layer(x), direct[0])


@pytest.mark.parametrize("order", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [False, True])
def test_a_call_that_nobody_watches_runs_the_kernel(planted, dtype, order, plan):
    layer = linear(dtype=dtype, out_features=WIDTHS[order])
    x = random(MANY, 16, dtype=dtype).requires_grad_()
    if plan:
        with watched():
            layer(x), layer(x)
    for around in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with around(), pytest.raises(RuntimeError, match="planted"):
            layer(x)


@pytest.mark.parametrize("order", WIDTHS)
def test_the_backward_pass_runs_the_kernel(planted, order):
    layer, x = linear(out_features=WIDTHS[order]), random(MANY, 16).requires_grad_()
    with watched():
        y = layer(x)
    with pytest.raises(RuntimeError, match="planted"):
        y.sum().backward()


def test_what_is_watched_runs_the_ops(planted):
    layer, x = linear(), random(MANY, 16).requires_grad_()
    with watched():
        layer(x).sum().backward()
    with Seen():
        layer(x).sum().backward()
    assert torch.func.vmap(layer)(x[None]).shape == (1, MANY, 40)
    torch.func.grad(lambda x: layer(x).sum())(x)


@pytest.mark.parametrize("order", WIDTHS)
def test_only_one_gradient_is_wanted(through_the_ops, order):
    layer, x = linear(out_features=WIDTHS[order]), random(MANY, 16)
    for wants_x, wants_v in ((True, False), (False, True)):
        layer.v.requires_grad_(wants_v)

        def gradient(wants_x=wants_x):
            inputs = x.detach().requires_grad_(wants_x)
            return torch.autograd.grad(layer(inputs).sum(), [inputs if wants_x else layer.v])[0]

        assert torch.equal(gradient(), gradient()) and torch.equal(gradient(), through_the_ops(gradient))


@pytest.mark.parametrize(("order", "forward", "backward"), [
    ("last", "low_rank", "update_input_grad"), ("first", "update", "update_backward"),
])  # fmt: skip
def test_a_mode_sees_the_ops(order, forward, backward):
    """The node's own; a layer under a mode does not run this node (ops/autograd.py)."""
    layer, x = linear(out_features=WIDTHS[order]), random(MANY, 16)
    for _ in range(2):
        step(layer, x, torch.ones(MANY, WIDTHS[order], device=DEVICE))
    frozen = layer._plan.plan.frozen
    arguments = (layer.v, *frozen[:-2], *node.NO_PARTS)
    with Seen() as seen:
        y = torch.ops.tinylora.linear(x.requires_grad_(), *arguments)
    assert [name for name in seen.names if name != "refresh_right"] == [forward]
    with Seen() as seen:
        torch.autograd.grad(y.sum(), [x, layer.v])
    assert seen.names == [backward]
    with Seen() as seen:
        step(layer, x, torch.ones(MANY, WIDTHS[order], device=DEVICE))
    assert seen.names == ["updated", "update_backward"]


def test_a_profiler_sees_the_ops():
    layer, x = linear(), random(MANY, 16)
    step(layer, x, torch.ones(MANY, 40, device=DEVICE))
    with watched() as profile:
        step(layer, x, torch.ones(MANY, 40, device=DEVICE))
    names = {event.key for event in profile.key_averages()}
    assert {"tinylora::low_rank", "tinylora::update_input_grad"} <= names


def test_a_checkpoint_that_runs_forward_again_under_a_mode():
    layer, x = linear(), random(MANY, 16)
    expected = step(layer, x, torch.ones(MANY, 40, device=DEVICE))
    inputs = x.detach().requires_grad_()
    y = checkpoint(layer, inputs, use_reentrant=False)
    with Seen() as seen:
        found = torch.autograd.grad(y.sum(), [inputs, layer.v])
    assert "updated" in seen.names
    assert torch.equal(found[0], expected[1]) and error(found[1], expected[2]) < 1e-5


REFUSED = [
    ("v", lambda v: v[:2]),
    ("v", lambda v: v.double()),
    ("v", lambda v: torch.stack([v, v], 1)[:, 0]),
    ("projection", lambda p: p[:, :1]),
    ("projection", lambda p: p.transpose(0, 2)),
    ("basis", lambda b: b[:, :20]),
    ("bias", lambda b: b[:4]),
    ("bias", lambda b: b.double()),
    ("adapter_ids", lambda ids: ids[:3]),
    ("adapter_ids", lambda ids: ids.to(torch.int16)),
]
if DEVICE == "cpu":  # elsewhere nobody waits to look at them
    REFUSED += [("adapter_ids", lambda ids: ids + 7), ("adapter_ids", lambda ids: ids - 2)]
else:
    REFUSED += [(name, torch.Tensor.cpu) for name in ("v", "projection", "basis", "bias", "adapter_ids")]


@pytest.mark.parametrize(
    ("order", "name", "change"),
    [(0, *case) for case in REFUSED] + [(1, *case) for case in REFUSED if case[0] != "basis"],  # y has its width
)
def test_what_is_refused_is_refused_in_the_same_words(through_the_ops, order, name, change):
    arguments = {
        "x": random(4, 16), "v": random(3), "weight": random(40, 16), "bias": random(40), "basis": random(2, 40),
        "projection": random(3, 2, 2), "adapter_ids": None, "right": random(2, 16), "samples": None, "order": order,
        "part_basis": None, "part_projection": None, "ends": [],
    }  # fmt: skip
    if name == "adapter_ids":
        arguments |= {"adapter_ids": torch.tensor([0, 1, 1, 0], device=DEVICE), "v": random(2, 3)}
    torch.ops.tinylora.linear(*arguments.values())
    arguments[name] = change(arguments[name])
    raised = []
    for call in (lambda run: run(), through_the_ops):
        with pytest.raises((ValueError, IndexError)) as info:
            call(lambda: torch.ops.tinylora.linear(*arguments.values()))
        raised.append((info.type, str(info.value)))
    assert raised[0] == raised[1] and raised[0][1].startswith(name)


def parts_step(ids, wants_t=True):
    """y, dx and dv of a fused layer whose update goes part by part."""
    torch.manual_seed(2)
    v = random(3, 5) if ids is not None else random(5)
    x, weight, g = random(4, 16).requires_grad_(), random(40, 16), random(4, 40)
    parts = (0.3 * random(2, 40), random(3, 5, 2, 2), [8, 24, 40])
    v.requires_grad_(wants_t)
    y = torch.ops.tinylora.linear(x, v, weight, random(40), random(8, 40), random(5, 8, 8), ids, None, None, 0, *parts)
    return [y.detach(), *torch.autograd.grad(y, [x, v] if wants_t else [x], g)]


@pytest.mark.parametrize("wants_t", [True, False])
@pytest.mark.parametrize("ids", [None, [2, -1, 0, 2]], ids=str)
def test_parts_have_the_same_bits_as_through_the_ops(through_the_ops, ids, wants_t):
    ids = None if ids is None else torch.tensor(ids, device=DEVICE)
    direct, ops = parts_step(ids, wants_t), through_the_ops(lambda: parts_step(ids, wants_t))
    assert all(torch.equal(one, other) for one, other in zip(direct, ops, strict=True)) and direct[1].abs().max() > 0


def test_parts_run_the_kernel(planted):
    with pytest.raises(RuntimeError, match="planted"):
        parts_step(None)


@pytest.mark.parametrize("ends", [[], [8, 24], [24, 8, 40]], ids=str)
def test_parts_that_are_refused_are_refused_in_the_same_words(through_the_ops, ends):
    def call():
        y = torch.ops.tinylora.linear(
            random(4, 16), random(5), random(40, 16), None, random(8, 40), random(5, 8, 8), None, None, None, 0,
            random(2, 40), random(3, 5, 2, 2), ends,
        )  # fmt: skip
        return y

    raised = []
    for way in (lambda run: run(), through_the_ops):
        with pytest.raises(ValueError, match="ends") as info:
            way(call)
        raised.append(str(info.value))
    assert raised[0] == raised[1]
