"""bench/dispatch.py: every way is timed, and each layer keeps the way it was planned on."""
import importlib.util
import pathlib
import sys

import pytest
import torch

from tinylora_kernels.linear import node, plan

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("dispatch_bench", ROOT / "bench" / "dispatch.py")
dispatch = sys.modules["dispatch_bench"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dispatch)


def test_every_way_is_timed_on_layers_that_keep_to_it(monkeypatch):
    if node.twin is None:
        pytest.skip(node.why_no_twin)
    monkeypatch.setattr(dispatch, "LAYERS", 2)
    rows, kept, build = [], [], dispatch.sweep

    def sweep(layers, x, g, way):
        rows.append(layers)
        kept.append([getattr(layer, "_plan", None) for layer in layers])
        return build(layers, x, g, way)

    monkeypatch.setattr(dispatch, "sweep", sweep)
    measured = dispatch.measure(torch.float32, seconds=0.05)
    assert {row["way"] for row in measured} == {"frozen", "frozen again", *dispatch.WAYS}
    for layers, plans in zip(rows[2:], kept[2:], strict=True):
        assert [layer._plan for layer in layers] == plans
    none, in_python, half, whole = (plans[0] for plans in kept[2:])
    assert none is None and type(in_python) is type(half) is plan.Plan and type(whole) is plan.twin
