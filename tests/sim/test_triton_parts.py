"""The Triton kernels of update_parts without a GPU, as tests/sim/test_triton.py does those of update."""
import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.cases import DTYPES, error
from tests.part_cases import PART_CASES, PartCase, assert_parts_within_budget, make_part_case, run_parts
from tinylora_kernels.method.parts import SPECIALISED_RANKS
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.triton import launch as triton_kernels
from tinylora_kernels.ops.triton import part_kernels

from .checks import same_bits
from .ptx import SimulationError
from .test_triton import most_registers, resources
from .triton_gpu import CUDA_TARGETS, HIP_TARGETS, simulated_gpu

GRID = [case for case in PART_CASES if case.rank in SPECIALISED_RANKS and not case.inputs]
SHARDS = [case for case in PART_CASES if case.rank in SPECIALISED_RANKS and case.inputs]
FEW = [GRID[i] for i in (2, 5, 6, 8)] + SHARDS[1:]
TARGETS = {**CUDA_TARGETS, **HIP_TARGETS}
# Every entry of the launch table that could run out of registers.
COMPILED = [
    PartCase(2, (64, 32), (0, 1), rank=8, numbers=40, adapters=2),
    PartCase(2, (1024, 128, 128), (0, 0, 0), rank=4),
    PartCase(2, (4096, 1024, 1024), (0, 1, 2), numbers=13, adapters=2),
    PartCase(2, (4096, 512), (0, 0), rank=8, numbers=13),
    PartCase(2, (8192, 8192), (0, 1), numbers=13),
    PartCase(2, (18944, 18944), (0, 0), numbers=13, adapters=2),
    PartCase(2, (4096, 1024), (0, 1), numbers=13, inputs=4096),
]


def _run(case: PartCase, dtype: torch.dtype, capability: int = 90) -> None:
    draws = [make_part_case(case, dtype, draw) for draw in range(3)]
    with simulated_gpu(CUDA_TARGETS[capability]) as gpu:
        found = [run_parts(triton_kernels, inputs) for inputs in draws]
    if case.inputs:
        for inputs, ours in zip(draws, found, strict=True):
            truth = run_parts(reference, inputs)
            assert error(ours.t, truth.t) < 2e-6 and error(ours.y, truth.y) < 2 * torch.finfo(dtype).eps
    else:
        assert_parts_within_budget(found, draws)
    if case.rows:
        names = [launch.kernel for launch in gpu.launches[:3]]
        assert names == ["update_parts_kernel", "update_parts_backward_kernel", "reduce_dv_parts_kernel"]
        assert len(gpu.launches) == 3 * len(draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRID + SHARDS, ids=str)
def test_grid(case, dtype):
    _run(case, dtype)


@pytest.mark.parametrize("capability", (80, 100, 120))
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_target(case, capability):
    _run(case, torch.bfloat16, capability)


def test_several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(triton_kernels, "MAX_PROGRAMS", 3)
    _run(PartCase(50, (300, 220), (0, 1), numbers=13), torch.bfloat16)
    _run(PartCase(50, (300, 220), (0, 0), numbers=3, adapters=4), torch.float32)


def test_a_row_is_read_once_and_written_once():
    case = PartCase(16, (512, 128, 128), (0, 1, 2), numbers=13, adapters=3)
    inputs = make_part_case(case, torch.bfloat16)
    inputs.adapter_ids.clamp_(min=0)
    with simulated_gpu(CUDA_TARGETS[90]) as gpu:
        run_parts(triton_kernels, inputs)
    forward, backward = (launch.traffic for launch in gpu.launches[:2])
    assert forward.bytes_read("y") == forward.bytes_written("y") == inputs.y.nbytes
    assert backward.bytes_read("g") == backward.bytes_written("g0") == inputs.g.nbytes
    assert forward.of("y").excess == backward.of("g").excess == backward.of("g0").excess == 1.0


@pytest.mark.parametrize("adapters", (0, 3))
def test_only_what_is_asked_for(adapters):
    inputs = make_part_case(PartCase(9, (40, 24), (0, 1), numbers=3, adapters=adapters), torch.float32)
    with simulated_gpu(CUDA_TARGETS[90]) as gpu:
        whole = run_parts(triton_kernels, inputs)
        g0, nothing = triton_kernels.update_parts_backward(*inputs.backward(None))
        assert same_bits(g0, whole.g0) and nothing.numel() == 0 and len(gpu.launches) == 4
        nothing, dv = triton_kernels.update_parts_backward(*inputs.backward(whole.t, need_input_grad=False))
    assert same_bits(dv, whole.dv) and nothing.numel() == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spill_on_any_target(target, dtype):
    with simulated_gpu(TARGETS[target], execute=False) as gpu:
        for case in COMPILED:
            run_parts(triton_kernels, make_part_case(case, dtype))
    for launch in gpu.launches:
        assert launch.metadata.shared <= 48 * 1024
        used = resources(launch)
        assert used["spilled bytes"] == 0, f"{launch.kernel} {dtype}: {used}"
        assert used["registers"] <= most_registers(launch), f"{launch.kernel} {dtype}: {used}"


MUTANTS = {  # name: (the case that shows it, what to replace in part_kernels.py, by what)
    "every part the last": ("parts", "tl.where(tl.program_id(1) == p, numbers[p], chosen)", "numbers[p]"),
    "every part the first": ("parts", "tl.program_id(1) == p,", "tl.program_id(1) == p + 7,"),
    "the vectors of group 0": ("parts",
        "    v_ptr += group.to(tl.int64) * num_adapters * u\n    projection_ptr += part * "
        "(R * R if LORA_XS else u * R * R)\n    t_ptr",
        "    projection_ptr += part * (R * R if LORA_XS else u * R * R)\n    t_ptr"),
    "P' of the first part": ("parts", "    projection_ptr += part * (R * R if LORA_XS else u * R * R)\n    t_ptr",
        "    t_ptr"),
    "t of all parts in one place": ("parts", "    t_ptr += part.to(tl.int64) * N * R\n", ""),
    "the offset of the first part": ("parts", "offset_ptr + part * R + rank", "offset_ptr + rank"),
    "the basis of the first columns": ("parts", "t = _coefficients(_finite(y), basis_ptr, begin + block, D, R)",
        "t = _coefficients(_finite(y), basis_ptr, block, D, R)"),
    "infinity in t": ("infinite", "t = _coefficients(_finite(y), basis_ptr, begin",
        "t = _coefficients(y, basis_ptr, begin"),
    "the bias of the first columns": ("bias", "bias_ptr + begin + block", "bias_ptr + block"),
    "no bias without an adapter": ("bias", "if not HAS_BIAS:\n                row_ok",
        "if True:\n                row_ok"),
    "writes into the next part": ("parts",
        "_store_rows(y_ptr, y_stride, rows, row_ok, begin + block, end, y)",
        "_store_rows(y_ptr, y_stride, rows, row_ok, begin + block, end + 1, y)"),
    "a long part starts over": ("long", "y = _add_term(y, s, basis_ptr, start + block",
        "y = _add_term(y, s, basis_ptr, begin + block"),
    "right of the first part": ("shard", "right_ptr + part * R * E", "right_ptr"),
    "rows without an adapter are written": ("adapters", "row_ok = row_ok & (ids >= 0)",
        "row_ok = row_ok & (ids >= -1)"),
    "g0 without M": ("parts", "s = tl.sum(a[:, :, None] * mixing, axis=1)",
        "s = tl.sum(a[:, None, :] * mixing, axis=2)"),
    "dM of one place": ("parts", "(part * tl.num_programs(0) + tl.program_id(0)) * R * R",
        "tl.program_id(0) * R * R"),
    "a of one place": ("adapters", "rank_at = (part.to(tl.int64) * N + rows)",
        "rank_at = (0 * part.to(tl.int64) + rows)"),
    "every group gets every part": ("parts", "if groups[part] == tl.program_id(2):", "if groups[part] >= 0:"),
    "dv of the last part alone": ("parts", "                dv += tl.sum(tl.load(projection_ptr + own",
        "                dv = tl.sum(tl.load(projection_ptr + own"),
    "dv of LoRA-XS by the first part": ("LoRA-XS", "projection_ptr + part * RR + entries",
        "projection_ptr + entries"),
    "dv of group 0 alone": ("parts", "dv_ptr += (tl.program_id(2).to(tl.int64) * num_adapters + adapter) * u",
        "dv_ptr += adapter.to(tl.int64) * u"),
}  # fmt: skip
MUTANT_CASES = {
    "parts": PartCase(9, (40, 24, 17), (0, 1, 0), numbers=4),
    "adapters": PartCase(9, (40, 24), (0, 1), numbers=4, adapters=3),
    "bias": PartCase(9, (40, 24), (0, 1), numbers=4, adapters=3, bias=False, adds_bias=True),
    "infinite": PartCase(9, (40, 24), (0, 1), numbers=4),
    "LoRA-XS": PartCase(9, (40, 24), (0, 0), lora_xs=True, numbers=4),
    "long": PartCase(2, (16400, 8), (0, 1)),
    "shard": PartCase(9, (40, 24), (0, 1), numbers=3, inputs=70),
}


def _run_mutant_case(name: str) -> None:
    case = MUTANT_CASES[name]
    inputs = [make_part_case(case, torch.float32, draw) for draw in range(2)]
    bare = torch.zeros(case.rows, dtype=torch.bool)
    if case.adapters:
        inputs[0].adapter_ids[-1] = -1
    if case.adapters and not case.adds_bias:
        bare = inputs[0].adapter_ids == -1
    if name == "infinite":
        inputs[0].y[3, 50] = torch.inf
    inputs[0].y[bare] = -0.0  # adding nothing to it would still make it 0.0
    with simulated_gpu(CUDA_TARGETS[90]), mock.patch.object(triton_kernels, "MAX_PROGRAMS", 2):
        found = [run_parts(triton_kernels, i) for i in inputs]
    if name == "infinite":
        assert (~torch.isfinite(found[0].y)).nonzero().tolist() == [[3, 50]]
    elif case.inputs:
        assert all(error(f.y, run_parts(reference, i).y) < 1e-6 for f, i in zip(found, inputs, strict=True))
    else:
        for part in inputs[0].parts:
            part.y[bare] = -0.0
        assert_parts_within_budget(found, inputs)
    assert same_bits(found[0].y[bare], inputs[0].y[bare])


@pytest.mark.parametrize("case", MUTANT_CASES)
def test_mutant_cases_pass_unchanged(case):
    _run_mutant_case(case)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, tmp_path, monkeypatch):
    case, old, new = MUTANTS[name]
    text = Path(part_kernels.__file__).read_text().replace("from .kernels", "from tinylora_kernels.ops.triton.kernels")
    assert text.count(old) == 1
    path = tmp_path / "mutated_part_kernels.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated_part_kernels", path)
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    monkeypatch.setattr(triton_kernels, "_part_code", lambda: mutated)
    with pytest.raises((SimulationError, AssertionError)):
        _run_mutant_case(case)
