import ctypes
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tinylora_kernels.method import philox as projection
from tinylora_kernels.method.philox import (
    normal_from_words,
    philox4x32,
    philox_normal,
    philox_projection,
    philox_uniform,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Random123 1.14, tests/kat_vectors, the lines "philox4x32 10": counter, key, output
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# (seed, index, u, r) -> P in reading order; changing these changes the meaning of every saved adapter
PROJECTIONS = {
    (0, 0, 1, 2): "-0x1.72760ap-3 0x1.aa5564p-1 0x1.c84d3cp-2 0x1.8378b6p-3",
    (0x0123456789ABCDEF, 195, 1, 2): "0x1.a2f32ap+0 -0x1.538854p-3 0x1.35617p+0 0x1.1f8ba6p-1",
    (2**64 - 1, 2**32 - 1, 3, 1): "-0x1.0e2368p+0 0x1.43ccaep+0 0x1.d3c83p-2",
    (42, 7, 1, 3): (
        "-0x1.1949cp-3 0x1.73e298p-1 -0x1.c66afp-4 -0x1.fbcbe2p-3 0x1.77596cp-1 "
        "-0x1.78081cp-3 0x1.6f6e8ep-4 -0x1.155a8ap-1 -0x1.39c52ep-1"
    ),
}
CASES = [(0, 0, 1, 2), (1, 0, 13, 2), (0, 1, 13, 2), (2**32, 5, 4, 1), (2**63 + 12345, 209, 257, 4),
         (987654321987654321, 2**31 + 1, 3, 8), (2**64 - 1, 2**32 - 1, 2, 3), (77, 3, 1, 16)]


def words(text):
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


def bits(values):
    return values.numpy().view(np.uint32)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    k0, k1 = (int(word, 16) for word in key.split())
    assert philox4x32(words(counter), (k0, k1)).tolist() == words(expected).tolist()


@pytest.mark.parametrize("case", PROJECTIONS)
def test_projection_known_answers(case):
    expected = [float.fromhex(text) for text in PROJECTIONS[case].split()]
    actual = philox_projection(*case)
    assert actual.dtype == torch.float32 and actual.shape == (case[2], case[3], case[3])
    assert actual.flatten().tolist() == expected


def test_docstring_vectors_are_the_tested_ones():
    published = re.findall(r"^    seed (\S+), index (\d+), u (\d+), r (\d+) +(\S.*)$", projection.__doc__, re.MULTILINE)
    assert len(published) == 2
    for seed, index, u, r, values in published:
        assert PROJECTIONS[int(seed, 0), int(index), int(u), int(r)] == values


def test_inverse_normal_against_scipy():
    ndtri = pytest.importorskip("scipy.special").ndtri
    spread = np.arange(0, 2**32, 8191, dtype=np.uint64)
    edges = [np.arange(50_000, dtype=np.uint64) + start for start in (0, 2**31 - 25_000, 2**32 - 50_000)]
    # both sides of the switch between the branches, |p - 1/2| = 0.425
    switch = [np.arange(1000, dtype=np.uint64) + int(p * 2**32) - 500 for p in (0.075, 0.925)]
    word = np.concatenate([spread, *edges, *switch]).astype(np.uint32)
    expected = ndtri((word.astype(np.float64) + 0.5) / 2**32)
    assert np.max(np.abs(normal_from_words(word) - expected) / np.abs(expected)) < 5e-15


def test_logarithm_against_libm():
    p = np.concatenate([np.linspace(2.0**-33, 0.99, 100_001), 2.0 ** -np.arange(1, 34)])
    assert np.max(np.abs(projection._log(p) / np.log(p) - 1)) < 1e-15


def test_normal_is_odd_and_increasing():
    word = np.arange(0, 2**32, 65_521, dtype=np.uint64).astype(np.uint32)
    z = normal_from_words(word)
    assert np.array_equal(z, -normal_from_words(~word))
    assert np.all(np.diff(z) > 0)
    assert normal_from_words(np.array([2**32 - 1], dtype=np.uint32))[0] == pytest.approx(6.3379578, abs=1e-7)


def test_distribution_is_standard_normal():
    stats = pytest.importorskip("scipy.stats")
    z = philox_normal(3, 11, 64, 4096, projection.STREAM_PROJECTION).numpy()  # [64, 4096]
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    count = z.size
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / count)
    # neighbours in every counter direction are uncorrelated
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / math.sqrt(count)
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(count)
    modules = np.stack([philox_projection(3, index, 16, 4).numpy().ravel() for index in range(200)])
    assert abs((modules[1:] * modules[:-1]).mean() * 4) < 4 / math.sqrt(modules.size)


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_variance_is_one_over_r(r):
    entries = philox_projection(5, 0, 40_000 // (r * r), r).double()
    assert entries.var().item() * r == pytest.approx(1.0, abs=4 * math.sqrt(2 / entries.numel()))


def test_each_argument_matters_and_u_only_appends():
    base = philox_projection(1, 2, 3, 2)
    assert torch.equal(base, philox_projection(1, 2, 3, 2))
    assert torch.equal(base, philox_projection(1, 2, 100, 2)[:3])
    for other in [(2, 2), (1, 3), (1 + 2**32, 2)]:
        assert not torch.any(base == philox_projection(*other, 3, 2))
    assert len(set(base.flatten().tolist())) == base.numel()


def test_global_generators_do_not_matter():
    torch.manual_seed(1)
    np.random.seed(1)
    first = philox_projection(9, 9, 5, 2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, philox_projection(9, 9, 5, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_uniform_fills_its_interval():
    v = philox_uniform(0, 4, 100_000, 0.01).double()
    assert v.abs().max() < 0.01 and v.abs().max() > 0.00999
    assert abs(v.mean().item()) < 4 * 0.01 / math.sqrt(3 * v.numel())
    assert v.var().item() == pytest.approx(1e-4 / 3, rel=0.02)
    assert torch.equal(philox_uniform(0, 4, 13, 0.01), v[:13].float())


@pytest.mark.parametrize("seed, index, u, r, message", [
    (-1, 0, 1, 2, "seed .* got -1"),
    (2**64, 0, 1, 2, f"seed .* got {2**64}"),
    (0, 2**32, 1, 2, f"module index .* got {2**32}"),
    (0, 0, 0, 2, "trainable_dim u .* got 0"),
    (0, 0, 1, 0, "rank r .* got 0"),
])
def test_arguments_out_of_range_are_named(seed, index, u, r, message):
    with pytest.raises(ValueError, match=message):
        philox_projection(seed, index, u, r)


# Flags that would change the bits of careless code: vectorised, fused multiply-add, no optimisation at all.
FLAGS = {"O0": ["-O0"], "O2": ["-O2"], "fused": ["-O3", "-march=native", "-ffp-contract=fast"]}


@pytest.fixture(scope="module", params=FLAGS)
def harness(request, tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH to build tests/method/philox_harness.cpp with")
    library = tmp_path_factory.mktemp("philox") / f"harness_{request.param}.so"
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *FLAGS[request.param],
                    str(ROOT / "tests/method/philox_harness.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def test_cpp_philox_known_answers(harness):
    for counter, key, expected in KNOWN_ANSWERS:
        out = np.zeros(4, dtype=np.uint32)
        harness.philox_block(pointer(words(counter)), pointer(words(key)), pointer(out))
        assert out.tolist() == words(expected).tolist()


def test_cpp_normals_have_the_same_bits(harness):
    edges = [np.arange(20_000, dtype=np.uint64) + start for start in (0, 2**31 - 10_000, 2**32 - 20_000)]
    word = np.concatenate([np.arange(0, 2**32, 30_011, dtype=np.uint64), *edges]).astype(np.uint32)
    out = np.full(word.size, np.nan)
    harness.normals(pointer(word), ctypes.c_int64(word.size), pointer(out))
    assert np.array_equal(out.view(np.uint64), normal_from_words(word).view(np.uint64))


@pytest.mark.parametrize("seed, index, u, r", CASES)
def test_cpp_projection_has_the_same_bits(harness, seed, index, u, r):
    out = np.full((u, r, r), np.nan, dtype=np.float32)
    harness.projection(ctypes.c_uint64(seed), ctypes.c_uint32(index), ctypes.c_uint32(u), ctypes.c_uint32(r),
                       pointer(out))
    assert np.array_equal(out.view(np.uint32), bits(philox_projection(seed, index, u, r)))


def test_same_bits_in_a_process_with_other_threads():
    script = ("from tinylora_kernels.method.philox import philox_projection as p; import sys;"
              "sys.stdout.buffer.write(p(2**40 + 3, 17, 64, 4).numpy().tobytes())")
    for threads in ("1", "2"):
        out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT,
                             env={"OMP_NUM_THREADS": threads, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}).stdout
        assert np.array_equal(np.frombuffer(out, np.uint32), bits(philox_projection(2**40 + 3, 17, 64, 4)).ravel())
