"""The CUDA kernels, executed from nvcc's PTX: results against float64, every finding of the interpreter, and exact traffic.

The launchers of csrc/cuda choose kernel, grid and block, so what runs here is what a GPU would be given.
"""
import pytest
import torch

from tests.cases import CASES, DTYPES, Case, Inputs, assert_within_budget, make_case, run_ops

from .cuda_gpu import SimulatedCuda
from .nvcc import needs_nvcc
from .ptx import Trap

CAPABILITIES = (80, 90, 100, 120)
GRID = [case for case in CASES if case.rank in (1, 2, 4, 8)] + [
    Case(7, 2056, rank=4, numbers=3),  # several vectors a thread, not all of them in use
    Case(5, 16384, rank=8, numbers=2),
    Case(2, 33000, rank=1, numbers=2),  # read twice
    Case(3, 17001, rank=4, numbers=1, pad=3),  # read twice, one element at a time
    Case(1, 152064, rank=2, numbers=13),  # the head of a large vocabulary
    Case(5000, 8, rank=2, numbers=3),  # dv in two chunks of rows
]
EVERYWHERE = [case for case in GRID if case.rows * case.features in (35, 561, 576, 26208, 58368, 80002, 4096, 4800, 650)]
pytestmark = needs_nvcc


def _simulated(capability: int, **options) -> SimulatedCuda:
    return SimulatedCuda(capability, CAPABILITIES, **options)


def _ids(value) -> str:
    return str(value).removeprefix("torch.")


def _run(case: Case, dtype: torch.dtype, capability: int) -> None:
    inputs = make_case(case, dtype)
    gpu = _simulated(capability)
    assert_within_budget(run_ops(gpu, inputs), inputs)
    if case.rows:
        assert len(gpu.launches) == 3  # one forward, two backward
        _assert_traffic(case, inputs, *(launch.traffic for launch in gpu.launches[:2]))


def _assert_traffic(case: Case, inputs: Inputs, forward, backward) -> None:
    """A row is read once and written once; beyond what registers hold, read twice. Aligned rows need no extra sector."""
    itemsize = inputs.y.element_size()
    row = case.features * itemsize
    packets = row % 16 == 0 and (case.rows == 1 or (case.features + case.pad) * itemsize % 16 == 0)
    reads = 1 if case.features <= (32768 if packets else 16384) else 2
    for traffic, source, target in ((forward, "y", "y"), (backward, "g", "g0")):
        assert traffic.bytes_read(source) == reads * case.rows * row
        assert traffic.bytes_written(target) == case.rows * row
    if row % 32 == 0 and not case.pad:
        assert forward.of("y").excess == backward.of("g").excess == backward.of("g0").excess == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, dtype):
    _run(case, dtype, 90)


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("capability", (80, 100, 120))
@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_every_target(case, capability, dtype):
    _run(case, dtype, capability)


def test_several_tiles_a_block():
    _run(Case(33000, 8, rank=1, numbers=2), torch.bfloat16, 90)


@pytest.mark.parametrize("adapters", (0, 3))
def test_only_what_is_asked_for(adapters):
    inputs = make_case(Case(9, 40, numbers=3, adapters=adapters), torch.float32)
    gpu = _simulated(90)
    whole = run_ops(gpu, inputs)
    shared = inputs.basis, inputs.v, inputs.projection
    before = len(gpu.launches)
    g0, nothing = gpu.update_backward(inputs.g, *shared, None, inputs.adapter_ids, True)
    assert torch.equal(g0, whole.g0) and nothing.numel() == 0 and len(gpu.launches) == before + 1
    nothing, dv = gpu.update_backward(inputs.g, *shared, whole.t, inputs.adapter_ids, False)
    assert torch.equal(dv, whole.dv) and nothing.numel() == 0


@pytest.mark.parametrize("adapters", (0, 2))
def test_dv_does_not_depend_on_the_order_of_blocks(adapters):
    inputs = make_case(Case(9000, 8, rank=2, numbers=5, adapters=adapters), torch.float32)
    one, other = (run_ops(_simulated(90, reverse=reverse), inputs) for reverse in (False, True))
    assert torch.equal(one.dv, other.dv)


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
def test_row_without_adapter_keeps_its_bits(dtype):
    inputs = make_case(Case(8, 72, adapters=2), dtype)
    inputs.adapter_ids[:] = torch.tensor([-1, 0, -1, 1, -1, -1, 0, -1])
    inputs.y[0], inputs.g[0] = -0.0, -0.0
    found = run_ops(_simulated(90), inputs)
    bare = inputs.adapter_ids == -1
    for result, source in ((found.y, inputs.y), (found.g0, inputs.g)):
        same = (result.view(torch.uint8) == source.contiguous().view(torch.uint8)).all(dim=1)
        assert same.tolist() == bare.tolist()


@pytest.mark.parametrize("bad", (-2, 3))
@pytest.mark.parametrize("kind", (torch.int32, torch.int64), ids=_ids)
def test_adapter_id_out_of_range_traps(bad, kind):
    inputs = make_case(Case(8, 72, adapters=3), torch.float32)
    ids = inputs.adapter_ids.to(kind)
    ids[5] = bad
    with pytest.raises(Trap):
        _simulated(90).update(inputs.clone_y(), inputs.basis, inputs.v, inputs.projection, None, ids)
