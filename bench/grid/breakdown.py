"""Where adapter time goes in a whole model: each part of a layer's work timed on its own, times the calls of a step.

Parts are differences of nested calls. On no rows at all nothing but overhead is left, so that

    kernel        op(N rows) - op(0 rows)                   the update of y, dx or g, or the term that y or dx
                                                            starts from, called again and again
    after product op(N rows) straight after a product - the same  where it stands in a model: code and data are cold
    dispatch      op(0 rows)                                torch's dispatcher, checks, M and dv, result tensors
    autograd      apply(0 rows) - linear(0 rows) - op(0)    our node instead of torch's own, both ways
    module        layer(0 rows) - base(0 rows) - the above  TinyLoRALayer.forward: hooks, choice of backend
    contraction   op(0 rows, u = 13) - op(0 rows, u = 1)    M = sum v_i P'_i, dv_i = <P'_i, dM>; a part of dispatch
"""
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinylora_kernels import ops
from tinylora_kernels.layers.layer import TinyLoRALayer
from tinylora_kernels.linear.node import FrozenLinear, apply_linear, order_of
from tinylora_kernels.linear.plan import right_for
from tinylora_kernels.linear.rules import LAST_BACKWARD, LAST_FORWARD

from . import environment, table
from .contenders import make_problem, our_layer
from .layers import ENVIRONMENT
from .shapes import Case, Shape
from .timing import no_collector, quantile
from .whole_model import BATCH, LENGTH, NUMBERS

Part = tuple[str, str]  # direction, part
FILE = "breakdown.csv"
COLUMNS = ["workload", "dtype", "direction", "part", "us_per_call", "calls", "ms_per_step", "share", *ENVIRONMENT]
BLOCKS = 30
# SmolLM2-135M, [out, in] -> modules of a block: q and o, k and v, gate and up, down
LAYERS = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}
WORKLOADS = {"training step": BATCH * LENGTH, "generation, batch 1": 1}


def run(out: Path, *, dtypes: Sequence[torch.dtype], quick: bool = False) -> None:
    facts = environment.describe()
    done = {(row["dtype"], row["threads"], row["code"]) for row in table.read(out / FILE)}
    for dtype in tqdm(dtypes[:1] if quick else dtypes, unit="dtype", desc="breakdown", dynamic_ncols=True):
        dtype_name = str(dtype).removeprefix("torch.")
        if (dtype_name, facts["threads"], facts["code"]) in done:
            continue
        rows = []
        for workload, tokens in WORKLOADS.items():
            parts = measure(dtype, tokens, training=workload == "training step", rounds=10 if quick else 60)
            total = sum(value for (_, part), (value, _) in parts.items() if part != "contraction")
            for (direction, part), (milliseconds, calls) in parts.items():
                rows.append({
                    "workload": workload, "direction": direction, "part": part, "calls": calls,
                    "us_per_call": milliseconds * 1e3 / calls, "ms_per_step": milliseconds,
                    "share": milliseconds / total,
                })  # fmt: skip
        table.append(out / FILE, COLUMNS, [row | {"dtype": dtype_name} | facts for row in rows])


def measure(dtype: torch.dtype, tokens: int, *, training: bool, rounds: int) -> dict[Part, tuple[float, int]]:
    """Part -> (milliseconds a step, calls a step), over the modules of the model."""
    totals: dict[Part, tuple[float, int]] = {}
    for (out_features, in_features), count in LAYERS.items():
        shape = Shape("SmolLM2-135M", "any", out_features, in_features, False)
        problem = make_problem(Case(shape, tokens, dtype, NUMBERS))
        calls = BLOCKS * count
        for key, seconds in parts_of(our_layer(problem), problem.x, problem.g, training, rounds).items():
            before = totals.get(key, (0.0, 0))
            totals[key] = (before[0] + seconds * 1e3 * calls, before[1] + calls)
    return totals


def parts_of(layer: TinyLoRALayer, x: Tensor, g: Tensor, training: bool, rounds: int) -> dict[Part, float]:
    """Part -> seconds a call of one layer."""
    no_x, no_g = x[:, :0].detach().requires_grad_(training), g[:, :0]
    weight, basis, projection = layer.base.weight, layer.basis, layer.projection
    v = layer.v.detach() * 1e-6  # every call works on y in place: a small v keeps repeated updates finite
    backend = ops.BACKENDS[ops.choose("cpu", x.dtype, len(basis))]
    held = right_for(layer, x.detach().requires_grad_(training))  # then the backward pass updates dx, not g
    right = None if held is None else held.right
    dx = torch.zeros_like(x)

    order = 0 if right is None else order_of(weight, None, backend)
    starts_y, starts_dx = order & LAST_FORWARD, order & LAST_BACKWARD

    def op(rows: Tensor, u: int) -> Callable:
        factors = basis, v[:u], projection[:u]
        if starts_y:
            return functools.partial(backend.low_rank, rows, right, *factors, None, None)
        return functools.partial(backend.update, rows, *factors, None, None, None)

    def product() -> Tensor:
        return nn.functional.linear(x, weight)

    def op_backward(gradient: Tensor, dx: Tensor, t: Tensor, u: int) -> Callable:
        shared = gradient, basis, v[:u], projection[:u], t, None
        if right is None:
            return functools.partial(backend.update_backward, *shared, True)
        return functools.partial(backend.update_input_grad, dx, right, *shared, not starts_dx)

    def backward_after_product() -> float:
        if right is None:  # g comes out of the product of another layer
            return _seconds_after(product, lambda gradient: op_backward(gradient, dx, t, u)(), rounds)
        return _seconds_after(lambda: torch.matmul(g, weight), lambda dx: op_backward(g, dx, t, u)(), rounds)

    u, rows = len(v), x if starts_y else g.clone()
    calls = {
        "op": op(rows, u), "op none": op(rows[:, :0], u), "op one": op(rows[:, :0], 1),
        "layer": lambda: layer(no_x), "base": lambda: layer.base(no_x),
    }  # fmt: skip
    if training:
        t, no_t = torch.randn(g.shape[1], len(basis)), torch.randn(0, len(basis))
        frozen = FrozenLinear(weight, None, basis, projection, None, right, None, order, None, backend)
        calls |= {
            "apply": lambda: apply_linear(no_x, layer.v, frozen),
            "linear": lambda: nn.functional.linear(no_x, weight),
            "backward": op_backward(g, dx, t, u), "backward none": op_backward(no_g, dx[:, :0], no_t, u),
            "backward one": op_backward(no_g, dx[:, :0], no_t, 1),
        }  # fmt: skip
    with torch.set_grad_enabled(training):
        s = _medians(calls, rounds)
    node = s["apply"] - s["linear"] - s["op none"] if training else 0.0
    parts = {
        ("forward", "kernel"): s["op"] - s["op none"],
        ("forward", "after product"): _seconds_after(product, lambda y: op(x if starts_y else y, u)(), rounds)
        - s["op"],
        ("forward", "dispatch"): s["op none"],
        ("forward", "module"): s["layer"] - s["base"] - s["op none"] - node,
        ("forward", "contraction"): s["op none"] - s["op one"],
    }
    if training:
        both = _backward_seconds(layer, no_x, no_g, rounds) - _backward_seconds(layer.base, no_x, no_g, rounds)
        parts |= {
            ("forward", "autograd"): node,
            ("backward", "kernel"): s["backward"] - s["backward none"],
            ("backward", "after product"): backward_after_product() - s["backward"],
            ("backward", "dispatch"): s["backward none"],
            ("backward", "autograd"): both - s["backward none"],
            ("backward", "contraction"): s["backward none"] - s["backward one"],
        }
    return parts


@torch.no_grad()
def _seconds_after(product: Callable[[], Tensor], call: Callable[[Tensor], object], rounds: int) -> float:
    """Median time of a call on a fresh result of the matrix product, straight after it."""
    times = []
    with no_collector():
        for _ in range(rounds):
            rows = product()
            begun = time.perf_counter()
            call(rows)
            times.append(time.perf_counter() - begun)
    return quantile(times, 0.5)


def _backward_seconds(module: nn.Module, x: Tensor, g: Tensor, rounds: int) -> float:
    """Median time of the backward of one call on no rows."""
    times = []
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    with no_collector():
        for _ in range(rounds):
            y = module(x)
            begun = time.perf_counter()
            torch.autograd.grad(y, inputs, g)
            times.append(time.perf_counter() - begun)
    return quantile(times, 0.5)


def _medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all of them once a round, five at a time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with no_collector():
        for _ in range(rounds):
            for name, call in calls.items():
                call()
                begun = time.perf_counter()
                for _ in range(5):
                    call()
                times[name].append((time.perf_counter() - begun) / 5)
    return {name: quantile(values, 0.5) for name, values in times.items()}
