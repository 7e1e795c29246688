"""Inputs of other layouts than rows in one tensor: nested ones, jagged and strided, and sparse ones: outputs are what
the frozen layer's are, with the numbers and gradients of the samples one by one, or one line says what is missing.
"""
import pytest
import torch
from torch import nn

from tests.guarantees.dense import BASES, adapted, example
from tinylora_kernels import AdapterBank
from tinylora_kernels.functional import tiny_lora_linear, tiny_lora_update, tiny_lora_update_parts
from tinylora_kernels.linear import node, plan

NESTED = pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
ONE_BY_ONE = [base for base in BASES if base != "conv2d"]  # whose base takes none


@pytest.fixture(params=["node as it is", "node in Python"])
def nodes(request, monkeypatch):
    if request.param == "node in Python":
        monkeypatch.setattr(node, "twin", None)
        monkeypatch.setattr(plan, "twin", None)


def samples_of(layer) -> list[torch.Tensor]:
    x = example(layer)
    return [x[0, :3].clone(), x[1].clone()]


def supported(layer, nested) -> bool:
    try:
        layer.base(nested)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


@NESTED
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("base", ONE_BY_ONE)
def test_nested_inputs(base, called_before, layout, nodes):
    layer = adapted(base)
    samples = samples_of(layer)
    nested = torch.nested.nested_tensor(samples, layout=layout)
    if not supported(layer, nested):
        pytest.skip("the frozen layer takes none either")
    if called_before:
        layer(example(layer)), layer(example(layer))
    expected = [layer(x) for x in samples]
    (truth,) = torch.autograd.grad(sum(y.square().sum() for y in expected), layer.v)
    y = layer(nested)
    assert y.is_nested and y.layout is layout
    for ours, one in zip(y.unbind(), expected, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(sum(one.square().sum() for one in y.unbind()), layer.v)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    if layout is torch.jagged:
        y + layer.base(nested)  # of the same rows, torch knows
    with torch.no_grad():
        torch.testing.assert_close(layer(nested).unbind()[1], expected[1].detach(), rtol=1e-5, atol=1e-5)


@NESTED
def test_the_gradient_of_a_nested_input(layout):
    layer = adapted("linear with a bias")
    samples = [x.requires_grad_() for x in samples_of(layer)]
    y = layer(torch.nested.as_nested_tensor(samples, layout=layout))
    found = torch.autograd.grad(sum(one.square().sum() for one in y.unbind()), [*samples, layer.v])
    expected = torch.autograd.grad(sum(layer(x).square().sum() for x in samples), [*samples, layer.v])
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@NESTED
def test_the_functions(layout):
    samples = [torch.randn(3, 24), torch.randn(5, 24)]
    nested, (basis, v, projection) = (
        torch.nested.nested_tensor(samples, layout=layout), (torch.randn(2, 24), torch.randn(3), torch.randn(3, 2, 2))
    )  # fmt: skip
    calls = {
        "update": lambda y: tiny_lora_update(y, basis, v, projection),
        "parts": lambda y: tiny_lora_update_parts(
            y, basis, v[None], projection[None].repeat(2, 1, 1, 1), [8, 24], [0, 0]
        ),
        "linear": lambda y: tiny_lora_linear(y, torch.eye(24), None, basis, v, projection),
    }
    for call in calls.values():
        for ours, sample in zip(call(nested).unbind(), samples, strict=True):
            torch.testing.assert_close(ours, call(sample), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="^y: expected its rows in one dense tensor, found a nested tensor beside ada"):
        tiny_lora_update(nested, basis, v[None], projection, None, torch.tensor([0, -1]))


def test_a_bank_refuses_nested_inputs():
    layer = adapted("linear")
    bank = AdapterBank(nn.ModuleDict({"layer": layer}), 2)
    bank.add("a")
    nested = torch.nested.nested_tensor(samples_of(layer), layout=torch.jagged)
    with bank.use(["a", None]), pytest.raises(ValueError, match="^layer: an AdapterBank needs the rows .* a nested on"):
        layer(nested)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
def test_sparse_inputs_where_the_frozen_layer_takes_them(layout, called_before, nodes):
    layer = adapted("linear with a bias")
    x = example(layer)[0]
    expected = layer(x).detach()
    if called_before:
        layer(x)
    sparse = getattr(x, layout)()
    if not supported(layer, sparse):
        pytest.skip("the frozen layer takes none either")
    torch.testing.assert_close(layer(sparse).detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_sparse_output_is_refused_by_name():
    with pytest.raises(ValueError, match="^y: expected its rows in one dense tensor, found torch.sparse_coo; call to"):
        tiny_lora_update(torch.eye(4).to_sparse(), torch.randn(2, 4), torch.randn(3), torch.randn(3, 2, 2))
