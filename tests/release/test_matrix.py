"""The matrix's bookkeeping; what it measures takes an hour and is asked for by `make matrix`."""
import pytest


def test_every_pair_once_and_each_python_and_torch_early(script):
    pairs = script("matrix").diagonals(["3.10", "3.11", "3.12"], ["2.10", "newest"])
    assert len(pairs) == len(set(pairs)) == 6
    assert {python for python, _ in pairs[:3]} == {"3.10", "3.11", "3.12"} and {torch for _, torch in pairs[:3]} == {
        "2.10", "newest",
    }  # fmt: skip


def test_the_table_has_a_line_for_each_environment_and_the_reasons(script):
    matrix = script("matrix")
    tried = {"python": "3.12.1", "torch": "2.13.0+cpu", "installer": "pip", "date": "2026-01-01"}
    tried["cuda_libraries"] = "none needed"
    rows = [
        tried | {"file": "+cpu", "result": "ok"},
        tried | {"file": "+gpu", "result": "failed: ImportError: no such symbol"},
        matrix.no_environment("3.13", "2.10.0", "uv", "this Python is not installed here"),
    ]
    lines = matrix.table(rows).splitlines()
    assert lines[0].split() == ["python", "torch", "installer", "CUDA", "libraries", "+cpu", "+gpu"]
    assert lines[1].split() == ["3.12.1", "2.13.0+cpu", "pip", "none", "needed", "ok", "failed"]
    assert lines[2].split() == ["3.13", "2.10.0", "uv", "not", "tried", "not", "tried"]
    assert lines[3] == "3.12.1, torch 2.13.0+cpu, pip, +gpu: failed: ImportError: no such symbol"
    assert lines[4] == "3.13, torch 2.10.0, uv, all: not tried: this Python is not installed here"


def test_a_failing_command_is_a_reason_in_one_line(script):
    matrix = script("matrix")
    code = "import sys; sys.stderr.write('Traceback\\n  x\\nValueError: what was wrong\\nnote: later\\n'); sys.exit(1)"
    with pytest.raises(matrix.Unavailable, match=r"^ValueError: what was wrong$"):
        matrix.run([matrix.sys.executable, "-c", code])


def test_a_later_run_takes_up_the_pairs_left_out(script):
    matrix = script("matrix")
    rows = [
        matrix.no_environment("3.10", "newest", "pip", "no time"),
        {"python": "3.11.7", "torch": "2.13.0+cpu", "installer": "pip", "file": "+cpu", "result": "ok"},
        {"python": "3.12.1", "torch": "2.11.0", "installer": "pip", "file": "+cpu", "result": "failed: import"},
    ]
    assert matrix.untried(rows) == [("3.10", "newest", "pip")]


def test_what_was_tried_again_replaces_what_was_kept(script):
    matrix = script("matrix")
    common = {"installer": "pip", "file": "+cpu"}
    kept = [
        matrix.no_environment("3.10", "newest", "pip", "no time"),
        common | {"python": "3.10.13", "torch": "2.10.0+cu128", "result": "ok"},
        common | {"python": "3.10.13", "torch": "2.10.0+cu128", "result": "ok", "installer": "uv"},
        common | {"python": "3.12.1", "torch": "2.10.0+cu128", "result": "ok"},
    ]
    rows = [
        common | {"python": "3.10.13", "torch": "2.15.0+cu130", "result": "ok"},
        common | {"python": "3.10.13", "torch": "2.10.0+cu128", "result": "failed: import"},
    ]
    merged = matrix.merge(rows, kept, [("3.10", "newest", "pip"), ("3.10", "2.10.0", "pip")])
    assert merged == rows + kept[2:]
