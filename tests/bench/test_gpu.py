"""The GPU benchmark's harness, tried on the CPU: the same gate, files and summary, another clock."""
from itertools import islice

import torch

from bench.grid import gpu, table
from bench.grid.shapes import Case, Shape

CASES = [Case(Shape("SmolLM2-135M", "q", 64, 48, True), 8, dtype, 13) for dtype in (torch.float32, torch.bfloat16)]


def test_every_contender_is_gated_and_timed_once(tmp_path):
    path = tmp_path / "card.csv"
    gpu.run(CASES, "cpu", "some card", path, compiled=False, seconds=0.01)
    rows = table.read(path)
    assert {row["contender"] for row in rows} >= {"frozen", "frozen again", "ours cpu", "delta", "chain", "peft"}
    assert all(float(row["error_y"]) < 1e-2 for row in rows if not row["contender"].startswith("frozen"))
    gpu.run(CASES, "cpu", "some card", path, compiled=False, seconds=0.01)
    assert table.read(path) == rows, "cases already measured for this code are not measured again"
    lines = gpu.summary(path).splitlines()
    assert len(lines) == 1 + len({(row["contender"], row["dtype"]) for row in rows})


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "found none" in capsys.readouterr().out


def test_both_grids_are_not_empty():
    assert list(islice(gpu.full_grid(), 1)) and list(gpu.quick_grid())
