"""Adapted layers and small models against float64, on a card where there is one: plans, both nodes, checkpoints, banks,
graphs, and that nothing waits for the device.
"""
from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.cases import error
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.layers.layer import TinyLoRALayer
from tinylora_kernels.linear import node, plan
from tinylora_kernels.ops.reference import contract

from .places import everywhere, on_a_card

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
SHAPES = [  # out, in, leading dimensions of x
    (640, 640, (2, 129)),
    (512, 3584, (1, 1)),
    (2048, 256, (3, 7)),
    (600, 256, (2, 260)),  # wide and many rows: on a GPU the term comes first
    (144, 64, (2, 1030)),
    (31, 64, (5, 3)),
]
NUMBERS = 13
nodes = pytest.mark.parametrize("in_cpp", [False] + [True] * (node.twin is not None), ids=lambda on: "cpp"[: 3 * on])


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 would make the product the less exact side of a comparison."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def choose_node(monkeypatch, in_cpp: bool) -> None:
    if not in_cpp:
        monkeypatch.setattr(node, "twin", None)
        monkeypatch.setattr(plan, "twin", None)


def make(out: int, width: int, dtype: torch.dtype, bias: bool, device: str, backend: str) -> TinyLoRALayer:
    torch.manual_seed(out + width)
    base = nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    basis = torch.linalg.qr(torch.randn(out, 2, dtype=torch.float64))[0].T.float().contiguous()
    v = nn.Parameter(torch.randn(NUMBERS) / NUMBERS**0.5)
    layer = TinyLoRALayer(base, basis, torch.ones(2), 10 * torch.randn(NUMBERS, 2, 2), v).to(device)
    layer.backend = backend
    return layer


def inputs(layer: TinyLoRALayer, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    weight = layer.base.weight
    x, g = (torch.randn(*rows, n, dtype=weight.dtype, device=weight.device) for n in reversed(weight.shape))
    return x.requires_grad_(), g


def exact(layer: TinyLoRALayer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dv in float64 on the CPU."""
    weight, basis, projection = (t.detach().double().cpu() for t in (layer.base.weight, layer.basis, layer.projection))
    x, v = (t.detach().double().cpu().requires_grad_() for t in (x, layer.v))
    y = x @ weight.T
    y = y + y @ basis.T @ contract(v, projection).T @ basis
    if layer.base.bias is not None:
        y = y + layer.base.bias.detach().double().cpu()
    return y.detach(), *torch.autograd.grad(y, (x, v), g.double().cpu())


def results(layer: TinyLoRALayer, x: Tensor, g: Tensor, call=None) -> tuple[Tensor, Tensor, Tensor]:
    y = layer(x) if call is None else call(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.v), g)


def agree(found, truth, dtype: torch.dtype, what: str = "") -> None:
    for name, one, other in zip(("y", "dx", "dv"), found, truth, strict=True):
        off = error(one.detach().cpu(), other)
        assert off < LIMIT[dtype], f"{what} {name}: error {off:.2e}"


@everywhere
@nodes
@pytest.mark.parametrize(
    "dtype, bias", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True), (torch.float16, False)]
)
@pytest.mark.parametrize("out, width, rows", SHAPES)
def test_a_layer(out, width, rows, bias, dtype, in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
    layer = make(out, width, dtype, bias, device, backend)
    x, g = inputs(layer, rows)
    truth = exact(layer, x, g)
    for turn in ("first call", "by its plan"):
        agree(results(layer, x, g), truth, dtype, turn)
    assert layer._plan is not None
    with torch.no_grad():
        off = error(layer(x).cpu(), truth[0])
        assert off < LIMIT[dtype], f"no grad: error {off:.2e}"
    (dx,) = torch.autograd.grad(layer(x).sum(), x)  # a gradient of stride 0
    off = error(dx.cpu(), exact(layer, x, torch.ones_like(g))[1])
    assert off < LIMIT[dtype], f"sum: error {off:.2e}"


@everywhere
@nodes
@pytest.mark.parametrize("rows", [7, 600])
@pytest.mark.parametrize("write", ["data", "copy_", "assignment"])
def test_a_weight_that_is_written_counts_from_the_next_call_on(write, rows, in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
    layer = make(640, 256, torch.float32, True, device, backend)
    x, g = inputs(layer, (rows,))
    weight = layer.base.weight
    for _ in range(3):
        agree(results(layer, x, g), exact(layer, x, g), torch.float32)
        if write == "data":
            weight.data.mul_(-1.5)
        elif write == "copy_":
            with torch.no_grad():
                weight.copy_(-weight)
        else:
            weight.data = weight.data * -1.5


@everywhere
@nodes
def test_a_checkpoint_under_autocast(in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
    layer = make(256, 128, torch.bfloat16, True, device, backend)
    x, g = inputs(layer, (2, 9))

    def call(x):
        with torch.autocast(device, torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    agree(results(layer, x, g, call), exact(layer, x, g), torch.bfloat16)


@everywhere
@nodes
def test_an_inf_stays_where_it_is(in_cpp, device, backend, monkeypatch):
    """A product of float16 that overflows: the other elements of its row are right."""
    choose_node(monkeypatch, in_cpp)
    layer = make(600, 64, torch.float16, True, device, backend)
    layer.base.weight.data[5] = 1000.0  # a row of W: one element of each row of y
    x, g = inputs(layer, (40,))
    with torch.no_grad():
        x[:20] = x[:20].abs() + 1  # 64 of them times 1000
        x[20:] *= 1e-3
        y = layer(x).cpu()
    truth, _, _ = exact(layer, x, g)
    lost = torch.zeros(y.shape, dtype=torch.bool)
    lost[:20, 5] = True
    assert torch.equal(y.isfinite(), ~lost)
    assert error(y[20:], truth[20:]) < LIMIT[torch.float16]


@everywhere
@nodes
def test_gradients_of_gradients(in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
    layer = make(60, 24, torch.float32, True, device, backend)
    x, g = inputs(layer, (5,))

    def second(layer, x, g):
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad((dx * dx).sum(), (x, layer.v))

    wide = make(60, 24, torch.float32, True, "cpu", "reference").double()  # of the same seed
    truth = second(wide, x.detach().double().cpu().requires_grad_(), g.double().cpu())
    for one, other in zip(second(layer, x, g), truth, strict=True):
        assert error(one.cpu(), other) < 2e-5


def small_model(device: str, dtype: torch.dtype, backend: str | None = None) -> nn.Module:
    model = tiny_decoder(width=64, inner=160, bias=True).to(dtype).to(device)
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=5, target_modules=TARGETS, backend=backend, cache=False))
    return model


def losses(model: nn.Module, tokens: Tensor, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(trainable_vectors(model), lr=0.5)
    found = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


@everywhere
@nodes
def test_a_model_trains_as_in_float64(in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
    tokens = torch.randint(17, (3, 40), generator=torch.Generator().manual_seed(0))
    model, wide = small_model(device, torch.float32, backend), small_model("cpu", torch.float64, "reference")
    assert losses(model, tokens.to(device)) == pytest.approx(losses(wide, tokens), rel=1e-4)


@everywhere
def test_a_banks_rows_are_those_of_each_adapter_alone(device, backend):
    model = small_model(device, torch.float32, backend)
    bank = AdapterBank(model, capacity=5, trainable=True, names=("a", "b", "c"))
    for table in bank.parameters():
        with torch.no_grad():
            table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
    tokens = torch.randint(17, (4, 30), generator=torch.Generator().manual_seed(0)).to(device)
    names = ["c", None, "a", "c"]
    with bank.use(names):
        together = model(tokens)
        gradients = torch.autograd.grad(together.square().sum(), list(bank.parameters()))
    sums = [torch.zeros_like(table) for table in bank.parameters()]
    for row, name in enumerate(names):
        with bank.use([name]):
            alone = model(tokens[row : row + 1])
            assert error(together[row].detach().cpu(), alone[0].detach().double().cpu()) < 2e-5
            if name is not None:
                parts = torch.autograd.grad(alone.square().sum(), list(bank.parameters()))
                for total, part in zip(sums, parts, strict=True):
                    total += part
    for one, other in zip(gradients, sums, strict=True):
        assert error(one.cpu(), other.double().cpu()) < 1e-4


@everywhere
@nodes
def test_runs_have_the_same_bits(in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
    for shape in ((640, 640), (600, 256)):
        layer = make(*shape, torch.bfloat16, True, device, backend)
        x, g = inputs(layer, (2, 300))
        first = results(layer, x, g)
        for _ in range(20):
            for one, other in zip(results(layer, x, g), first, strict=True):
                assert torch.equal(one, other)


@everywhere
def test_compiled(device, backend):
    layer = make(320, 128, torch.float32, True, device, backend)
    x, g = inputs(layer, (4, 150))
    compiled = torch.compile(layer, fullgraph=True)
    agree(results(layer, x, g, compiled), exact(layer, x, g), torch.float32)


@on_a_card
@everywhere
@nodes
@pytest.mark.parametrize("shape", [(640, 640), (600, 256)], ids=str)
def test_nothing_waits_for_the_device(shape, in_cpp, device, backend, monkeypatch):
    """Neither calls by a plan, nor those that make one anew for a weight that has changed."""
    choose_node(monkeypatch, in_cpp)
    layer = make(*shape, torch.bfloat16, True, device, backend)
    x, g = inputs(layer, (600,))
    results(layer, x, g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for write in (layer.base.weight.data.neg_, lambda: layer.base.weight.detach().neg_(), lambda: None):
            write()
            found = results(layer, x, g), results(layer, x, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result in found:
        agree(result, exact(layer, x, g), torch.bfloat16)


@on_a_card
@everywhere
@nodes
@pytest.mark.parametrize("out, width, rows", [(3584, 512, 65), (3584, 512, 700), (512, 512, 300), (512, 512, 1)])
def test_a_captured_graph(out, width, rows, in_cpp, device, backend, monkeypatch):
    """Forward and backward of a layer, replayed on other inputs, another v and another weight."""
    choose_node(monkeypatch, in_cpp)
    layer = make(out, width, torch.bfloat16, True, device, backend)
    x, g = inputs(layer, (1, rows))
    step = functools.partial(results, layer, x, g)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (x, g, layer.v):
                tensor.copy_(torch.randn_like(tensor))
        layer.base.weight.data.mul_(-1)
        graph.replay()
        agree(found, exact(layer, x, g), torch.bfloat16)
