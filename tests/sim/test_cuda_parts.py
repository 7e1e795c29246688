"""update_parts of the CUDA backend without a GPU: nvcc's PTX in the interpreter, the sources on the host emulator, and
csrc/cuda/ops.cpp behind torch's dispatcher.
"""
import dataclasses

import pytest
import torch

from tests.cases import DTYPES, error, run_ops
from tests.part_cases import PART_CASES, PartCase, check_parts, drawn, make_part_case, one_by_one, run_parts
from tinylora_kernels.method.parts import SPECIALISED_RANKS
from tinylora_kernels.ops import reference

from .checks import LARGE, same_bits
from .compilers import COMPILERS, CUDA, needs_compiler
from .cuda_gpu import SimulatedCuda
from .host import emulator
from .host.emulator import Emulated, Fault
from .mutants import PART_MUTANTS, Mutant, edited_copy
from .ptx import SimulationError

needs_emulator = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))
# Tiles of every shape, parts of different numbers of warps, blocks of several tiles and blocks with warps left over.
CASES = {
    "parts": PartCase(40, (40, 24, 16), (0, 1, 0), numbers=4),
    "one wide": PartCase(23, (1400, 72, 600), (1, 0, 1), numbers=3, bias=False, adds_bias=True),
    "medium": PartCase(9, (5000, 512), (0, 1), numbers=3),
    "long": PartCase(5, (8200, 640), (0, 0), numbers=2),
    "scalar": PartCase(21, (40, 33, 12), (0, 1, 0), numbers=3, pad=1),
    "first unaligned": PartCase(9, (6, 34, 24), (0, 1, 0), numbers=3),
    "wide with adapters": PartCase(30, (2600, 40), (0, 1), numbers=2, adapters=2),
    "stream": PartCase(3, (33000, 40), (0, 1)),
    "shard": PartCase(19, (48, 24), (0, 1), numbers=3, inputs=72, bias=False, adds_bias=True),
    "odd shard": PartCase(9, (40, 24), (0, 1), numbers=3, inputs=50),
    "adapters": PartCase(50, (64, 24, 40), (0, 1, 0), numbers=4, adapters=3),
    "sequences": PartCase(24, (40, 24), (0, 1), numbers=3, adapters=3, per_sequence=True),
    "large bank": PartCase(20, (48, 16), (1, 0), numbers=2, adapters=64),
    "shard of a bank": PartCase(18, (64, 32), (0, 1), numbers=3, adapters=4, inputs=88, bias=False),
    "LoRA-XS": PartCase(12, (48, 16), (1, 0), lora_xs=True, numbers=4),
    "one vector": PartCase(30, (24, 16, 8, 40), (0, 0, 0, 0), numbers=13),
}  # fmt: skip
EVERYWHERE = [case for case in PART_CASES if case.rank in SPECIALISED_RANKS]


def run_everything(make, case: PartCase) -> None:
    """Results, and the same bits in any order, in a graph and on another card; only what is asked for."""
    inputs = drawn(case, torch.bfloat16)
    check_parts([run_parts(make(), one) for one in inputs], inputs, case)
    first = run_parts(make(), inputs[0])
    for way in ({"order": "reverse"}, {"capturing": True}):
        other = run_parts(make(**way), inputs[0])
        assert all(same_bits(getattr(first, name), getattr(other, name)) for name in vars(first)), way
    large = run_parts(make(card=LARGE), inputs[0])
    assert same_bits(large.y, first.y) and same_bits(large.g0, first.g0) and same_bits(large.t, first.t)
    assert error(large.dv, first.dv) < 1e-5
    backend, one = make(), inputs[0]
    if one.adapter_ids is not None:
        narrow = dataclasses.replace(one, adapter_ids=one.adapter_ids.int())
        assert same_bits(run_parts(backend, narrow).y, first.y)
    g0, nothing = backend.update_parts_backward(*one.backward(None))
    assert same_bits(g0, first.g0) and nothing.numel() == 0
    nothing, dv = backend.update_parts_backward(*one.backward(first.t, need_input_grad=False))
    assert error(dv, first.dv) < 1e-5 and nothing.numel() == 0


def bare_and_infinite(make) -> None:
    """Rows without an adapter keep every bit; what is not finite stays in its element, and spreads in a gradient."""
    one = make_part_case(PartCase(20, (40, 24), (0, 1), numbers=3, adapters=3), torch.bfloat16)
    one.adapter_ids[::3] = -1
    for rows in (one.y, one.g):
        rows[0] = -0.0
        rows[3].view(torch.int16)[:] = 0x7FA5  # a NaN with a payload
    found, bare = run_parts(make(), one), one.adapter_ids < 0
    assert same_bits(found.y[bare], one.y[bare]) and same_bits(found.g0[bare], one.g[bare])
    one = make_part_case(PartCase(9, (40, 24), (0, 1), numbers=3), torch.bfloat16)
    clean = run_parts(make(), one)
    one.y[2, 5], one.y[4, 50] = torch.inf, torch.nan
    found = run_parts(make(), one)
    assert (~found.y.isfinite()).nonzero().tolist() == [[2, 5], [4, 50]]
    rest = [row for row in range(9) if row not in (2, 4)]
    assert same_bits(found.y[rest], clean.y[rest]) and error(found.t, run_parts(reference, one).t) < 1e-5
    one = make_part_case(PartCase(8, (40, 24), (0, 1), numbers=3, adapters=2), torch.bfloat16)
    one.adapter_ids[5] = 2
    with pytest.raises(Exception, match="trap"):
        run_parts(make(), one)


def run_case(case: str, make) -> None:
    bare_and_infinite(make) if case == "bare" else run_everything(make, CASES[case])


def look_for(mutant: Mutant, make) -> None:
    """The case that has to show this mutant: raises on a finding."""
    run_case(mutant.case, make)


@needs_compiler
@pytest.mark.parametrize("case", [*CASES, "bare"])
def test_checks_on_the_interpreter(case):
    run_case(case, lambda **options: SimulatedCuda(90, **options))


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_grid(case, dtype, compiler):
    inputs, gpu = drawn(case, dtype), SimulatedCuda(90, compiler=compiler)
    check_parts([run_parts(gpu, one) for one in inputs], inputs, case)
    if case.rows:  # one launch each way, and one more for the sums of a bank
        assert len(gpu.launches) == (3 if case.adapters else 2) * len(inputs)


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("capability", (75, 80, 100, 120))
@pytest.mark.parametrize("case", [EVERYWHERE[i] for i in (2, 5, 6, 8)], ids=str)
def test_every_target(case, capability, compiler):
    inputs, gpu = drawn(case, torch.bfloat16), SimulatedCuda(capability, compiler=compiler)
    check_parts([run_parts(gpu, one) for one in inputs], inputs, case)


@needs_compiler
def test_a_part_has_the_bits_of_an_update_of_its_own():
    """Where its own update would be of the same tile: q, k and v of any model."""
    one, gpu = make_part_case(CASES["one wide"], torch.bfloat16), SimulatedCuda(90)
    found, alone = run_parts(gpu, one), one_by_one(lambda part: run_ops(gpu, part), one)
    assert same_bits(found.y, alone.y) and same_bits(found.t, alone.t) and same_bits(found.g0, alone.g0)


@needs_compiler
def test_a_row_is_read_once_and_written_once():
    one = make_part_case(PartCase(16, (512, 128, 128), (0, 1, 2)), torch.bfloat16)
    gpu = SimulatedCuda(90)
    run_parts(gpu, one)
    forward, backward = (launch.traffic for launch in gpu.launches)
    assert forward.bytes_read("y") == forward.bytes_written("y") == one.y.nbytes
    assert backward.bytes_read("g") == backward.bytes_written("g0") == one.g.nbytes
    assert forward.of("y").excess == backward.of("g").excess == backward.of("g0").excess == 1.0


@needs_compiler
@pytest.mark.parametrize("rows", (1, 60, 4000))
def test_blocks_are_shared_out_by_what_the_parts_move(rows):
    """q's blocks beside k's and v's; all of them run at once, none is without rows."""
    gpu = SimulatedCuda(90, card=(8, 2))
    one = make_part_case(PartCase(rows, (896, 128, 128), (0, 0, 0)), torch.bfloat16)
    gpu.update_parts(one.clone_y(), *one.forward())
    (launch,) = gpu.launches
    assert 3 <= launch.grid[0] <= max(8 * 2, 3) and launch.block == (128, 1, 1)
    assert rows < 60 or launch.grid[0] >= 14


@needs_emulator
@pytest.mark.parametrize("mode", ("plain", "asan", "race"))
@pytest.mark.parametrize("case", [*CASES, "bare"])
def test_checks_on_the_emulator(mode, case):
    executable = emulator.build(mode, ranks=(2,), dtypes=(torch.bfloat16,))
    run_case(case, lambda **options: Emulated(executable, **options))


@needs_compiler
@pytest.mark.parametrize("mutant", [mutant for mutant in PART_MUTANTS if mutant.one_order], ids=lambda m: m.name)
def test_every_mutant_is_caught(tmp_path, mutant):
    sources = edited_copy(CUDA, tmp_path, (mutant.edit,))
    with pytest.raises((SimulationError, AssertionError, pytest.fail.Exception)):
        look_for(mutant, lambda **options: SimulatedCuda(90, sources=sources, **options))


@needs_emulator
@pytest.mark.parametrize("mutant", PART_MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught_on_the_emulator(tmp_path, mutant):
    sources = edited_copy(emulator.KERNELS, tmp_path, (mutant.edit,))
    mode = {"races": "race", "bounds": "asan"}.get(mutant.check, "plain")
    executable = emulator.build(mode, kernels=sources, ranks=(2,), dtypes=(torch.bfloat16,))
    with pytest.raises((Fault, AssertionError, pytest.fail.Exception)):
        look_for(mutant, lambda **options: Emulated(executable, **options))
