"""What a simulated backend has to pass, on shapes small enough to simulate. Each check raises on the first failure.

A check takes `make(**options)`, which gives a backend. Options: order of execution ("forward", "reverse" or
"random"), skew and bias_skew (rows, or the bias, begin so many elements past a 16-byte boundary), card
(multiprocessors, and blocks that each runs at once), capturing (the stream is being captured into a graph). "bounds"
and "races" run the very calls of "schedule" and "spread": the simulator they are given reports what it is built to
report.
"""
from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.cases import Case, Inputs, Outputs, assert_within_budget, error, exact, make_case, run_ops
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.schema import RIGHT_COLUMNS, samples_shape

from .mutants import Mutant

DTYPES = (torch.float32, torch.bfloat16)
SMALL, LARGE = (2, 2), (132, 3)  # cards: several tiles a block; a multiprocessor for each row
# On a small card these reach every tile shape but Few, several tiles a block and several teams.
CASES = {
    "short": Case(100, 64, numbers=13),  # a part of a warp, four teams; two tiles a block
    "strided": Case(70, 1032, pad=24, bias=False),
    "bias": Case(37, 520, numbers=3, bias=False, adds_bias=True),
    "medium": Case(9, 5000, numbers=3),
    "scalar": Case(20, 65, numbers=4, pad=3),
    "unaligned rows": Case(9, 64, pad=1),  # Scalar: whole packets, but rows that start anywhere
    "long": Case(7, 8200),
    "stream, scalar": Case(2, 16387),
    "stream": Case(9, 32800),
    "adapters": Case(200, 64, numbers=40, adapters=5),  # four tiles a block
    "sequences": Case(24, 40, numbers=3, adapters=3, per_sequence=True),
    "many sequences": Case(560, 8, numbers=2, adapters=3, per_sequence=True),
    "large bank": Case(34, 72, numbers=2, adapters=64),
    "LoRA-XS": Case(18, 48, lora_xs=True, numbers=4),
    "bare with a bias": Case(24, 200, numbers=3, adapters=2, bias=False, adds_bias=True),
}
ALL = tuple(CASES.values())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def narrow_ids(inputs: Inputs) -> Inputs:
    """The same with int32 ids."""
    return inputs if inputs.adapter_ids is None else dataclasses.replace(inputs, adapter_ids=inputs.adapter_ids.int())


def draws(case: Case, dtype: torch.dtype) -> list[Inputs]:
    """Several inputs of one case: a single dv has an error small by luck as often as not, many together have not."""
    few = max(case.adapters, 1) * case.numbers < 8 and case.rows * case.features < 2**14
    return [make_case(case, dtype, draw) for draw in range(6 if few else 3)]


def budget(make, dtypes=DTYPES, cases=ALL) -> None:
    """The update and its gradient within the error budget on every case; what lies between rows is left alone."""
    for case in cases:
        for dtype in dtypes:
            inputs = draws(case, dtype)
            found = [run_ops(make(), i) for i in inputs]
            assert_within_budget(found, inputs)
            if case.pad:
                y = found[0].y
                between = y.as_strided([case.rows - 1, case.pad], [y.stride(0), 1], case.features)
                assert between.isnan().all(), f"{case}: wrote between the rows"


@dataclasses.dataclass(frozen=True)
class Around:
    """What the ops around the product take beside the inputs of a case: the other side of the layer."""

    x: torch.Tensor  # [N, E]
    dx: torch.Tensor  # [N, E], rows padded
    right: torch.Tensor  # [r, E]
    bias: torch.Tensor  # [D]
    t: torch.Tensor  # [N, r]


def around_of(case: Case, dtype: torch.dtype, width: int) -> Around:
    generator = torch.Generator().manual_seed(case.rows * case.features + width)
    x, dx = (torch.randn(case.rows, width + case.pad, generator=generator).to(dtype)[:, :width] for _ in range(2))
    right, t = (torch.randn(*shape, generator=generator) for shape in ((case.rank, width), (case.rows, case.rank)))
    return Around(x, dx, right, torch.randn(case.features, generator=generator).to(dtype), t)


def run_around(backend, inputs: Inputs, around: Around) -> dict[str, torch.Tensor]:
    """Both ops around the product, in the ways there are; activations in the dtype of the inputs."""
    factors = inputs.basis, inputs.v, inputs.projection
    found = {}
    for name, bias in (("y", None), ("y + b", around.bias)):
        found[name], found["t"] = backend.low_rank(around.x, around.right, *factors, bias, inputs.adapter_ids)
    for name, add in (("dx", False), ("dx added", True)):
        rows = torch.full((len(around.dx), around.dx.stride(0)), torch.nan, dtype=around.dx.dtype)
        dx = rows[:, : around.dx.shape[1]].copy_(around.dx)
        found["dv"] = backend.update_input_grad(
            dx, around.right, inputs.g, *factors, around.t, inputs.adapter_ids, add
        )  # fmt: skip
        assert rows[:, dx.shape[1] :].isnan().all(), f"{name}: wrote between the rows"
        found[name] = dx
    return found


def around(make, dtypes=DTYPES, cases=ALL) -> None:
    """low_rank and update_input_grad: sums to fp32's error, results rounded once."""
    for case in cases:
        for dtype in dtypes:
            for width in (48, 77, 1100):
                inputs, other = make_case(case, dtype), around_of(case, dtype, width)
                found = run_around(make(), inputs, other)
                wide = {f.name: getattr(other, f.name).double() for f in dataclasses.fields(Around)}
                truth = run_around(reference, inputs.to(torch.float64), Around(**wide))
                for name, expected in truth.items():
                    limit = 3e-6 + (0.6 * torch.finfo(dtype).eps if found[name].dtype is dtype else 0)
                    off = error(found[name], expected)
                    assert off <= limit, f"{case} {width} {name}: {off}"


def schedule(make, cases=ALL) -> None:
    """The same bits in any order of blocks and threads, with 32-bit ids, in a graph, and for each op alone."""
    for case in cases:
        inputs = make_case(case, torch.bfloat16)
        ways = ({}, {"order": "reverse"}, {"order": "random"}, {"capturing": True})
        results = [run_ops(make(**way), inputs) for way in ways]
        results.append(run_ops(make(), narrow_ids(inputs)))
        for other in results[1:]:
            assert_same_outputs(results[0], other)
        backend, shared = make(order="random"), (inputs.basis, inputs.v, inputs.projection)
        empty, dv = backend.update_backward(inputs.g, *shared, results[0].t, inputs.adapter_ids, False)
        g0, nothing = backend.update_backward(inputs.g, *shared, None, inputs.adapter_ids, True)
        assert empty.numel() == nothing.numel() == 0
        assert same_bits(g0, results[0].g0) and error(dv, results[0].dv) < 1e-5  # dv alone: over another tile
        other = around_of(case, torch.bfloat16, 40)
        first, second = (run_around(make(**way), inputs, other) for way in ({}, {"order": "random"}))
        for name, expected in first.items():
            assert same_bits(second[name], expected), f"{name}: other bits"


def spread(make, cases=ALL) -> None:
    """A row's bits depend on that row alone: on any card, and in a batch of any size."""
    for case in cases:
        inputs = make_case(case, torch.bfloat16)
        results = [run_ops(make(card=card), inputs) for card in (SMALL, (1, 1), LARGE)]
        for other in results[1:]:
            assert error(other.dv, results[0].dv) < 1e-5  # summed over other blocks
            assert_same_outputs(results[0], dataclasses.replace(other, dv=results[0].dv))


def everything(make, cases=ALL) -> None:
    """For a simulator that watches: every call there is, on both cards."""
    schedule(make, cases)
    spread(make, cases)


def not_finite(make, dtypes=DTYPES) -> None:
    """What is not finite in y stays where it is, in no row's coefficients; it spreads over a gradient's row."""
    plain, bias = Case(21, 72, numbers=2), Case(7, 1100, bias=False, adds_bias=True)
    for case in (plain, bias, Case(3, 33000), Case(5, 33, pad=2)):
        for dtype in dtypes:
            inputs = make_case(case, dtype)
            clean = run_ops(make(), inputs)
            bad = inputs.clone_y()
            at = torch.zeros(bad.shape, dtype=torch.bool)
            at[1, 3] = at[1, -1] = at[case.rows - 1, 0] = True
            bad[1, 3], bad[1, -1], bad[case.rows - 1, 0] = torch.inf, torch.nan, -torch.inf
            found = run_ops(make(order="random"), dataclasses.replace(inputs, y=bad))
            truth = exact(dataclasses.replace(inputs, y=torch.where(at, 0, inputs.y)))
            assert torch.equal(found.y.isfinite(), ~at) and found.t.isfinite().all()
            assert error(found.t, truth.t) < 1e-5 and error(found.y[~at], truth.y[~at]) < torch.finfo(dtype).eps
            touched = at.any(1)
            assert same_bits(found.y[~touched], clean.y[~touched]) and same_bits(found.t[~touched], clean.t[~touched])
            g0, dv = make().update_backward(bad, inputs.basis, inputs.v, inputs.projection, found.t, None, True)
            assert torch.equal(g0.isfinite().all(1), ~touched) and not dv.isfinite().any()


def assert_same_outputs(a: Outputs, b: Outputs) -> None:
    for field in dataclasses.fields(Outputs):
        assert same_bits(getattr(a, field.name), getattr(b, field.name)), f"{field.name}: other bits"


def assert_equal_to_one_rounding(a: Outputs, b: Outputs) -> None:
    """The error of a against b, for each of y, t, g0 and dv."""
    for name in (field.name for field in dataclasses.fields(Outputs)):
        found, expected = getattr(a, name), getattr(b, name)
        assert error(found, expected) <= torch.finfo(found.dtype).eps, f"{name}: {error(found, expected):.3g}"


def kept_right(make, dtypes=DTYPES) -> None:
    """B^T is computed when it is asked for and when the weight is another, in any column, and at no other time."""
    for dtype in dtypes:
        for rank, (rows, columns) in ((2, (300, 150)), (8, (7, 64)), (1, (1000, 70)), (1, (1, 3))):
            generator = torch.Generator().manual_seed(rows)
            wide = torch.randn(rows, columns + 3, generator=generator).to(dtype)
            basis = torch.randn(rank, rows, generator=generator)
            for weight in (wide[:, :columns].clone(), wide[:, :columns], wide[:, :columns].t().contiguous().t()):
                right, samples = torch.empty(rank, columns), torch.empty(samples_shape(columns), dtype=torch.int32)
                make().refresh_right(right, samples, weight, basis, True)
                assert error(right, basis.double() @ weight.double()) < 2e-6
                assert torch.equal(samples, reference.samples_of(weight))
                right[:] = torch.arange(columns)  # shows what is computed again
                kept = right.clone()
                make().refresh_right(right, samples, weight, basis, False)
                assert torch.equal(right, kept)
                last = weight[:, (len(samples) - 1) * RIGHT_COLUMNS :]
                last.mul_(2)
                make().refresh_right(right, samples, weight, basis, False)
                at = columns - last.shape[1]
                assert torch.equal(right[:, :at], kept[:, :at])
                assert error(right[:, at:], basis.double() @ last.double()) < 2e-6
                assert torch.equal(samples, reference.samples_of(weight))


def alignment(make, dtypes=DTYPES) -> None:
    """Rows or a bias that start off a 16-byte boundary, though their stride and width would allow 16-byte accesses."""
    for case in (Case(37, 64, numbers=3), Case(5, 2056, bias=False, adds_bias=True)):
        for dtype in dtypes:
            inputs = draws(case, dtype)
            for skew in ({"skew": 1}, {"bias_skew": 1}):
                assert_within_budget([run_ops(make(**skew), i) for i in inputs], inputs)


def rounding(make) -> None:
    """16-bit results are the exact ones rounded once, to nearest even, but for ties that float32 sums cannot settle."""
    inputs = make_case(CASES["short"], torch.bfloat16)
    found, truth = run_ops(make(), inputs), exact(inputs)
    for name in ("y", "g0"):
        agree = getattr(found, name) == getattr(truth, name).to(torch.bfloat16)
        assert agree.double().mean() > 0.99, f"{name}: {agree.double().mean():.1%} rounded to nearest"


def bare_rows(make) -> None:
    """A row of adapter -1 keeps every bit, of negative zeros and NaNs too; its coefficients are still computed."""
    case = Case(12, 72, numbers=2, adapters=2)
    inputs = make_case(case, torch.bfloat16)
    inputs.adapter_ids[::3] = -1
    for rows in (inputs.y, inputs.g):
        rows[0] = -0.0
        rows[3].view(torch.int16)[:] = 0x7FA5  # a NaN with a payload
    found = run_ops(make(), inputs)
    bare = inputs.adapter_ids < 0
    assert same_bits(found.y[bare], inputs.y[bare]) and same_bits(found.g0[bare], inputs.g[bare])
    assert torch.allclose(found.t[6], exact(inputs).t[6].float(), atol=1e-5)


def bad_ids(make) -> None:
    """An id out of range ends the launch, in either op, also where only dv is asked for."""
    for bad in (-2, 2, 2**40):
        inputs = make_case(Case(8, 64, numbers=2, adapters=2), torch.bfloat16)
        inputs.adapter_ids[:] = 0
        inputs.adapter_ids[5] = bad
        backend, t = make(), torch.zeros(8, 2)
        operands = inputs.basis, inputs.v, inputs.projection
        for call in (
            lambda: backend.update(inputs.clone_y(), *operands, inputs.offset, inputs.bias, inputs.adapter_ids),
            lambda: backend.update_backward(inputs.g, *operands, t, inputs.adapter_ids, True),
            lambda: backend.update_backward(inputs.g, *operands, t, inputs.adapter_ids, False),
        ):
            with pytest.raises(Exception, match="trap"):
                call()


CHECKS = {
    "budget": budget,
    "around": around,
    "schedule": schedule,
    "spread": spread,
    "not finite": not_finite,
    "alignment": alignment,
    "rounding": rounding,
    "bare rows": bare_rows,
    "bad ids": bad_ids,
    "kept right": kept_right,
    "bounds": everything,
    "races": everything,
    "races around a NaN": not_finite,
}
# The emulator's build for a check; plain otherwise.
MODE = {"bounds": "asan", "alignment": "asan", "races": "race", "races around a NaN": "race"}


def look_for(mutant: Mutant, make) -> None:
    """The check that has to find this mutant, on the case that shows it, in bfloat16: raises on a finding."""
    options = {}
    if CHECKS[mutant.check] in (budget, around, alignment, not_finite, kept_right):
        options["dtypes"] = (torch.bfloat16,)
    if CHECKS[mutant.check] in (budget, around, schedule, spread, everything):
        options["cases"] = (CASES[mutant.case],)
    CHECKS[mutant.check](make, **options)
