"""Data parallel, FSDP2 and tensor parallel, two and four processes: the numbers of one process."""
import numpy as np
import pytest
import torch

from tests.distributed import checks, layouts
from tests.distributed.processes import run
from tinylora_kernels import load_adapter
from tinylora_kernels.factors.svd import truncated_svd

# Layouts whose 100 steps of Adam run here; the others' are in bench/results/layouts.csv.
TRAINED = {
    2: ["DDP", "FSDP2, adapted before", "tensor parallel, adapted after"],
    4: ["DDP", "FSDP2, adapted before"],
}


@pytest.fixture(scope="module", params=[2, 4])
def measured(request):
    return run(request.param, layouts.measure_all, [torch.float64, torch.bfloat16], TRAINED[request.param])[0]


def test_outputs_and_gradients_are_those_of_one_process(measured):
    for deviation in measured[0]:
        if deviation.dtype == "float64":
            assert deviation.output < 1e-14 and deviation.gradient < 1e-14, deviation
        else:  # no further from one process than rounding puts either of the two from the truth
            assert deviation.output <= 2 * deviation.own_output, deviation
            assert deviation.gradient <= 2 * deviation.own_gradient, deviation


def with_a_number_each(found) -> int:
    """Bytes of v, three numbers a group, and what says whether a group's was used."""
    return found.vector_bytes * 4 // 3


def test_data_parallelism_costs_one_all_reduce_of_v(measured):
    deviations = {(d.layout, d.dtype): d for d in measured[0]}
    for name in ("DDP", "replicate_adapter alone"):
        for dtype in ("float64", "bfloat16"):
            found = deviations[name, dtype]
            expected = found.vector_bytes if name == "DDP" else with_a_number_each(found)
            assert found.collectives == f"1 allreduce, {expected} B", found


def test_sharded_data_parallelism_adds_one_all_reduce_of_v_and_gathers_weights_alone(measured):
    """Two blocks gathered forward and backward and the root once, half the bytes a number in bf16: no fp32 factor."""
    deviations = {(d.layout, d.dtype): d for d in measured[0]}
    for name in ("FSDP2, adapted before", "FSDP2, adapted after"):
        gathered = {}
        for dtype in ("float64", "bfloat16"):
            found = deviations[name, dtype]
            gather, reduce = found.collectives.split("; ")
            assert reduce == f"1 allreduce, {with_a_number_each(found)} B", found
            gathered[dtype] = int(gather.split()[2])
        assert gathered["float64"] == 4 * gathered["bfloat16"]


def test_tensor_parallelism_adds_r_numbers_a_token_for_columns_and_u_a_layer_for_rows(measured):
    deviations = {(d.layout, d.dtype): d for d in measured[0]}
    found = deviations["tensor parallel, adapted after", "bfloat16"]
    tokens, rank, numbers, blocks = layouts.BATCH * layouts.LENGTH, 2, 3, 2
    columns, rows = blocks * len(layouts.COLUMNS), blocks * len(layouts.ROWS)
    bytes_ = 4 * (columns * 2 * tokens * rank + rows * numbers)
    torchs = 11  # torch's own: of activations [tokens, 24] in bfloat16, as the bare model makes them
    calls, bytes_ = torchs + 2 * columns + rows, torchs * tokens * 24 * 2 + bytes_
    assert f"{calls} all_reduce, {bytes_} B" in found.collectives, found


def test_after_a_hundred_steps_every_rank_holds_the_same_bits(measured):
    for training in measured[1]:
        assert training.steps == 100 and training.identical and training.deviation < 1e-5, training


@pytest.fixture(scope="module", params=[2, 4])
def checked(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return request.param, directory, run(request.param, checks.check_all, str(directory))


def test_each_matrix_is_factorised_once_and_every_rank_has_all(checked):
    world, _, found = checked
    model = layouts.model_of(torch.float32, 2)
    bases = {n: truncated_svd(m.weight, 2, cache=False).basis for n, m in model.named_modules() if n[-4:] == "proj"}
    for kind in ("whole", "sharded"):
        names = [name for result in found for name in result["sharing"][kind]]
        assert sorted(names) == sorted(bases)
        assert all(result["sharing"][kind] for result in found), "a rank had nothing to do"
    for result in found:
        assert result["sharing"]["same"] and list(result["sharing"]["bases"]) == list(bases)
        assert all(np.array_equal(result["sharing"]["bases"][name], basis) for name, basis in bases.items())


def test_a_weight_that_cannot_be_factorised_stops_every_rank(checked):
    assert {result["failing"] for result in checked[2]} == {"layers.1.k_proj: the weight holds NaN or infinite values"}


def test_gradients_are_averaged_again_after_a_backward_pass_that_failed(checked):
    for result in checked[2]:
        assert result["after a failure"] == 0


def test_a_vector_that_no_rank_used_stands_still_and_one_that_some_used_is_the_mean(checked):
    """As in one process: AdamW's decay moves what has a gradient of zeros."""
    for result in checked[2]:
        unused, frozen, some = result["unused"]
        assert unused == frozen == 0 and some < 1e-6


def test_shards_of_unequal_width(checked):
    for result in checked[2]:
        assert max(result["uneven"]) < 1e-14


def test_layouts_without_an_update_are_refused(checked):
    for result in checked[2]:
        average, maximum, *transformed, bank, trained_bias = result["refusals"]
        assert "layers.0.o_proj: expected an output [..., 24] sharded, or partial by sum" in average
        assert "avg" in average
        assert len(transformed) == 2
        assert all("q_proj: expected a weight that is whole for torch.func" in message for message in transformed)
        assert "max" in maximum and "AdapterBank needs whole outputs" in bank
        assert "layers.0.k_proj: expected a frozen bias beside a weight that is sharded" in trained_bias


def test_checkpoints_of_one_layout_load_in_another(checked):
    for result in checked[2]:
        for pair, deviations in result["checkpoints"].items():
            assert len(deviations) == 2 and max(deviations) < 1e-6, pair


def test_an_adapter_of_a_sharded_model_loads_in_one_process(checked):
    expected = layouts.one_process(layouts.model_of(torch.float32, 2), checks.CONFIG)
    layouts.set_vectors(expected.bare)
    tokens, _ = layouts.batch()
    for number in range(2):
        model = layouts.model_of(torch.float32, 2)
        load_adapter(model, checked[1] / str(number) / "adapter.safetensors", cache=False, progress=False)
        assert torch.equal(model(tokens), expected.forward(tokens))


def test_the_demo_under_torchrun_learns_what_one_process_learns(checked):
    expected = checks.demo_step(0, 1)
    assert np.abs(expected).max() > 0
    for result in checked[2]:
        np.testing.assert_array_equal(result["demo"], checked[2][0]["demo"])
        np.testing.assert_allclose(result["demo"], expected, atol=1e-5 * np.abs(expected).max())
