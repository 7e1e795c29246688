"""Whether a class of layers computes what its base class does, as far as an adapter is concerned: tried, not believed.

The update of an output is the update of a weight, f(x; R W, b) - b = R (f(x; W, b) - b) for every R [out, out], where
the forward multiplies x by the weight as it is kept, whatever else it does to x: pads it, scales it, rounds it. Of an
embedding, f(x; T R) = f(x; T) R. A subclass may do other things: standardise the weight, round it, normalise what it
has looked up, leave the bias to its caller. Then U is of another matrix than the one multiplied, nothing fails, and a
merged model is not the adapted one.
"""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..common import modes
from .attributes import bias_of, weight_of

_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUNDINGS = 4  # of the weight's dtype, by norm; a GPU may round float32 to TF32
_LEAST = 2e-3
_ROWS = 1024  # of a table at a time
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_not_linear(module: nn.Module) -> str | None:
    """Of a linear layer or a convolution with a plain weight: why its update is none of its weight, one line; None
    where it is, or where the forward cannot be tried. Tried on a copy: no hook, buffer or generator is touched.
    """
    return None if is_known(module) else _outcome(module, _deviation, "its weight times x and its bias")


def why_not_lookup(module: nn.Module) -> str | None:
    """The same of an embedding, whose every row is looked up."""
    return None if is_known(module) else _outcome(module, _deviation_of_rows, "a row of its table")


def why_not_tried(module: nn.Module) -> str | None:
    """Why nothing is known of a linear layer's forward, one line: it is of a class of its own, and could not be run."""
    if is_known(module) or not isinstance(module, nn.Linear):
        return None
    try:
        with undisturbed(module):
            _deviation(module, weight_of(module))
    except Exception as error:
        reason = str(error).partition("\n")[0][:100]
        return f"the forward of {type(module).__name__} takes no rows [2, {module.in_features}] ({reason})"
    return None


def is_known(module: nn.Module) -> bool:
    """Whether it computes what its base class does by its class alone, or nothing can be said by trying."""
    weight, cls = weight_of(module), type(module)
    known = next((known for known in (*_KNOWN, nn.Embedding) if isinstance(module, known)), None)
    if known is None or weight.is_meta or module._parameters.get("weight") is not weight or weight.dtype not in _DTYPES:
        return True
    return all(getattr(cls, name, None) is getattr(known, name, None) for name in ("forward", "_conv_forward"))


def tolerance(weight: Tensor) -> float:
    """How far two outputs that should be one may be apart, by norm."""
    return max(_ROUNDINGS * torch.finfo(weight.dtype).eps, _LEAST)


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """What is tried inside draws from no generator of the caller's, and no mode or autocast of theirs changes it."""
    kind = weight_of(module).device.type
    devices = [] if kind == "cpu" else [weight_of(module).device]
    ambient = torch.random.fork_rng(devices, device_type=kind), modes.out_of_sight(), torch.no_grad()
    with ambient[0], ambient[1], ambient[2], torch.autocast(kind, enabled=False):
        yield


def _outcome(
    module: nn.Module, deviation_of: Callable[[nn.Module, Tensor], float | None], what: str
) -> str | None:
    weight, name = weight_of(module), type(module).__name__
    with undisturbed(module):
        try:
            deviation = deviation_of(module, weight)
        except Exception:  # it wants other inputs, or cannot be copied
            return None
    if deviation is None:
        features = weight.shape[1] if isinstance(module, nn.Embedding) else len(weight)
        return f"{name} returns no tensor of {features} features; leave it out by exclude_modules"
    if not deviation > tolerance(weight):
        return None
    return (
        f"the forward of {name} is not {what}: with an updated weight it is {deviation:.1g} off the updated output; "
        "leave it out by exclude_modules"
    )


def _deviation_of_rows(module: nn.Module, table: Tensor) -> float | None:
    """How far a row of f(x; T R) is from f(x; T) R, at most; None without such an output. R scales the columns and
    turns them round: no row of another table is near its own image.
    """
    out = table.shape[1]
    scale = torch.linspace(0.5, 2, out, dtype=torch.float64, device=table.device)
    updated = (table.detach() * scale.to(table)).flip(1)
    before, after = (copy_with(module, each, None) for each in (table.detach(), updated))
    ids, most = torch.arange(len(table), device=table.device), 0.0
    # Of the numbers past the last, where there is such a thing, another table may know.
    for rows in (*ids.split(_ROWS), ids[-1:] + 1):
        try:
            y, moved = (type(module).forward(each, rows[None]) for each in (before, after))
        except Exception:
            if rows[0] <= ids[-1]:
                raise
            break
        if not isinstance(y, Tensor) or y.shape != (1, len(rows), out):
            return None
        expected = (y.double() * scale).flip(-1)
        error = (moved.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-300)
        most = max(most, float(error.max()))
    return most


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
    """The module in evaluation with another weight and bias, without its hooks and with buffers of its own."""
    memo: dict[int, object] = {id(module._parameters["weight"]): nn.Parameter(weight, requires_grad=False)}
    if bias is not None:
        memo[id(bias_of(module))] = nn.Parameter(bias, requires_grad=False)
    twin = copy.deepcopy(module, memo).eval()
    for each in twin.modules():
        for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
            hooks.clear()
    return twin
