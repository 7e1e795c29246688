"""The variants of bench/gpu/variants without a GPU: compiled for sm_90 by Triton, executed by its interpreter.

What multiplies on tensor cores the PTX interpreter does not run; the interpreter runs the source, in float16.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu.products import Side
from bench.gpu.variants import coefficients as of
from bench.gpu.variants import dependent, persistent, skinny
from bench.gpu.variants.persistent import RAGGED, TILINGS, Tiling

from . import variants_interpreter
from .test_triton import most_registers, resources
from .triton_gpu import CUDA_TARGETS, Launch, simulated_gpu
from .variants_interpreter import FEW, MANY, MUTANTS, WAYS, figures

ROOT = Path(__file__).parents[2]
OUT, WIDTH, ROWS = 512, 1024, 256
BFLOAT16 = torch.bfloat16
RANKS = (1, 2, 4, 8)


# Executed by Triton's interpreter


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What each check of variants_interpreter found: None, or an error."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", variants_interpreter.__name__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = map(json.loads, done.stdout.splitlines())
    return {outcome["check"]: outcome["error"] for outcome in outcomes}


def test_every_variant_agrees_with_float64(interpreted):
    found = {name: error for name, error in interpreted.items() if name not in MUTANTS}
    assert len(found) == len(MANY) + len(FEW) + len(WAYS)
    assert not any(found.values()), found


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, interpreted):
    assert interpreted[name]


# Compiled for sm_90


class Inputs:
    """A side and what its pass makes; nothing is computed."""

    def __init__(self, rank: int, dtype: torch.dtype = BFLOAT16, backward: bool = False, rows: int = ROWS) -> None:
        self.side = Side(OUT, WIDTH, rows, backward, "cpu", rank, dtype)
        self.x, self.w, self.d, self.far = (
            held[0] for held in (self.side.x, self.side.weights, self.side.d, self.side.far)
        )
        self.made = of.buffers(self.x, rank)
        self.halves = of.halves_of(self.side.near[0], dtype)

    def run_pass(self, **options) -> Launch:
        with simulated_gpu(CUDA_TARGETS[90], execute=False) as gpu:
            of.coefficients(
                self.x, self.halves, self.side.v, self.side.projection, self.made, backward=self.side.backward,
                **options,
            )  # fmt: skip
        return gpu.launches[0]

    def run_persistent(self, tiling: Tiling, term: persistent.Term, x=None, dependent: bool = False) -> Launch:
        step = term is persistent.Term.STEP
        with simulated_gpu(CUDA_TARGETS[90], execute=False) as gpu:
            persistent.product(
                self.x if x is None else x, self.w, self.d, backward=self.side.backward, programs=132, tiling=tiling,
                term=term, gains=self.made, factor=of.deep_factor(self.far, self.x.dtype) if step else self.far,
                dependent=dependent,
            )  # fmt: skip
        return gpu.launches[0]

    def run_skinny(self, columns: int, term: skinny.Term, dependent: bool = False) -> Launch:
        with simulated_gpu(CUDA_TARGETS[90], execute=False) as gpu:
            skinny.product(
                self.x, self.w, self.d, self.side.v, self.side.projection, columns=columns, term=term,
                halves=self.halves, basis=self.far, t=self.made.t, gains=self.made.gains, dependent=dependent,
            )  # fmt: skip
        return gpu.launches[0]


def text_of(launch: Launch) -> str:
    return launch.assembly("ptx").read_text()


def count(launch: Launch, instruction: str) -> int:
    return len(re.findall(rf"\b{re.escape(instruction)}", text_of(launch)))


def assert_no_spill(launch: Launch) -> None:
    used = resources(launch)
    assert used["spilled bytes"] == 0 and used["registers"] <= most_registers(launch), f"{launch.kernel}: {used}"
    assert launch.metadata.shared <= persistent.SHARED


@pytest.mark.parametrize("rank", RANKS)
def test_the_pass_does_not_spill(rank):
    for backward in (False, True):
        inputs = Inputs(rank, BFLOAT16 if backward else torch.float16, backward)
        launch = inputs.run_pass(deep=True, saved=inputs.side.saved if backward else None, dependents=True)
        assert_no_spill(launch)
        assert count(launch, "mma.sync") and count(launch, "cp.async.cg")


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("rank", (2, 8))
def test_the_persistent_product_does_not_spill(rank, backward):
    inputs, terms = Inputs(rank, backward=backward), persistent.Term
    for tiling in TILINGS:
        for term in terms if rank == 2 else (terms.EPILOGUE, terms.STEP):
            if persistent.fits(tiling, term, rank):
                launch = inputs.run_persistent(tiling, term, dependent=term > 0)
                assert_no_spill(launch)
                assert count(launch, "wgmma.mma_async") and count(launch, "cp.async.bulk.tensor")
                assert 0 <= persistent.shared_bytes(tiling, term, rank) - launch.metadata.shared <= 4 * tiling.columns
    odd = torch.randn(ROWS, inputs.side.k + 1).to(BFLOAT16)[:, 1:]  # rows that begin anywhere
    for term in (terms.EPILOGUE, terms.STEP):
        launch = inputs.run_persistent(RAGGED, term, odd)
        assert_no_spill(launch)
        assert count(launch, "wgmma.mma_async") and not count(launch, "cp.async.bulk.tensor")


@pytest.mark.parametrize("dtype", (BFLOAT16, torch.float16), ids=str)
def test_every_rank_has_a_tiling_for_every_term(dtype):
    for rank in RANKS:
        for term in persistent.Term:
            assert any(persistent.fits(tiling, term, rank) for tiling in TILINGS)
    for rank in (1, 4):
        for term in (persistent.Term.EPILOGUE, persistent.Term.STEP):
            tiling = next(tiling for tiling in TILINGS if persistent.fits(tiling, term, rank))
            assert_no_spill(Inputs(rank, dtype).run_persistent(tiling, term))


@pytest.mark.parametrize("term", (persistent.Term.EPILOGUE, persistent.Term.STEP), ids=("epilogue", "step"))
def test_gains_are_waited_for_behind_a_tile_that_is_loaded_ahead(term):
    """In the main loop the wait comes behind the tile's product and before the first gain; steps are loaded ahead."""
    assert dependent.why_not() is None
    for backward in (False, True):
        inputs = Inputs(2, backward=backward)
        plain, launched_early = (inputs.run_persistent(TILINGS[0], term, dependent=way) for way in (False, True))
        assert launched_early.metadata.launch_pdl and not plain.metadata.launch_pdl
        assert count(launched_early, "cp.async.bulk.tensor") == count(plain, "cp.async.bulk.tensor")
        assert launched_early.metadata.shared == plain.metadata.shared
        text = text_of(launched_early)
        product, wait = text.index("wgmma.mma_async"), text.index("griddepcontrol.wait")
        assert text.index("cp.async.bulk.tensor") < product < wait < text.index("ld.global")


@pytest.mark.parametrize("columns", skinny.COLUMNS)
@pytest.mark.parametrize("rank", RANKS)
def test_the_skinny_product_makes_t_without_a_load_more(rank, columns):
    inputs, terms = Inputs(rank, rows=5), skinny.Term
    bare, inside, given = (inputs.run_skinny(columns, term, dependent=True) for term in terms)
    for launch in (bare, inside, given):
        assert_no_spill(launch)
        assert not count(launch, "ld.global.b16"), "an element at a time"
    for instruction in ("cp.async.cg", "mma.sync"):
        assert count(inside, instruction) == count(bare, instruction) > 0


@pytest.mark.parametrize("columns", skinny.COLUMNS)
def test_the_first_piece_of_the_weight_is_asked_for_before_the_wait(columns):
    inputs, terms = Inputs(2, rows=1), skinny.Term
    inside, given = (text_of(inputs.run_skinny(columns, term, True)) for term in (terms.INSIDE, terms.GIVEN))
    wait = inside.index("griddepcontrol.wait")
    assert inside.index("ld.global.v4") < wait < inside.index("cp.async.cg")
    assert given.index("mma.sync") < given.index("griddepcontrol.wait")
    plain = text_of(inputs.run_skinny(columns, terms.INSIDE))
    assert "griddepcontrol" not in plain


def test_more_than_sixteen_rows_are_refused():
    inputs = Inputs(2, rows=17)
    with pytest.raises(ValueError, match="at most 16 rows, found 17"):
        inputs.run_skinny(32, skinny.Term.INSIDE)


@pytest.mark.parametrize("family", ("persistent", "skinny"))
def test_dependent_launches_are_timed_and_the_pass_before_them_is_launched_plainly(family):
    with simulated_gpu(CUDA_TARGETS[90], execute=False) as gpu:
        rows = 5 if family == "skinny" else 40
        found = figures(family, rows, BFLOAT16, gate=SimpleNamespace(check=lambda side, run, **made: run(0)))
    more = {", dependent", ", passed"} if family == "skinny" else {", dependent"}
    stems = ("skinny 32", "skinny 64") if family == "skinny" else ("persistent", "persistent, step")
    assert found["variants, forward"] >= {stem + way for stem in stems for way in more}
    early = [launch.kernel for launch in gpu.launches if launch.metadata.launch_pdl]
    assert set(early) == {f"{family}_kernel"}
    passes = [launch for launch in gpu.launches if launch.kernel == "coefficients_kernel"]
    assert any(count(launch, "griddepcontrol.launch_dependents") for launch in passes)
