"""What an adapted layer costs beyond the frozen one at one token, by how much of the way to the kernels is in C++.

A row of layers, called one after another as a model calls them: each product empties the caches for the code of the next
layer, which is most of what a layer then costs. The update itself takes a microsecond here.

    in Python        autograd.py's node, plain_linear.py's plan (TINYLORA_NODE=0, or a wheel as it comes)
    node             linear_node.cpp
    node and plan    linear_node.cpp, linear_plan.inl

    python bench/dispatch.py            bench/results/dispatch.csv and a table; a minute
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tinylora_kernels import ops  # noqa: E402
from tinylora_kernels.bench import environment, table  # noqa: E402
from tinylora_kernels.bench.contenders import AGAIN, FROZEN, Problem, make_base, make_problem, our_layer  # noqa: E402
from tinylora_kernels.bench.shapes import Case, layer  # noqa: E402
from tinylora_kernels.bench.timing import interleave  # noqa: E402

FILE = "dispatch.csv"
COLUMNS = ["dtype", "way", "phase", "rounds", "us_per_layer", "ratio_p50", "beyond_us", *environment.describe()]
WAYS = {"in Python": {"linear": None, "plan": None}, "node": {"plan": None}, "node and plan": {}}
LAYERS, NUMBERS, SECONDS = 40, 13, 8.0


def row_of_layers(problems: list[Problem], way: str) -> list[nn.Module]:
    build = make_base if way in (FROZEN, AGAIN) else our_layer
    return [build(problem) for problem in problems]


def plan(layers: list[nn.Module], x: Tensor, way: str) -> None:
    """Have the layers make their plans on a way, which they keep as long as nobody changes any adapted layer."""
    whole = ops.BACKENDS["cpu"]
    ops.BACKENDS["cpu"] = whole._replace(**WAYS[way])
    try:
        for module in layers:
            module(x.detach().requires_grad_())
    finally:
        ops.BACKENDS["cpu"] = whole


def sweep(layers: list[nn.Module], x: Tensor, g: Tensor) -> Callable[[], dict[str, float]]:
    """Seconds a layer: forward without gradients, forward with them, backward to x and v."""
    x = x.detach().requires_grad_()
    inputs = [[x, *(p for p in module.parameters() if p.requires_grad)] for module in layers]
    clock, grad = time.perf_counter, torch.autograd.grad

    def step() -> dict[str, float]:
        times = dict.fromkeys(("inference", "forward", "backward"), 0.0)
        for module, wanted in zip(layers, inputs):
            begun = clock()
            y = module(x)
            turned = clock()
            gradients = grad(y, wanted, g)
            times["backward"] += clock() - turned
            times["forward"] += turned - begun
            del y, gradients
        with torch.no_grad():
            for module in layers:
                begun = clock()
                y = module(x)
                times["inference"] += clock() - begun
                del y
        return {phase: seconds / LAYERS for phase, seconds in times.items()}

    return step


def measure(dtype: torch.dtype, seconds: float) -> list[dict]:
    case = Case(layer("SmolLM2-135M", "q"), 1, dtype, NUMBERS)
    problem = make_problem(case)
    problems = [dataclasses.replace(problem, weight=problem.weight.clone()) for _ in range(LAYERS)]  # too many for L2
    ways = [FROZEN, AGAIN, *WAYS] if ops.BACKENDS["cpu"].linear else [FROZEN, AGAIN, "in Python"]
    rows = {way: row_of_layers(problems, way) for way in ways}
    for way in ways[2:]:
        plan(rows[way], problem.x, way)
    first, *others = (rows[way][0](problem.x) for way in ways[2:])
    assert all(torch.equal(first, other) for other in others), "the ways give different bits"
    steps = {way: sweep(layers, problem.x, problem.g) for way, layers in rows.items()}
    timed = interleave(steps, FROZEN, seconds=seconds, most=10_000)
    return [
        {
            "dtype": case.dtype_name, "way": way, "phase": phase, "rounds": s.rounds, "us_per_layer": s.p50,
            "ratio_p50": s.ratio_p50, "beyond_us": (s.ratio_p50 - 1) * timed[FROZEN][phase].p50,
        }
        for way, phases in timed.items()
        for phase, s in phases.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a dtype (default: {SECONDS:g})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = environment.describe()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype, options.seconds)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / FILE).unlink(missing_ok=True)
    table.append(options.out / FILE, COLUMNS, [row | facts for row in rows])
    print(f"{'':<6}{'':<16}{'phase':<11}{'us a layer':>11}{'over frozen':>13}{'us beyond':>11}")
    for row in rows:
        numbers = f"{row['us_per_layer']:>11.1f}{row['ratio_p50']:>13.3f}{row['beyond_us']:>11.1f}"
        print(f"{row['dtype']:<6}{row['way']:<16}{row['phase']:<11}{numbers}")


if __name__ == "__main__":
    main()
