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
from tinylora_kernels.method.parts import block_basis, block_projection
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
@nodes
def test_a_banks_rows_are_those_of_each_adapter_alone(in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
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


def capture(step):
    """A graph of a step that has run before, and the tensors that it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


def draw_anew(*tensors: Tensor) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))


@on_a_card
@everywhere
@nodes
@pytest.mark.parametrize("out, width, rows", [(3584, 512, 65), (3584, 512, 700), (512, 512, 300), (512, 512, 1)])
def test_a_captured_graph(out, width, rows, in_cpp, device, backend, monkeypatch):
    """Forward and backward of a layer, replayed on other inputs, another v and another weight."""
    choose_node(monkeypatch, in_cpp)
    layer = make(out, width, torch.bfloat16, True, device, backend)
    x, g = inputs(layer, (1, rows))
    graph, found = capture(functools.partial(results, layer, x, g))
    for _ in range(3):
        draw_anew(x, g, layer.v)
        layer.base.weight.data.mul_(-1)
        graph.replay()
        agree(found, exact(layer, x, g), torch.bfloat16)


def make_fused(sizes: tuple[int, ...], width: int, device: str, backend: str) -> TinyLoRALayer:
    """A layer that is adapted part by part."""
    plain = make(sum(sizes), width, torch.bfloat16, True, device, backend)
    basis, _ = other_factors(plain, sizes)
    own = [10 * torch.randn(NUMBERS, 2, 2) for _ in sizes]
    layer = TinyLoRALayer(
        plain.base.cpu(), block_basis(basis.cpu(), sizes), torch.ones(len(sizes), 2), block_projection(own),
        nn.Parameter(plain.v.detach().cpu()), parts=sizes,
    ).to(device)  # fmt: skip
    layer.backend = backend
    return layer


def other_factors(layer: TinyLoRALayer, sizes: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    bases = [torch.linalg.qr(torch.randn(size, 2))[0].T for size in sizes or (layer.base.out_features,)]
    sigma = torch.ones(2) if sizes is None else torch.ones(len(sizes), 2)
    return torch.cat(bases, 1).contiguous().to(layer.basis.device), sigma


def write(layer: TinyLoRALayer, what: str) -> None:
    weight = layer.base.weight
    if what == "copy_":
        with torch.no_grad():
            weight.copy_(-weight)
    elif what == "state dict":
        layer.load_state_dict(layer.state_dict())
    elif what == "factors":
        layer.set_factors(*other_factors(layer, layer.parts))
    else:
        put_back = layer.keep()
        layer.set_factors(*other_factors(layer, layer.parts))
        put_back()


@on_a_card
@everywhere
@nodes
@pytest.mark.parametrize("called", [True, False], ids=["called since", ""])
@pytest.mark.parametrize("what", ["copy_", "state dict", "factors", "factors and back"])
@pytest.mark.parametrize("shape, rows", [((144, 64), 516), ((80, 64), 7), ((80, 24, 40), 9)], ids=str)
def test_a_captured_graph_follows_what_was_written(shape, rows, what, called, in_cpp, device, backend, monkeypatch):
    """In place, and whether the layer was called since or not; it writes into no memory but its own."""
    choose_node(monkeypatch, in_cpp)
    if len(shape) == 2:
        layer = make(*shape, torch.bfloat16, True, device, backend)
    else:
        layer = make_fused(shape, 64, device, backend)
    layer.config = TinyLoRAConfig(trainable_dim=NUMBERS, alpha=3.0)
    x, g = inputs(layer, (rows,))
    graph, found = capture(functools.partial(results, layer, x, g))
    for _ in range(2):
        write(layer, what)
        if called:
            agree(results(layer, x, g), exact(layer, x, g), torch.bfloat16, "called")
        others = [torch.full((n,), 7.0, device=device) for n in (128, 256, 512)]  # where B^T lay, if it left
        draw_anew(x, g)
        graph.replay()
        agree(found, exact(layer, x, g), torch.bfloat16, "replayed")
        assert all(bool((one == 7).all()) for one in others)


def read_one_x(device: str, backend: str, rows: int):
    """q, k and v on one x: what a step gives, in float64 too, and what may be written between steps."""
    layers = [make(out, 256, torch.bfloat16, out != 96, device, backend) for out in (256, 96, 600)]
    x = torch.randn(1, rows, 256, dtype=torch.bfloat16, device=device).requires_grad_()
    gs = [torch.randn(1, rows, layer.base.out_features, dtype=x.dtype, device=device) for layer in layers]
    vectors = [layer.v for layer in layers]

    def step():
        h = x * 1  # as from a norm
        ys = [layer(h) for layer in layers]
        joined = {y.grad_fn.next_functions[0][0] for y in ys}
        assert len(joined) == 1 and ("Siblings" in joined.pop().name()) is ("C++" in ys[0].grad_fn.name())
        return [y.detach() for y in ys], *torch.autograd.grad(ys, (x, *vectors), gs)

    def truth():
        one_by_one = [exact(layer, x, g) for layer, g in zip(layers, gs, strict=True)]
        ys, dxs, dvs = zip(*one_by_one, strict=True)
        return list(ys), sum(dxs), *dvs

    return step, truth, (x, *gs, *vectors)


def agree_on_one_x(found, truth) -> None:
    (ys, *gradients), (true_ys, *true_gradients) = found, truth
    for n, (one, other) in enumerate(zip([*ys, *gradients], [*true_ys, *true_gradients], strict=True)):
        assert (off := error(one.detach().cpu(), other)) < LIMIT[torch.bfloat16], f"{n}: error {off:.2e}"


@on_a_card
@everywhere
@nodes
@pytest.mark.parametrize("rows", [3, 530])
def test_layers_that_read_one_x_in_a_captured_graph(rows, in_cpp, device, backend, monkeypatch):
    choose_node(monkeypatch, in_cpp)
    step, truth, written = read_one_x(device, backend, rows)
    graph, found = capture(step)
    for _ in range(3):
        draw_anew(*written)
        graph.replay()
        agree_on_one_x(found, truth())


@on_a_card
@everywhere
@nodes
@pytest.mark.parametrize("rows", [3, 530])
def test_layers_that_read_one_x_on_a_side_stream(rows, in_cpp, device, backend, monkeypatch):
    """All of them; and a last step of the main stream, behind it, by the plans that were made there."""
    choose_node(monkeypatch, in_cpp)
    step, truth, written = read_one_x(device, backend, rows)
    side = torch.cuda.Stream()
    for _ in range(3):
        draw_anew(*written)
        expected = truth()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = step()
        torch.cuda.current_stream().wait_stream(side)
        agree_on_one_x(found, expected)
    agree_on_one_x(step(), expected)


@on_a_card
@everywhere
@nodes
def test_a_sibling_on_another_stream_hands_its_own_dx_on(in_cpp, device, backend, monkeypatch):
    """One that adds to a sum before it is there would be wrong: torch orders what streams hand on."""
    choose_node(monkeypatch, in_cpp)
    layers = [make(512, 256, torch.bfloat16, False, device, backend) for _ in range(2)]
    x, g = inputs(layers[0], (700,))
    side = torch.cuda.Stream()
    for _ in range(3):
        h = x * 1
        first = layers[0](h)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second = layers[1](h)
        torch.cuda.current_stream().wait_stream(side)
        edges = [y.grad_fn.next_functions[0][0] for y in (first, second)]
        assert (edges[0] is edges[1]) is ("C++" not in first.grad_fn.name())
        (dx,) = torch.autograd.grad((first, second), x, (g, g))
        truth = sum(exact(layer, x, g)[1] for layer in layers)
        assert error(dx.cpu(), truth) < LIMIT[torch.bfloat16]
