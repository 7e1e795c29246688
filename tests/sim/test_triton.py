"""The Triton kernels without a GPU: compiled for every target, and executed from their PTX for four of them.

The backend runs as it is, from its argument checks to Triton's own JIT; only the driver underneath is a simulation.
"""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton

from tests.cases import CASES, DTYPES, Case, Inputs, assert_within_budget, make_case, run_ops
from tinylora_kernels.method.parts import SPECIALISED_RANKS
from tinylora_kernels.ops.triton import kernels as triton_device
from tinylora_kernels.ops.triton import launch as triton_kernels

from . import checks
from .checks import draws, same_bits
from .ptx import Race, SimulationError, Trap
from .triton_gpu import CUDA_TARGETS, HIP_TARGETS, SimulatedGPU, simulated_gpu

GRID = [case for case in CASES if case.rank in SPECIALISED_RANKS]
FEW = [case for case in GRID if case.rows * case.features in (35, 561, 57344, 58368, 56832, 4800)]
TARGETS = {**CUDA_TARGETS, **HIP_TARGETS}
# One shape for every entry of the launch table that could run out of registers.
COMPILED = [
    Case(2, 64, rank=8, numbers=40, adapters=2),
    Case(2, 1024, rank=4),
    Case(2, 4096, rank=2, numbers=13),
    Case(2, 4096, rank=8, numbers=13, adapters=2),
    Case(2, 8192, rank=4, numbers=13),
    Case(2, 16384, rank=2, numbers=13),
    Case(2, 40000, rank=8),
]


def _ids(value) -> str:
    return str(value).removeprefix("torch.")


# Executed from PTX


def _run(case: Case, dtype: torch.dtype, capability: int) -> None:
    inputs = draws(case, dtype)
    with simulated_gpu(CUDA_TARGETS[capability]) as gpu:
        found = [run_ops(triton_kernels, i) for i in inputs]
    assert_within_budget(found, inputs)
    if case.rows:
        names = [launch.kernel for launch in gpu.launches[:3]]
        assert names == ["rows_kernel", "rows_kernel", "reduce_dv_kernel"]
        assert len(gpu.launches) == 3 * len(inputs)
        _assert_traffic(case, inputs[0], gpu)


def _assert_traffic(case: Case, inputs: Inputs, gpu: SimulatedGPU) -> None:
    """A row that fits a tile is read once and written once, a longer one read twice; aligned rows: whole sectors."""
    forward, backward = (launch.traffic for launch in gpu.launches[:2])
    row = case.features * inputs.y.element_size()
    bare = (inputs.adapter_ids == -1).sum().item() * case.rows // len(inputs.adapter_ids) if case.adapters else 0
    skipped = 0 if case.adds_bias else bare
    reads = 1 if case.features <= triton_kernels.launch_parameters(case.features, case.rank).block else 2
    assert forward.bytes_read("x") == reads * case.rows * row - (reads - 1) * skipped * row
    assert forward.bytes_written("x") == (case.rows - skipped) * row
    assert backward.bytes_read("x") == reads * case.rows * row
    assert backward.bytes_written("y") == case.rows * row
    if case.features % 16 == 0 and case.pad % 16 == 0:
        assert forward.of("x").excess == backward.of("x").excess == backward.of("y").excess == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, dtype):
    _run(case, dtype, 90)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=_ids)
@pytest.mark.parametrize("capability", (80, 100, 120))
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_target(case, capability, dtype):
    _run(case, dtype, capability)


@pytest.mark.parametrize("case", [case for case in FEW if case.rows > 3], ids=str)
def test_around_the_product(case):
    with simulated_gpu(CUDA_TARGETS[90]):
        checks.around(lambda: triton_kernels, cases=(case,))


def test_what_is_not_finite():
    with simulated_gpu(CUDA_TARGETS[90]):
        checks.not_finite(lambda **_: triton_kernels)


def test_a_kept_right_factor_follows_its_weight():
    with simulated_gpu(CUDA_TARGETS[90]):
        checks.kept_right(lambda: triton_kernels)


def test_a_bank_larger_than_the_batch():
    inputs = draws(checks.CASES["large bank"], torch.float32)
    with simulated_gpu(CUDA_TARGETS[90]):
        assert_within_budget([run_ops(triton_kernels, i) for i in inputs], inputs)


def test_several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(triton_kernels, "MAX_PROGRAMS", 3)
    _run(Case(50, 520, numbers=13), torch.bfloat16, 90)
    _run(Case(50, 520, numbers=3, adapters=4), torch.float32, 90)


@pytest.mark.parametrize("adapters", (0, 3))
def test_only_what_is_asked_for(adapters):
    inputs = make_case(Case(9, 40, numbers=3, adapters=adapters), torch.float32)
    shared = inputs.basis, inputs.v, inputs.projection
    with simulated_gpu(CUDA_TARGETS[90]) as gpu:
        whole = run_ops(triton_kernels, inputs)
        g0, nothing = triton_kernels.update_backward(inputs.g, *shared, None, inputs.adapter_ids, True)
        assert same_bits(g0, whole.g0) and nothing.numel() == 0 and len(gpu.launches) == 4
        nothing, dv = triton_kernels.update_backward(inputs.g, *shared, whole.t, inputs.adapter_ids, False)
    assert same_bits(dv, whole.dv) and nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
def test_row_without_adapter_keeps_its_bits(dtype):
    inputs = make_case(Case(8, 72, adapters=2), dtype)
    inputs.adapter_ids[:] = torch.tensor([-1, 0, -1, 1, -1, -1, 0, -1])
    inputs.y[0] = -0.0
    with simulated_gpu(CUDA_TARGETS[90]):
        found = run_ops(triton_kernels, inputs)
    bare = inputs.adapter_ids == -1
    assert same_bits(found.y[bare], inputs.y[bare]) and torch.equal(found.g0[bare], inputs.g[bare])
    assert not torch.equal(found.y[~bare], inputs.y[~bare])


@pytest.mark.parametrize("bad", (-2, 3))
@pytest.mark.parametrize("kind", (torch.int32, torch.int64), ids=_ids)
def test_adapter_id_out_of_range_stops_the_kernel(bad, kind):
    inputs = make_case(Case(8, 72, adapters=3), torch.float32)
    ids = inputs.adapter_ids.to(kind)
    ids[5] = bad
    with simulated_gpu(CUDA_TARGETS[90]), pytest.raises(Trap, match="adapter id outside"):
        triton_kernels.update(inputs.clone_y(), inputs.basis, inputs.v, inputs.projection, None, None, ids)


# Compiled for every target


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=_ids)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spill_on_any_target(target, dtype):
    with simulated_gpu(TARGETS[target], execute=False) as gpu:
        for case in COMPILED:
            run_ops(triton_kernels, make_case(case, dtype))
        for case in COMPILED[:4]:
            checks.run_around(triton_kernels, make_case(case, dtype), checks.around_of(case, dtype, 1100))
    for launch in gpu.launches:
        assert launch.metadata.shared <= 48 * 1024
        used = resources(launch)
        assert used["spilled bytes"] == 0, f"{launch.kernel} {dtype}: {used}"
        assert used["registers"] <= most_registers(launch), f"{launch.kernel} {dtype}: {used}"


def most_registers(launch) -> int:
    """Of a thread, so that a block fits: 65,536 a multiprocessor; of AMD's, 512 (gfx942) and 1,536 (gfx1100) a lane of
    each of four units, over which a block's warps are spread."""
    warps, target = launch.metadata.num_warps, launch.metadata.target
    if target.backend == "cuda":
        return 65536 // (warps * 32)
    return (512 if target.warp_size == 64 else 1536) // max(1, warps // 4)


def resources(launch) -> dict[str, int]:
    """Registers a thread and bytes of local memory, from the assembler's own records."""
    if launch.metadata.target.backend == "hip":
        text = launch.assembly("amdgcn").read_text()
        counts = {name: int(n) for name, n in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)}
        spilled = counts["vgpr_spill_count"] + counts["sgpr_spill_count"] + counts["private_segment_fixed_size"]
        return {"registers": counts["vgpr_count"], "spilled bytes": spilled}
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "-res-usage", launch.assembly("cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": counts["REG"], "spilled bytes": counts["STACK"] + counts["LOCAL"]}


def test_no_atomics():
    with simulated_gpu(CUDA_TARGETS[90], execute=False) as gpu:
        run_ops(triton_kernels, make_case(COMPILED[0], torch.bfloat16))
    for launch in gpu.launches:
        assert not re.search(r"\b(atom|red)\.", launch.assembly("ptx").read_text())


# Mutants

MUTANTS = {  # name: (the case that shows it, what to replace in ops/triton/kernels.py, by what)
    "M and its transpose swapped": ("adapters",
        "tl.sum(t[:, None, :] * mixing, axis=2)", "tl.sum(t[:, :, None] * mixing, axis=1)"),
    "the offset added": ("adapters", "t -= tl.load(offset_ptr", "t += tl.load(offset_ptr"),
    "the bias forgotten": ("bias", "if HAS_BIAS:\n                    x +=", "if False:\n                    x +="),
    "a row without an adapter gets no bias": ("bias of bare rows",
        "if HAS_IDS and IN_PLACE and not HAS_BIAS:", "if HAS_IDS and IN_PLACE:"),
    "loads and stores rows past the last": ("adapters",
        "row_ok = rows < N\n", "row_ok = rows < N + 1\n"),
    "loads columns past the end": ("adapters",
        "row_ok[:, None] & (cols < width)[None, :], other=0.0).to",
        "row_ok[:, None] & (cols <= width)[None, :], other=0.0).to"),
    "skips the last column": ("adapters",
        "tl.store(at, x.to(x_ptr.dtype.element_ty), mask=row_ok[:, None] & (cols < width)",
        "tl.store(at, x.to(x_ptr.dtype.element_ty), mask=row_ok[:, None] & (cols < width - 1)"),
    "reads v past its end": ("tiles",
        "v_row + i[None, :], mask=chosen & (i < u)", "v_row + i[None, :], mask=chosen & (i <= u)"),
    "adds the last row of the factor for every j": ("adapters",
        "_factor_row(factor_ptr, j, cols, width, x.shape[0])\n        x =",
        "_factor_row(factor_ptr, R - 1, cols, width, x.shape[0])\n        x ="),
    "M of the first tile alone": ("tiles", "if tile == first:", "if tile < 0:"),
    "dM of the last tile only": ("tiles", "d_mixing += tl.sum(t[:, :, None]", "d_mixing = tl.sum(t[:, :, None]"),
    "every adapter gets every row": ("adapters",
        "mine = (ids == adapter)[:, None] & (ids >= 0)[:, None]", "mine = (ids >= 0)[:, None]"),
    "rows without an adapter are written": ("adapters",
        "row_ok = row_ok & (ids >= 0)", "row_ok = row_ok & (ids >= -1)"),
    "one id a row though there is one a sequence": ("sequences", "ids_ptr + rows // rows_per_id", "ids_ptr + rows"),
    "an id without an adapter has a gradient": ("large bank",
        "wanted = (adapter >= 0) & (before == 0.0)", "wanted = before == 0.0"),
    "every id sums for itself alone": ("large bank", "mine = (ids == adapter)[:, None]",
        "mine = ((ids == adapter) & (n // rows_per_id == tl.program_id(1)))[:, None]"),
    "the second pass starts over": ("long",
        "y = _add_term(y, gains, write_ptr, at", "y = _add_term(y, gains, write_ptr, cols"),
    "what dx holds is forgotten": ("around", "elif ONTO == 1:", "elif ONTO == 3:"),
    "a NaN spreads over its row": ("not finite", "if tl.sum(lost, axis=0) > 0.0:", "if tl.sum(lost, axis=0) > 9.0:"),
    "a NaN spreads over its long row": ("not finite",
        "finite += _coefficients(_finite(x)", "finite += _coefficients(x"),
    "LoRA-XS transposed": ("LoRA-XS",
        "found = tl.load(projection_ptr + entries) * d_mixing",
        "found = tl.load(projection_ptr + entries % R * R + entries // R) * d_mixing"),
    "a weight that has changed is not noticed": ("kept right", "    if stale:\n", "    if stale and FORCE:\n"),
    "samples outside the weight": ("kept right",
        "tl.minimum(first + (golden >> 26).to(tl.int32), E - 1)", "first + (golden >> 26).to(tl.int32)"),
}  # fmt: skip
MUTANT_CASES = {
    "tiles": Case(150, 23, numbers=13),  # three a program
    "sequences": Case(12, 520, numbers=3, adapters=3, per_sequence=True),
    "adapters": Case(9, 40, numbers=4, adapters=3),
    "bias": Case(9, 40, numbers=4, bias=False, adds_bias=True),
    "bias of bare rows": Case(9, 40, numbers=4, adapters=2, bias=False, adds_bias=True),
    "large bank": checks.CASES["large bank"],
    "LoRA-XS": Case(9, 40, lora_xs=True, numbers=4),
    "long": Case(2, 16400),
}
MUTANT_CHECKS = {
    "around": lambda: checks.around(
        lambda: triton_kernels, dtypes=(torch.float32,), cases=(Case(9, 40, numbers=4, adapters=3),)
    ),
    "not finite": lambda: checks.not_finite(lambda **_: triton_kernels, dtypes=(torch.float32,)),
    "kept right": lambda: checks.kept_right(lambda: triton_kernels, dtypes=(torch.float32,)),
}


def _run_mutant_case(name: str) -> None:
    if name in MUTANT_CHECKS:
        with simulated_gpu(CUDA_TARGETS[90]):
            MUTANT_CHECKS[name]()
        return
    case = MUTANT_CASES[name]
    inputs = draws(case, torch.float32)
    bare = torch.zeros(case.rows, dtype=torch.bool)
    if case.adapters:
        inputs[0].adapter_ids[-1] = -1
        bare = inputs[0].adapter_ids.repeat_interleave(case.rows // len(inputs[0].adapter_ids)) == -1
    inputs[0].y[bare] = -0.0  # adding nothing to it would still make it 0.0
    with simulated_gpu(CUDA_TARGETS[90]), mock.patch.object(triton_kernels, "MAX_PROGRAMS", 2):
        found = [run_ops(triton_kernels, i) for i in inputs]
    assert_within_budget(found, inputs)
    if not case.adds_bias:
        assert same_bits(found[0].y[bare], inputs[0].y[bare])


@pytest.mark.parametrize("case", [*MUTANT_CASES, *MUTANT_CHECKS])
def test_mutant_cases_pass_unchanged(case):
    _run_mutant_case(case)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, tmp_path, monkeypatch):
    case, old, new = MUTANTS[name]
    text = Path(triton_device.__file__).read_text()
    assert text.count(old) == 1
    path = tmp_path / "mutated_device.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated_device", path)
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    monkeypatch.setattr(triton_kernels, "_device_code", lambda: mutated)
    with pytest.raises((SimulationError, AssertionError)):
        _run_mutant_case(case)


def test_implicit_fma_makes_lanes_disagree(monkeypatch):
    """Why the backend compiles with enable_fp_fusion=False: lanes write different sums to one shared location."""
    options = triton_kernels._options
    monkeypatch.setattr(triton_kernels, "_options", lambda *args: {**options(*args), "enable_fp_fusion": True})
    with simulated_gpu(CUDA_TARGETS[90]), pytest.raises(Race, match="writes another value"):
        run_ops(triton_kernels, make_case(Case(5, 7, numbers=13), torch.float32))


# Errors, before any launch


def _operands(**changes):
    inputs = make_case(Case(6, 32, numbers=3), torch.float32)
    given = {name: getattr(inputs, name) for name in ("y", "basis", "v", "projection", "offset", "bias", "adapter_ids")}
    return {**given, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(y=torch.zeros(6, 32, dtype=torch.float64)), "float64|basis: expected"),
        (dict(basis=torch.zeros(3, 32), projection=torch.zeros(3, 3, 3), offset=None), "rank 1, 2, 4 and 8, not 3"),
        (dict(v=torch.zeros(0), projection=torch.zeros(0, 2, 2)), "v: expected"),
        (dict(y=torch.zeros(32, 6).T), "last stride 1"),
        (dict(y=torch.zeros(4, 3, 64).transpose(0, 1)[..., :32]), "one row stride"),
        (dict(y=torch.zeros(32).expand(6, 32)), "rows overlap"),
        (dict(basis=torch.zeros(32, 2).T), "contiguous"),
    ],
    ids=("float64", "rank", "no numbers", "stride", "rows", "overlap", "basis"),
)
def test_bad_input_is_refused_before_any_launch(changes, message):
    with simulated_gpu(CUDA_TARGETS[90]) as gpu:
        with pytest.raises((ValueError, RuntimeError), match=message):
            triton_kernels.update(**_operands(**changes))
    assert not gpu.launches


def test_cpu_tensors_are_refused():
    assert "move the tensors to a GPU" in triton_kernels.why_not("cpu", torch.float32, 2)
    with pytest.raises(RuntimeError, match="y: triton kernels run on GPU tensors, not on 'cpu'"):
        triton_kernels.update(**_operands())


def test_missing_triton_is_a_reason_and_not_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # what import then does is raise ImportError
    monkeypatch.setattr(triton_kernels, "_import_problem", triton_kernels._import_problem.__wrapped__)  # ask again
    assert "pip install triton" in triton_kernels.why_not("cuda", torch.float32, 2)
