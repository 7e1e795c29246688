"""The update dissolved by torch.compile: the numbers of what is traced and what is generated, and when it is chosen.

tests/ops/test_backends.py runs the same functions over the grid as any backend's; tests/sim/test_inductor.py counts
what is generated for a GPU.
"""
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from tests.cases import Case, Inputs, Outputs, assert_within_budget, error, make_case
from tinylora_kernels import ops
from tinylora_kernels.functional import tiny_lora_linear, tiny_lora_update, tiny_lora_update_parts
from tinylora_kernels.ops import dispatch, inductor

GRID = [
    Case(5, 7, rank=2, numbers=13),
    Case(40, 1000, rank=4, numbers=13, pad=24),
    Case(24, 576, rank=2, numbers=13, adapters=3, per_sequence=True),
    Case(37, 513, rank=2, numbers=13, bias=False, adds_bias=True),
]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    ops.set_backend(None)
    dispatch._choose.cache_clear()


def dissolved(inputs: Inputs, *, bias: Tensor | None = None):
    """(y, v) -> the updated y."""

    def forward(y: Tensor, v: Tensor) -> Tensor:
        return tiny_lora_update(
            y, inputs.basis, v, inputs.projection, inputs.offset, inputs.adapter_ids, bias=bias, backend="inductor"
        )

    return forward


def gradients(forward, inputs: Inputs) -> list[Tensor]:
    """y, g0 and dv."""
    y, v = inputs.y.clone().requires_grad_(), inputs.v.clone().requires_grad_()
    out = forward(y, v)
    return [out.detach(), *torch.autograd.grad(out, (y, v), inputs.g)]


def exactly(inputs: Inputs, bias: Tensor | None = None) -> list[Tensor]:
    """The same of the reference in float64, eagerly."""
    wide = inputs.to(torch.float64)
    bias = None if bias is None else bias.double()

    def forward(y: Tensor, v: Tensor) -> Tensor:
        return tiny_lora_update(
            y, wide.basis, v, wide.projection, wide.offset, wide.adapter_ids, bias=bias, backend="reference"
        )

    return gradients(forward, wide)


# What is generated


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generated_code_is_within_the_budget_and_repeats_its_bits(dtype, device):
    """Over the grid's kinds of case, all in one graph: forward and backward as autograd has them, t among them."""
    draws = [[make_case(case, dtype, draw) for draw in range(4)] for case in GRID]

    @torch.compile(fullgraph=True, dynamic=False)
    def run(inputs: list[Inputs]):
        outs = []
        for i in inputs:
            y, t = inductor.updated(i.y, i.basis, i.v, i.projection, i.offset, i.bias, i.adapter_ids)
            outs.append((y, t, *inductor.update_backward(i.g, i.basis, i.v, i.projection, t, i.adapter_ids, True)))
        return outs

    found = []
    for draw in range(4):
        inputs = [of_case[draw].on(device) for of_case in draws]
        found.append([Outputs(*out).cpu() for out in run(inputs)])
        for first, again in zip(found[-1], run(inputs), strict=True):
            for name, tensor in zip(("y", "t", "g0", "dv"), again, strict=True):
                assert torch.equal(getattr(first, name), tensor.cpu()), name
    for of_case, inputs in zip(zip(*found, strict=True), draws, strict=True):
        assert_within_budget(list(of_case), inputs)


def test_nothing_of_ours_is_called():
    inputs = make_case(Case(6, 64, numbers=3), torch.float32)
    _, codes = run_and_get_code(lambda: gradients(torch.compile(dissolved(inputs), fullgraph=True), inputs))
    assert len(codes) == 2 and not any("ops.tinylora" in code or "extern_kernels." in code for code in codes)


@pytest.mark.parametrize("bad", [7, -2, -6])
def test_an_id_without_an_adapter_is_an_error_in_generated_code_too(bad):
    inputs = make_case(Case(6, 64, numbers=3, adapters=5), torch.float32)
    ids = torch.tensor([0, -1, 4, 2, 2, bad])

    @torch.compile(fullgraph=True)
    def run(ids: Tensor) -> Tensor:
        return tiny_lora_update(inputs.y, inputs.basis, inputs.v, inputs.projection, None, ids, backend="inductor")

    run(ids.clamp(-1, 4))
    with pytest.raises(RuntimeError, match="index out of bounds"):
        run(ids)


# What is traced


SITUATIONS = {
    "offset": Case(6, 40, numbers=3),
    "bias": Case(6, 40, numbers=3, bias=False, adds_bias=True),
    "padded rows": Case(6, 40, numbers=3, pad=8),
    "LoRA-XS": Case(6, 40, lora_xs=True, numbers=4),
    "an id a row": Case(24, 40, numbers=3, adapters=5),
    "an id a sequence": Case(24, 40, numbers=3, adapters=3, per_sequence=True),
    "no rows": Case(0, 40),
}


@pytest.mark.parametrize("case", SITUATIONS.values(), ids=SITUATIONS)
def test_traced_in_one_graph_with_its_gradients(case):
    inputs = make_case(case, torch.float32)
    bias = inputs.bias
    compiled = torch.compile(dissolved(inputs, bias=bias), fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(compiled, inputs), exactly(inputs, bias), strict=True):
        assert found.dtype is torch.float32 and error(found, expected) < 1e-6


def test_a_trained_bias_and_one_row_without_a_batch():
    inputs = make_case(Case(1, 40, numbers=3, bias=False, adds_bias=True), torch.float32)
    found, expected = [], []
    for wide, backend, results in ((inputs, "inductor", found), (inputs.to(torch.float64), "reference", expected)):
        y, v, b = (t.clone().requires_grad_() for t in (wide.y[0], wide.v, wide.bias))

        def forward(y, v, b, wide=wide, backend=backend):
            return tiny_lora_update(y, wide.basis, v, wide.projection, bias=b, backend=backend)

        call = torch.compile(forward, fullgraph=True, backend="aot_eager") if backend == "inductor" else forward
        out = call(y, v, b)
        results += [out.detach(), *torch.autograd.grad(out, (y, v, b), wide.g[0])]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and error(ours, theirs) < 1e-6


def test_the_parts_of_a_fused_layer():
    generator = torch.Generator().manual_seed(0)
    y, g = (torch.randn(5, 40, generator=generator) for _ in range(2))
    basis, bias = torch.randn(2, 40, generator=generator) / 5, torch.randn(40, generator=generator)
    v, projection = torch.randn(2, 3, generator=generator), torch.randn(3, 3, 2, 2, generator=generator)
    results = []
    for backend in ("inductor", "reference"):

        def run(y, v, backend=backend):
            return tiny_lora_update_parts(
                y, basis, v, projection, [16, 28, 40], [0, 1, 0], bias=bias, inplace=True, backend=backend
            )

        leaves = y.clone().requires_grad_(), v.clone().requires_grad_()
        call = torch.compile(run, fullgraph=True, backend="aot_eager") if backend == "inductor" else run
        out = call(leaves[0] * 1, leaves[1])
        results.append([out.detach(), *torch.autograd.grad(out, leaves, g)])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-6


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_elements_that_are_not_finite_leave_the_others_of_their_row_finite(value):
    inputs = make_case(Case(4, 40, numbers=3), torch.float32)
    inputs.y[1, 7] = value
    compiled = torch.compile(dissolved(inputs), fullgraph=True, backend="aot_eager")
    found, expected = compiled(inputs.y, inputs.v), exactly(inputs)[0]
    rest = torch.ones(40, dtype=torch.bool)
    rest[7] = False
    assert torch.equal(found[1, 7].isnan(), expected[1, 7].isnan()) and not found[1, 7].isfinite()
    assert found[:, rest].isfinite().all() and error(found[:, rest], expected[:, rest]) < 1e-6


def test_nothing_is_written_into_y():
    inputs = make_case(Case(4, 40, numbers=3), torch.float32)
    before = inputs.y.clone()
    compiled = torch.compile(
        lambda y: tiny_lora_update(y, inputs.basis, inputs.v, inputs.projection, inplace=True, backend="inductor"),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    assert not torch.equal(compiled(inputs.y), before) and torch.equal(inputs.y, before)


@pytest.mark.parametrize("right", [False, True], ids=["", "with B"])
def test_autocast_and_checkpointing_inside_one_graph(right):
    """x and W in float32, a product in bfloat16, gradients in float32: dv is summed in float32 all the same."""
    torch.manual_seed(0)
    inputs = make_case(Case(30, 64, numbers=3, bias=False), torch.float32)
    weight, x = torch.randn(64, 48) / 7, torch.randn(30, 48)
    b = inputs.basis @ weight if right else None

    def layer(x: Tensor, v: Tensor, backend: str) -> Tensor:
        if right:
            return tiny_lora_linear(x, weight, None, inputs.basis, v, inputs.projection, right=b, backend=backend)
        y = torch.nn.functional.linear(x, weight)
        return tiny_lora_update(y, inputs.basis, v, inputs.projection, backend=backend)

    def run(x: Tensor, v: Tensor, backend: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(layer, x, v, backend, use_reentrant=False)

    results = []
    for call, backend in ((torch.compile(run, fullgraph=True, backend="aot_eager"), "inductor"), (run, "reference")):
        x_, v = x.clone().requires_grad_(), inputs.v.clone().requires_grad_()
        y = call(x_, v, backend)
        results.append([y.detach().float(), *torch.autograd.grad(y, (x_, v), inputs.g.to(y.dtype))])
    for found, expected in zip(*results, strict=True):
        assert found.dtype is torch.float32 and error(found, expected) < 4e-3  # half an eps of bfloat16


def test_lengths_cause_no_more_graphs_than_with_another_backend():
    inputs = make_case(Case(4, 40, numbers=3), torch.float32)
    counts = {}
    for backend in ("reference", "inductor"):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        def forward(y, v, backend=backend):
            return tiny_lora_update(y, inputs.basis, v, inputs.projection, inputs.offset, backend=backend)

        compiled = torch.compile(forward, fullgraph=True, backend=counter)
        for rows in (2, 3, 9, 17):
            y, v = torch.randn(rows, 40, requires_grad=True), inputs.v.clone().requires_grad_()
            torch.autograd.grad(compiled(y, v).sum(), (y, v))
        counts[backend] = counter.frame_count
    assert len(set(counts.values())) == 1, counts


def test_second_derivatives_are_refused():
    inputs = make_case(Case(4, 40, numbers=3), torch.float32)
    y, v = inputs.y.requires_grad_(), inputs.v.requires_grad_()
    out = torch.compile(dissolved(inputs), fullgraph=True, backend="aot_eager")(y, v)
    (dv,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dv.sum(), y)


# When it is chosen


@pytest.mark.parametrize(
    "device, rank, asked, chosen",
    [
        ("cuda", 2, None, "inductor"), ("xpu", 8, None, "inductor"), ("cuda", 2, "reference", "reference"),
        ("cpu", 2, "inductor", "inductor"), ("cuda", 16, None, "reference"),
    ],
)  # fmt: skip
def test_while_tracing_for_a_gpu_it_is_the_automatic_choice(device, rank, asked, chosen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why cuda and triton do not run here
        assert dispatch._choose_while_tracing(device, torch.bfloat16, rank, asked) == chosen
        ops.set_backend("reference")
        assert dispatch._choose_while_tracing("cuda", torch.bfloat16, rank, None) == "reference"


def test_elsewhere_it_is_where_it_was_asked_for():
    assert ops.choose("cpu", torch.float32, 2) != "inductor"
    assert dispatch._choose_while_tracing("cpu", torch.float32, 2, None) != "inductor"
    ops.set_backend("inductor")
    assert ops.choose("cpu", torch.float32, 2) == "inductor"
    with pytest.raises(RuntimeError, match="rank 16: it is unrolled, up to rank 8"):
        ops.choose("cpu", torch.float32, 16)
