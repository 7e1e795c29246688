"""The study's rows are complete, resumable and independent of what shares a batch; its choices see no test problem."""
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.grid import table
from bench.study import demonstrations, figures, methods, rollouts, rounding, runner, summary
from bench.study.__main__ import file_name
from bench.study.design import OBJECTIVES, REAL, REAL_CURVE, TINY, TINY_CURVE, TINY_QUICK, Arm, design, only, tied
from bench.study.methods import FULL, LORA_XS, Method, Run, attach
from bench.study.training import GRPO, SFT
from demo.models import load_model
from demo.tasks import last_number, task

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "study"
SMALL = replace(
    TINY, settings=replace(TINY.settings, steps=2, samples=4), seeds=(0, 1), validation=10, held_out=20,
    arms=(
        Arm(tied(13, 21), "grpo", (0.003, 0.03)), Arm(tied(13, 21, storage="bfloat16"), "grpo", (0.03,)),
        Arm(Method(LORA_XS, rank=1), "sft-own", (0.03,)), Arm(Method(FULL), "sft-foreign", (1e-3,)),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(autouse=True, scope="module")
def few_demonstrations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations, "COUNT", 64)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "tiny.csv"
    return path, runner.run(SMALL, path, processes=1)


def test_every_run_is_a_row_and_rows_that_are_there_are_not_run_again(finished, monkeypatch):
    path, rows = finished
    assert len(rows) == 1 + 4 + 2 + 2 + 2 == len(table.read(path))
    assert {row["numbers"] for row in rows} == {"0", "13", "21", "615424"}
    assert {(row["bytes"]) for row in rows if row["numbers"] == "13"} == {"52", "26"}
    assert all(float(row["moved"]) > 0 for row in rows[1:])
    monkeypatch.setattr(runner, "execute", lambda unit: pytest.fail(f"ran {unit.label} again"))
    assert runner.run(SMALL, path, processes=1) == rows
    more = replace(SMALL, seeds=(0, 1, 2))
    missing = list(runner.missing_units(more, {runner.key_of(row) for row in rows}))
    assert sorted(seed for unit in missing for *_, seed in unit.runs) == [2] * 5
    longer = replace(SMALL, settings=replace(SMALL.settings, steps=3))
    assert sum(len(unit.runs) for unit in runner.missing_units(longer, {runner.key_of(row) for row in rows})) == 10


def test_storage_rounds_v_after_every_step(tiny):
    run = Run(tied(13, 21, storage="bfloat16"), 0.03, 0)
    learners = attach(tiny, [run], "grpo", samples=4)
    objective = GRPO(task("digit-sums"), SMALL.settings, [run])
    while not learners.norm(run):
        objective.step(learners)
    (table_,) = learners.bank.parameters()
    assert torch.equal(table_, table_.bfloat16().float())


@pytest.mark.parametrize("objective", ["grpo", "sft-own"])
def test_a_run_learns_the_same_whatever_shares_its_batch(tiny, objective):
    problems = task("digit-sums")

    def vector_of(*wanted):
        runs = [Run(tied(u, 21), rate, seed) for u, rate, seed in wanted]
        learners = attach(tiny, runs, objective, SMALL.settings.samples)
        if objective == "grpo":
            steps = GRPO(problems, SMALL.settings, runs)
        else:
            steps = SFT(demonstrations.own_samples(tiny, problems, 1.0), SMALL.settings, runs)
        for _ in range(2):
            steps.step(learners)
        return learners.bank.vectors(runs[0].name)

    alone, shared = vector_of((13, 0.01, 0)), vector_of((13, 0.01, 0), (13, 0.03, 1), (49, 0.003, 0), (4, 0.01, 0))
    assert alone.norm() > 0
    torch.testing.assert_close(shared[:, :13], alone, rtol=1e-3, atol=1e-5)
    assert not shared[:, 13:].any()


def test_seeds_draw_another_projection(tiny):
    runs = [Run(tied(13, 21), 0.01, 0), Run(tied(13, 21), 0.01, 1)]
    learners = attach(tiny, runs, "grpo", samples=4)
    assert [learners.bank.seed(run.name) for run in runs] == [0, 1]


def test_methods_train_what_they_say(tiny):
    sizes = {arm.method.label: count_of(tiny, arm.method) for arm in TINY.arms if arm.objective == "grpo"}
    assert sizes["TinyLoRA r=2 u=1 n_tie=21"] == 1 and sizes["TinyLoRA r=2 u=1 n_tie=6"] == 4
    assert sizes["TinyLoRA r=2 u=13 n_tie=21"] == 13 and sizes["TinyLoRA r=4 u=16"] == 336
    assert sizes["LoRA-XS r=2"] == 84 and sizes["LoRA r=1"] == 7392 and sizes["full"] == 615_424
    assert {sizes[method.label] for method in figures.EQUAL_SIZE} == {42}
    assert {sizes[method.label] for method in figures.TYING} == {14}


def count_of(base, method):
    run = Run(method, 0.0, 0)
    return attach(base, [run], "grpo", samples=4).numbers(run)


@pytest.mark.parametrize("name", ["digit-sums", "addition"])
def test_foreign_demonstrations_are_right(name, tiny):
    problems = task(name)
    model = tiny if name == "digit-sums" else replace(tiny, encode=list, encode_text=lambda text: [text], end_id=".")
    known = {problem.prompt for problem in problems.held_out}
    endless, found = problems.training(demonstrations.SEED), demonstrations.foreign_demonstrations(model, problems)
    for problem, demonstration in zip(endless, found, strict=False):
        text = tiny.decode(demonstration.reply) if name == "digit-sums" else demonstration.reply[0]
        assert problem.score(text) == 1.0 and problem.prompt not in known
    if name == "addition":
        assert last_number("3 plus 4 makes 7") == 7


def test_own_samples_are_right_and_end(tiny):
    problems = task("digit-sums")
    for one in demonstrations.own_samples(tiny, problems, 1.0):
        digits = [int(c) for c in tiny.decode(one.prompt) if c.isdigit()]
        assert tiny.decode(one.reply).endswith(f"#{sum(digits) % 10}.")


def test_the_rate_is_chosen_by_validation_and_edges_are_marked():
    def row(rate, seed, validation, test):
        return dict(
            method="m", objective="grpo", lr=str(rate), seed=str(seed), kind="TinyLoRA", numbers="13", bytes="52",
            validation=str(validation), test=str(test), validation_sampled="0", test_sampled="0",
            reward_last5=str(rate),
        )  # fmt: skip

    rows = [row(0.1, 0, 0.5, 0.9), row(0.1, 1, 0.5, 0.9), row(0.2, 0, 0.7, 0.6), row(0.2, 1, 0.6, 0.2),
            row(0.3, 0, 0.1, 1.0), row(0.3, 1, 0.1, 1.0)]  # fmt: skip
    (result,) = summary.results(rows, summary.GREEDY)
    assert (result.rate, result.scores, result.edge) == (0.2, (0.6, 0.2), "")
    assert result.mean == pytest.approx(0.4)
    (result,) = summary.results(rows, summary.GREEDY, chosen_by="reward_last5")
    assert (result.rate, result.scores) == (0.3, (1.0, 1.0))
    (result,) = summary.results(rows[:4], summary.GREEDY)
    assert result.edge == ">"


def test_tables_and_figures(finished, tmp_path):
    _, rows = finished
    text = summary.table(rows, {"TinyLoRA r=2 u=13 n_tie=21", "full"})
    assert all(len(line) <= 110 for line in text.splitlines())
    curve, others = text.split("ablations")
    assert "TinyLoRA r=2 u=13 n_tie=21 bfloat16" in others and "LoRA-XS r=1" not in curve
    figures.curve(rows, {row["method"] for row in rows}, "tiny", tmp_path / "curve.png")
    found = rounding.run("tiny", tmp_path / "rounding.csv")
    figures.rounding(found, {"tiny": [0.1, 0.2]}, tmp_path / "rounding.png")
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("curve.png", "rounding.png"))

    def survived(dtype, size):
        return [row["survived"] for row in found if row["dtype"] == dtype and row["size"] == size]

    assert max(survived("bfloat16", 1e-5)) < 0.05 and min(survived("bfloat16", 1.0)) > 0.95
    assert min(survived("float16", 0.01)) > max(survived("bfloat16", 0.001))


@pytest.mark.parametrize("source", rollouts.SOURCES)
def test_rollouts_come_from_the_source_and_leave_the_model_as_it_was(tiny, source):
    model = replace(tiny, module=copy.deepcopy(tiny.module).bfloat16())
    methods.adapt(model.module, tied(13, 21), seed=0)
    (vector,) = (p for p in model.module.parameters() if p.requires_grad)
    ids = torch.randint(0, 24, (8, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vector.fill_(0.05)
        before = model.module(ids).logits
        with rollouts.rollout_model(model, source) as sampler:
            sampled = sampler.module(input_ids=ids).logits
        assert torch.equal(model.module(ids).logits, before)
    distance = ((sampled - before).norm() / before.norm()).item()
    # merged weights are rounded once more; PEFT adds the same update in another order
    assert distance == 0 if source == rollouts.OWN else 0 < distance < 0.02


@pytest.mark.parametrize(
    "model, other_task",
    [
        ("tiny", None), ("smollm2", None),
        ("smollm2", "reasoning_gym:chain_sum(max_terms=2,max_digits=2)"),
    ],
)  # fmt: skip
def test_the_page_shows_what_the_rows_say(model, other_task):
    name = file_name(model, other_task)
    rows = table.read(RESULTS / f"{name}.csv")
    plan = design(model, False, other_task)
    if other_task:
        plan = only(plan, ["TinyLoRA r=2 u=4"], ["grpo"])
    rows = {runner.key_of(row): row for row in rows}
    curve = {method.label for method in (TINY_CURVE if model == "tiny" else REAL_CURVE)}
    text = summary.table([rows[runner.key_of(row)] for row in runner.rows_of(plan)], curve)
    assert (RESULTS / f"{name}.txt").read_text() == text + "\n"
    page = (ROOT / "docs" / "study.md").read_text()
    for part in text.split("\n\n")[:-1]:
        assert part in page


def test_designs():
    assert {arm.objective for arm in REAL.arms} == set(OBJECTIVES)
    assert design("tiny", quick=True) == TINY_QUICK
    other = design("some/directory", quick=False, task="reasoning_gym:chain_sum")
    assert other.model == "some/directory" and {arm.objective for arm in other.arms} == {"grpo", "sft-own"}
    assert len({(arm.method.label, arm.objective) for arm in TINY.arms}) == len(TINY.arms)
    few = only(other, ["LoRA r=1", "full"])
    assert {arm.method.label for arm in few.arms} == {"LoRA r=1", "full"} and few.settings == REAL.settings
    assert [arm.objective for arm in only(other, ["LoRA r=1"], ["grpo"]).arms] == ["grpo"]
    with pytest.raises(ValueError, match="methods: expected some of .*LoRA r=1.*, found LoRA r=3"):
        only(TINY, ["LoRA r=1", "LoRA r=3"])


def test_unknown_methods_and_styles_are_named(tiny):
    with pytest.raises(ValueError, match="method: expected TinyLoRA"):
        attach(tiny, [Run(Method("other"), 0.1, 0)], "grpo", samples=4)
    with pytest.raises(ValueError, match="subtraction: it has no demonstrations in a foreign style"):
        demonstrations.foreign_demonstrations(replace(tiny, encode=list), task("subtraction"))
