"""The CUDA kernels, executed from the PTX of NVRTC and of nvcc: results against float64, findings of the interpreter,
exact traffic.

The launchers of csrc/cuda choose kernel, grid and block, so what runs here is what a GPU would be given.
"""
import functools

import pytest
import torch

from tests.cases import CASES, DTYPES, Case, Inputs, Outputs, assert_within_budget, make_case, run_ops

from .checks import CHECKS, assert_equal_to_one_rounding, draws, look_for
from .compilers import COMPILERS, CUDA, needs_compiler
from .cuda_gpu import SimulatedCuda
from .host import emulator
from .mutants import MUTANTS, RIGHT_MUTANTS, edited_copy
from .ptx import SimulationError

GRID = [case for case in CASES if case.rank in (1, 2, 4, 8)] + [
    Case(7, 2056, rank=4, numbers=3),  # several vectors a thread, not all of them in use
    Case(9, 5000, rank=4, numbers=3),
    Case(5, 16384, rank=8, numbers=2),
    Case(2, 33000, rank=1, numbers=2),  # read twice
    Case(3, 17001, rank=4, numbers=1, pad=3),  # read twice, one element at a time
    Case(1, 152064, rank=2, numbers=13),  # the head of a large vocabulary
]
_SIZES = (35, 561, 576, 26208, 58368, 80002, 4096, 4800, 650, 18981)  # rows x features: every rank, tile and option
EVERYWHERE = [case for case in GRID if case.rows * case.features in _SIZES]
pytestmark = needs_compiler


def _ids(value) -> str:
    return str(value).removeprefix("torch.")


def _run(inputs: list[Inputs], case: Case, capability: int, compiler: str) -> list[Outputs]:
    gpu = SimulatedCuda(capability, compiler=compiler)
    outputs = [run_ops(gpu, i) for i in inputs]
    if case.rows:
        backward = 2 if case.adapters else 1  # launches: what a bank's rows have in common is summed by a second one
        assert len(gpu.launches) == (1 + backward) * len(inputs)
        _assert_traffic(case, inputs[0], *(launch.traffic for launch in gpu.launches[:2]))
    return outputs


def _assert_traffic(case: Case, inputs: Inputs, forward, backward) -> None:
    """A row is read once and written once; beyond what registers hold, read twice. Aligned rows: no extra sector."""
    itemsize = inputs.y.element_size()
    row = case.features * itemsize
    packets = case.features % 4 == 0 and (case.rows == 1 or case.pad % 4 == 0)
    reads = 1 if packets and row <= 65536 else 2
    for traffic, source, target in ((forward, "y", "y"), (backward, "g", "g0")):
        assert traffic.bytes_read(source) == reads * case.rows * row
        assert traffic.bytes_written(target) == case.rows * row
    if row % 32 == 0 and not case.pad:
        assert forward.of("y").excess == backward.of("g").excess == backward.of("g0").excess == 1.0


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, dtype, compiler):
    inputs = draws(case, dtype)
    assert_within_budget(_run(inputs, case, 90, compiler), inputs)


@functools.cache
def _on_the_grids_target(case: Case, dtype: torch.dtype) -> tuple[Inputs, Outputs]:
    inputs = make_case(case, dtype)
    return inputs, run_ops(SimulatedCuda(90), inputs)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("capability", (75, 80, 100, 120))
@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_every_target(case, capability, dtype, compiler):
    """To one rounding what the target gives that the grid holds to its budget. compute_100 is what the wheels hold."""
    inputs, expected = _on_the_grids_target(case, dtype)
    (found,) = _run([inputs], case, capability, compiler)
    assert_equal_to_one_rounding(found, expected)


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("bounds", "races", "races around a NaN")])
def test_checks(check):
    """Each looks for stray accesses and races on the way."""
    CHECKS[check](lambda **options: SimulatedCuda(90, **options))


@pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))
def test_agrees_with_the_host_emulator():
    """The same sources through two compilers and two simulators: equal to one rounding of the result."""
    emulated = emulator.Emulated(emulator.build("plain", ranks=(2,), dtypes=(torch.bfloat16,)))
    for case in GRID:
        if case.rank == 2 and case.rows:
            inputs = make_case(case, torch.bfloat16)
            assert_equal_to_one_rounding(run_ops(emulated, inputs), run_ops(SimulatedCuda(90), inputs))


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS + RIGHT_MUTANTS if mutant.one_order], ids=lambda mutant: mutant.name
)
def test_every_mutant_is_caught(tmp_path, mutant):
    sources = edited_copy(CUDA, tmp_path, (mutant.edit,))
    with pytest.raises((SimulationError, AssertionError, pytest.fail.Exception)):
        look_for(mutant, lambda **options: SimulatedCuda(90, sources=sources, **options))


def test_a_finding_leaves_nothing_to_the_next_run(tmp_path):
    """Both share the launchers, and the ticket with them."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "the ticket is left as it is")
    inputs = make_case(Case(100, 64), torch.bfloat16)
    with pytest.raises(SimulationError, match="the ticket is left at"):
        run_ops(SimulatedCuda(90, sources=edited_copy(CUDA, tmp_path, (mutant.edit,))), inputs)
    run_ops(SimulatedCuda(90), inputs)
