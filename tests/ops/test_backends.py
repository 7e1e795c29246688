"""Every backend that runs on this machine, on its own device: the same assertions on a laptop and on a GPU.

Here that is the CPU; `make gpu` runs the same file where there is a card, with TINYLORA_REPEATS=1000.
"""
import os

import pytest
import torch

from tests.cases import CASES, DTYPES, Case, assert_within_budget, make_case, run_ops
from tinylora_kernels import ops
from tinylora_kernels.functional import tiny_lora_update

REPEATS = int(os.environ.get("TINYLORA_REPEATS", "20"))
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    (device, name)
    for device in DEVICES
    for name in ops.BACKENDS
    if ops.BACKENDS[name].why_not(device, torch.float32, 2) is None
]
CUDA_PLACES = [place for place in PLACES if place[0] == "cuda"]
on_cuda = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, id=name) for _, name in CUDA_PLACES]
    or [pytest.param(None, marks=pytest.mark.skip(reason="streams and graphs exist on a GPU only: make gpu"))],
)
everywhere = pytest.mark.parametrize("device, backend", PLACES)


@pytest.fixture(autouse=True)
def exact_reference():
    """TF32 in the reference's products would make it the less exact side of a comparison."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_within_the_budget(case, dtype, device, backend):
    if ops.BACKENDS[backend].why_not(device, dtype, case.rank) is not None:
        assert device == "cuda", "the CPU backends serve every rank"
        return  # ops.choose takes the reference for such a rank, which is a place of its own
    draws = [make_case(case, dtype, draw) for draw in range(8)]
    assert_within_budget([run_ops(ops.BACKENDS[backend], i.on(device)).cpu() for i in draws], draws)


@everywhere
@pytest.mark.parametrize("case", [Case(300, 576, numbers=13), Case(96, 4864, rank=4, adapters=7)], ids=str)
def test_results_have_the_same_bits_on_every_run(case, device, backend):
    if backend == "reference" and device == "cuda" and case.adapters:
        return  # index_add_ on a GPU adds in any order; the reference promises exactness, not bits
    inputs = make_case(case, torch.bfloat16).on(device)
    first = run_ops(ops.BACKENDS[backend], inputs)
    for _ in range(REPEATS):
        again = run_ops(ops.BACKENDS[backend], inputs)
        for name in ("y", "t", "g0", "dv"):
            assert torch.equal(getattr(again, name), getattr(first, name)), name


@on_cuda
def test_a_captured_graph_replays_on_new_inputs(backend):
    inputs = make_case(Case(64, 1536, numbers=13), torch.bfloat16).on("cuda")
    y, g, v = inputs.y.clone(), inputs.g.clone(), inputs.v.clone()
    run = ops.BACKENDS[backend]

    def step():
        t = run.update(y, inputs.basis, v, inputs.projection, inputs.offset, None, None)
        return t, *run.update_backward(g, inputs.basis, v, inputs.projection, t, None, True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compilation and the allocator's first calls happen outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for draw in (1, 2):
        fresh = make_case(Case(64, 1536, numbers=13), torch.bfloat16, draw).on("cuda")
        y.copy_(fresh.y), g.copy_(fresh.g), v.copy_(fresh.v)
        graph.replay()
        replayed = [y.clone(), *(tensor.clone() for tensor in captured)]
        y.copy_(fresh.y)
        for found, expected in zip(replayed, (y, *step()), strict=True):
            if found is not replayed[0]:
                assert torch.equal(found, expected)
        assert torch.equal(replayed[0], y)


@on_cuda
def test_kernels_run_on_the_callers_stream(backend):
    inputs = make_case(Case(512, 4096), torch.float32).on("cuda")
    expected = run_ops(ops.BACKENDS[backend], inputs)
    stream, y = torch.cuda.Stream(), torch.empty_like(inputs.y)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the copy waits; a kernel on another stream would read y before it
        y.copy_(inputs.y)
        ops.BACKENDS[backend].update(y, inputs.basis, inputs.v, inputs.projection, inputs.offset, None, None)
    stream.synchronize()
    assert torch.equal(y, expected.y)


@on_cuda
def test_gradients_through_autograd(backend):
    inputs = make_case(Case(40, 1536, numbers=13), torch.float32)
    moved = inputs.on("cuda")
    gradients = []
    for place, name in ((moved, backend), (inputs.to(torch.float64), "reference")):
        y, v = place.y.clone().requires_grad_(), place.v.clone().requires_grad_()
        out = tiny_lora_update(y, place.basis, v, place.projection, place.offset, backend=name)
        gradients.append([x.double().cpu() for x in torch.autograd.grad(out, (y, v), place.g)])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
