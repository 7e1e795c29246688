"""The scaling study reads a curve as it says, on numbers worked out by hand; its rows come from seconds-long runs."""
from __future__ import annotations

import math
import random
import re
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import scipy.stats

from bench.grid import table
from bench.study import demonstrations, figures, runner, scaling, transfer
from bench.study.__main__ import main
from bench.study.design import TINY, WIDTHS, arms, tied
from bench.study.methods import LORA, Method
from bench.study.scaling import Reading, crossing, half, interval, read, redrawn, share_at, slope, spearman
from demo import pretrain_tiny, recipes, tiny
from demo.models import PROJECTIONS, load_model
from demo.tasks import addition, task
from tinylora_kernels.model.targets import target_names


def row(numbers, seed, score, rate=0.01, objective="grpo", method=None):
    return dict(
        method=method or f"u={numbers}", objective=objective, lr=str(rate), seed=str(seed), kind="TinyLoRA",
        numbers=str(numbers), bytes="4", validation=str(score), test=str(score), validation_sampled=str(score),
        test_sampled=str(score), length="3", length_sampled=str(3 + score), reward_last5="0",
    )  # fmt: skip


BASE = row(0, "", 0.5, objective="", method=runner.BASE)
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "study"
GAINS = {1: 0.1, 10: 0.3, 100: 0.5, 1000: 0.4}
ROWS = [BASE, *(row(n, seed, 0.5 + gain) for n, gain in GAINS.items() for seed in (0, 1))]


def test_the_crossing_is_linear_in_the_logarithm():
    # 95% of 0.5 is 0.475, seven eighths of the way from 10 to 100
    assert crossing({1: 0.1, 10: 0.3, 100: 0.5, 1000: 0.4}) == pytest.approx(10 * 10**0.875)
    assert crossing({1: 0.5, 10: 0.5}) == 1.0
    assert crossing({1: 0.1, 10: 0.2}, share=0.5) == 1.0
    assert crossing({1: -0.1, 10: 0.0}) is None


def test_a_reading_is_of_the_objective_and_counts_from_the_base_model():
    other = [row(n, 0, 0.55, objective="sft-own") for n in (1, 10)]
    found = read("m", 1000, ROWS + other, "grpo", "sampled")
    assert found.base == 0.5 and found.best == 100 and found.seeds == 2
    assert found.needed == pytest.approx(10 * 10**0.875)
    assert found.told(crossing) == pytest.approx((found.needed,) * 3)  # seeds agree
    assert found.told(half) == pytest.approx((10**0.75,) * 3)  # 0.25 of 0.5, three quarters of the way from 1 to 10
    assert found.told(partial(share_at, size=10)) == pytest.approx((0.6,) * 3) and math.isnan(share_at(found.gains))
    assert read("m", 1000, ROWS + other, "sft-own", "greedy").needed == 1.0


def test_the_interval_widens_with_the_spread_of_seeds_and_holds_the_reading():
    def spread(by):
        own = [row(n, seed, 0.5 + gain + sign * by) for n, gain in GAINS.items() for seed, sign in ((0, -1), (1, 1))]
        return read("m", 1000, [BASE, *own], "grpo", "sampled")

    narrow, wide = spread(0.01), spread(0.08)
    needed, low, high = narrow.told(crossing)
    assert low <= needed <= high
    _, lower, higher = wide.told(crossing)
    assert math.log(higher / lower) > 2 * math.log(high / low) > 0


def test_nothing_gained_is_said(tmp_path):
    rows = [BASE, *(row(n, seed, 0.4) for n in (1, 13) for seed in (0, 1))]
    found = read("tiny", 1000, rows, "grpo", "sampled")
    assert found.needed is None and not found.draws
    assert "nothing gained" in scaling.text([found], {"tiny": rows})
    assert set(list(scaling.described(found).values())[8:]) == {None}
    figures.scaling([found], tmp_path / "none.png")


def test_redrawn_seeds_are_the_seeds_of_their_size():
    drawn = [redrawn({1: [0.0, 1.0], 2: [5.0, 5.0]}, random.Random(seed)) for seed in range(50)]
    assert {draw[1] for draw in drawn} == {0.0, 0.5, 1.0} and {draw[2] for draw in drawn} == {5.0}
    assert interval(list(range(1000))) == (25, 974)


def test_the_slope_is_that_of_a_power_law():
    def reading(parameters, needed):
        drawn = ({0.9 * needed: 0.1}, {1.1 * needed: 0.1}) * 50  # reached by their only size
        return Reading("m", parameters, "grpo", "sampled", 0.5, {needed: 0.1}, 4, drawn)

    power, low, high = slope([reading(n, 7.0 * n**-0.5) for n in (1e5, 1e6, 1e7)], crossing)
    assert power == pytest.approx(-0.5) and low <= power <= high


def test_rank_correlation_matches_scipy():
    pairs = [(1.0, 2.0), (2.0, 2.0), (3.0, 1.0), (4.0, 7.0), (4.0, 5.0), (0.5, 0.1)]
    assert spearman(pairs) == pytest.approx(scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def test_designs_know_sizes_to_ten_million_parameters():
    sizes = [scaling.parameters_of(model) for model in scaling.DECODERS]
    assert sizes == sorted(sizes) and sizes[0] < 0.2e6 and 9e6 < sizes[-1] < 1e7 and len(sizes) == len(WIDTHS)
    plans = [scaling.scaling(model) for model in scaling.DECODERS]
    assert len({(plan.task, plan.settings, plan.seeds, plan.arms) for plan in plans}) == 1  # the same at every size
    assert {len(target_names(tiny.TinyDecoder(width), PROJECTIONS)) for width in (64, 96)} == {21}


SMALL = replace(
    TINY, model="tiny-64", settings=replace(TINY.settings, steps=2, samples=4), seeds=(0, 1),
    validation=10, held_out=20,
    arms=arms(((tied(4, 21), (0.03,)), (tied(13, 21), (0.03,)), (Method(LORA, rank=1), (0.01,))), scaling.OBJECTIVES),
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Three sizes of adapter on the smallest decoder, two steps."""
    monkeypatch.setattr(scaling, "scaling", lambda model: replace(SMALL, model=model))
    monkeypatch.setattr(demonstrations, "COUNT", 16)


def test_the_study_runs_what_is_missing_and_reads_what_is_complete(small, tmp_path, monkeypatch, capsys):
    scaling.study(["tiny-64"], tmp_path, processes=1)
    rows = table.read(tmp_path / "tiny-64.csv")
    assert len(rows) == 1 + 2 * 3 * 2 and {row["numbers"] for row in rows} == {"0", "4", "13", "3696"}
    assert all(float(row["length_sampled"]) > 1 for row in rows)
    assert all(len(row["lengths"].split()) == 2 for row in rows if row["objective"] == "grpo")
    found = table.read(tmp_path / "scaling.csv")
    assert [(one["model"], one["objective"], one["metric"]) for one in found] == [
        ("tiny-64", objective, metric) for metric in ("greedy", "sampled") for objective in scaling.OBJECTIVES
    ]
    assert (tmp_path / "scaling.txt").read_text() in capsys.readouterr().out
    assert (tmp_path / "scaling.png").stat().st_size > 5_000
    monkeypatch.setattr(runner, "execute", lambda unit: pytest.fail(f"ran {unit.label} again"))
    scaling.study(["tiny-64"], tmp_path, processes=1)
    (tmp_path / "tiny-64.csv").unlink()  # an objective that lacks a row is not read, the other is
    table.append(tmp_path / "tiny-64.csv", runner.COLUMNS, rows[:-1])
    assert {one.objective for one in scaling.readings(scaling.rows_by_model(tmp_path))} == {"grpo"}


def test_nothing_begins_after_the_time_is_up(small, tmp_path, monkeypatch):
    scaling.run(["tiny-64"], tmp_path, 1, until=time.monotonic() - 1)
    assert not list(tmp_path.iterdir())
    path, begun = tmp_path / "rows.csv", []
    monkeypatch.setattr(runner, "execute", lambda unit: begun.append(unit) or [])
    runner.run(SMALL, path, 1, until=time.monotonic() - 1)
    assert not begun


def test_a_decoder_that_is_missing_is_trained(small, tmp_path, monkeypatch):
    path, write = tmp_path / "tiny-32.safetensors", pretrain_tiny.write_checkpoint
    monkeypatch.setattr(scaling, "DECODERS", {"tiny-32": 32})
    monkeypatch.setattr(tiny, "checkpoint", lambda width=tiny.WIDTH: path)
    monkeypatch.setattr(pretrain_tiny, "write_checkpoint", lambda path, width: write(path, steps=2, width=width))
    monkeypatch.setattr(runner, "run", lambda plan, *others: load_model(plan.model))
    scaling.run(["tiny-32"], tmp_path, 1, math.inf)
    assert tiny.load_checkpoint(path).tokens.weight.shape == (24, 32)


def test_unknown_models_are_named(capsys):
    assert main(["--scaling", "--models", "tiny-65"]) == 2
    assert "models: expected some of tiny-64" in capsys.readouterr().err


def test_other_tasks_are_what_they_say_and_no_training_problem():
    training = {problem.prompt for problem in islice(addition().training(0), 200)}
    for name, make in transfer.TASKS.items():
        problems = make()
        assert len(problems) == transfer.COUNT and not training & {problem.prompt for problem in problems}
        for problem in problems:
            numbers = [int(n) for n in re.findall(r"\d+", problem.prompt)]
            answer = {
                "subtraction": lambda n: n[0] - n[1], "larger of two": max, "stories": lambda n: n[0] + n[1]
            }.get(name, sum)(numbers)  # fmt: skip
            assert problem.score(str(answer)) == 1.0 and problem.score(str(answer + 1)) == 0.0
    assert {len(re.findall(r"\d+", p.prompt)) for p in transfer.TASKS["three terms"]()} == {3}


def test_transfer_trains_an_adapter_once_and_scores_it_on_every_task(tmp_path, monkeypatch):
    digits = task("digit-sums").held_out[:20]
    recipe = replace(recipes.TINY, settings=replace(recipes.TINY.settings, steps=2, prompts=4, samples=4))
    for name, value in dict(MODEL="tiny", RECIPE=recipe, ADAPTERS=((0, 0), (13, 0))).items():
        monkeypatch.setattr(transfer, name, value)
    monkeypatch.setattr(transfer, "TASKS", {"as trained": lambda: digits, "others": lambda: digits[:2]})
    rows = transfer.run(tmp_path, 1)
    assert [row["numbers"] for row in rows] == ["0", "0", "13", "13"] and rows[2]["lr"] == "0.02"
    assert rows == table.read(tmp_path / "transfer.csv") and float(rows[0]["length"]) > 1
    (file,) = (tmp_path / "adapters").iterdir()
    assert transfer.text(rows).splitlines()[2].startswith("as trained")
    (tmp_path / "transfer.csv").unlink()  # rows are made again from the file, to the digit
    transfer.adapted.cache_clear()
    monkeypatch.setattr(transfer, "train_adapter", lambda *unused: pytest.fail(f"trained {file.name} again"))
    assert transfer.run(tmp_path, 1) == rows
    monkeypatch.setattr(transfer, "execute", lambda unit: pytest.fail(f"ran {unit.label} again"))
    assert transfer.run(tmp_path, 1) == rows
    transfer.adapted.cache_clear()


def test_the_page_shows_what_the_rows_say():
    rows = scaling.rows_by_model(RESULTS)
    found = scaling.readings(rows)
    assert (RESULTS / "scaling.txt").read_text() == scaling.text(found, rows) + "\n"
    page = (ROOT / "docs" / "study.md").read_text()
    for part in scaling.text(found, rows).split("\n\n")[:-1]:
        assert part in page
    not_run = [model for model in scaling.MODELS if model not in rows]
    assert all(model in page for model in not_run)  # said so
    moved = transfer.run(RESULTS, 1, until=0.0)
    assert len(moved) == len(transfer.ADAPTERS) * len(transfer.TASKS) and transfer.text(moved) in page
