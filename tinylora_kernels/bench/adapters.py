"""Many adapters in one batch: what K of them cost over one, and over the only other ways to serve them.

    one adapter             our layer with a single v: the unit of every ratio
    bank                    the same rows under an AdapterBank, K adapters spread over them
    forward per adapter     our layer once for each adapter on its own rows, results put back in place
    peft, by groups         PEFT's layer with K adapters, set_adapter before the rows of each

The rows are gathered and the adapters assigned in an order that is not sorted. Generation compares tokens a second of a
whole model under one adapter and under one for each sequence.
"""
from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..bank import AdapterBank
from ..layer import TinyLoRALayer
from . import environment, table
from .contenders import Problem, make_base, make_problem, our_layer, peft_vector
from .gate import WrongResult
from .layers import ENVIRONMENT, QUANTILES
from .shapes import RANK, Case, layer
from .timing import interleave
from .whole_model import GENERATED, NUMBERS, PROMPT, adapt_with_ours, smollm2

FILE = "adapters.csv"
COLUMNS = [
    "workload", "layer", "rows", "adapters", "dtype", "contender", "phase", "rounds", *QUANTILES, "tokens_per_s",
    *ENVIRONMENT,
]  # fmt: skip
ONE, BANK, SEPARATE, PEFT = "one adapter", "bank", "forward per adapter", "peft, by groups"
COUNTS = (1, 8, 64, 512)
ROWS = (16, 64, 512)
MOST_PEFT_ADAPTERS = 64  # PEFT keeps a module list for each adapter: 512 take minutes to build
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
SEQUENCES = 64


def run(out: Path, *, quick: bool = False) -> None:
    """Write adapters.csv anew."""
    (out / FILE).unlink(missing_ok=True)
    facts = environment.describe()
    shapes = [layer("Qwen2.5-1.5B", "o")] if quick else [layer("SmolLM2-135M", "gate"), layer("Qwen2.5-1.5B", "o")]
    cases = [
        (Case(shape, rows, dtype, NUMBERS), count)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for rows in (ROWS[1:2] if quick else ROWS)
        for count in COUNTS
        if count <= rows
    ]
    for case, count in tqdm(cases, unit="case", desc="adapters in a batch", dynamic_ncols=True):
        rows = measure(case, count, seconds=0.3 if quick else 1.5)
        table.append(out / FILE, COLUMNS, [row | facts for row in rows])
    table.append(out / FILE, COLUMNS, [row | facts for row in generation(rounds=2 if quick else 8)])


def measure(case: Case, count: int, *, seconds: float) -> list[dict]:
    """Rows of times for K = count adapters over the rows of one layer, after each contender's output was checked."""
    problem = make_problem(case)
    generator = torch.Generator().manual_seed(count)
    vectors = problem.v * (1 + torch.rand(count, 1, generator=generator))  # [K, u]
    ids = torch.arange(case.tokens)[torch.randperm(case.tokens, generator=generator)] % count  # [rows]
    x = problem.x[0]  # [rows, in]
    runs = {ONE: our_layer(problem), BANK: bank_run(problem, vectors, ids), SEPARATE: separate_run(problem, vectors, ids)}
    if count <= MOST_PEFT_ADAPTERS:
        runs[PEFT] = peft_run(problem, vectors, ids)
    expected = row_by_row(problem, vectors, ids, x)
    for name, forward in runs.items():
        if name != ONE:
            _check(f"{name}, {case}, K={count}", forward(x), expected, case.dtype)
    steps = {name: _inference(forward, x) for name, forward in runs.items()}
    return [
        {
            "workload": "layer", "layer": str(case.shape), "rows": case.tokens, "adapters": count,
            "dtype": case.dtype_name, "contender": name, "phase": "inference", "rounds": s.rounds,
        }
        | dict(zip(QUANTILES, (s.p20, s.p50, s.p80, s.ratio_p20, s.ratio_p50, s.ratio_p80)))
        for name, phases in interleave(steps, ONE, seconds=seconds, most=400).items()
        for s in phases.values()
    ]  # fmt: skip


@torch.no_grad()
def row_by_row(problem: Problem, vectors: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    """Every row through a layer that holds its adapter alone, [rows, out]."""
    alone = our_layer(problem)
    rows = []
    for row, adapter in enumerate(ids.tolist()):
        alone.v.copy_(vectors[adapter])
        rows.append(alone(x[row : row + 1]))
    return torch.cat(rows)


def bank_run(problem: Problem, vectors: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The rows through one layer under a bank; entering the block is part of every call."""
    module = our_layer(problem)
    bank = AdapterBank(nn.ModuleList([module]), len(vectors))
    slots = torch.tensor([bank.add(str(k), v[None]) for k, v in enumerate(vectors)])[ids]

    def forward(x: Tensor) -> Tensor:
        with bank.use(slots):
            return module(x)

    return forward


def separate_run(problem: Problem, vectors: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """One call for each adapter on its own rows."""
    first = our_layer(problem)
    layers = [
        TinyLoRALayer(first.base, first.basis, first.sigma, first.projection, nn.Parameter(v.clone())) for v in vectors
    ]
    groups = [(ids == k).nonzero().squeeze(1) for k in range(len(vectors))]

    def forward(x: Tensor) -> Tensor:
        out = x.new_empty(len(x), problem.case.shape.out_features)
        for own, rows in zip(layers, groups):
            out[rows] = own(x[rows])
        return out

    return forward


def peft_run(problem: Problem, vectors: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """PEFT's layer with K adapters, switched for the rows of each."""
    from peft import TinyLoraConfig, get_peft_model

    holder = nn.Module()
    holder.linear = make_base(problem)
    config = TinyLoraConfig(r=RANK, u=problem.case.numbers, target_modules=["linear"])
    triplets = problem.left, problem.sigma, problem.right.T
    names = [f"a{k}" for k in range(len(vectors))]
    with mock.patch("torch.linalg.svd", return_value=triplets), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(holder, config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config)
    module = model.base_model.model.linear
    for name, v in zip(names, vectors):
        module.tinylora_P[name].copy_(problem.fixed)
        module.tinylora_v[name]["0"].data.copy_(v)
    groups = [(ids == k).nonzero().squeeze(1) for k in range(len(vectors))]

    def forward(x: Tensor) -> Tensor:
        out = x.new_empty(len(x), problem.case.shape.out_features)
        for name, rows in zip(names, groups):
            module.set_adapter(name)
            out[rows] = module(x[rows])
        return out

    return forward


def generation(*, rounds: int) -> list[dict]:
    """Tokens a second of `generate` with 64 sequences under one adapter and under 64, SmolLM2's architecture."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = smollm2(dtype).eval()
        adapt_with_ours(model, torch.full((NUMBERS,), 0.01))
        prompts = torch.randint(0, 49152, (SEQUENCES, PROMPT), generator=torch.Generator().manual_seed(0))
        bank = AdapterBank(model, SEQUENCES)
        for k in range(SEQUENCES):
            bank.add(str(k), torch.full((1, NUMBERS), 0.01 * k / SEQUENCES))

        def step(slots: Tensor | None) -> dict[str, float]:
            begun = time.perf_counter()
            if slots is None:
                _generate(model, prompts)
            else:
                with bank.use(slots):
                    _generate(model, prompts)
            return {"generate": time.perf_counter() - begun}

        contenders = {ONE: lambda: step(None), BANK: lambda: step(torch.arange(SEQUENCES))}
        times = interleave(contenders, ONE, seconds=1e9, least=rounds, most=rounds, longest=1e9)
        results += [
            {
                "workload": "generate", "layer": "SmolLM2-135M", "rows": SEQUENCES,
                "adapters": 1 if name == ONE else SEQUENCES, "dtype": "fp32" if dtype is torch.float32 else "bf16",
                "contender": name, "phase": "generate", "rounds": s.rounds,
                "tokens_per_s": SEQUENCES * GENERATED / (s.p50 * 1e-6),
            }
            | dict(zip(QUANTILES, (s.p20, s.p50, s.p80, s.ratio_p20, s.ratio_p50, s.ratio_p80)))
            for name, phases in times.items()
            for s in phases.values()
        ]  # fmt: skip
    return results


def _generate(model: nn.Module, prompts: Tensor) -> Tensor:
    options = dict(max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def _inference(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        with torch.no_grad():
            begun = time.perf_counter()
            forward(x)
            return {"inference": time.perf_counter() - begun}

    return step


def _check(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error < TOLERANCE[dtype]:
        raise WrongResult(f"{name}: its rows differ from those of each adapter alone by {error:.3g}")
