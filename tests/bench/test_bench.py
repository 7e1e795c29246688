"""The benchmark measures what it says: the gate rejects wrong results, ratios are taken round by round, runs resume."""
import gc
import math
from itertools import cycle

import pytest
import torch

from bench.grid import (
    adapters,
    breakdown,
    busy,
    contenders,
    gate,
    layers,
    memory,
    report,
    roofline,
    shapes,
    table,
    timing,
    whole_model,
)

TINY = shapes.Case(shapes.Shape("SmolLM2-135M", "q", 64, 48, True), 8, torch.float32, 13)
TINY_BF16 = shapes.Case(shapes.Shape("SmolLM2-135M", "down", 40, 64, False), 128, torch.bfloat16, 1)
EAGER = ["frozen", "frozen again", "ours", "delta", "chain"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Bytes are counted here: torch.empty must not be followed by a fill, as it is in the other tests."""


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="PEFT is a contender; the extra [bench] installs it")


@pytest.mark.parametrize("case", [TINY, TINY_BF16], ids=str)
def test_every_contender_computes_the_same_adapter(case, peft):
    problem = contenders.make_problem(case)
    exact = gate.truth(problem)
    names = [name for name in contenders.names_for(case.dtype, compiled=False) if not name.startswith("frozen")]
    assert {"ours", "delta", "chain", "peft"} <= set(names)
    for contender in contenders.build(problem, names).values():
        assert set(gate.check(contender, problem, exact)) == {"y", "dx", "dv"}


@pytest.mark.parametrize("case", [TINY, TINY_BF16], ids=str)
@pytest.mark.parametrize("damage", ["missing", "wrong v", "wrong sign of dv"])
def test_the_gate_rejects_a_wrong_adapter(case, damage):
    problem = contenders.make_problem(case)
    ours = contenders.build(problem, ["ours"])["ours"]
    if damage == "missing":
        ours.module.enabled = False
        ours.forward = lambda x: ours.module(x) + 0 * ours.v.sum()
    elif damage == "wrong v":
        ours.v.data.mul_(1.2)
    else:
        ours.v.register_hook(torch.neg)
    with pytest.raises(gate.WrongResult, match="ours"):
        gate.check(ours, problem, gate.truth(problem))


def test_the_truth_is_the_dense_formula():
    problem = contenders.make_problem(TINY)
    mixing = torch.einsum("i,ijk->jk", problem.v.double(), problem.fixed.double())
    root = problem.sigma.double().sqrt()
    delta = (problem.left.double() * root) @ mixing @ (root[:, None] * problem.right.double().T)
    x = problem.x[0].double()
    y = x @ (problem.weight.double() + delta).T + problem.bias.double()
    exact = gate.truth(problem)
    torch.testing.assert_close(exact.y, y[exact.rows])


def test_planted_triplets_are_the_leading_ones():
    weight, left, sigma, right = contenders.planted_weight(TINY.shape)
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(s[:2], sigma, rtol=1e-4, atol=0)
    assert s[2] < 0.9 * s[1]
    torch.testing.assert_close((u[:, :2].T @ left).abs(), torch.eye(2), atol=1e-4, rtol=0)
    torch.testing.assert_close((vh[:2] @ right).abs(), torch.eye(2), atol=1e-4, rtol=0)


def test_ours_saves_r_numbers_a_token_and_nothing_else():
    problem = contenders.make_problem(TINY_BF16)
    built = contenders.build(problem, EAGER)
    saved = {name: memory.measure(contender, problem).saved for name, contender in built.items()}
    tokens, (_, features) = TINY_BF16.tokens, problem.weight.shape
    assert saved["frozen"] == 0
    assert saved["ours"] == tokens * shapes.RANK * 4
    assert saved["delta"] >= tokens * features * 2 + problem.weight.nbytes  # x and the dense sum


@pytest.mark.parametrize("name", ["ours", "delta", "chain"])
def test_counting_keeps_nothing(name):
    """The graph of W + delta holds what it saves: counted for every layer of the grid, that was 12 GB."""
    problem = contenders.make_problem(TINY)
    contender = contenders.build(problem, [name])[name]
    memory.measure(contender, problem)
    gc.collect()
    before = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    memory.measure(contender, problem)
    gc.collect()
    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) == before


def test_written_bytes_count_results_and_in_place_writes():
    problem = contenders.make_problem(TINY)
    built = contenders.build(problem, ["frozen", "ours"])
    frozen, ours = (memory.measure(built[name], problem).written for name in ("frozen", "ours"))
    y, dx, t, v = problem.g.nbytes, problem.x.nbytes, TINY.tokens * shapes.RANK * 4, problem.v.nbytes
    assert frozen == y + dx
    assert ours - frozen == y + t + dx + v  # y and t before the product is added; dx and dv as well


def test_ratios_are_medians_over_rounds_of_the_same_round():
    frozen, ours = cycle([1.0, 2.0, 4.0]), cycle([1.5, 3.0, 6.0])
    steps = {"frozen": lambda: {"both": next(frozen)}, "ours": lambda: {"both": next(ours)}}
    found = timing.interleave(steps, "frozen", seconds=0, least=4, most=4, longest=1e9)
    assert found["ours"]["both"].rounds == 4
    assert found["frozen"]["both"].ratio_p50 == 1.0
    assert found["ours"]["both"].ratio_p20 == found["ours"]["both"].ratio_p80 == 1.5


def test_quantiles():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_other_work_ends_with_its_block():
    with busy.processes(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


def test_grids_cover_every_case_once_and_every_family_early():
    grid = list(shapes.full_grid())
    assert len(grid) == len(set(grid)) == 5 * 5 * 5 * 2 * 2
    first_half = {(case.shape, case.tokens, case.dtype) for case in grid[:250]}
    assert len(first_half) == 250
    early = grid[:20]
    assert {case.shape.model for case in early} == set(shapes.MODELS)
    assert {case.dtype for case in early} == set(shapes.DTYPES) and {case.numbers for case in early} == {1, 13}
    assert {case.dtype for case in shapes.quick_grid()} == set(shapes.DTYPES)


def test_the_limit_is_one_read_and_one_write():
    size = 8 * 64 * 4
    assert roofline.limit_seconds(TINY, "forward", 1e9) == pytest.approx(2 * size / 1e9)
    assert roofline.limit_seconds(TINY, "both", 1e9) == pytest.approx(4 * size / 1e9)


def test_a_run_writes_its_files_and_resumes(tmp_path, capsys):
    arguments = {"seconds": 0.0, "most_rounds": 15, "compiled": False}
    assert layers.run([TINY], tmp_path, **arguments, max_seconds=0.0) == 1, "no time: the case is left"
    assert layers.run([TINY], tmp_path, **arguments) == 0
    times = table.read(tmp_path / layers.TIMES_FILE)
    assert {row["phase"] for row in times} == {"forward", "backward", "both", "inference"}
    assert {"frozen", "ours"} <= {row["contender"] for row in times}
    assert all(float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) for row in times)
    assert all(math.isclose(float(row["ratio_p50"]), 1) for row in times if row["contender"] == "frozen")
    assert all(row["cpu"] and row["threads"] and row["torch"] and row["commit"] for row in times)
    layers.run([TINY, TINY_BF16], tmp_path, **arguments)
    again = table.read(tmp_path / layers.TIMES_FILE)
    assert again[: len(times)] == times and {row["dtype"] for row in again[len(times) :]} == {"bf16"}
    report.write(tmp_path)
    assert max(map(len, (tmp_path / report.FILE).read_text().splitlines())) <= report.WIDTH
    assert {path.name for path in tmp_path.glob("*.png")} <= {"ratio.png", "roofline.png"}
    assert "ours" in capsys.readouterr().out


def test_files_with_other_columns_are_refused(tmp_path):
    table.append(tmp_path / "a.csv", ["x"], [{"x": 1.0}])
    with pytest.raises(ValueError, match="expected the columns"):
        table.append(tmp_path / "a.csv", ["x", "y"], [{"x": 1.0, "y": None}])


def test_whole_model_variants_are_one_function_and_ours_saves_eight_bytes(peft):
    variants = whole_model.make_variants(torch.float32, blocks=1)
    tokens = whole_model.make_tokens()[:1, :16]
    checked = whole_model.check(variants, tokens, torch.float32)
    assert checked["ours"][0] == pytest.approx(checked["peft"][0], rel=1e-5)
    assert checked["ours"][0] != pytest.approx(checked["frozen"][0], rel=1e-5)
    frozen, ours = (whole_model.saved_bytes(variant, tokens) for variant in variants[:2])
    assert ours - frozen == shapes.RANK * 4 * tokens.numel() * len(whole_model.target_names_of(variants))
    for variant in variants:
        phases = whole_model.training_step(variant, tokens)()
        assert phases["step"] >= phases["forward"] + phases["backward"] > 0
        decode = whole_model.generation(variant, 1)
        assert decode()["token"] > 0 and decode()["token"] > 0


def test_adapters_in_a_batch_are_checked_and_timed(peft, monkeypatch):
    monkeypatch.setattr(adapters, "TRAINING_ROWS", TINY.tokens)
    monkeypatch.setattr(adapters, "interleave", lambda *a, **k: timing.interleave(*a, **k | {"least": 2, "most": 2}))
    rows = adapters.measure(TINY, 3, seconds=0.0)
    phases = {(row["contender"], row["phase"]) for row in rows}
    ways = (adapters.ONE, adapters.BANK, adapters.SEPARATE)
    assert phases == {(way, phase) for way in ways for phase in (adapters.INFERENCE, adapters.BOTH)} | {
        (adapters.PEFT, adapters.INFERENCE), (adapters.BANK, adapters.OPENING)
    }  # fmt: skip
    written = [{name: table._text(value) for name, value in row.items()} for row in rows]
    described = adapters.describe(written)
    assert max(map(len, described.splitlines())) <= report.WIDTH and "of 2" in described
    monkeypatch.setattr(adapters, "in_bank", lambda p, v, i, build=adapters.in_bank: build(p, 1.2 * v, i))
    with pytest.raises(gate.WrongResult, match="bank"):
        adapters.measure(TINY, 3, seconds=0.0)


@pytest.mark.parametrize("training", [True, False])
def test_breakdown_covers_every_part(training, monkeypatch):
    small = {(48, 32): 2, (16, 32): 2, (96, 32): 2, (32, 96): 1}  # as many modules, less to factorise
    monkeypatch.setattr(breakdown, "LAYERS", small)
    parts = breakdown.measure(torch.float32, 4, training=training, rounds=3)
    assert parts["forward", "kernel"][1] == 210
    assert {("forward", "dispatch"), ("forward", "module"), ("forward", "after product")} <= set(parts)
    assert (("backward", "autograd") in parts) == training
