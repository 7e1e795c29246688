"""Whether a class of layers computes what its base class does, as far as an adapter is concerned: tried, not believed.

The update of an output is the update of a weight, f(x; R W, b) - b = R (f(x; W, b) - b) for every R [out, out], where
the forward multiplies x by the weight as it is kept, whatever else it does to x: pads it, scales it, rounds it. A
subclass may do other things: standardise the weight, round it, leave the bias to its caller. Then U is of another
matrix than the one multiplied, nothing fails, and a merged model is not the adapted one.
"""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..common import modes
from .attributes import bias_of, weight_of

_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUNDINGS = 4  # of the weight's dtype, by norm; a GPU may round float32 to TF32
_LEAST = 2e-3


def why_not_linear(module: nn.Module) -> str | None:
    """Of a linear layer or a convolution with a plain weight: why its update is none of its weight, one line; None
    where it is, or where the forward cannot be tried. Tried on a copy: no hook, buffer or generator is touched.
    """
    weight, cls = weight_of(module), type(module)
    known = next((known for known in _KNOWN if isinstance(module, known)), None)
    if known is None or weight.is_meta or module._parameters.get("weight") is not weight:
        return None
    if all(getattr(cls, name, None) is getattr(known, name, None) for name in ("forward", "_conv_forward")):
        return None
    with aside(weight):
        try:
            deviation = _deviation(module, weight)
        except Exception:  # it wants other inputs, or cannot be copied
            return None
    if deviation is None:
        return f"{cls.__name__} returns no tensor of {len(weight)} features; leave it out by exclude_modules"
    if not deviation > tolerance(weight):
        return None
    return (
        f"the forward of {cls.__name__} is not its weight times x and its bias: with an updated weight it is "
        f"{deviation:.1g} off the updated output; leave it out by exclude_modules"
    )


@contextlib.contextmanager
def aside(weight: Tensor) -> Iterator[None]:
    """What is tried inside draws from no generator of the caller's, and no mode or autocast of theirs changes it."""
    devices = [] if weight.device.type == "cpu" else [weight.device]
    ambient = torch.random.fork_rng(devices, device_type=weight.device.type), modes.out_of_sight(), torch.no_grad()
    with ambient[0], ambient[1], ambient[2], torch.autocast(weight.device.type, enabled=False):
        yield


def tolerance(weight: Tensor) -> float:
    """How far two outputs that should be one may be apart, by norm."""
    return max(_ROUNDINGS * torch.finfo(weight.dtype).eps, _LEAST)


def _deviation(module: nn.Module, weight: Tensor) -> float | None:
    """How far f(x; R W, b) is from R (f(x; W, b) - b) + b by norm, for R = I + g h^T; None without such an output."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(weight)

    out, channels = len(weight), isinstance(module, _ConvNd)
    x = random(1, *input_shape(module))
    bias = None if bias_of(module) is None else random(out)
    g, h = random(out), random(out) / out**0.5
    matrix = weight.detach().flatten(1)  # [out, in]
    updated = torch.addr(matrix, g, h @ matrix).view(weight.shape)
    outputs = []
    for other in (weight.detach(), updated):
        y = type(module).forward(copy_with(module, other, bias), x)
        if not isinstance(y, Tensor) or y.dim() != x.dim() or y.shape[1 if channels else -1] != out:
            return None
        y = (y.movedim(1, -1) if channels else y).double()
        outputs.append(y if bias is None else y - bias.double())
    before, after = outputs
    expected = before + (before @ h.double()).unsqueeze(-1) * g.double()
    return float((after - expected).norm() / expected.norm().clamp(min=1e-300))


def input_shape(module: nn.Module) -> tuple[int, ...]:
    """Of one small sample: two rows, or a little more than what a kernel sees."""
    if not isinstance(module, _ConvNd):
        return 2, weight_of(module).shape[1]
    sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    return module.in_channels, *(2 * ((kernel - 1) * apart + 1) + step for kernel, apart, step in sizes)


def copy_with(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The module in evaluation with another weight, and bias where one is given, without its hooks and with buffers of
    its own.
    """
    memo: dict[int, object] = {id(module._parameters["weight"]): nn.Parameter(weight, requires_grad=False)}
    if bias is not None:
        memo[id(bias_of(module))] = nn.Parameter(bias, requires_grad=False)
    twin = copy.deepcopy(module, memo).eval()
    for each in twin.modules():
        for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
            hooks.clear()
    return twin
