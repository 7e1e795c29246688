"""The CUDA kernels, executed from nvcc's PTX: results against float64, findings of the interpreter, exact traffic.

The launchers of csrc/cuda choose kernel, grid and block, so what runs here is what a GPU would be given.
"""
import functools
from pathlib import Path

import pytest
import torch

from tests.cases import CASES, DTYPES, Case, Inputs, Outputs, assert_within_budget, make_case, run_ops

from .checks import CHECKS, assert_equal_to_one_rounding, draws, look_for
from .cuda_gpu import SimulatedCuda
from .host import emulator
from .mutants import MUTANTS, RIGHT_MUTANTS, Edit, edited_copy
from .nvcc import CUDA, needs_nvcc
from .ptx import SimulationError

CAPABILITIES = (80, 90, 100, 120)
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
pytestmark = needs_nvcc


def _simulated(capability: int, **options) -> SimulatedCuda:
    return SimulatedCuda(capability, CAPABILITIES, **options)


def _ids(value) -> str:
    return str(value).removeprefix("torch.")


def _run(inputs: list[Inputs], case: Case, capability: int) -> list[Outputs]:
    gpu = _simulated(capability)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, dtype):
    inputs = draws(case, dtype)
    assert_within_budget(_run(inputs, case, 90), inputs)


@functools.cache
def _on_the_grids_target(case: Case, dtype: torch.dtype) -> tuple[Inputs, Outputs]:
    inputs = make_case(case, dtype)
    return inputs, run_ops(_simulated(90), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("capability", (80, 100, 120))
@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_every_target(case, capability, dtype):
    """To one rounding what the target gives that the grid holds to its budget."""
    inputs, expected = _on_the_grids_target(case, dtype)
    (found,) = _run([inputs], case, capability)
    assert_equal_to_one_rounding(found, expected)


# One rank is enough to find a bug in, and builds four times as fast.
ONE_RANK = tuple(
    Edit(file, f"    case {rank}: {call};\n", "")
    for rank in (1, 4, 8)
    for file, call in (
        ("launch_rows.cuh",
         f"return ids ? kernel_of_rank<T, {rank}, true>(tile) : kernel_of_rank<T, {rank}, false>(tile)"),
        ("bank_grad.cu", f"TL_LAUNCH(bank_grad_kernel<{rank}>, grid, block, stream, arguments); break"),
    )
)  # fmt: skip


def _maker(sources: Path, launchers: Path | None = None):
    """A maker of backends, as tests/sim/checks.py wants it."""
    return lambda **options: SimulatedCuda(90, sources=sources, launchers=launchers, **options)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return edited_copy(CUDA, tmp_path_factory.mktemp("one_rank"), ONE_RANK)


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("bounds", "races", "races around a NaN")])
def test_checks(one_rank, check):
    """Each looks for stray accesses and races on the way."""
    CHECKS[check](_maker(one_rank))


@pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))
def test_agrees_with_the_host_emulator():
    """The same sources through two compilers and two simulators: equal to one rounding of the result."""
    emulated = emulator.Emulated(emulator.build("plain", ranks=(2,), dtypes=(torch.bfloat16,)))
    for case in GRID:
        if case.rank == 2 and case.rows:
            inputs = make_case(case, torch.bfloat16)
            assert_equal_to_one_rounding(run_ops(emulated, inputs), run_ops(_simulated(90), inputs))


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS + RIGHT_MUTANTS if mutant.one_order], ids=lambda mutant: mutant.name
)
def test_every_mutant_is_caught(tmp_path, one_rank, mutant):
    sources = edited_copy(CUDA, tmp_path, (*ONE_RANK, mutant.edit))
    only_kernels = mutant.file.endswith(".cuh")  # the launchers are in .cu and .h files
    with pytest.raises((SimulationError, AssertionError, pytest.fail.Exception)):
        look_for(mutant, _maker(sources, one_rank if only_kernels else None))
