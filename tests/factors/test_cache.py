import os
import pathlib
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from tinylora_kernels.factors import cache as factor_cache
from tinylora_kernels.factors import svd as factors
from tinylora_kernels.factors.svd import truncated_svd, weight_fingerprint

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the fingerprint


def test_fingerprint_is_of_the_values_not_the_dtype():
    weight = gaussian(700, 2000).bfloat16()  # several chunks
    prints = {weight_fingerprint(weight.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    assert len(prints) == 1
    half = gaussian(70, 200).half()
    assert weight_fingerprint(half) == weight_fingerprint(half.float()) == weight_fingerprint(half.double())
    single = gaussian(70, 200)
    assert weight_fingerprint(single) == weight_fingerprint(single.double())
    assert weight_fingerprint(single) != weight_fingerprint(single.double() * (1 + 1e-15))


def test_fingerprint_sees_one_bit_and_the_shape():
    weight = gaussian(700, 2000).bfloat16()
    expected = weight_fingerprint(weight)
    assert re.fullmatch("[0-9a-f]{32}", expected)
    for row, column in ((0, 0), (699, 1999), (524, 288)):
        changed = weight.clone()
        changed.view(torch.int16)[row, column] ^= 1
        assert weight_fingerprint(changed) != expected
    assert weight_fingerprint(weight.view(2000, 700)) != expected
    assert weight_fingerprint(weight[:350]) != expected
    assert weight_fingerprint(torch.zeros(2, 2)) != weight_fingerprint(-torch.zeros(2, 2))


def test_fingerprint_known_answers():
    """Published values: a change would orphan every adapter file."""
    ramp = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert weight_fingerprint(ramp) == "06f56c3d4dc11b1cb22d99156a01c406"
    assert weight_fingerprint(ramp / 7) == "e62f36edbb7c863ccaadbff9977cc575"


def test_fingerprint_does_not_depend_on_threads():
    weight = gaussian(3000, 1000)
    threads = torch.get_num_threads()
    try:
        prints = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            prints.add(weight_fingerprint(weight))
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 1


# ---------------------------------------------------------------- the cache


@pytest.fixture
def counted(monkeypatch):
    """How often factors were computed."""
    calls = []
    compute = factors._compute
    monkeypatch.setattr(factors, "_compute", lambda *arguments: calls.append(1) or compute(*arguments))
    return calls


def same(a, b):
    return (torch.equal(a.basis, b.basis) and torch.equal(a.sigma, b.sigma) and a.degenerate == b.degenerate
            and a.residual == b.residual)


def test_second_call_reads_the_first(cache, counted):
    weight = gaussian(250, 300).bfloat16()
    cold = truncated_svd(weight, 2)
    (entry,) = cache.iterdir()
    assert entry.name.startswith(weight_fingerprint(weight)) and entry.suffix == ".factors"
    warm, copy = truncated_svd(weight, 2), truncated_svd(weight.float(), 2)
    assert len(counted) == 1
    assert same(cold, warm) and same(cold, copy)


def test_what_makes_another_entry(counted):
    weight = gaussian(40, 30)
    truncated_svd(weight, 2)
    for other in (lambda: truncated_svd(weight, 3), lambda: truncated_svd(weight, 2, tol=1e-6),
                  lambda: truncated_svd(weight.double(), 2), lambda: truncated_svd(weight * 2, 2)):
        before = len(counted)
        first, second = other(), other()
        assert len(counted) == before + 1
        assert same(first, second)
    assert truncated_svd(weight.double(), 2).basis.dtype == torch.float64


def test_without_cache_nothing_is_written_or_hashed(cache, monkeypatch):
    monkeypatch.setattr(factors, "weight_fingerprint", lambda weight: pytest.fail("the weight was hashed"))
    truncated_svd(gaussian(40, 30), 2, cache=False)
    assert not cache.exists()


def damage_truncate(entry):
    return entry[:-7]


def damage_bit(entry):
    return entry[:-9] + bytes([entry[-9] ^ 16]) + entry[-8:]


def damage_header(entry):
    return entry[:32] + b"\xff" * 8 + entry[40:]


def damage_empty(entry):
    return b""


@pytest.mark.parametrize("damage", [damage_truncate, damage_bit, damage_header, damage_empty])
def test_damaged_entry_is_computed_again(cache, counted, damage):
    weight = gaussian(40, 30)
    expected = truncated_svd(weight, 2)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert same(truncated_svd(weight, 2), expected)
    assert len(counted) == 2
    assert path.read_bytes() == good


def test_well_formed_entry_of_something_else_is_computed_again(cache, counted):
    weight = gaussian(40, 30)
    expected = truncated_svd(weight, 2)
    (path,) = cache.iterdir()
    for tensors in ({"basis": torch.zeros(2, 40)},
                    {**{name: torch.zeros(2) for name in ("sigma", "degenerate", "residual")},
                     "basis": torch.zeros(2, 39)}):
        factor_cache.store(path.stem, tensors)
        assert same(truncated_svd(weight, 2), expected)
    assert len(counted) == 3


def test_unwritable_directory_costs_one_warning(tmp_path, monkeypatch, counted):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("TINYLORA_CACHE", str(blocked / "cache"))
    factor_cache._warn_once.cache_clear()
    weight = gaussian(40, 30)
    with pytest.warns(UserWarning, match="factors are not cached in .*set TINYLORA_CACHE"):
        truncated_svd(weight, 2)
    truncated_svd(weight, 2)  # warnings are errors here: the second is silent
    assert len(counted) == 2


def test_failed_write_leaves_no_file(cache, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    factor_cache._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="disk full"):
        truncated_svd(gaussian(40, 30), 2)
    assert list(cache.iterdir()) == []


def test_directory_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("TINYLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert factor_cache.cache_directory() == tmp_path / ".cache" / "tinylora_kernels"


def test_no_home_no_cache(monkeypatch):
    def no_home():
        raise RuntimeError("no home")

    monkeypatch.delenv("TINYLORA_CACHE")
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert truncated_svd(gaussian(40, 30), 2).residual < 1e-5


def test_warning_comes_from_the_cache_too():
    for _ in range(2):
        with pytest.warns(UserWarning, match="block.0: leading singular values coincide"):
            assert truncated_svd(torch.eye(30), 2, name="block.0").degenerate


CONCURRENT_SCRIPT = textwrap.dedent("""
    import torch
    from tinylora_kernels.factors.svd import truncated_svd
    for round in range(5):
        for seed in range(8):
            w = torch.randn(60, 50, generator=torch.Generator().manual_seed(seed))
            cached, fresh = truncated_svd(w, 2), truncated_svd(w, 2, cache=False)
            assert torch.equal(cached.basis, fresh.basis) and torch.equal(cached.sigma, fresh.sigma)
    print("done")
""")


def test_processes_share_the_cache(cache):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", CONCURRENT_SCRIPT], env=environment, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        out, error = process.communicate()
        assert out.strip() == "done", error
    names = [path.name for path in cache.iterdir()]
    assert len(names) == 8 and all(name.endswith(".factors") for name in names)
