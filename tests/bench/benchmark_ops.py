"""The two ops under pytest-benchmark, one case a shape. Not collected by default:

    pytest tests/bench/benchmark_ops.py --benchmark-group-by=func,param:dtype --benchmark-sort=fullname
"""
import pytest
import torch

from bench.grid import shapes
from tinylora_kernels import ops

MODELS = ("SmolLM2-135M", "Qwen2.5-1.5B", "Qwen2.5-7B")
LAYERS = [shapes.layer(model, kind) for model in MODELS for kind in ("q", "gate")]
AVAILABLE = [name for name, reason in ops.table("cpu") if reason is None]
every_case = [
    pytest.mark.parametrize("backend", AVAILABLE),
    pytest.mark.parametrize("numbers", shapes.NUMBERS),
    pytest.mark.parametrize("dtype", shapes.DTYPES, ids=str),
    pytest.mark.parametrize("tokens", (1, 512)),
    pytest.mark.parametrize("shape", LAYERS, ids=str),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Speed, not results: memory is left as the allocator gives it, unlike in the tests."""


@pytest.fixture
def call(shape, tokens, dtype, numbers):
    """y, g, basis, v, P', t of a case; the in-place update is repeated, so v is small."""
    generator = torch.Generator().manual_seed(0)
    y, g = (torch.randn(tokens, shape.out_features, generator=generator).to(dtype) for _ in range(2))
    basis = torch.linalg.qr(torch.randn(shape.out_features, shapes.RANK, generator=generator))[0].T.contiguous()
    projection = torch.randn(numbers, shapes.RANK, shapes.RANK, generator=generator)
    return y, g, basis, torch.full((numbers,), 1e-6), projection, torch.randn(tokens, shapes.RANK, generator=generator)


def decorate(function):
    for mark in every_case:
        function = mark(function)
    return function


@decorate
def test_update(benchmark, call, backend):
    y, _, basis, v, projection, _ = call
    benchmark(ops.BACKENDS[backend].update, y, basis, v, projection, None, None)


@decorate
def test_update_backward(benchmark, call, backend):
    _, g, basis, v, projection, t = call
    benchmark(ops.BACKENDS[backend].update_backward, g, basis, v, projection, t, None, True)
