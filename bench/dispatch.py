"""What an adapted layer costs beyond the frozen one at one token, by how much of the way to the kernels is in C++.

A row of layers, called one after another as a model calls them: each product empties the caches for the code of the
next layer, which is most of what a layer then costs. The update itself takes a microsecond here.

    no plan          linear/node.py, and all questions asked at every call
    in Python        linear/node.py and plan.py (TINYLORA_NODE=0, or a wheel before its node is compiled)
    node             linear/node.cpp, plan.py
    node and plan    linear/node.cpp, plan.inl

    python bench/dispatch.py            bench/results/dispatch.csv and a table; a minute
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.grid import environment, table  # noqa: E402
from bench.grid.contenders import AGAIN, FROZEN, Problem, make_base, make_problem, our_layer  # noqa: E402
from bench.grid.shapes import Case, layer  # noqa: E402
from bench.grid.timing import interleave  # noqa: E402
from tinylora_kernels.layers.layer import TinyLoRALayer  # noqa: E402
from tinylora_kernels.linear import node, plan  # noqa: E402

FILE = "dispatch.csv"
COLUMNS = ["dtype", "way", "phase", "rounds", "us_per_layer", "ratio_p50", "beyond_us", *environment.describe()]
TWINS = node.twin, plan.twin
WAYS = {  # twin of the node, twin of the plan, whether plans are made
    "no plan": (None, None, False),
    "in Python": (None, None, True),
    "node": (TWINS[0], None, True),
    "node and plan": (*TWINS, True),
}
LAYERS, NUMBERS, SECONDS = 40, 13, 8.0


def row_of_layers(problems: list[Problem], way: str) -> list[nn.Module]:
    build = make_base if way in (FROZEN, AGAIN) else our_layer
    return [build(problem) for problem in problems]


@contextlib.contextmanager
def on_way(way: str) -> Iterator[None]:
    """Layers run this way inside; a plan made inside is kept as long as nobody changes any adapted layer."""
    if way not in WAYS:
        yield
        return
    node.twin, plan.twin, planned = WAYS[way]
    worth_a_plan = TinyLoRALayer._worth_a_plan
    if not planned:
        TinyLoRALayer._worth_a_plan = lambda self, chosen: False
    try:
        yield
    finally:
        node.twin, plan.twin = TWINS
        TinyLoRALayer._worth_a_plan = worth_a_plan


def sweep(layers: list[nn.Module], x: Tensor, g: Tensor, way: str) -> Callable[[], dict[str, float]]:
    """Seconds a layer: forward without gradients, forward with them, backward to x and v."""
    x = x.detach().requires_grad_()
    inputs = [[x, *(p for p in module.parameters() if p.requires_grad)] for module in layers]
    clock, grad = time.perf_counter, torch.autograd.grad

    def step() -> dict[str, float]:
        with on_way(way):
            return timed_step()

    def timed_step() -> dict[str, float]:
        times = dict.fromkeys(("inference", "forward", "backward"), 0.0)
        for module, wanted in zip(layers, inputs, strict=True):
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
    ways = [FROZEN, AGAIN, *(WAYS if node.twin is not None else ["no plan", "in Python"])]
    rows = {way: row_of_layers(problems, way) for way in ways}
    outputs = []
    for way in ways[2:]:
        with on_way(way):
            for module in rows[way]:
                module(problem.x.detach().requires_grad_())  # makes its plan
            outputs.append(rows[way][0](problem.x))
    assert all(torch.equal(outputs[0], other) for other in outputs), "the ways give different bits"
    steps = {way: sweep(layers, problem.x, problem.g, way) for way, layers in rows.items()}
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
