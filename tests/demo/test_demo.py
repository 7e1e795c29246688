"""The demo itself on the tiny decoder, a few steps of it: it learns, and it prints and writes what it promises."""
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from demo import main, run
from demo.experiment import Experiment, random_direction
from demo.models import load_model
from demo.processes import SideBySide, open_jobs
from demo.recipes import REAL, adapter_config, rates, resolve_numbers
from demo.tasks import task
from demo.training import Run, Settings
from tinylora_kernels import apply_tiny_lora
from tinylora_kernels.model.adapted import trainable_vectors


def run_demo(out, threads):
    """Six steps with 13 numbers, then 4 beside it: about 20 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPS", "6")
        patch.setenv("TASK", "")  # make passes empty variables for what was not asked
        assert main(["--model", "tiny", "--params", "13,4", "--draws", "1", "--out", str(out)]) == 0
    torch.set_num_threads(before)
    return out / "tiny"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), threads=1)


@pytest.fixture(scope="module")
def results(demo):
    return json.loads((demo / "results.json").read_text())


def accuracy(row, kind="greedy"):
    correct = row["evaluation"][kind]["correct"]
    return sum(correct) / len(correct)


def test_thirteen_numbers_learn(results):
    base, frozen, trained, _ = results["rows"]
    assert trained["numbers"] == 13 and trained["bytes"] == 52 and len(trained["rewards"]) == 6
    assert accuracy(trained) > accuracy(base) + 0.10
    assert accuracy(trained, "sampled") > accuracy(base, "sampled") + 0.05


def test_lr_zero_changes_nothing(results):
    base, frozen, *_ = results["rows"]
    assert frozen["evaluation"] == base["evaluation"]


def test_random_control_has_the_trained_norm_and_does_not_learn(results):
    control = results["random_control"]
    assert control["numbers"] == 13 and control["norm"] > 0 and len(control["evaluations"]) == 1


def test_the_learning_rate_falls_linearly_to_zero():
    model = load_model("tiny")
    apply_tiny_lora(model.module, adapter_config(13, 21), progress=False)
    run = Run(model, task("digit-sums"), Settings(steps=4, prompts=2, samples=2, lr=0.08, temperature=1.0))
    found = []
    for _ in range(4):
        run.step()
        found += [group["lr"] for group in run.trainer.optimizer.param_groups]
    assert found == pytest.approx([0.08, 0.06, 0.04, 0.02])


def test_files_and_breakdown(demo, results):
    assert (demo / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert (demo / "adapter-13.safetensors").stat().st_size < 64 * 1024 and (demo / "adapter-4.safetensors").is_file()
    facts = results["facts"]
    assert 0 < facts["kernel_milliseconds"] < facts["step_milliseconds"]


def test_side_by_side_finds_what_one_after_the_other_does(demo, tmp_path, capfd):
    """Two threads: a process of one for each training."""
    found = run_demo(tmp_path, threads=2)
    assert "2 trainings, 2 at a time" in capfd.readouterr().out
    for file in ("adapter-13.safetensors", "adapter-4.safetensors"):
        assert torch.equal(load_file(found / file)["v"], load_file(demo / file)["v"])
    one, two = (json.loads((each / "results.json").read_text()) for each in (demo, found))
    for row in (*one["rows"], *two["rows"], one["random_control"], two["random_control"]):
        del row["seconds"]
    assert two["rows"] == one["rows"] and two["random_control"] == one["random_control"]


def test_a_draw_is_the_same_whatever_its_process_did_before(monkeypatch):
    def vectors(experiment):
        return torch.nn.utils.parameters_to_vector(trainable_vectors(experiment.model.module)).detach().clone()

    monkeypatch.setattr(Experiment, "_evaluate", vectors)
    experiment = Experiment.named("tiny", "digit-sums", Settings(1, 2, 2, 0.1, 1.0))
    draws = []
    for numbers in (None, 4, 13):  # bare, then adapted with others, then with as many
        if numbers:
            experiment._adapt(numbers, 21)
        draws.append(experiment.random_draw(13, 21, 0.5, seed=3)[0])
    assert torch.equal(draws[1], draws[0]) and torch.equal(draws[2], draws[0])
    assert draws[0].shape == (13,) and draws[0].norm() == pytest.approx(0.5)
    with pytest.raises(ValueError):
        experiment.base_row()  # of the bare model: it has no vectors


def test_a_job_that_fails_in_its_process_is_told_here():
    model, before = load_model("tiny"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_jobs(model, task("digit-sums"), Settings(1, 2, 2, 0.1, 1.0), "tiny", trainings=2) as jobs:
            assert isinstance(jobs, SideBySide)
            job = jobs.submit("random_draw", 0, 21, 1.0, 0)
            with pytest.raises(ValueError, match="trainable_dim"):
                jobs.watch([job], lambda job: job.result())
    finally:
        torch.set_num_threads(before)


def test_a_process_that_is_killed_is_one_line(monkeypatch, capsys, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def killed(jobs, *_):
        job = jobs.submit("base_row")  # which starts a process
        os.kill(next(iter(jobs._pool._processes)), signal.SIGKILL)
        job.result()

    monkeypatch.setattr(run, "rows", killed)
    try:
        assert main(["--model", "tiny", "--params", "13,4", "--out", str(tmp_path)]) == 2
    finally:
        torch.set_num_threads(before)
    (line,) = capsys.readouterr().err.splitlines()
    assert "was killed" in line and "OMP_NUM_THREADS=1" in line


def test_wrong_options_are_one_line(capsys, tmp_path):
    assert main(["--model", str(tmp_path)]) == 2
    assert main(["--model", "tiny", "--task", "sums", "--out", str(tmp_path)]) == 2
    assert main(["--model", "tiny", "--params", "0", "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["MODEL", "TASK", "PARAMS"]


@pytest.mark.parametrize(
    "numbers, modules, u, groups",
    [(840, 210, 4, 210), (210, 210, 1, 210), (13, 210, 1, 13), (13, 21, 13, 1), (1, 21, 1, 1), (14, 196, 1, 14)],
)
def test_numbers_are_spread_over_modules(numbers, modules, u, groups):
    config = adapter_config(numbers, modules)
    assert config.trainable_dim == u and -(-modules // config.n_tie) == groups and u * groups == numbers


def test_numbers_may_be_given_for_each_module():
    assert resolve_numbers("4x", 210) == 840 and resolve_numbers("13", 210) == resolve_numbers(13, 210) == 13


def test_rates_are_the_recipes_unless_asked_for():
    real = replace(REAL, numbers={"4x": 0.01, 13: 0.02}, settings=replace(REAL.settings, lr=0.005))
    assert rates(real, None, None, 210) == {840: 0.01, 13: 0.02}
    assert rates(real, ["13", "840", "7"], None, 210) == {13: 0.02, 840: 0.01, 7: 0.005}
    assert rates(real, ["13"], 0.1, 210) == {13: 0.1} and rates(real, None, 0.1, 210) == {840: 0.1, 13: 0.1}


def test_random_direction_is_a_repeatable_unit_vector():
    assert random_direction(840, 1).norm() == pytest.approx(1.0)
    assert torch.equal(random_direction(840, 1), random_direction(840, 1))
    assert not torch.equal(random_direction(840, 1), random_direction(840, 2))
