"""The CUDA kernels, compiled for the host and run thread by thread, against float64; and the proof that it would tell.

Three builds of the same sources: plain, with AddressSanitizer and UndefinedBehaviorSanitizer, with the race detector.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import CASES, DTYPES, assert_within_budget, make_case, run_ops

from .checks import CHECKS, MODE, assert_same_outputs, draws, look_for
from .host import emulator
from .host.emulator import Emulated, Fault
from .mutants import MUTANTS, Edit, edited_copy

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))

GPU_CASES = [case for case in CASES if case.rank in emulator.RANKS]


@pytest.fixture(scope="module")
def all_kernels():
    return emulator.build("plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_within_the_error_budget(all_kernels, case, dtype):
    inputs = draws(case, dtype)
    forward = [run_ops(Emulated(all_kernels), i) for i in inputs]
    assert_within_budget(forward, inputs)
    assert_same_outputs(forward[0], run_ops(Emulated(all_kernels, order="random", seed=7), inputs[0]))


@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.rank != 2 and case.rows > 3], ids=str)
def test_around_the_product_at_every_rank(all_kernels, case):
    CHECKS["around"](lambda **options: Emulated(all_kernels, **options), cases=(case,))


@pytest.mark.parametrize("mode", ["asan", "race"])
@pytest.mark.parametrize("rank", [2, 8])
def test_no_stray_access_and_no_race_on_the_case_grid(mode, rank):
    kernels = emulator.build(mode, ranks=(rank,), dtypes=(torch.bfloat16,))
    for case in GPU_CASES:
        if case.rank == rank:
            run_ops(Emulated(kernels, order="random"), make_case(case, torch.bfloat16))


@pytest.fixture(scope="module")
def kernels():
    """The clean side of every mutant."""
    return lambda mode: emulator.build(mode, ranks=(2,), dtypes=(torch.float32, torch.bfloat16))


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "kept right"])  # test_cuda_ops.py
def test_checks(kernels, check):
    executable = kernels(MODE.get(check, "plain"))
    CHECKS[check](lambda **options: Emulated(executable, **options))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(tmp_path, mutant):
    sources = edited_copy(emulator.KERNELS, tmp_path, (mutant.edit,))
    executable = emulator.build(
        MODE.get(mutant.check, "plain"), kernels=sources, ranks=(2,), dtypes=(torch.bfloat16,)
    )
    with pytest.raises((Fault, AssertionError, pytest.fail.Exception)):
        look_for(mutant, lambda **options: Emulated(executable, **options))


# bugs.cpp, by number: what finds the bug, and the words it must say.
PLANTED = [
    ("asan", "heap-buffer-overflow"),  # reads past the end
    ("asan", "heap-buffer-overflow"),  # writes past the end
    ("asan", "heap-buffer-overflow"),  # past the end of shared memory
    ("race", "write then read"),  # no barrier
    ("race", "read then write"),  # no barrier before shared memory is used again
    ("plain", "threads left the kernel while"),  # a barrier one warp does not reach
    ("plain", "deadlock"),  # a shuffle some lanes skip
    ("plain", "names lanes that left"),  # a shuffle after a lane has left
    ("asan", "misaligned address"),
    ("race", "different blocks"),  # blocks add up without order
    ("race", "different blocks"),  # a ticket without a fence
    ("plain", "nan instead of"),  # shared memory nobody wrote
    ("race", "same block"),  # lanes hand over through memory without __syncwarp
    ("asan", "signed integer overflow"),
    ("plain", "outside its mask"),  # a shuffle from a lane that is not in the mask
    ("plain", "different barriers"),
]


@pytest.fixture(scope="module")
def planted():
    def build(mode):
        objects = [emulator.kernel_object(emulator.HERE / "bugs.cpp", mode), *emulator.runtime_objects(mode)]
        return emulator.link(objects, mode)

    return build


@pytest.mark.parametrize("mode", emulator.MODES)
def test_the_kernels_without_a_bug_run_clean(planted, mode):
    emulator.run(planted(mode), arguments=("0",))


@pytest.mark.parametrize("number", range(1, len(PLANTED) + 1))
def test_planted_bug_is_reported(planted, number):
    mode, words = PLANTED[number - 1]
    with pytest.raises(Fault, match=words):
        emulator.run(planted(mode), arguments=(str(number),))


def test_a_mutant_that_does_not_apply_is_an_error(tmp_path):
    stale = Edit("launch_plan.h", "no such line", "")
    with pytest.raises(ValueError, match="expected exactly one"):
        edited_copy(emulator.KERNELS, tmp_path, (stale,))


def _cuda_h() -> Path | None:
    """The folder of NVIDIA's cuda.h: of a toolkit, or of the package nvidia-cuda-runtime."""
    homes = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    homes += [Path(entry) / "nvidia" / name / "include" for entry in sys.path for name in ("cuda_runtime", "cu13")]
    return next((home for home in homes if (home / "cuda.h").is_file()), None)


@pytest.mark.skipif(_cuda_h() is None, reason="needs cuda.h from the CUDA toolkit or nvidia-cuda-runtime-cu12")
@pytest.mark.parametrize(
    "edit",
    [
        None,
        Edit("driver_api.h", "size_t count, StreamHandle stream)", "int count, StreamHandle stream)"),
        Edit("driver_api.h", "(Ordinal* device, int ordinal)", "(int ordinal, Ordinal* device)"),
        Edit("driver_api.h", "kMajor = 75", "kMajor = 76"),
        Edit("driver_api.h", "kRelaxed = 2", "kRelaxed = 1"),
        Edit("driver_api.h", "F(cuStreamGetId,", "F(cuStreamGetNumber,"),
    ],
    ids=lambda edit: edit.new if edit else "as it is",
)
def test_the_driver_is_declared_as_in_nvidias_header(tmp_path, edit):
    sources = edited_copy(emulator.KERNELS, tmp_path / "sources", (edit,) if edit else ())
    check = emulator.HERE.parent / "driver/check_api.cpp"
    command = [shutil.which("g++"), "-std=c++17", "-fsyntax-only", f"-I{sources}", "-isystem", _cuda_h(), check]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (edit is None), done.stderr[-2000:]
