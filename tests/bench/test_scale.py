"""The formulae of bench/scale.py against what small models really hold, send and compute."""
import csv
import importlib.util
import pathlib
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora
from tinylora_kernels.distributed import deal
from tinylora_kernels.factors import subspace

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("scale", ROOT / "bench" / "scale.py")
scale = sys.modules["scale"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank, numbers", [(2, 1), (4, 13)])
def test_factor_bytes_are_those_of_the_buffers(rank, numbers, bias):
    config = TinyLoRAConfig(frozen_rank=rank, trainable_dim=numbers, target_modules=TARGETS, cache=False)
    model = apply_tiny_lora(tiny_decoder(bias=bias), config)
    for layer in adapted_layers(model).values():
        counted = sum(buffer.nbytes for buffer in layer.buffers(recurse=False))
        assert counted == scale.layer_factor_bytes(layer.out_features, rank, numbers)


def test_tensor_parallel_bytes_are_those_that_were_counted():
    """Against the collectives of the layouts that were run: two blocks of seven, 64 tokens, r = 2, u = 3."""
    blocks = [scale.Matrix(24, 24, 6, 6), scale.Matrix(40, 24, 4, 4), scale.Matrix(24, 24, 2, 2, column=False),
              scale.Matrix(24, 40, 2, 2, column=False)]  # fmt: skip
    expected = scale.tensor_parallel_bytes(blocks, 64, rank=2, numbers=3)
    with open(ROOT / "bench" / "results" / "layouts.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "bfloat16"]
    tensor_parallel = [row for row in rows if row["layout"].startswith("tensor parallel, adapted")]
    assert len(tensor_parallel) == 4
    for row in tensor_parallel:
        # forward a pair of shards ends in one all-reduce; backward each of the columns sends its own dx, all but
        # the embedding's side of the first block, which is frozen
        frozen = (4 + 7) * 64 * 2 * 24
        assert row["collectives"] == f"{11 + 24} all_reduce, {frozen + expected['adapter']} B"


def test_operations_of_the_solver_are_those_that_torch_counts():
    weight, rows = torch.randn(96, 128), torch.randn(8, 128, dtype=torch.float64)
    space = subspace.Space(weight, 8, 1.0, subspace.serial)
    left, image = torch.empty(8, 96, dtype=torch.float64), torch.empty(8, 128, dtype=torch.float64)

    def of_addmm(total, a, b, **_):  # shapes; torch knows the out-of-place one alone
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: of_addmm}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        subspace.multiply(space, rows, torch.float64, left, image)  # by torch; in fp32 a kernel does the same
    assert counter.get_total_flops() == scale.operations((96, 128), 8)


def test_a_measured_matrix_predicts_another_within_a_factor_of_three():
    """In CPU seconds on one thread; four times the entries, another shape."""
    small, large = scale.measure([(512, 512), (1024, 1024)])
    predicted = scale.Solver.of(small).cpu_seconds((1024, 1024))
    assert 1 / 3 < predicted / float(large["cpu_s"]) < 3


def test_measured_matrices_predict_each_other_within_a_factor_of_two():
    with open(scale.MEASURED, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    largest = scale.Solver.of(rows[-1])
    for row in rows[1:]:
        assert 0.5 < largest.cpu_seconds((int(row["out"]), int(row["in"]))) / float(row["cpu_s"]) < 2


def test_parameters_add_up_and_shares_are_even():
    for model, billions in zip(scale.MODELS, (6.5, 68.5, 1039), strict=True):
        entries = sum(m.entries * m.count for m in model.matrices())
        assert entries / 1e9 == pytest.approx(billions, rel=0.01)
        assert scale.largest_share(model, 8) == pytest.approx(entries / 8, rel=0.01)
    assert deal({"a": 5, "b": 4, "c": 3, "d": 2}, 2) == [["a", "d"], ["b", "c"]]


def test_the_page_shows_what_the_formulae_give():
    assert scale.tables() in (ROOT / "docs" / "scale.md").read_text()
