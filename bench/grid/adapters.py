"""Many adapters in one batch: what K of them cost over one, and over the only other ways to serve them.

    one adapter             our layer with a single v: the unit of every ratio
    bank                    the same rows under an AdapterBank, K adapters spread over them
    forward per adapter     our layer once for each adapter on its own rows, results put back in place
    peft, by groups         PEFT's layer with K adapters, set_adapter before the rows of each

The rows are gathered and the adapters assigned in an order that is not sorted. A block of `bank.use` spans a whole
model's pass or a whole call of generate, so the layers are timed inside one, and opening one for the batch is a phase
of its own, "opening", in microseconds without a ratio. Generation compares tokens a second of a whole model under one
adapter and under one for each sequence; there, opening the block is part of the call.

PEFT takes no part in "forward + backward": set_adapter freezes the adapters of the other groups.
"""
from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinylora_kernels.bank.bank import AdapterBank
from tinylora_kernels.layers.layer import TinyLoRALayer

from . import environment, table
from .contenders import Problem, make_base, make_problem, our_layer
from .gate import WrongResult
from .layers import ENVIRONMENT, QUANTILES
from .shapes import RANK, Case, layer
from .timing import geometric_mean, interleave
from .whole_model import NUMBERS, adapt_with_ours, smollm2

FILE = "adapters.csv"
COLUMNS = [
    "workload", "layer", "rows", "adapters", "dtype", "contender", "phase", "rounds", *QUANTILES, "tokens_per_s",
    *ENVIRONMENT,
]  # fmt: skip
ONE, BANK, SEPARATE, PEFT = "one adapter", "bank", "forward per adapter", "peft, by groups"
INFERENCE, BOTH, OPENING, GENERATE = "inference", "forward + backward", "opening", "generate"
COUNTS = (1, 8, 64, 512)
ROWS = (16, 64, 512)
MOST_PEFT_ADAPTERS = 64  # PEFT keeps a module list for each adapter: 512 take minutes to build
TRAINING_ROWS = 512
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
SEQUENCES, PROMPT, GENERATED = 64, 8, 12
TARGET = 1.05


@dataclass(frozen=True)
class Contender:
    """A way to run rows x [N, in] under their adapters, and the parameters that get a gradient then."""

    forward: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]


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
        rows = measure(case, count, seconds=0.3 if quick else 1.0)
        table.append(out / FILE, COLUMNS, [row | facts for row in rows])
    generated = generation(blocks=2, rounds=2) if quick else generation(blocks=30, rounds=6)
    table.append(out / FILE, COLUMNS, [row | facts for row in generated])


def measure(case: Case, count: int, *, seconds: float) -> list[dict]:
    """Rows of times for K = count adapters over the rows of one layer, after each contender's output was checked."""
    problem = make_problem(case)
    generator = torch.Generator().manual_seed(count)
    vectors = problem.v * (1 + torch.rand(count, 1, generator=generator))  # [K, u]
    ids = torch.arange(case.tokens)[torch.randperm(case.tokens, generator=generator)] % count  # [rows]
    x = problem.x[0]  # [rows, in]
    one = our_layer(problem)
    module, bank, slots = in_bank(problem, vectors, ids)
    runs = {
        ONE: Contender(one, [one.v]), BANK: Contender(module, bank.parameters()),
        SEPARATE: separate(problem, vectors, ids),
    }  # fmt: skip
    training = {name: training_step(run, x, problem.g[0]) for name, run in runs.items()}
    if count <= MOST_PEFT_ADAPTERS:
        runs[PEFT] = Contender(peft_run(problem, vectors, ids), [])
    expected = row_by_row(problem, vectors, ids, x)
    timed = {}
    with bank.use(slots):
        for name, run in runs.items():
            if name != ONE:
                with torch.no_grad():
                    _check(f"{name}, {case}, K={count}", run.forward(x), expected, case.dtype)
        steps = {name: _inference(run.forward, x) for name, run in runs.items()}
        timed.update(interleave(steps, ONE, seconds=seconds, most=400))
        if case.tokens == TRAINING_ROWS:
            _check_gradients(f"{case}, K={count}", runs, x, problem.g[0], ids)
            for name, phases in interleave(training, ONE, seconds=seconds, most=100).items():
                timed[name] = timed[name] | phases
    opened = interleave({BANK: lambda: opening(bank, slots)}, BANK, seconds=0.1)[BANK][OPENING]
    rows = [
        {"contender": name, "phase": phase, "rounds": s.rounds}
        | dict(zip(QUANTILES, (s.p20, s.p50, s.p80, s.ratio_p20, s.ratio_p50, s.ratio_p80), strict=True))
        for name, phases in timed.items()
        for phase, s in phases.items()
    ]
    rows.append(
        {"contender": BANK, "phase": OPENING, "rounds": opened.rounds}
        | dict(zip(QUANTILES, (opened.p20, opened.p50, opened.p80, None, None, None), strict=True))
    )
    common = {
        "workload": "layer", "layer": str(case.shape), "rows": case.tokens, "adapters": count, "dtype": case.dtype_name
    }  # fmt: skip
    return [common | row for row in rows]


@torch.no_grad()
def row_by_row(problem: Problem, vectors: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    """Every row through a layer that holds its adapter alone, [rows, out]."""
    alone = our_layer(problem)
    rows = []
    for row, adapter in enumerate(ids.tolist()):
        alone.v.copy_(vectors[adapter])
        rows.append(alone(x[row : row + 1]))
    return torch.cat(rows)


def in_bank(problem: Problem, vectors: Tensor, ids: Tensor) -> tuple[TinyLoRALayer, AdapterBank, Tensor]:
    """One layer under a bank of K adapters, and the bank's ids of the rows."""
    module = our_layer(problem)
    bank = AdapterBank(nn.Sequential(module), len(vectors), trainable=True)
    slots = torch.tensor([bank.add(str(k), v[None]) for k, v in enumerate(vectors)])[ids]
    return module, bank, slots


def opening(bank: AdapterBank, slots: Tensor) -> dict[str, float]:
    begun = time.perf_counter()
    with bank.use(slots):
        return {OPENING: time.perf_counter() - begun}


def separate(problem: Problem, vectors: Tensor, ids: Tensor) -> Contender:
    """One call for each adapter on its own rows."""
    first = our_layer(problem)
    layers = [
        TinyLoRALayer(first.base, first.basis, first.sigma, first.projection, nn.Parameter(v.clone())) for v in vectors
    ]
    groups = [(ids == k).nonzero().squeeze(1) for k in range(len(vectors))]

    def forward(x: Tensor) -> Tensor:
        out = x.new_empty(len(x), problem.case.shape.out_features)
        for own, rows in zip(layers, groups, strict=True):
            out[rows] = own(x[rows])
        return out

    return Contender(forward, [layer.v for layer in layers])


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
    for name, v in zip(names, vectors, strict=True):
        module.tinylora_P[name].copy_(problem.fixed)
        module.tinylora_v[name]["0"].data.copy_(v)
    groups = [(ids == k).nonzero().squeeze(1) for k in range(len(vectors))]

    def forward(x: Tensor) -> Tensor:
        out = x.new_empty(len(x), problem.case.shape.out_features)
        for name, rows in zip(names, groups, strict=True):
            module.set_adapter(name)
            out[rows] = module(x[rows])
        return out

    return forward


def generation(*, blocks: int, rounds: int) -> list[dict]:
    """Tokens a second of `generate` with 64 sequences under one adapter and under 64, SmolLM2's architecture.

    Args:
        blocks: of its 30.
    """
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = smollm2(dtype, blocks).eval()
        # The head gets a strided slice of the hidden states: torch would copy its weight for each sequence.
        model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
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
            return {GENERATE: time.perf_counter() - begun}

        contenders = {ONE: lambda: step(None), BANK: lambda: step(torch.arange(SEQUENCES))}
        times = interleave(contenders, ONE, seconds=1e9, least=rounds, most=rounds, longest=1e9)
        results += [
            {
                "workload": GENERATE, "layer": f"SmolLM2-135M, {blocks} blocks", "rows": SEQUENCES,
                "adapters": 1 if name == ONE else SEQUENCES, "dtype": "fp32" if dtype is torch.float32 else "bf16",
                "contender": name, "phase": GENERATE, "rounds": s.rounds,
                "tokens_per_s": SEQUENCES * GENERATED / (s.p50 * 1e-6),
            }
            | dict(zip(QUANTILES, (s.p20, s.p50, s.p80, s.ratio_p20, s.ratio_p50, s.ratio_p80), strict=True))
            for name, phases in times.items()
            for s in phases.values()
        ]  # fmt: skip
    return results


def training_step(run: Contender, x: Tensor, g: Tensor) -> Callable[[], dict[str, float]]:
    """Forward with autograd, and backward to x and the vectors."""
    x = x.detach().requires_grad_()

    def step() -> dict[str, float]:
        begun = time.perf_counter()
        torch.autograd.grad(run.forward(x), [x, *run.trained], g)
        return {BOTH: time.perf_counter() - begun}

    return step


def _generate(model: nn.Module, prompts: Tensor) -> Tensor:
    options = dict(max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def _inference(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        with torch.no_grad():
            begun = time.perf_counter()
            forward(x)
            return {INFERENCE: time.perf_counter() - begun}

    return step


def _check(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error < TOLERANCE[dtype]:
        raise WrongResult(f"{name}: its rows differ from those of each adapter alone by {error:.3g}")


def _check_gradients(name: str, runs: dict[str, Contender], x: Tensor, g: Tensor, ids: Tensor) -> None:
    """The bank's gradients against those of one call for each adapter."""
    x = x.detach().requires_grad_()
    bank, apart = (torch.autograd.grad(runs[way].forward(x), [x, *runs[way].trained], g) for way in (BANK, SEPARATE))
    _check(f"dx of the bank, {name}", bank[0], apart[0], x.dtype)
    _check(f"dv of the bank, {name}", bank[1], torch.stack(apart[1:]), x.dtype)


def describe(rows: list[dict]) -> str:
    """The table of the report: ratios to one adapter, a column for each K; microseconds for opening a block."""
    lines = [
        f"Many adapters in one batch: time over the same rows under one adapter (the bank's target: {TARGET:g})",
        f"{'layer':<25}{'dtype':<5}{'rows':>4}  {'phase':<19}{'contender':<20}" + "".join(f"{k:>6}" for k in COUNTS),
    ]
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        key = row["layer"], row["dtype"], row["rows"], row["phase"], row["contender"]
        if row["workload"] == "layer" and row["contender"] != ONE:
            shown = f"{float(row['ratio_p50']):.3g}" if row["ratio_p50"] else f"{float(row['p50_us']):.0f}us"
            cells.setdefault(key, {})[int(row["adapters"])] = shown
    for (shape, dtype, count, phase, contender), found in cells.items():
        columns = "".join(f"{found.get(k, '-'):>6}" for k in COUNTS)
        lines.append(f"{shape:<25}{dtype:<5}{count:>4}  {phase:<19}{contender:<20}{columns}")
    for row in rows:
        if row["workload"] == GENERATE:
            lines.append(
                f"generate, {row['rows']} sequences of {row['layer']}, {row['dtype']}, under {row['adapters']:>2}: "
                f"{float(row['tokens_per_s']):.1f} tokens/s ({float(row['ratio_p50']):.3f})"
            )
    bank = [
        float(row["ratio_p50"])
        for row in rows
        if row["contender"] == BANK and row["phase"] in (INFERENCE, BOTH) and row["workload"] == "layer"
    ]
    missed = sum(value > TARGET for value in bank)
    mean, worst = geometric_mean(bank), max(bank)
    lines.append(f"bank: geometric mean {mean:.3f}, worst {worst:.3f}; above {TARGET:g}: {missed} of {len(bank)}")
    return "\n".join(lines)
