"""What a simulated backend has to pass, on shapes small enough to simulate. Each check raises on the first failure.

A check takes `make(order, skew)`, which gives a backend for an order of execution ("forward", "reverse" or "random")
and for rows that begin `skew` elements past a 16-byte boundary. "bounds" and "races" run the very calls of "schedule":
the simulator they are given reports what it is built to report.
"""
from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.cases import Case, Inputs, Outputs, assert_within_budget, error, exact, make_case, run_ops

from .mutants import Mutant

DTYPES = (torch.float32, torch.bfloat16)
# With the constants of mutants.SMALL these reach every tile shape, several tiles a block and several chunks of dv.
CASES = {
    "short": Case(100, 64, numbers=13),  # a part of a warp; three tiles a block, three chunks of dv
    "strided": Case(70, 1032, pad=24, bias=False),  # Medium in float32, Short in bfloat16
    "medium": Case(5, 2056, numbers=3),
    "scalar": Case(20, 65, numbers=4, pad=3),
    "unaligned rows": Case(9, 64, pad=1),  # Scalar: whole packets, but rows that start anywhere
    "long": Case(2, 16640),
    "stream, scalar": Case(2, 16387),
    "stream": Case(2, 32800),
    "adapters": Case(100, 64, numbers=40, adapters=5),
    "sequences": Case(24, 40, numbers=3, adapters=3, per_sequence=True),
    "LoRA-XS": Case(18, 48, lora_xs=True, numbers=4),
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
    """Both ops within the error budget on every case; what lies between rows is left alone."""
    for case in cases:
        for dtype in dtypes:
            inputs = draws(case, dtype)
            found = [run_ops(make("forward", 0), i) for i in inputs]
            assert_within_budget(found, inputs)
            if case.pad:
                y = found[0].y
                between = y.as_strided([case.rows - 1, case.pad], [y.stride(0), 1], case.features)
                assert between.isnan().all(), f"{case}: wrote between the rows"


def schedule(make, cases=ALL) -> None:
    """The same bits in any order of blocks and threads, with 32-bit ids, and for each op alone."""
    for case in cases:
        inputs = make_case(case, torch.bfloat16)
        results = [run_ops(make(order, 0), inputs) for order in ("forward", "reverse", "random")]
        results.append(run_ops(make("forward", 0), narrow_ids(inputs)))
        for other in results[1:]:
            assert_same_outputs(results[0], other)
        backend, shared = make("random", 0), (inputs.basis, inputs.v, inputs.projection)
        empty, dv = backend.update_backward(inputs.g, *shared, results[0].t, inputs.adapter_ids, False)
        g0, nothing = backend.update_backward(inputs.g, *shared, None, inputs.adapter_ids, True)
        assert empty.numel() == nothing.numel() == 0
        assert same_bits(g0, results[0].g0) and same_bits(dv, results[0].dv)


def assert_same_outputs(a: Outputs, b: Outputs) -> None:
    for field in dataclasses.fields(Outputs):
        assert same_bits(getattr(a, field.name), getattr(b, field.name)), f"{field.name}: other bits"


def assert_equal_to_one_rounding(a: Outputs, b: Outputs) -> None:
    """The error of a against b, for each of y, t, g0 and dv."""
    for name in (field.name for field in dataclasses.fields(Outputs)):
        found, expected = getattr(a, name), getattr(b, name)
        assert error(found, expected) <= torch.finfo(found.dtype).eps, f"{name}: {error(found, expected):.3g}"


def alignment(make, dtypes=DTYPES) -> None:
    """Rows that start off a 16-byte boundary, though their stride and width would allow 16-byte accesses."""
    for case in (Case(37, 64, numbers=3), Case(5, 2056)):
        for dtype in dtypes:
            inputs = draws(case, dtype)
            assert_within_budget([run_ops(make("forward", 1), i) for i in inputs], inputs)


def rounding(make) -> None:
    """16-bit results are the exact ones rounded once, to nearest even, but for ties that float32 sums cannot settle."""
    inputs = make_case(CASES["short"], torch.bfloat16)
    found, truth = run_ops(make("forward", 0), inputs), exact(inputs)
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
    found = run_ops(make("forward", 0), inputs)
    bare = inputs.adapter_ids < 0
    assert same_bits(found.y[bare], inputs.y[bare]) and same_bits(found.g0[bare], inputs.g[bare])
    assert torch.allclose(found.t[6], exact(inputs).t[6].float(), atol=1e-5)


def bad_ids(make) -> None:
    """An id out of range ends the launch, in either op, also where only dv is asked for."""
    for bad in (-2, 2, 2**40):
        inputs = make_case(Case(8, 64, numbers=2, adapters=2), torch.bfloat16)
        inputs.adapter_ids[:] = 0
        inputs.adapter_ids[5] = bad
        backend, t = make("forward", 0), torch.zeros(8, 2)
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
    "schedule": schedule,
    "alignment": alignment,
    "rounding": rounding,
    "bare rows": bare_rows,
    "bad ids": bad_ids,
    "bounds": schedule,
    "races": schedule,
}
MODE = {"bounds": "asan", "alignment": "asan", "races": "race"}  # the emulator's build for a check; plain otherwise


def look_for(mutant: Mutant, make) -> None:
    """The check that has to find this mutant, on the case that shows it, in bfloat16: raises on a finding."""
    options = {}
    if mutant.check in ("budget", "alignment"):
        options["dtypes"] = (torch.bfloat16,)
    if CHECKS[mutant.check] in (budget, schedule):
        options["cases"] = (CASES[mutant.case],)
    CHECKS[mutant.check](make, **options)
