"""bench/startup.py on matrices of a few hundred numbers: every stage runs, and reads what it wrote."""
import importlib.util
import pathlib
import sys

import pytest

SPEC = importlib.util.spec_from_file_location(
    "startup", pathlib.Path(__file__).resolve().parents[2] / "bench" / "startup.py"
)
startup = sys.modules["startup"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(startup)


def test_every_stage_of_a_small_model(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(startup, "SHAPES", {"q_proj": (300, 200), "o_proj": (300, 200), "k_proj": (160, 200)})
    monkeypatch.setattr(startup, "LAYERS", 2)
    rows = startup.measure_ours(layers=1)
    totals = {row["item"]: float(row["wall_s"]) for row in rows if row["shape"] == "all"}
    assert set(totals) == {"factorise, cache cold", "hash", "factorise, cache warm (hash and read)"}
    assert all(seconds > 0 for seconds in totals.values())
    assert len(list(tmp_path.iterdir())) == 3  # one entry a matrix of the layer that was measured
    reload = startup.measure_cached_reload()
    assert reload["matrices"] == 6 and reload["basis"] == "3 entries read again and again"


def test_a_full_decomposition_is_scaled_by_its_operations(monkeypatch):
    monkeypatch.setattr(startup, "SHAPES", {"q_proj": (200, 100), "o_proj": (100, 200)})
    monkeypatch.setattr(startup, "LAYERS", 3)
    # 4 m n^2 + 22 n^3; a matrix and its transpose cost the same
    assert startup.full_svd_total({(200, 100): 2.0}) == pytest.approx(12.0)
    smaller = (4 * 100 * 50**2 + 22 * 50**3) / (4 * 200 * 100**2 + 22 * 100**3)
    assert startup.full_svd_total({(100, 50): 2.0 * smaller}) == pytest.approx(12.0)
