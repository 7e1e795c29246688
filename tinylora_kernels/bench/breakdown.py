"""Where adapter time goes in a whole model: each part of a layer's work timed on its own, times the calls of a step.

Parts are differences of nested calls. On no rows at all nothing but overhead is left, so that

    kernel        op(N rows) - op(0 rows)                          the update itself, M and dv included
    dispatch      op(0 rows)                                       torch's dispatcher, argument checks, result tensors
    autograd      TinyLoRAUpdate.apply(0 rows) - op(0 rows)        the node of the graph; backward: Python and engine
    functional    tiny_lora_update(0 rows) - apply(0 rows)         choice of backend, dtype checks
    module        layer(0 rows) - base(0 rows) - update(0 rows)    nn.Module's call and TinyLoRALayer.forward
    contraction   op(0 rows, u = 13) - op(0 rows, u = 1)           M = sum v_i P'_i, dv_i = <P'_i, dM>; inside dispatch

The sum is set beside the difference that whole_model measured between adapted and frozen steps.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import ops
from ..functional import tiny_lora_update
from ..layer import TinyLoRALayer
from . import environment, table
from .contenders import our_layer, make_problem
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
            parts = measure(dtype, tokens, training=workload == "training step", rounds=20 if quick else 60)
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
    y, no_y = g.clone(), g[:, :0].clone()
    basis, v, projection = layer.basis, layer.v.detach(), layer.projection
    one_v, one_projection = v[:1], projection[:1]
    backend = ops.BACKENDS[ops.choose("cpu", x.dtype, len(basis))]
    # Every call works on y in place; a small v keeps repeated updates finite.
    small = v * 1e-6

    def op(rows: Tensor, v: Tensor = small, projection: Tensor = projection) -> Callable:
        return lambda: backend.update(rows, basis, v, projection, None, None)

    def op_backward(gradient: Tensor, t: Tensor, v: Tensor = small, projection: Tensor = projection) -> Callable:
        return lambda: backend.update_backward(gradient, basis, v, projection, t, None, True)

    def update(function: Callable) -> Callable:
        """A function of no rows, fresh as a layer's output: inside the graph, and no view."""
        unsafe_view = torch.ops.aten._unsafe_view.default
        return lambda: function(unsafe_view(no_y.detach().requires_grad_(training), no_y.shape))

    trained, apply = layer.v, ops.TinyLoRAUpdate.apply
    calls = {
        "op": op(y), "op none": op(no_y), "op one": op(no_y, one_v, one_projection),
        "functional": update(lambda rows: tiny_lora_update(rows, basis, trained, projection, inplace=True)),
        "apply": update(lambda rows: apply(rows, basis, trained, projection, None, None, backend.name)),
        "rows": update(lambda rows: rows),
        "layer": lambda: layer(no_x), "base": lambda: layer.base(no_x),
    }  # fmt: skip
    if training:
        t, no_t = torch.randn(y.shape[1], len(basis)), torch.randn(0, len(basis))
        calls |= {
            "backward": op_backward(g, t), "backward none": op_backward(no_g, no_t),
            "backward one": op_backward(no_g, no_t, one_v, one_projection),
        }  # fmt: skip
    else:  # without gradients the node is never made
        calls["apply"] = update(lambda rows: op(rows)())
    with torch.set_grad_enabled(training):
        s = _medians(calls, rounds)
    parts = {
        ("forward", "kernel"): s["op"] - s["op none"],
        ("forward", "dispatch"): s["op none"],
        ("forward", "functional"): s["functional"] - s["apply"],
        ("forward", "module"): (s["layer"] - s["base"]) - (s["functional"] - s["rows"]),
        ("forward", "contraction"): s["op none"] - s["op one"],
    }  # fmt: skip
    if training:
        node = _backward_seconds(layer, no_x, no_g, rounds) - _backward_seconds(layer.base, no_x, no_g, rounds)
        parts |= {
            ("forward", "autograd"): s["apply"] - s["rows"] - s["op none"],
            ("backward", "kernel"): s["backward"] - s["backward none"],
            ("backward", "dispatch"): s["backward none"],
            ("backward", "autograd"): node - s["backward none"],
            ("backward", "contraction"): s["backward none"] - s["backward one"],
        }
    return parts


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
