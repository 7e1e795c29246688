"""Factors from the cache are those of the weight, whoever wrote the entry; what is solved starts from its own hash."""
from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import stat
import time
import warnings

import pytest
import torch
from torch import nn

from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora
from tinylora_kernels.common import atomic
from tinylora_kernels.factors import cache as factor_cache
from tinylora_kernels.factors import svd
from tinylora_kernels.factors.svd import canonical_signs, truncated_svd
from tinylora_kernels.method.philox import STREAM_SOLVER, philox_normal


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYLORA_CACHE_MB", raising=False)
    factor_cache._warn_once.cache_clear()

    def hangs(*_):
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(120)
    yield tmp_path / "cache"
    signal.alarm(0)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def computed(monkeypatch):
    """How often factors were computed."""
    calls = []
    compute = svd._compute
    monkeypatch.setattr(svd, "_compute", lambda *arguments: calls.append(1) or compute(*arguments))
    return calls


def with_spectrum(m, n, sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = min(len(sigma), m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n))
    return (u * sigma[:k]) @ v.T


INDEX = torch.arange(1, 401, dtype=torch.float64)
SPECTRA = {
    "flat": 2 - INDEX / 400, "slow": INDEX**-0.2, "decaying": INDEX**-0.5, "fast": 1 / INDEX,
    "spiked": torch.cat([torch.tensor([1000.0, 30.0]), INDEX[2:] ** -0.1]),
    "steep": torch.cat([torch.tensor([1.0, 3e-5]), 1e-5 * INDEX[2:] ** -0.5]),
    "tight": torch.cat([torch.tensor([2.0, 1.5, 1.5 - 1e-4]), INDEX[3:] ** -0.5]),
    "equal": torch.cat([torch.tensor([2.0, 2.0]), INDEX[2:] ** -0.5]),
}  # fmt: skip
SMALL = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (5, 3), (8, 8), (40, 7), (7, 40), (16, 14), (15, 17), (3, 400)]
SHAPES = [(40, 30), (300, 260), (400, 1100), (1500, 230)]  # in full, by the solver, wide, tall
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_was_stored_is_proven_and_read(computed, spectrum, shape, dtype):
    wide = spectrum == "steep" and dtype is torch.bfloat16  # rounding to it leaves nothing of the second
    weight = with_spectrum(*shape, SPECTRA["spiked" if wide else spectrum]).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal singular values
        cold, warm = truncated_svd(weight, 2), truncated_svd(weight, 2)
    assert len(computed) == 1
    assert torch.equal(cold.basis, warm.basis) and torch.equal(cold.sigma, warm.sigma)
    assert (cold.degenerate, cold.residual) == (warm.degenerate, warm.residual)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_small_ones_too(computed, rank, shape, cache):
    weight = with_spectrum(*shape, SPECTRA["slow"]).float()
    rank = min(rank, *shape)
    cold, warm = truncated_svd(weight, rank), truncated_svd(weight, rank)
    assert len(computed) == 1 and torch.equal(cold.basis, warm.basis)
    if rank < min(shape):  # the last is left out for the one after it
        (path,) = cache.iterdir()
        residual = torch.tensor(1e-7, dtype=torch.float64)
        last = triplets(weight, *range(rank - 1), rank)
        factor_cache.store(path.stem, last | {"degenerate": torch.tensor(False), "residual": residual})
        assert torch.equal(truncated_svd(weight, rank).basis, cold.basis) and len(computed) == 2


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_at_every_rank_and_magnitude(computed, rank):
    for number, scale in enumerate((1.0, 1e-30, 1e30)):
        weight = (with_spectrum(300, 260, SPECTRA["slow"]) * scale).float()
        truncated_svd(weight, rank)
        truncated_svd(weight.T.contiguous().T, rank)
        assert len(computed) == number + 1


def triplets(weight, *which):
    """basis and sigma of the triplets named, as if they were the leading ones."""
    u, sigma, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    chosen = list(which)
    return {"basis": canonical_signs(u.T[chosen]).to(weight.dtype), "sigma": sigma[chosen].to(weight.dtype)}


def tilted(basis, by):
    return torch.stack([basis[0] + by * basis[1], basis[1] - by * basis[0]])


FORGERIES = {
    "NaN": lambda w, b, s: {"basis": b * torch.nan},
    "one NaN": lambda w, b, s: {"basis": b.index_fill(1, torch.tensor([5]), torch.nan)},
    "infinite": lambda w, b, s: {"basis": b * torch.inf},
    "sigma NaN": lambda w, b, s: {"sigma": s * torch.nan},
    "sigma infinite": lambda w, b, s: {"sigma": s * torch.inf},
    "sigma negative": lambda w, b, s: {"sigma": -s},
    "sigma zero": lambda w, b, s: {"sigma": s * 0},
    "sigma swapped": lambda w, b, s: {"sigma": s.flip(0)},
    "sigma off by a thousandth": lambda w, b, s: {"sigma": s * 1.001},
    "zeros": lambda w, b, s: {"basis": b * 0},
    "another weight's": lambda w, b, s: triplets(w.roll(1, 0), 0, 1),
    "the transposed weight's": lambda w, b, s: triplets(w.T, 0, 1) if len(w) == len(w.T) else {"basis": b.roll(1, 1)},
    "a weight's of another size": lambda w, b, s: triplets(1.01 * w, 0, 1),
    "rows swapped": lambda w, b, s: {"basis": b.flip(0)},
    "one twice": lambda w, b, s: {"basis": b[[0, 0]], "sigma": s[[0, 0]]},
    "a sign": lambda w, b, s: {"basis": b * torch.tensor([[1.0], [-1.0]], dtype=b.dtype)},
    "tilted": lambda w, b, s: {"basis": tilted(b, 1e-3)},
    "a wrong entry": lambda w, b, s: {"basis": b.index_fill(1, torch.tensor([3]), 0.3)},
    "noise": lambda w, b, s: {"basis": b + 1e-4 * torch.randn(b.shape, dtype=b.dtype)},
    "the second and third": lambda w, b, s: triplets(w, 1, 2),
    "the first and third": lambda w, b, s: triplets(w, 0, 2),
    "the last": lambda w, b, s: triplets(w, -2, -1),
    "residual NaN": lambda w, b, s: {"residual": torch.tensor(torch.nan, dtype=torch.float64)},
    "residual large": lambda w, b, s: {"residual": torch.tensor(0.1, dtype=torch.float64)},
    "residual negative": lambda w, b, s: {"residual": torch.tensor(-1.0, dtype=torch.float64)},
    "residual a list": lambda w, b, s: {"residual": torch.zeros(2, dtype=torch.float64)},
    "another dtype": lambda w, b, s: {"basis": b.half()},
    "integers": lambda w, b, s: {"sigma": s.long()},
    "another shape": lambda w, b, s: {"basis": b.T.contiguous()},
    "a tensor more": lambda w, b, s: {"more": s.clone()},
}  # fmt: skip


@pytest.mark.parametrize("shape", [(40, 40), (300, 260), (260, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_entries_with_a_right_digest_that_are_not_of_the_weight(computed, forgery, shape, dtype, cache):
    weight = with_spectrum(*shape, SPECTRA["fast"]).to(dtype)
    expected = truncated_svd(weight, 2)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    entry = {"basis": expected.basis, "sigma": expected.sigma, "degenerate": torch.tensor(expected.degenerate),
             "residual": torch.tensor(expected.residual, dtype=torch.float64)}  # fmt: skip
    entry |= FORGERIES[forgery](weight, expected.basis, expected.sigma)
    factor_cache.store(path.stem, {name: tensor.contiguous() for name, tensor in entry.items()})
    assert path.read_bytes() != good
    found = truncated_svd(weight, 2)
    assert len(computed) == 2 and torch.equal(found.basis, expected.basis) and torch.equal(found.sigma, expected.sigma)
    assert path.read_bytes() == good


@pytest.mark.parametrize("spectrum", ["flat", "slow", "decaying", "spiked"])
@pytest.mark.parametrize("which", [(1, 2), (0, 9), (5, 6), (-2, -1)])
def test_a_leading_vector_left_out_is_missed(computed, spectrum, which, cache):
    """As far as a short search tells: in the flat spectrum the first ten are within three percent of each other."""
    weight = with_spectrum(300, 260, SPECTRA[spectrum]).float()
    if spectrum == "flat" and which[1] in (2, 6, 9):
        which = (40, 41)
    expected = truncated_svd(weight, 2)
    (path,) = cache.iterdir()
    residual = torch.tensor(1e-7, dtype=torch.float64)
    factor_cache.store(path.stem, triplets(weight, *which) | {"degenerate": torch.tensor(False), "residual": residual})
    assert torch.equal(truncated_svd(weight, 2).basis, expected.basis) and len(computed) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_copied_from_another_weight_or_key(computed, dtype, cache):
    weights = [with_spectrum(60, 50, SPECTRA["slow"], seed).to(dtype) for seed in range(3)]
    expected = [truncated_svd(weight, 2) for weight in weights]
    names = [next(p for p in cache.iterdir() if p.name.startswith(svd.weight_fingerprint(w))) for w in weights]
    shutil.copy(names[0], names[1])
    shutil.copy(names[0], str(names[0]).replace("-r2", "-r1"))
    shutil.copy(names[2], str(names[2]).replace("tol1e-05", "tol1e-06"))
    for weight, factors in zip(weights, expected, strict=True):
        assert torch.equal(truncated_svd(weight, 2).basis, factors.basis)
    assert len(computed) == 4
    assert torch.equal(truncated_svd(weights[0], 1).basis, expected[0].basis[:1])
    truncated_svd(weights[2], 2, tol=1e-6)
    assert len(computed) == 6


def bind(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def other_things(path: pathlib.Path):
    yield "a FIFO", lambda: os.mkfifo(path)
    yield "a link to a FIFO", lambda: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe"))
    yield "a link to nothing", lambda: path.symlink_to(f"{path}.nothing")
    yield "a link to itself", lambda: path.symlink_to(path)
    yield "a socket", lambda: bind(path)
    yield "terabytes", lambda: (path.touch(), os.truncate(path, 1 << 40))


@pytest.mark.parametrize("number", range(6))
def test_entries_that_are_no_files(computed, number, cache, monkeypatch):
    weight = with_spectrum(40, 30, SPECTRA["slow"])
    expected = truncated_svd(weight, 2)
    (path,) = cache.iterdir()
    monkeypatch.chdir(cache)  # names of sockets are short
    path = pathlib.Path(path.name)
    good = path.read_bytes()
    path.unlink()
    name, make = list(other_things(path))[number]
    make()
    assert torch.equal(truncated_svd(weight, 2).basis, expected.basis), name
    assert len(computed) == 2 and path.is_file() and not path.is_symlink() and path.read_bytes() == good
    truncated_svd(weight, 2)
    assert len(computed) == 2


def test_a_directory_in_the_place_of_an_entry_costs_a_warning(computed, cache):
    weight = with_spectrum(40, 30, SPECTRA["slow"])
    truncated_svd(weight, 2)
    (path,) = cache.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="^factors are not cached in .*; set TINYLORA_CACHE to a writable directory$"):
        truncated_svd(weight, 2)


def size(directory):
    return sum(path.stat().st_size for path in directory.iterdir())


def test_it_is_bounded_and_keeps_what_was_used_last(computed, cache, monkeypatch):
    weights = [with_spectrum(3000, 30, SPECTRA["slow"], seed).float() for seed in range(12)]  # 24 kB each
    monkeypatch.setenv("TINYLORA_CACHE_MB", "0.1")
    for number, weight in enumerate(weights):
        truncated_svd(weight, 2)
        assert size(cache) <= 0.1 * 2**20
        for path in cache.iterdir():  # as if each had been stored a minute after the last
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns - 60 * 10**9, status.st_mtime_ns - 60 * 10**9))
        if number:
            before = len(computed)
            truncated_svd(weights[0], 2)  # in use all the time
            assert len(computed) == before
    assert len(list(cache.iterdir())) == 4
    before = len(computed)
    for weight in (weights[0], *weights[-3:]):
        truncated_svd(weight, 2)
    assert len(computed) == before
    truncated_svd(weights[1], 2)
    assert len(computed) == before + 1


def test_no_room_and_no_number(computed, cache, monkeypatch):
    weight = with_spectrum(40, 30, SPECTRA["slow"])
    monkeypatch.setenv("TINYLORA_CACHE_MB", "0")
    truncated_svd(weight, 2)
    assert not cache.exists()
    for bad in ("a lot", "nan", "-1", "inf", "1G"):
        monkeypatch.setenv("TINYLORA_CACHE_MB", bad)
        with pytest.raises(ValueError, match="^TINYLORA_CACHE_MB: expected a finite number of at least 0, found"):
            truncated_svd(weight, 2)
    monkeypatch.delenv("TINYLORA_CACHE_MB")
    truncated_svd(weight, 2)
    assert factor_cache.size_limit() == 2**30 and len(list(cache.iterdir())) == 1


def test_what_killed_writers_left_is_removed_and_what_is_in_work_is_not(cache):
    cache.mkdir()
    for name in (".tinylora-0123456789abcdef", ".tinylora-0123456789abcdee"):
        (cache / name).write_bytes(b"half of an entry")
    keep = [cache / "notes.txt", cache / ".tinylora-old", cache / ".tinylora-0123456789abcdef-old"]
    for path in keep:
        path.write_text("mine")
    with atomic._beside(str(cache)) as (in_work, _):
        truncated_svd(with_spectrum(40, 30, SPECTRA["slow"]), 2)
        assert {*keep, pathlib.Path(in_work)} == {p for p in cache.iterdir() if p.suffix != ".factors"}
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_users_of_a_group_share_it(tmp_path, monkeypatch, umask):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2770)
    before = os.umask(umask)
    try:
        for below in ("", "new", "a/b"):
            monkeypatch.setenv("TINYLORA_CACHE", str(shared / below))
            truncated_svd(with_spectrum(40, 30, SPECTRA["slow"]), 2)
            directory = shared / below
            assert stat.S_IMODE(directory.stat().st_mode) & 0o2070 == 0o2070
            (entry,) = directory.glob("*.factors")
            assert stat.S_IMODE(entry.stat().st_mode) == directory.stat().st_mode & 0o666
    finally:
        os.umask(before)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_cache_of_ones_own_is_as_the_umask_says(cache, umask, mode):
    before = os.umask(umask)
    try:
        truncated_svd(with_spectrum(40, 30, SPECTRA["slow"]), 2)
    finally:
        os.umask(before)
    (entry,) = cache.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == mode


def test_an_entry_that_may_not_be_read_is_said(computed, monkeypatch):
    weight = with_spectrum(40, 30, SPECTRA["slow"])
    truncated_svd(weight, 2)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(factor_cache, "open_regular", forbidden)
    with pytest.warns(UserWarning, match=r"^cached factors in .* cannot be read \(Permission denied\): chmod g\+r"):
        truncated_svd(weight, 2)
    truncated_svd(weight, 2)  # once
    assert len(computed) == 3


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TINYLORA_CACHE", "~/of factors")
    truncated_svd(with_spectrum(40, 30, SPECTRA["slow"]), 2)
    assert len(list((tmp_path / "of factors").iterdir())) == 1


def against_a_start(m, n, seed, sigma):
    """A float64 weight whose largest right singular vector stands at right angles to the random start of a seed."""
    generator = torch.Generator().manual_seed(1)
    k = min(m, n, len(sigma)) - 40
    start = torch.linalg.qr(philox_normal(seed, 0, 8, n, STREAM_SOLVER).T).Q  # [n, 8]
    v = torch.randn(n, k, generator=generator, dtype=torch.float64)
    for _ in range(2):
        v[:, 0] -= start @ (start.T @ v[:, 0])
    v = torch.linalg.qr(v).Q  # the first column keeps its direction
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    u[::8, 0] = 0  # nor does a sample of the rows know of it
    u[:, 0] /= u[:, 0].norm()
    u = torch.linalg.qr(u).Q
    return (u * sigma[:k]) @ v.T


@pytest.mark.parametrize("spectrum", ["fast", "decaying", "slow"])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize("shape", [(320, 300), (512, 700)])
def test_a_weight_built_against_a_start_has_its_largest_singular_value(shape, seed, spectrum):
    weight = against_a_start(*shape, seed, SPECTRA[spectrum])
    found = truncated_svd(weight, 2, cache=False)
    u, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(found.sigma, sigma[:2], rtol=1e-9)
    assert (found.basis - canonical_signs(u.T[:2])).norm(dim=1).max() < 2e-6


def test_the_start_is_of_the_values_not_of_their_form():
    weight = with_spectrum(300, 260, SPECTRA["slow"]).bfloat16()
    forms = [weight, weight.float(), weight.T.contiguous().T, nn.Parameter(weight)]
    assert len({svd._seed(form, None) for form in forms}) == 1
    assert len({svd._seed(weight + i, None) for i in range(4)}) == 4


def test_a_model_with_a_poisoned_cache_is_adapted_right(cache):
    def adapted():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))
        return apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=2), progress=False)

    expected = adapted()
    for path in cache.iterdir():
        tensors = {"basis": torch.full((2, 16 if "x" else 24), torch.nan), "sigma": torch.ones(2),
                   "degenerate": torch.tensor(False), "residual": torch.tensor(0.0, dtype=torch.float64)}  # fmt: skip
        factor_cache.store(path.stem, tensors)
    time.sleep(0.01)
    found = adapted()
    for ours, theirs in zip(expected.buffers(), found.buffers(), strict=True):
        assert torch.equal(ours, theirs)
