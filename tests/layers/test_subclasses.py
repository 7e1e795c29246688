"""Inputs of a class that inherits from torch.Tensor, as torchvision's images are: outputs are of that class as those of
the bare layer are, with the numbers and gradients of plain tensors.
"""
import pytest
import torch
from torch import nn

from tests.layers.test_layer import adapted, linear
from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.functional import tiny_lora_linear, tiny_lora_update, tiny_lora_update_parts


class Labelled(torch.Tensor):
    pass


def convolution(bias=True):
    torch.manual_seed(2)
    base = nn.Conv1d(16, 24, 1, bias=bias)
    return adapted(base, base.weight[:, :, 0])


LAYERS = {
    "linear": (linear, (5, 16)),
    "linear, three dimensions": (linear, (2, 3, 16)),
    "linear, no bias": (lambda: linear(bias=False), (5, 16)),
    "linear, bfloat16": (lambda: linear(dtype=torch.bfloat16), (5, 16)),
    "convolution": (convolution, (2, 16, 7)),
    "convolution, no bias": (lambda: convolution(bias=False), (2, 16, 7)),
}


def gradients(layer, x, label):
    x = x.clone().requires_grad_()
    y = layer(x.as_subclass(Labelled) if label else x)
    assert type(y) is (Labelled if label else torch.Tensor)
    found = torch.autograd.grad(y.as_subclass(torch.Tensor).square().sum(), [x, layer.v])
    return [y.as_subclass(torch.Tensor).detach(), *found]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("again", [False, True], ids=["first call", "with a plan"])
def test_a_layer_keeps_the_class_of_its_input(name, again):
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape).to(build().weight.dtype)
    if again:
        layer(x), layer(x)
    expected, found = gradients(layer, x, label=False), gradients(layer, x, label=True)
    tolerance = 2e-2 if x.dtype is torch.bfloat16 else 1e-5
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    for around in (torch.no_grad, torch.inference_mode):
        with around():
            y = layer(x.as_subclass(Labelled))
            assert type(y) is Labelled
            torch.testing.assert_close(y.as_subclass(torch.Tensor), expected[0], rtol=tolerance, atol=tolerance)


def test_a_bank_and_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=3, n_tie=2, cache=False), progress=False)
    x = torch.randn(4, 16)
    model(x.as_subclass(Labelled)).sum().backward()
    labelled = trainable_vectors(model)[0].grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(trainable_vectors(model)[0].grad, labelled, rtol=1e-5, atol=1e-5)
    assert type(labelled) is torch.Tensor and labelled.any()

    bank = AdapterBank(model, capacity=2)
    for n in range(2):
        bank.add(str(n), torch.randn(1, 3))
    with bank.use(["0", "1", None, "0"]):
        expected, found = model(x), model(x.as_subclass(Labelled))
    assert type(found) is Labelled
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_functions(inplace):
    y, basis, projection = torch.randn(5, 24), torch.randn(2, 24), torch.randn(3, 2, 2)
    v = torch.randn(3, requires_grad=True)
    calls = {
        "update": lambda y: tiny_lora_update(y, basis, v, projection, inplace=inplace),
        "parts": lambda y: tiny_lora_update_parts(
            y, basis, v[None], projection[None].repeat(2, 1, 1, 1), [8, 24], [0, 0], inplace=inplace
        ),
        "linear": lambda y: tiny_lora_linear(y, torch.eye(24), None, basis, v, projection),
    }
    for call in calls.values():
        expected, found = call(y.clone()), call(y.clone().as_subclass(Labelled))
        assert type(found) is Labelled
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
        gradient, reference = (torch.autograd.grad(one.sum(), v)[0] for one in (found, expected))
        torch.testing.assert_close(gradient.as_subclass(torch.Tensor), reference, rtol=1e-5, atol=1e-5)
